"""Optimizers that send one bit: what is exact, what travels, and that they learn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.optim.compressed_mean import Way
from narrows.optim.compressed_sgd import compressed_sgd
from narrows.optim.compression import identity
from narrows.optim.one_bit_adam import one_bit_adam
from narrows.optim.one_bit_lamb import one_bit_lamb
from narrows.optim.sparse import top_k
from narrows.optim.switch import init_switch, is_frozen, look
from narrows.optim.table import make_optimizer
from narrows.optim.zero_one_adam import zero_one_adam
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.state import restore, simulate

N, ROWS = 8, 16
WHOLE = Way("plain", identity())
MAKE: dict[str, Any] = {
    "adam": functools.partial(one_bit_adam, 3e-3),
    "lamb": functools.partial(one_bit_lamb, 1e-2),
    "zero_one": functools.partial(zero_one_adam, 3e-3),
}


def start():
    """A two-layer regression whose inputs differ in scale; row 3 is never used."""
    rng = np.random.default_rng(0)
    tree = {"in": rng.normal(size=(12, 16)) / 4, "out": rng.normal(size=(16, 3)) / 4}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def batch_loss(params, key):
    x = jax.random.normal(key, (ROWS, 12)) * jnp.logspace(0, -1.5, 12)
    x = x.at[:, 3].set(0)
    goal = jnp.sin(2 * x[:, :3]) + x[:, 4:7]
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - goal) ** 2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(tx, steps, own=False):
    """Losses and last parameters of each worker, all by simulation of N workers.

    own: every worker keeps its own parameters, else it takes the first one's update.
    """
    params = start()
    grads_of = jax.vmap(jax.value_and_grad(batch_loss), in_axes=(0, 0))

    def step(carry, i):
        params, state = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), N)
        losses, grads = grads_of(params, keys)

        def worker(x, state):
            grads, params = x
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = simulate(worker, workers=N, axis_name="data")(
            (grads, params), state
        )
        spread = jax.tree.map(lambda x: jnp.abs(x - x[:1]).max(), params)
        return (params, state), (losses.mean(), optax.tree.max(spread))

    many = jax.tree.map(lambda x: jnp.stack([x] * N), params)
    (params, state), out = jax.lax.scan(
        step, (many, tx.init(params)), jnp.arange(steps)
    )
    return *out, params, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def plain(tx, steps):
    """The same by the mean gradient and an optax optimizer."""

    def step(carry, i):
        params, state = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), N)
        losses, grads = jax.vmap(jax.value_and_grad(batch_loss), in_axes=(None, 0))(
            params, keys
        )
        grads = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), losses.mean()

    carry = start(), tx.init(start())
    (params, _), losses = jax.lax.scan(step, carry, jnp.arange(steps))
    return losses, params


TWINS = {
    "adam": optax.adam(3e-3),
    "lamb": optax.lamb(1e-2),
    "zero_one": optax.adam(3e-3),
}


@pytest.mark.parametrize("name", list(MAKE))
def test_before_the_switch_it_is_its_dense_twin(name):
    options = {"refreshes": 1000, "floor": 0.0} if name == "zero_one" else {}
    if name == "lamb":
        options = {"ratio_range": (0.0, 1e9)}
    tx = MAKE[name](workers=N, freeze_step=1000, **options)
    losses, spread, params, _ = train(tx, 30)
    wanted, twin = plain(TWINS[name], 30)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert not spread.any()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(lambda x, y: close(x[0], y), params, twin)


@pytest.mark.parametrize("name", list(MAKE))
def test_after_it_workers_agree_to_the_bit_and_unused_rows_rest(name):
    tx = MAKE[name](workers=N, freeze_step=20)
    _, spread, params, state = train(tx, 60)
    assert not spread.any()
    np.testing.assert_array_equal(params["in"][0, 3], start()["in"][3])
    state = state if name == "zero_one" else state[0]
    assert state.said.reported == {"compressed": 1.0, "frozen_at": 20.0}
    assert jnp.abs(state.mean.up.worker.per_worker_mean.e["out"]).max() > 0


def test_without_compression_it_is_adam_with_a_frozen_moment():
    tx = MAKE["adam"](workers=N, freeze_step=20, up=WHOLE, down=WHOLE, floor=0.0)
    _, _, params, _ = train(tx, 40)
    b1, b2 = 0.9, 0.999
    twin = start()
    mu, nu = (jax.tree.map(jnp.zeros_like, twin) for _ in range(2))
    for i in range(40):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), N)
        grads = jax.vmap(jax.grad(batch_loss), in_axes=(None, 0))(twin, keys)
        grads = jax.tree.map(lambda g: g.mean(0), grads)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
        if i < 20:
            nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, nu, grads)
        m_bias, v_bias = 1 - b1 ** (i + 1), 1 - b2 ** min(i + 1, 20)
        twin = jax.tree.map(
            lambda x, m, v, a=m_bias, b=v_bias: (
                x - 3e-3 * (m / a) / (jnp.sqrt(v / b) + 1e-8)
            ),
            twin,
            mu,
            nu,
        )
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5)
    jax.tree.map(lambda x, y: close(x[0], y), params, twin)


def test_one_worker_is_error_feedback_of_the_momentum():
    """n = 1: two signs in a row, whose residuals and output add up to the momentum."""
    tx = one_bit_adam(1.0, workers=1, freeze_step=1, b1=0.5, eps=1.0)
    params = jnp.zeros((2, 4))
    go = simulate(lambda g, s: tx.update(g, s, params), workers=1, axis_name="data")
    state: Any = tx.init(params)
    sent = came = jnp.zeros((2, 4))
    for i in range(4):
        g = jax.random.normal(jax.random.key(i), (1, 2, 4))
        old = state[0].adam.mu
        _, state = go(g, state)
        if i:
            sent, came = sent + state[0].adam.mu, came + (old + g[0]) / 2
    kept = state[0].mean.up.worker[0].e[0] + state[0].mean.down.e[0].reshape(2, 4)
    np.testing.assert_allclose(sent + kept, came, atol=1e-6)


def test_they_learn_as_their_twins_do_and_feedback_is_why():
    tail, steps = slice(-50, None), 300
    dense = plain(optax.adam(3e-3), steps)[0]
    begin, wanted = dense[:10].mean(), dense[tail].mean()
    lossy = Way("plain", top_k(0.05))
    runs = {
        name: MAKE[name](workers=N, freeze_step=80) for name in ("adam", "zero_one")
    }
    runs["none"] = one_bit_adam(3e-3, workers=N, freeze_step=80, up=lossy, down=lossy)
    lost = {
        name: float((train(tx, steps)[0][tail].mean() - wanted) / (begin - wanted))
        for name, tx in runs.items()
    }
    assert max(lost["adam"], lost["zero_one"]) < 0.1, lost
    assert lost["none"] > max(lost["adam"], 0) + 0.02, lost
    twin = plain(optax.lamb(1e-2), steps)[0]
    lamb = train(one_bit_lamb(1e-2, workers=N, freeze_step=80), steps)[0]
    assert lamb[tail].mean() < twin[tail].mean() + 0.1 * (begin - twin[tail].mean())


def test_local_steps_meet_again():
    """0/1 Adam with rounds of up to 4 steps: apart within them, together after."""
    tx = zero_one_adam(3e-3, workers=N, freeze_step=20, rounds=2, longest=4)
    losses, spread, _, state = train(tx, 20 + 2 + 2 * 2 + 3 * 4, own=True)
    met = np.asarray(spread) < 1e-6
    wanted = [True] * 22 + [False, True] * 2 + [False, False, False, True] * 3
    assert met.tolist() == wanted
    assert state.round.gap == 4
    assert losses[-4:].mean() < losses[:4].mean()


def test_clipping_has_the_factor_of_the_mean_gradient():
    """Alike gradients on all workers: local norms are global ones, in both stages."""
    grads = {"w": jnp.full((N, 4, 4), 2.0)}  # norm 8
    params = {"w": jnp.zeros((4, 4))}
    for freeze, up in ((100, WHOLE), (1, WHOLE)):
        tx = one_bit_adam(1.0, workers=N, freeze_step=freeze, clip=1.0, up=up, down=up)
        go = simulate(
            lambda g, s, tx=tx: tx.update(g, s, params), workers=N, axis_name="data"
        )
        state: Any = tx.init(params)
        for _ in range(2):
            _, state = go(grads, state)
        np.testing.assert_allclose(state[0].adam.mu["w"], 0.25 * 0.19, rtol=1e-5)


def test_a_row_first_used_after_the_switch_takes_steps_of_a_usual_size():
    """Its v froze at 0; over eps alone the step would be a million times too long."""
    sizes = {}
    params = jnp.zeros((4, 8))
    for floor in (0.0, 0.01):
        tx = one_bit_adam(1.0, workers=N, freeze_step=3, floor=floor)
        state: Any = tx.init(params)
        go = simulate(
            lambda g, s, tx=tx: tx.update(g, s, params), workers=N, axis_name="data"
        )
        for i in range(5):
            g = jax.random.normal(jax.random.key(i), (N, 4, 8))
            updates, state = go(g.at[:, 2].set(0) if i < 4 else g, state)
        sizes[floor] = float(jnp.abs(updates[0, 2]).max())
    assert sizes[0.0] > 1e5
    assert sizes[0.01] < 20


@pytest.mark.parametrize("freeze_step", [None, 7])
def test_the_switch_waits_until_the_moment_has_settled(freeze_step):
    """|v| grows for 30 steps, then stays; looks are every 5 from step 10 on."""
    switch, settled = init_switch(), []
    for count in range(1, 61):
        v = [jnp.full(3, min(count, 30.0))]
        if not is_frozen(switch):
            switch = look(
                switch,
                jnp.int32(count),
                v,
                freeze_step=freeze_step,
                decay=0.8,
                tolerance=0.04,
                earliest=10,
            )
        settled.append(int(switch.frozen_at))
    assert settled[-1] == (35 if freeze_step is None else 7)
    assert settled.index(settled[-1]) == settled[-1] - 1


@pytest.mark.parametrize(
    ("link", "rate", "momentum", "average"),
    [
        ("feedback", 0.05, 0.9, 0.0),
        ("econtrol", 0.05, 0.9, 0.0),
        ("ef21", 0.1, 0.0, 0.8),
    ],
)
def test_momentum_learns_over_every_link(link, rate, momentum, average):
    """EF21 bears no large steps by noisy gradients: its clients average theirs."""
    up = Way(link, top_k(0.2))
    options = {"momentum": momentum, "average": average}
    sgd = compressed_sgd(rate, workers=N, up=up, **options)
    wanted = plain(optax.sgd(rate, momentum=momentum), 300)[0]
    losses, spread, _, _ = train(sgd, 300)
    assert not spread.any()
    assert losses[-50:].mean() < wanted[-50:].mean() + 0.1 * (wanted[0] - wanted[-1])


@functools.cache
def second_stage():
    return train(one_bit_adam(3e-3, workers=N, freeze_step=20), 30)[-1]


@pytest.mark.parametrize("workers", [8, 6, 1])
def test_residuals_survive_a_change_of_workers(workers, tmp_path):
    """Saved by 8 in the second stage, resumed by others: the averages that enter the
    update are what they were, and by 8 every bit is."""
    make = functools.partial(one_bit_adam, 3e-3, freeze_step=20)
    state = second_stage()
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        jax.eval_shape(make(workers=workers).init, start()),
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(30, state, {})
        found, _ = restore(checkpoints, target, step=30)
    if workers == 8:
        jax.tree.map(np.testing.assert_array_equal, found, state)
    old, new = state[0].mean, found[0].mean
    for name, x in start().items():
        was = np.asarray(old.up.worker.per_worker_mean.e[name], np.float64).mean(0)
        now = new.up.worker.per_worker_mean.e[name]
        assert now.shape == (workers, *x.shape)
        np.testing.assert_allclose(
            now, np.stack([was] * workers) if workers != 8 else now, atol=1e-7
        )
        server = [np.asarray(m.down.e.over_workers[name]).ravel() for m in (old, new)]
        np.testing.assert_array_equal(server[0][: x.size], server[1][: x.size])
        assert not server[0][x.size :].any()  # what fills the last chunk holds nothing
    grads = jax.tree.map(lambda x: jnp.stack([x] * workers), start())
    tx = make(workers=workers)
    go = simulate(
        lambda g, s: tx.update(g, s, start()), workers=workers, axis_name="data"
    )
    updates, _ = go(grads, found)
    assert np.isfinite(updates["in"]).all()


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="freeze_step: missing, but zero_one_adam"):
        make_optimizer("zero_one_adam", 0.1, workers=2)
    with pytest.raises(ValueError, match="freeze_step: 3, but compressed_sgd"):
        make_optimizer("compressed_sgd", 0.1, freeze_step=3)
    with pytest.raises(ValueError, match="freeze_step: 3, but adamw"):
        make_optimizer("adamw", 0.1, freeze_step=3)
    tx = zero_one_adam(0.1, workers=1, freeze_step=2)
    with pytest.raises(ValueError, match="params is missing"):
        tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))
