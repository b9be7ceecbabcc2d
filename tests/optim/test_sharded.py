"""Compressed optimizers over shards: exact before the switch, bytes alone after it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.compressed_mean import PLAIN, Way, sharded_mean
from narrows.optim.compression import identity
from narrows.optim.one_bit_adam import ONE_BIT
from narrows.optim.sharded import sharded
from narrows.optim.sharded_optimizers import (
    ONE_BIT_DOWN,
    sharded_one_bit_adam,
    sharded_sgd,
)
from narrows.optim.table import LOCAL, SHARDED, make_optimizer
from narrows.parallel.layout import Layout, make_mesh, place_batch
from narrows.parallel.rules import TRANSFORMER, whole_over
from narrows.parallel.state import resize, simulate
from narrows.parallel.step import create_state, make_step
from narrows.parallel.wire import collectives

N, ROWS = 8, 16
WHOLE = Way("ef21", identity())


def start():
    rng = np.random.default_rng(0)
    tree = {"in": rng.normal(size=(12, 16)) / 4, "out": rng.normal(size=(16, 3)) / 4}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def batch_loss(params, key):
    x = jax.random.normal(key, (ROWS, 12)) * jnp.logspace(0, -1.5, 12)
    goal = jnp.sin(2 * x[:, :3]) + x[:, 4:7]
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - goal) ** 2)


def keys_of(i):
    return jax.random.split(jax.random.fold_in(jax.random.key(1), i), N)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(tx, steps):
    """Losses, how far the workers' copies differ, parameters and state of all."""
    grads_of = jax.vmap(jax.value_and_grad(batch_loss), in_axes=(0, 0))

    def step(carry, i):
        params, state = carry
        losses, grads = grads_of(params, keys_of(i))

        def worker(x, state):
            grads, params = x
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        go = simulate(worker, workers=N, axis_name="fsdp")
        params, state = go((grads, params), state)
        spread = jax.tree.map(lambda x: jnp.abs(x - x[:1]).max(), params)
        return (params, state), (losses.mean(), optax.tree.max(spread))

    many = jax.tree.map(lambda x: jnp.stack([x] * N), start())
    carry = many, tx.init(start())
    (params, state), out = jax.lax.scan(step, carry, jnp.arange(steps))
    return *out, params, state


@functools.partial(jax.jit, static_argnums=(0, 1))
def plain(tx, steps):
    """The same by the mean gradient and an optax optimizer."""

    def step(carry, i):
        params, state = carry
        grads_of = jax.vmap(jax.value_and_grad(batch_loss), in_axes=(None, 0))
        losses, grads = grads_of(params, keys_of(i))
        grads = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), losses.mean()

    carry = start(), tx.init(start())
    (params, _), losses = jax.lax.scan(step, carry, jnp.arange(steps))
    return losses, params


def clipped(tx, clip=0.3):
    return optax.chain(optax.clip_by_global_norm(clip), tx)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_uncompressed_it_is_the_optax_optimizer(name):
    """Adam before the switch; SGD through links that lose nothing. Both clip."""
    if name == "adam":
        tx = sharded_one_bit_adam(3e-3, workers=N, freeze_step=100, clip=0.3)
        twin = clipped(optax.adam(3e-3))
    else:
        tx = sharded_sgd(0.1, workers=N, clip=0.3, up=PLAIN, down=WHOLE)
        twin = clipped(optax.sgd(0.1, momentum=0.9))
    losses, spread, params, _ = train(tx, 30)
    wanted, last = plain(twin, 30)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert not spread.any()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(lambda x, y: close(x[0], y), params, last)


def test_it_learns_as_adam_does_with_one_bit_each_way():
    tail, steps = slice(-50, None), 300
    dense = plain(optax.adam(3e-3), steps)[0]
    begin, wanted = dense[:10].mean(), dense[tail].mean()
    tx = sharded_one_bit_adam(3e-3, workers=N, freeze_step=80)
    losses, spread, params, state = train(tx, steps)
    assert not spread.any()  # the copies are equal to the bit
    assert (losses[tail].mean() - wanted) / (begin - wanted) < 0.1
    assert state.said.reported == {"compressed": 1.0, "frozen_at": 80.0}
    # A copy trails the parameters by what was not sent yet: it is no other model.
    for name, x in start().items():
        master = np.asarray(state.master.over_workers[name]).reshape(-1)[: x.size]
        gap = np.linalg.norm(np.asarray(params[name][0]).reshape(-1) - master)
        assert 0 < gap < 0.05 * np.linalg.norm(master)
    lossy = sharded_one_bit_adam(
        3e-3, workers=N, freeze_step=80, up=Way("plain", ONE_BIT.compressors)
    )
    assert train(lossy, steps)[0][tail].mean() > losses[tail].mean()  # feedback is why


def test_momentum_learns_in_four_bits():
    wanted = plain(optax.sgd(0.05, momentum=0.9), 300)[0]
    losses, spread, _, _ = train(sharded_sgd(0.05, workers=N), 300)
    assert not spread.any()
    assert losses[-50:].mean() < wanted[-50:].mean() + 0.1 * (wanted[0] - wanted[-1])


