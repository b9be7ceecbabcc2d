"""The step of local updates: what its programs send, and what they leave behind."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.compressed_mean import CompressedMean
from narrows.optim.local_updates.outer import make_outer
from narrows.optim.local_updates.rounds import local_updates
from narrows.optim.local_updates.step import make_local_step
from narrows.optim.table import make_optimizer
from narrows.parallel.layout import Layout, make_mesh, place_batch
from narrows.parallel.state import resize
from narrows.parallel.step import abstract_state, create_state, make_step
from narrows.parallel.wire import collectives

CONFIG = TransformerConfig(vocab_size=32, depth=1, width=16, heads=2, mlp_width=32)
EVERY = 3

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def made(name, text="data=4", every=EVERY, rate=1e-2, sgd=False, **options):
    layout = Layout.parse(text)
    mesh = make_mesh(layout, jax.devices()[: layout.size])
    parts = model_parts(CONFIG, "none")
    inner = optax.sgd(rate) if sgd else make_optimizer("adamw", rate)
    rounds = local_updates(
        inner, make_outer(name), workers=layout.data, every=every, **options
    )
    step = make_local_step(parts.loss, rounds, layout, mesh)
    return parts, layout, mesh, rounds, step


def fresh(name, *arguments, **options):
    parts, _, mesh, rounds, _ = made(name, *arguments, **options)
    return create_state(parts.init, rounds, 0, mesh)


def rows(n):
    tokens = np.random.default_rng(n).integers(0, 32, (8, 9)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def train(step, mesh, state, numbers):
    losses = []
    for n in numbers:
        state, metrics = step.fused(state, place_batch(rows(n), mesh))
        losses.append(np.mean(metrics["loss"]))
    return state, losses


def close(a, b, **tolerance):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), **tolerance
        )


def test_rounds_of_one_step_are_data_parallel_training():
    parts, layout, mesh, _, step = made("local_sgd", every=1, sgd=True)
    state, found = train(step, mesh, fresh("local_sgd", every=1, sgd=True), range(8))
    tx = optax.sgd(1e-2)
    dense = make_step(parts.loss, tx, layout, mesh)
    other = create_state(parts.init, tx, 0, mesh)
    wanted = []
    for n in range(8):
        other, metrics = dense.fused(other, place_batch(rows(n), mesh))
        wanted.append(float(metrics["loss"]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    close(state.params, other.params, rtol=1e-5, atol=1e-6)


def slow_mean(tree, state, key):
    """The mean, after a second of computing."""
    del key
    start = optax.tree.sum(tree)
    zero = 0 * jax.lax.fori_loop(0, 2_000_000, lambda i, x: jnp.sin(x), start)
    return jax.tree.map(lambda x: jax.lax.pmean(x + zero, "data"), tree), state


SLOW: Any = CompressedMean(lambda *_, **__: (), slow_mean, lambda tree: 0)


def still_on_its_way():
    """Of each round but the last step, whether its exchange outlasts its steps."""
    each = {device.process_index: device for device in jax.devices()}
    layout = Layout.parse("data=2")
    mesh = make_mesh(layout, list(each.values()))
    parts = model_parts(CONFIG, "none")
    rounds = local_updates(
        make_optimizer("adamw", 1e-2), make_outer("co2"), workers=2, every=3, mean=SLOW
    )
    step = make_local_step(parts.loss, rounds, layout, mesh)
    state, found = create_state(parts.init, rounds, 0, mesh), []
    for n in range(4 * EVERY):
        state, metrics = step.fused(state, place_batch(rows(n), mesh))
        jax.block_until_ready((metrics, state.params))
        if n % EVERY == EVERY - 2:  # the next step ends the round
            arriving = jax.tree.leaves(state.opt.arriving)
            found.append(not any(x.is_ready() for x in arriving))
    return found, int(state.opt.anchors[0].rounds)


def test_steps_go_on_while_an_exchange_is_on_its_way(two_processes):
    for found, meetings in two_processes(still_on_its_way):
        assert found[2:] == [True, True]  # before, programs are compiled
        assert meetings == 4


@pytest.mark.parametrize("inner", ["fsdp", "tensor"])
def test_a_worker_may_lie_over_other_axes(inner):
    wanted = train(*made("co2")[4:1:-2], fresh("co2"), range(8))
    text = f"data=4,{inner}=2"
    state, losses = train(*made("co2", text)[4:1:-2], fresh("co2", text), range(8))
    np.testing.assert_allclose(losses, wanted[1], rtol=2e-5)
    kernel = state.opt.own[0].params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_steps_send_nothing_over_data_and_a_meeting_what_it_must():
    """The program of a step has no collective over data; the exchange of pseudo-
    gradients is the only one, and has as many numbers as a ring of four takes."""
    _, _, mesh, _, step = made("co2", "data=4,fsdp=2")
    state = fresh("co2", "data=4,fsdp=2")
    batch = place_batch(rows(0), mesh)
    local = step.local.lower(
        state.opt.own, state.rest, state.step, state.key, batch
    ).compile()
    assert {axis for c in collectives(local, mesh) for axis in c.axes} <= {"fsdp"}
    batches = jax.tree.map(lambda x: jnp.stack([x] * EVERY), batch)
    whole = step.round.lower(state, batches).compile()
    over = [c for c in collectives(whole, mesh) if "data" in c.axes]
    held = [x.addressable_shards[0].data.size for x in jax.tree.leaves(state.params)]
    sent = sum(np.prod(s) * c.count for c in over for s in c.shapes)
    assert sent == 2 * 3 * -(-sum(held) // 4)  # by each device what it holds, in a ring


@pytest.mark.parametrize("name", ["diloco", "co2"])
def test_a_round_in_one_program_is_its_steps(name):
    """Whether the exchange is a program of its own or inside that of the round."""
    *_, mesh, _, step = made(name)
    state, other = fresh(name), fresh(name)
    state, _ = train(step, mesh, state, range(EVERY - 1))
    other, _ = train(step, mesh, other, range(EVERY - 1))
    state, _ = step.fused(state, place_batch(rows(EVERY - 1), mesh))  # and meets
    mine, number, _ = step.local(
        *(other.opt.own, other.rest, other.step, other.key),
        place_batch(rows(EVERY - 1), mesh),
    )
    other = other._replace(opt=other.opt._replace(own=mine), step=number)
    for begin in (EVERY, 2 * EVERY):
        numbers = range(begin, begin + EVERY)
        batches = [place_batch(rows(n), mesh) for n in numbers]
        other, metrics = step.round(
            other, jax.tree.map(lambda *x: jnp.stack(x), *batches)
        )
        assert metrics["loss"].shape == (EVERY, 4)
        state, _ = train(step, mesh, state, numbers)
    close(state.params, step.meet(other, 0).params, rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_state_goes_on_as_if_never_stopped():
    """In the middle of a round too, with an exchange on its way."""
    *_, mesh, rounds, step = made("co2", fragments=2, every=4)
    state, _ = train(step, mesh, fresh("co2", fragments=2, every=4), range(9))
    again = jax.tree.map(lambda x: jax.device_put(jnp.copy(x), x.sharding), state)
    wanted = train(step, mesh, state, range(9, 14))
    new = make_local_step(made("co2")[0].loss, rounds, made("co2")[1], mesh)
    found = train(new, mesh, again, range(9, 14))
    assert found[1] == wanted[1]
    for a, b in zip(*map(jax.tree.leaves, (found[0], wanted[0])), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)


def test_fewer_groups_go_on_from_the_anchor():
    *_, mesh, _, step = made("co2")
    state, before = train(step, mesh, fresh("co2"), range(2 * EVERY))
    parts, _, few, rounds, step = made("co2", "data=2,tensor=2")
    target = abstract_state(parts.init, rounds, 0, few)
    opt = resize(jax.device_get(state.opt), target.opt)
    moved = jax.tree.map(
        lambda x, t: jax.device_put(x, t.sharding), state._replace(opt=opt), target
    )
    close(moved.params, state.params, rtol=0)
    _, after = train(step, few, moved, range(2 * EVERY, 4 * EVERY))
    assert np.mean(after[-2:]) < np.mean(before[:2])


def test_what_learns_from_sums_is_refused():
    layout = Layout.parse("data=4")
    mesh = make_mesh(layout, jax.devices()[:4])
    parts = model_parts(CONFIG, "codebook", waist_options={"codes": 8})
    rounds = local_updates(optax.sgd(0.1), make_outer("co2"), workers=4, every=2)
    step = make_local_step(parts.loss, rounds, layout, mesh)
    state = create_state(parts.init, rounds, 0, mesh)
    with pytest.raises(ValueError, match="waist: learns from sums"):
        step.fused(state, place_batch(rows(0), mesh))
    with pytest.raises(ValueError, match="mesh: has axes"):
        make_local_step(parts.loss, rounds, Layout(data=2), mesh)
