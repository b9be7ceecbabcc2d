"""Messages and chunks: nothing is lost on the way, and nothing is sent wider."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from narrows.parallel.chunks import WASTE, chunk_shape, join, split
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.messages import from_bytes, message_size, share, swap, to_bytes
from narrows.parallel.wire import collectives

few = settings(max_examples=8, deadline=None, derandomize=True, database=None)


def payload(worker=0):
    rng = np.random.default_rng(worker)
    return {
        "values": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
        "half": [jnp.asarray(rng.normal(size=(8, 2)), jnp.bfloat16)],
        "places": jnp.asarray(rng.integers(0, 2**16, (8, 5)), jnp.uint16),
        "signs": jnp.asarray(rng.integers(0, 256, (8, 7)), jnp.uint8),
        "scale": jnp.asarray(rng.normal(size=8), jnp.float32),
    }


def test_a_message_is_its_payload_byte_for_byte():
    sent = payload() | {"bad": jnp.asarray([jnp.nan, jnp.inf, -0.0])}
    message = to_bytes(sent)
    assert message.nbytes == message_size(sent) == 8 * (12 + 4 + 10 + 7 + 4) + 12
    jax.tree.map(np.testing.assert_array_equal, from_bytes(message, sent), sent)
    with pytest.raises(ValueError, match="message: has 307 bytes"):
        from_bytes(message[1:], sent)


def test_swap_and_share_are_transposition_and_copy():
    """Under vmap and on a mesh; on the mesh one collective of uint8 each."""
    every = jax.tree.map(lambda *x: jnp.stack(x), *(payload(i) for i in range(8)))

    def both(x):
        return swap(x, "data"), share(x, "data")

    swapped, shared = jax.vmap(both, axis_name="data")(every)
    for found, wanted in (
        (swapped, jax.tree.map(lambda x: x.swapaxes(0, 1), every)),
        (shared, jax.tree.map(lambda x: jnp.stack([x] * 8), every)),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)

    mesh = make_mesh(Layout(data=8))
    run = jax.shard_map(
        lambda x: jax.tree.map(
            lambda y: y[None], both(jax.tree.map(lambda y: y[0], x))
        ),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )
    compiled = jax.jit(run).lower(every).compile()
    jax.tree.map(np.testing.assert_array_equal, compiled(every), (swapped, shared))
    size = message_size(payload())
    seen = {(c.kind, c.dtype, c.bytes) for c in collectives(compiled, mesh)}
    assert seen == {("all-to-all", "uint8", size), ("all-gather", "uint8", size)}


@few
@given(
    shape=st.lists(st.integers(1, 12), min_size=0, max_size=3).map(tuple),
    workers=st.integers(1, 9),
)
def test_a_tensor_comes_back_from_its_chunks(shape, workers):
    x = np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape)
    chunks = np.asarray(split(jnp.asarray(x), workers))
    assert chunks.shape == (workers, *chunk_shape(shape, workers))
    np.testing.assert_array_equal(join(jnp.asarray(chunks), shape), x)
    width = chunks.shape[-1]
    assert (shape[-1] if shape else 1) % width == 0  # rows are parts of rows
    assert chunks.size <= max((1 + WASTE) * x.size, x.size + workers)
    for dimension, size in enumerate(shape):
        if size % workers == 0:
            along = split(jnp.asarray(x), workers, dimension)
            parts = np.split(x, workers, dimension)
            for chunk, part in zip(along, parts, strict=True):
                np.testing.assert_array_equal(chunk.reshape(part.shape), part)
            np.testing.assert_array_equal(join(along, shape, dimension), x)


def test_a_dimension_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="dimension: 1 of shape"):
        split(jnp.zeros((4, 6)), 4, 1)