@pytest.mark.parametrize("workers", [6, 4, 1])
def test_other_workers_go_on_from_its_state(workers):
    """Moments and parameters are what they were; so is the mean of the residuals."""
    _, _, params, state = train(sharded_one_bit_adam(3e-3, workers=N, freeze_step=5), 9)
    tx = sharded_one_bit_adam(3e-3, workers=workers, freeze_step=5)
    found: Any = resize(state, jax.eval_shape(tx.init, start()))
    pairs = [
        (state.master.over_workers, found.master.over_workers),
        (state.moments.over_workers[0].mu, found.moments.over_workers[0].mu),
    ]
    for old, new in pairs:
        for name, x in start().items():
            flat = [np.asarray(t[name]).reshape(-1) for t in (old, new)]
            np.testing.assert_array_equal(flat[0][: x.size], flat[1][: x.size])
            assert not flat[1][x.size :].any()
    e = [s.up.worker.per_worker_mean.e["in"] for s in (state, found)]
    np.testing.assert_allclose(e[1].mean(0), e[0].mean(0), atol=1e-7)
    assert np.abs(e[0]).max() > 0
    copy = jax.tree.map(lambda x: x[0], params)
    grads = jax.tree.map(lambda x: jnp.stack([x] * workers), copy)
    go = simulate(lambda g, s: tx.update(g, s, copy), workers=workers, axis_name="fsdp")
    updates, new = go(grads, found)
    assert new.count == 10
    assert np.isfinite(updates["in"]).all()


@functools.cache
def compiled_step(name, text):
    layout = Layout.parse(text)
    mesh = make_mesh(layout, jax.devices()[: layout.size])
    config = TransformerConfig(vocab_size=32, depth=1, width=16, heads=2, mlp_width=32)
    parts = model_parts(config, "none")
    freeze = 2 if "adam" in name else None
    tx = make_optimizer(name, 1e-2, workers=layout.fsdp, freeze_step=freeze)
    rules = whole_over(TRANSFORMER, "fsdp")
    state = create_state(parts.init, tx, 0, mesh, rules)
    options = {"gradients": "local", "advance": parts.advance, "rules": rules}
    step = make_step(parts.loss, tx, layout, mesh, **options)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 9)).astype(np.int32)
    batch = place_batch({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, mesh)
    return step.fused.lower(state, batch).compile(), mesh, state, batch


def losses_of(name, text, steps=5):
    compiled, mesh, state, batch = compiled_step(name, text)
    state, found = jax.tree.map(jnp.copy, state), []
    for _ in range(steps):
        state, metrics = compiled(state, batch)
        found.append(float(metrics["loss"]))
    return found, compiled, mesh, state


@pytest.mark.parametrize("text", ["fsdp=4", "fsdp=4,tensor=2"])
@pytest.mark.parametrize("name", SHARDED)
def test_every_method_trains_over_every_layout(name, text, quick_compilation):
    """The curve of the plain layout, state in shards, and the counted bytes alone."""
    wanted, *_ = losses_of(name, "fsdp=4")
    found, compiled, mesh, state = losses_of(name, text)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    assert found[-1] < found[0]
    for x in jax.tree.leaves((state.opt.master, state.opt.moments)):
        assert x.sharding.spec == P("fsdp")
    over_fsdp = [c for c in collectives(compiled, mesh) if c.axes == ("fsdp",)]
    sent = 8 * sum(c.wire_bytes for c in over_fsdp if c.dtype == "uint8")
    down = ONE_BIT_DOWN if "adam" in name else SHARDED_DOWN
    up = ONE_BIT if "adam" in name else SHARDED_UP
    counted = sharded_mean(up, down, like=state.params, workers=4).sent_bits(None)
    assert sent == pytest.approx(counted, rel=1e-12)
    floats = [c for c in over_fsdp if "float" in c.dtype]
    long = [c for c in floats if max(np.prod(s) for s in c.shapes) > 4]
    assert bool(long) == ("adam" in name)  # those of the warm branch alone
    assert {c.kind for c in long} <= {"all-reduce", "reduce-scatter", "all-gather"}


SHARDED_UP, SHARDED_DOWN = (
    sharded_sgd.__kwdefaults__["up"],
    sharded_sgd.__kwdefaults__["down"],
)


def test_rules_without_an_axis():
    for rule, without in zip(TRANSFORMER, whole_over(TRANSFORMER, "fsdp"), strict=True):
        assert rule.pattern == without.pattern
        assert (rule.axes is None) == (without.axes is None)
        for a, b in zip(rule.axes or (), without.axes or (), strict=True):
            assert b == (None if a == "fsdp" else a)


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="down: link 'feedback' sends parameters"):
        sharded(optax.sgd(0.1), workers=2, up=PLAIN, down=ONE_BIT)
    tx = sharded_sgd(0.1, workers=2)
    with pytest.raises(ValueError, match="params is missing"):
        tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))
    with pytest.raises(ValueError, match="freeze_step: 3, but sharded_compressed_sgd"):
        make_optimizer("sharded_compressed_sgd", 0.1, freeze_step=3)
    assert not set(LOCAL) & set(SHARDED)
