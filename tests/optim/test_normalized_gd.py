"""Normalised gradient descent: its limit, its bounds and what large steps do."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.optim.normalized_gd import (
    LOGISTIC,
    PERCEPTRON,
    margin,
    normalize_by_loss,
    normalize_by_residuals,
    normalized_gd,
    online_perceptron,
    separate,
)
from narrows.scripts.reproductions.normalized_gd import (
    descend,
    hard_set,
    limit_gap,
    random_set,
)


@functools.cache
def many_sets():
    """1000 random separable sets of 30 points with their R^2 / mu^2."""
    rng = np.random.default_rng(0)
    z = np.stack([random_set(rng, 30, 4) for _ in range(1000)])
    radius = np.linalg.norm(z, axis=2).max(axis=1)
    return z, (radius / np.array([margin(points) for points in z])) ** 2


@pytest.mark.parametrize(("arm", "factor"), [("method", 1), ("LR+GD", 30)])
def test_perceptrons_stop_within_their_bound(arm, factor):
    """R^2 / mu^2 for the normalised one, n times that for the batch one."""
    z, bound = many_sets()
    cap = np.ceil(factor * bound).astype(int) + 1  # one more would break the bound
    done = descend(z, 1.0, cap, arm, perceptron=True)
    assert done.separated.all()
    assert (done.iterations <= factor * bound).all()
    assert (np.einsum("snd,sd->sn", z, done.w) > 0).all()


@pytest.mark.parametrize("order", ["cyclic", "random"])
def test_online_perceptron_meets_novikoffs_bound(order):
    z, bound = (found[:200] for found in many_sets())
    key = None if order == "cyclic" else jax.random.key(0)
    with jax.enable_x64(True):
        done = jax.vmap(lambda z: online_perceptron(z, max_visits=100_000, key=key))(z)
    assert bool(done.separated.all())
    assert (np.asarray(done.mistakes) <= bound).all()


def test_online_perceptron_is_the_textbook_loop():
    z = random_set(np.random.default_rng(1), 12, 3)
    w, history, mistakes = np.zeros(3), [], 0
    while not (z @ w > 0).all():
        point = z[len(history) % 12]
        if point @ w <= 0:
            w, mistakes = w + point, mistakes + 1
        history.append(w)
    with jax.enable_x64(True):
        done = online_perceptron(jnp.asarray(z), max_visits=10_000)
    assert (int(done.mistakes), int(done.visits)) == (mistakes, len(history))
    chex.assert_trees_all_close(np.asarray(done.w), w)
    chex.assert_trees_all_close(np.asarray(done.average), np.mean(history, axis=0))


def test_a_large_step_follows_the_batch_perceptron():
    z = many_sets()[0][:100]
    gap, compared = limit_gap(z / np.linalg.norm(z, axis=2).max(axis=1)[:, None, None])
    assert gap <= 1e-6
    assert compared > 300


def test_directions_agree_better_as_the_step_grows():
    """After 5 updates: the angle to the batch perceptron shrinks to rounding."""
    rng = np.random.default_rng(2)
    z = np.stack([hard_set(20, mu, np.eye(2)) for mu in rng.uniform(0.05, 0.2, 50)])
    u = descend(z, 1.0, 5, "LR+GD", perceptron=True).w
    angles = []
    for gamma in (1e-1, 1e0, 1e1, 1e8):
        theta = descend(z, gamma, 5, "LR+GD").w
        cosine = (theta * u).sum(1) / np.linalg.norm(theta, axis=1)
        angles.append(float(np.mean(1 - cosine / np.linalg.norm(u, axis=1))))
    assert angles == sorted(angles, reverse=True)
    assert angles[2] > 1e-9
    assert abs(angles[-1]) < 1e-12


@pytest.mark.parametrize(("n", "batch", "normal"), [(10, 5, 20), (100, 50, 2)])
def test_hard_set_costs_n_over_two_without_normalising(n, batch, normal):
    z = [hard_set(n, 0.1, np.eye(2))]
    assert descend(z, 1e4, 10_000, "LR+GD").iterations[0] == batch
    assert descend(z, 1e4, 10_000, "method").iterations[0] == normal


def test_high_loss_can_be_close_to_the_solution():
    """Step 100 stops after 5 updates at a higher loss than step 1 after 1008."""
    z = [hard_set(10, 0.1, np.eye(2))]
    large, small = (descend(z, gamma, 10_000, "LR+GD") for gamma in (1e2, 1e0))
    assert large.separated.all()
    assert small.separated.all()
    assert large.iterations[0] < small.iterations[0] / 100
    assert large.loss[0] > 2 * small.loss[0]


def test_perceptron_is_the_logistic_loss_of_a_large_step():
    """softplus(g x) / g -> relu(x) and sigmoid(g x) -> step(x), with step(0) = 1/2."""
    x = jnp.array([-1.0, -0.1, 0.0, 0.1, 2.0])
    chex.assert_trees_all_close(
        LOGISTIC.loss(1e4 * x) / 1e4, PERCEPTRON.loss(x), atol=1e-4
    )
    chex.assert_trees_all_close(LOGISTIC.residual(1e4 * x), PERCEPTRON.residual(x))


def test_zero_is_no_solution_and_non_separable_data_meet_the_cap():
    z = jnp.array([[1.0, 0.0]])
    assert not bool(separate(optax.sgd(1.0), z, max_steps=0).separated)
    assert int(separate(optax.sgd(1.0), z, max_steps=9).iterations) == 1
    opposite = jnp.array([[1.0, 0.5], [-1.0, -0.5], [0.0, 1.0]])
    for tx in (optax.sgd(1e4), normalized_gd(1e4)):
        done = separate(tx, opposite, max_steps=57)
        assert int(done.iterations) == 57
        assert not bool(done.separated)
        assert bool(jnp.isfinite(done.loss))


@pytest.mark.parametrize("make", [normalize_by_residuals, normalize_by_loss])
def test_underflow_gives_a_zero_update(make):
    """All samples far on the right side: 0 / 0, and a subnormal over a subnormal."""
    for tiny in (0.0, 1e-42):
        extra = {"residuals": jnp.full(3, tiny), "value": jnp.float32(tiny)}
        grads = jnp.full(2, tiny)
        updates, _ = make().update(grads, optax.EmptyState(), None, **extra)
        chex.assert_trees_all_equal(updates, jnp.zeros(2))


def test_a_step_past_separation_changes_nothing():
    """float32, gamma = 1e4: sigmoid(-z.w) underflows to 0 and w must stay finite."""
    z, w = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([1e4, 0.0])
    tx = normalized_gd(1e4)
    s = LOGISTIC.residual(-z @ w)
    assert float(s.sum()) == 0
    updates, _ = tx.update(-(s @ z) / 2, tx.init(w), w, residuals=s)
    chex.assert_trees_all_equal(optax.apply_updates(w, updates), w)


def test_it_divides_any_tree_by_the_mean_residual_and_keeps_dtypes():
    grads = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.full(3, 2.0)}
    s = jnp.array([[0.1, 0.2], [0.3, 0.2]])
    tx = normalize_by_residuals()
    updates, _ = tx.update(grads, tx.init(grads), residuals=s, unknown=1)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_close(updates, {"w": 5 * grads["w"], "b": 5 * grads["b"]})


def test_half_precision_residuals_are_averaged_in_float32():
    """The mean of 1 and 1 + 2^-7 lies between two neighbours of bfloat16."""
    s = jnp.array([1.0, 1 + 2**-7], jnp.bfloat16)
    updates, _ = normalize_by_residuals().update(jnp.ones(2), (), residuals=s)
    chex.assert_trees_all_close(updates, jnp.full(2, 1 / (1 + 2**-8)), rtol=1e-6)


def test_workers_that_average_both_give_the_update_of_one():
    """pmean of gradients and of residuals, the latter passed as a scalar."""
    z = jnp.asarray(random_set(np.random.default_rng(3), 24, 5), jnp.float32)
    w, tx = jnp.full(5, 0.1), normalized_gd(10.0)

    def update(z, mean=lambda x: x):
        s = LOGISTIC.residual(-z @ w)
        grads = -(s @ z) / len(z)
        extra = {"residuals": mean(s.mean())}
        return jnp.asarray(tx.update(mean(grads), tx.init(w), w, **extra)[0])

    mean = functools.partial(jax.lax.pmean, axis_name="workers")
    parts = jax.vmap(lambda z: update(z, mean), axis_name="workers")(z.reshape(4, 6, 5))
    chex.assert_trees_all_close(parts, jnp.tile(update(z), (4, 1)), rtol=1e-5)


def test_gradient_over_loss_is_the_gradient_of_the_log():
    z = jnp.asarray(random_set(np.random.default_rng(4), 9, 3), jnp.float32)
    w, tx = jnp.array([0.3, -0.2, 0.1]), normalize_by_loss()

    def loss(w):
        return LOGISTIC.loss(-z @ w).mean()

    value, grads = jax.value_and_grad(loss)(w)
    updates, _ = tx.update(grads, tx.init(w), value=value)
    wanted = jax.grad(lambda w: jnp.log(loss(w)))(w)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-5)


@pytest.mark.parametrize("make", [normalize_by_residuals, normalize_by_loss])
def test_a_missing_argument_is_named(make):
    tx = make()
    with pytest.raises(ValueError, match="is missing: call update"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_the_second_call_compiles_nothing():
    update = jax.jit(chex.assert_max_traces(normalized_gd(1.0).update, n=1))
    w = jnp.ones(3)
    state = normalized_gd(1.0).init(w)
    for scale in (0.5, 0.25):
        _, state = update(scale * w, state, w, residuals=jnp.full(7, scale))


def test_margin_is_exact():
    """Known margins; a set with opposite points has none."""
    for mu in (0.01, 0.1, 0.5):
        turn = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0][:2]
        for size in (3.0, 1e-12, 1e12):
            found = margin(size * hard_set(7, mu, turn))
            assert found == pytest.approx(size * mu, rel=1e-9)
    assert margin(np.array([[1.0, 0.0], [-1.0, 0.0]])) == 0.0
    assert margin(np.array([[1.0, 1.0], [-1.0, 2.0], [0.0, -1.0]])) == 0.0
