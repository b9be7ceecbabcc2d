"""The training step compiles for TPU slices that are not there."""

import os

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.local_updates.outer import make_outer
from narrows.optim.local_updates.rounds import local_updates
from narrows.optim.local_updates.step import make_local_step
from narrows.parallel.layout import Layout, batch_sharding, make_mesh
from narrows.parallel.step import abstract_state, make_step
from narrows.parallel.wire import collectives, summary

pytest.importorskip("libtpu", reason="install the tpu extra to compile for TPUs")


@pytest.fixture(scope="module")
def devices():
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


def test_the_step_compiles_for_a_slice_of_eight(devices):
    """Batch, parameters and heads are split there, and gradients cross every axis.

    Attention is the TPU kernel, on each device's own rows and heads.
    """
    layout = Layout.parse("data=2,fsdp=2,tensor=2")
    mesh = make_mesh(layout, devices)
    config = TransformerConfig(
        depth=2, width=256, heads=4, dtype=jnp.bfloat16, scan=True, remat="full"
    )
    parts = model_parts(config, "codebook", waist_options={"codes": 128})
    tx = optax.adamw(1e-3)
    state = abstract_state(parts.init, tx, 0, mesh)
    rows = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=batch_sharding(mesh))
    step = make_step(parts.loss, tx, layout, mesh, advance=parts.advance)
    batch = {"tokens": rows, "targets": rows}
    compiled = step.fused.lower(state, batch).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2  # there and back
    memory = compiled.memory_analysis()
    assert memory is not None
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    assert memory.argument_size_in_bytes < 0.8 * 3 * whole  # parameters and moments
    sent = summary(collectives(compiled, mesh))
    crossed = {axis for _, axes in sent for axis in axes}
    assert crossed == {"data", "fsdp", "tensor"}


def test_a_stale_exchange_travels_beside_the_steps(devices):
    """In the loop of steps a send starts before the layers and is done after them, and
    nothing else crosses data."""
    every = 4
    layout = Layout.parse("data=8")
    mesh = make_mesh(layout, devices)
    config = TransformerConfig(
        depth=2, width=128, heads=2, dtype=jnp.bfloat16, scan=True
    )
    parts = model_parts(config, "none")
    rounds = local_updates(optax.adamw(1e-3), make_outer("co2"), workers=8, every=every)
    step = make_local_step(parts.loss, rounds, layout, mesh)
    state = abstract_state(parts.init, rounds, 0, mesh)
    place = NamedSharding(mesh, P(None, ("data", "fsdp")))
    rows = jax.ShapeDtypeStruct((every, 8, 128), jnp.int32, sharding=place)
    compiled = step.round.lower(state, {"tokens": rows, "targets": rows}).compile()
    assert {c.kind for c in collectives(compiled, mesh)} == {"collective-permute"}
    between = []
    for body in compiled.as_text().split("\n}\n"):
        _, _, rest = body.partition(" collective-permute-start(")
        if rest:
            between.append(rest.partition(" collective-permute-done(")[0])
    assert between
    assert any(text.count("dot_general") > 4 for text in between)  # named by fusions
