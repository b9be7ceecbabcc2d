"""Tensor parallelism by hand: the same numbers, and the papers' bytes to the byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from narrows.models.language_model import token_nats
from narrows.parallel import wire
from narrows.parallel.tensor import split_block, vocabulary_lookup, vocabulary_nats

B, T, D, H, V = 2, 4, 8, 16, 32


def mesh_of(parts):
    types = (AxisType.Auto,)
    return jax.make_mesh((parts,), ("tensor",), types, devices=jax.devices()[:parts])


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def sent(function, *arguments):
    found = wire.jaxpr_collectives(jax.make_jaxpr(function)(*arguments))
    assert all(c.axes == ("tensor",) for c in found)
    return {kind: row.wire_bytes for (kind, _), row in wire.summary(found).items()}


def two_blocks(axis_name):
    """A layer's two halves, as far as bytes are concerned: two split mlps."""

    def run(x, up, down):
        for _ in range(2):
            x = split_block(x, lambda x: jnp.tanh(x @ up) @ down, axis_name)
        return x

    return run


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_layer_sends_four_all_reduces_of_its_stream(parts):
    x, up, down = draw(B, T, D), draw(D, H, seed=1) / 3, draw(H, D, seed=2) / 4
    many = jax.shard_map(
        two_blocks("tensor"),
        mesh=mesh_of(parts),
        in_specs=(P(), P(None, "tensor"), P("tensor")),
        out_specs=P(),
    )

    def one(x, up, down):
        for _ in range(2):
            x = x + jnp.tanh(x @ up) @ down
        return x

    def both(function):
        out, pull = jax.vjp(function, x, up, down)
        return out, *pull(jnp.cos(out))

    for a, b in zip(both(many), both(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    stream = 4 * B * T * D
    assert sent(lambda: both(many)) == {
        "all-reduce": 8 * stream * (parts - 1) / parts  # arXiv:2104.04473, Section 3.2
    }


@pytest.mark.parametrize("parts", [2, 8])
def test_a_vocabulary_over_devices_sends_three_numbers_a_position(parts):
    logits = 3 * draw(B, T, V)
    targets = jax.random.randint(jax.random.key(3), (B, T), 0, V)
    many = jax.shard_map(
        lambda logits, targets: vocabulary_nats(logits, targets, "tensor"),
        mesh=mesh_of(parts),
        in_specs=(P(None, None, "tensor"), P()),
        out_specs=P(),
    )
    np.testing.assert_allclose(
        many(logits, targets), token_nats(logits, targets), rtol=1e-5
    )
    weights = draw(B, T, seed=4)

    def gradient(function):
        return jax.grad(lambda x: (weights * function(x, targets)).sum())(logits)

    np.testing.assert_allclose(
        gradient(many), gradient(token_nats), rtol=1e-5, atol=1e-6
    )
    numbers = 3 * 4 * B * T * 2 * (parts - 1) / parts
    assert sent(lambda: gradient(many)) == {"all-reduce": numbers}


def test_a_table_over_devices_is_looked_up_with_one_sum():
    table = draw(V, D)
    tokens = jax.random.randint(jax.random.key(3), (B, T), 0, V)
    many = jax.shard_map(
        lambda tokens, table: vocabulary_lookup(tokens, table, "tensor"),
        mesh=mesh_of(4),
        in_specs=(P(), P("tensor")),
        out_specs=P(),
    )
    np.testing.assert_array_equal(many(tokens, table), table[tokens])
    weights = draw(B, T, D, seed=4)
    found = jax.grad(lambda table: (weights * many(tokens, table)).sum())(table)
    wanted = jax.grad(lambda table: (weights * table[tokens]).sum())(table)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert sent(many, tokens, table) == {"all-reduce": 4 * B * T * D * 2 * 3 / 4}
