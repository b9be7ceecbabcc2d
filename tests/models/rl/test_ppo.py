"""Advantages against a slow reference, the clipped objective, and a solved problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.models.rl.ppo import (
    Environment,
    Experience,
    collect,
    gae,
    log_probability,
    terms,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
CELLS, DISCOUNT = 4, 0.8


def corridor() -> Environment:
    """Cells in a row: go right (1) from any to the last for a reward of 1, or left."""

    def step(state, action):
        new = jnp.clip(state + 2 * action - 1, 0, CELLS)
        return new, (new == CELLS).astype(jnp.float32), new == CELLS

    def reset(key):
        return jax.random.randint(key, (), 0, CELLS)

    return Environment(reset, lambda state: state, step)


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_advantages_are_sums_of_discounted_errors(decay):
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 3, 7))
    done, last = rng.random((3, 7)) < 0.25, rng.normal(size=3)
    found = gae(
        jnp.float32(reward),
        jnp.float32(value),
        jnp.asarray(done),
        jnp.float32(last),
        discount=DISCOUNT,
        decay=decay,
    )
    for row in range(3):
        for t in range(7):
            advantage, weight = 0.0, 1.0
            for s in range(t, 7):
                after = last[row] if s == 6 else value[row, s + 1]
                after = 0.0 if done[row, s] else after
                error = reward[row, s] + DISCOUNT * after - value[row, s]
                advantage += weight * error
                weight *= 0.0 if done[row, s] else DISCOUNT * decay
            assert found[row, t] == pytest.approx(advantage, rel=1e-5, abs=1e-5)


def taken(logits, action, advantage) -> Experience:
    nats = log_probability(logits, action)
    zero = jnp.zeros_like(nats)
    return Experience(None, action, nats, advantage, zero, zero, zero > 0, None)  # type: ignore


def test_the_objective_is_flat_where_the_ratio_has_left_and_wants_further():
    """Two actions; the old policy is even, the new one gives the first 0.5 r."""
    seen = taken(
        jnp.zeros((4, 2)), jnp.zeros(4, int), jnp.array([1.0, -1.0, 1.0, -1.0])
    )
    ratio = jnp.array([1.5, 1.5, 0.5, 0.5])
    logits = jnp.log(jnp.stack([ratio / 2, 1 - ratio / 2], -1))

    def policy(logits):
        return terms(logits, jnp.zeros(4), seen, clip=0.2).policy

    np.testing.assert_allclose(policy(logits), [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)
    slope = jax.jacobian(lambda x: policy(x).sum())(logits)
    assert jnp.array_equal(jnp.abs(slope).sum(-1) > 0, jnp.array([0, 1, 1, 0], bool))
    found = terms(logits, jnp.zeros(4), seen, clip=0.2)
    assert jnp.array_equal(found.clipped, jnp.ones(4))
    assert jnp.all(found.divergence > 0)


def test_before_the_first_step_it_is_the_policy_gradient():
    logits = jax.random.normal(jax.random.key(0), (50, 3))
    action = jax.random.randint(jax.random.key(1), (50,), 0, 3)
    seen = taken(logits, action, jax.random.normal(jax.random.key(2), (50,)))

    def surrogate(x):
        return terms(x, jnp.zeros(50), seen).policy.sum()

    def plain(x):
        return -jnp.sum(log_probability(x, action) * seen.advantage)

    np.testing.assert_allclose(
        jax.grad(surrogate)(logits), jax.grad(plain)(logits), rtol=1e-5, atol=1e-6
    )
    found = terms(logits, jnp.ones(50), seen)
    np.testing.assert_allclose(found.value, 0.5)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)


def test_it_solves_a_corridor_whose_values_are_known():
    """All go right, and a cell is worth the discount to its steps from the end."""
    tx, length = optax.adam(0.05), 8

    def act(tables, seen):
        return tables[0][seen], tables[1][seen]

    @jax.jit
    def learn(key):
        def one(carry, index):
            tables, state = carry
            keys = jax.random.split(jax.random.fold_in(key, index), 64)
            seen = collect(
                lambda x, _: act(tables, x),
                corridor(),
                keys,
                length,
                discount=DISCOUNT,
            )

            def epoch(carry, _):
                tables, state = carry

                def loss(tables):
                    return terms(*act(tables, seen.observation), seen).total.mean()

                updates, state = tx.update(jax.grad(loss)(tables), state, tables)
                return (optax.apply_updates(tables, updates), state), None

            carry, _ = jax.lax.scan(epoch, (tables, state), length=4)
            return carry, seen.reward.sum() / seen.done.sum()

        tables = (jnp.zeros((CELLS + 1, 2)), jnp.zeros(CELLS + 1))
        return jax.lax.scan(one, (tables, tx.init(tables)), jnp.arange(120))[0][0]

    logits, value = learn(jax.random.key(0))
    right = jax.nn.softmax(logits)[:CELLS, 1]
    assert jnp.all(right > 0.9)
    np.testing.assert_allclose(
        value[:CELLS], DISCOUNT ** np.arange(CELLS - 1, -1, -1), atol=0.1
    )


def test_experience_of_a_row_depends_on_its_key_alone():
    def act(seen, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
        return noise + seen[:, None], seen.astype(jnp.float32)

    keys = jax.random.split(jax.random.key(3), 6)
    whole, part = (collect(act, corridor(), k, 10) for k in (keys, keys[2:4]))
    for name in ("observation", "action", "nats", "reward", "done"):
        assert jnp.array_equal(getattr(whole, name)[2:4], getattr(part, name)), name
    assert whole.advantage.mean() == pytest.approx(0, abs=1e-5)
    assert whole.advantage.std() == pytest.approx(1, rel=1e-3)
    again = act(whole.observation.reshape(-1), whole.keys.reshape(-1))[0]
    np.testing.assert_allclose(
        log_probability(again, whole.action.reshape(-1)),
        whole.nats.reshape(-1),
        rtol=1e-5,
    )  # the same keys: what was drawn is drawn again
    follows = jnp.where(
        whole.done[:, :-1],
        True,
        jnp.abs(whole.observation[:, 1:] - whole.observation[:, :-1]) <= 1,
    )
    assert follows.all()  # only an end leads to a new world
