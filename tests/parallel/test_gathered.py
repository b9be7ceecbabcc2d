"""Parameters in shards: the gradients of whole ones, and bytes to the byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from narrows.parallel import wire
from narrows.parallel.gathered import layer_of_shards
from narrows.parallel.layout import Layout, make_mesh

LAYERS, D, ROWS = 3, 16, 8


def layer(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def loss(run, params, x):
    return (lax.scan(lambda x, w: (run(w, x), None), x, params)[0] ** 2).sum()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_two_gathers_and_a_scatter_of_every_matrix(parts):
    """A device sends 3 (n - 1) / n of the parameters, and gradients are those of one"""
    mesh = make_mesh(Layout(fsdp=parts), jax.devices()[:parts])
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (LAYERS, D, 2 * D)) / D**0.5,
        "down": jax.random.normal(keys[1], (LAYERS, 2 * D, D)) / D**0.5,
    }
    x = jax.random.normal(keys[2], (ROWS, D))
    run = layer_of_shards(layer, "fsdp")

    @jax.jit
    @jax.shard_map(
        mesh=mesh,
        in_specs=(P(None, "fsdp"), P("fsdp")),
        out_specs=P(None, "fsdp"),
        check_vma=False,
    )
    def cut(params, x):
        return jax.grad(lambda p: loss(run, p, x))(params)

    whole = jax.grad(lambda p: loss(layer, p, x))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        cut(params, x),
        whole,
    )
    found = wire.summary(wire.jaxpr_collectives(cut.trace(params, x).jaxpr))
    held = 4 * sum(p.size for p in jax.tree.leaves(params))
    once = held * (parts - 1) / parts
    assert {key: row.wire_bytes for key, row in found.items()} == {
        ("all-gather", ("fsdp",)): 2 * once,
        ("reduce-scatter", ("fsdp",)): once,
    }
    runs = {kind: row.count for (kind, _), row in found.items()}
    assert runs == {"all-gather": 4 * LAYERS, "reduce-scatter": 2 * LAYERS}
