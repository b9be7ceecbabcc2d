"""The step of a language model with compressed gradients: what its program sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.compressed_mean import compressed_mean
from narrows.optim.one_bit_adam import ONE_BIT
from narrows.optim.table import LOCAL, make_optimizer
from narrows.parallel import hlo
from narrows.parallel.layout import Layout, make_mesh, place_batch
from narrows.parallel.rules import follow, shardings
from narrows.parallel.state import simulate, specs
from narrows.parallel.step import create_state, make_step
from narrows.parallel.wire import SENT, collectives

N = 8


@functools.cache
def compiled_step(name, text="data=8"):
    """The whole training step of a language model on a mesh, and its shapes."""
    layout = Layout.parse(text)
    mesh = make_mesh(layout, jax.devices()[: layout.size])
    config = TransformerConfig(vocab_size=32, depth=1, width=16, heads=2, mlp_width=32)
    parts = model_parts(config, "none")
    tx = make_optimizer(name, 1e-2, workers=layout.data, freeze_step=2)
    state = create_state(parts.init, tx, 0, mesh)
    step = make_step(
        parts.loss, tx, layout, mesh, gradients="local", advance=parts.advance
    )
    tokens = np.random.default_rng(0).integers(0, 32, (8, 9)).astype(np.int32)
    batch = place_batch({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, mesh)
    return step.fused.lower(state, batch).compile(), mesh, state, batch, step


def longest_floats(module, name):
    """The most numbers in a dense collective of floats that a computation reaches."""
    found = [0]
    for op, *_ in module._runs(SENT, name, 1, True):
        for operand in module.operands(op):
            found += [
                int(np.prod(shape))
                for kind, shape in hlo.arrays(operand)
                if "float" in kind
            ]
    return max(found)


def test_compressed_phase_sends_no_dense_gradient(quick_compilation):
    """In the compiled text: outside the conditional and in its compressed branch no
    collective of floats is longer than the number of workers; the warm one has one."""
    compiled, mesh, state, _, _ = compiled_step("one_bit_adam")
    module = hlo.Module(str(compiled.as_text()))
    branches = []
    for ops in module.computations.values():
        for op in ops:
            if op.opcode == "conditional":
                names = hlo._CALL.findall(op.rest)
                called = ",".join(x for pair in names for x in pair if x)
                branches.append([x.strip(" %") for x in called.split(",")])
    branches = [
        b for b in branches if any(list(module._runs(SENT, x, 1, True)) for x in b)
    ]
    assert len(branches) == 1
    lengths = {name: longest_floats(module, name) for name in branches[0]}
    size = sum(x.size for x in jax.tree.leaves(state.params))
    assert min(lengths.values()) <= N < max(lengths.values()) <= size
    # Of the whole program: floats of more than N numbers are those of the warm branch.
    warm = max(lengths, key=lambda x: lengths[x])
    dense = [
        c
        for c in collectives(compiled, mesh)
        if "float" in c.dtype and max(np.prod(s) for s in c.shapes) > N
    ]
    in_warm = [op.name for op, *_ in module._runs(SENT, warm, 1, True)]
    assert 0 < len(dense) <= len(in_warm)
    sent = [c for c in collectives(compiled, mesh) if c.dtype == "uint8"]
    assert {c.kind for c in sent} == {"all-to-all", "all-gather"}
    counted = compressed_mean(ONE_BIT, ONE_BIT, workers=N).sent_bits(state.params)
    assert 8 * sum(c.wire_bytes for c in sent) == pytest.approx(counted, rel=1e-12)


def test_a_step_of_training_reports_and_goes_on(quick_compilation):
    compiled, _, state, batch, _ = compiled_step("one_bit_adam")
    said = []
    state = jax.tree.map(jnp.copy, state)
    for _ in range(4):
        state, metrics = compiled(state, batch)
        said.append(float(metrics["compressed"]))
    assert said == [0, 0, 1, 1]
    assert metrics["frozen_at"] == 2
    assert np.isfinite(metrics["loss"])


def losses_of(text, steps=5):
    compiled, mesh, state, batch, _ = compiled_step("one_bit_adam", text)
    state, found = jax.tree.map(jnp.copy, state), []
    for _ in range(steps):
        state, metrics = compiled(state, batch)
        found.append(float(metrics["loss"]))
    return found, compiled, mesh, state


@pytest.mark.parametrize(
    "inner", [pytest.param("tensor", marks=pytest.mark.slow), "fsdp"]
)
def test_layouts_compose_with_compression_over_data(inner, quick_compilation):
    """An inner axis changes neither the curve nor what is sent over data, and shards
    the residuals with their parameters."""
    wanted, compiled, mesh, _ = losses_of("data=4")
    found, other, wider, state = losses_of(f"data=4,{inner}=2")
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    over_data = [
        [
            c.bytes
            for c in collectives(*pair)
            if (c.axes, c.dtype) == (("data",), "uint8")
        ]
        for pair in ((compiled, mesh), (other, wider))
    ]
    assert sum(over_data[0]) == sum(over_data[1]) > 0
    e = state.opt[0].mean.up.worker.per_worker_mean.e["blocks"]["mlp"]["up"]["kernel"]
    assert e.addressable_shards[0].data.size * 8 == e.size


@pytest.mark.parametrize("name", list(LOCAL))
def test_every_row_of_the_table_trains_in_place(name):
    """One update by the table's name: state as it was shaped, places known by name."""
    freeze = None if name == "compressed_sgd" else 1
    tx = make_optimizer(name, 0.1, workers=N, freeze_step=freeze)
    params = {"blocks": {"mlp": {"up": {"kernel": jnp.ones((2, 4, 8))}}}}
    state = tx.init(params)
    mesh = make_mesh(Layout(data=N))
    places = follow(state, params, shardings(params, mesh))
    told = jax.tree.map(lambda x: x.spec, places)
    per_worker = jax.tree.map(lambda s: s == P("data"), specs(state, "data"))
    for place, mine in zip(
        jax.tree.leaves(told), jax.tree.leaves(per_worker), strict=True
    ):
        assert (tuple(place)[:1] == ("data",)) == mine
    grads = jax.tree.map(lambda x: jnp.stack([x] * N), params)
    go = jax.jit(
        simulate(lambda g, s: tx.update(g, s, params), workers=N, axis_name="data")
    )
    for _ in range(2):
        updates, new = go(grads, state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        state = new
    assert (updates["blocks"]["mlp"]["up"]["kernel"] < 0).all()
