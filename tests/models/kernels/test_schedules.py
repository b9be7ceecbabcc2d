"""The published orders: one result, and the operations that each paper promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.models.kernels.attention import io
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.reference import reference
from narrows.models.kernels.attention.schedules import blockwise, kind, triangle, view
from narrows.models.kernels.attention.tiles import FULL, PART, SKIP


def draw(b=1, t=64, s=64, n=2, k=1, h=8, dtype=jnp.float32):
    rng = np.random.default_rng([b, t, s, n])
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    q, k_, v = (jnp.asarray(rng.normal(size=x), dtype) for x in shapes)
    return q, k_, v


def defined(arrays, offset=None):
    """The definition in float64 of the rounded inputs."""
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
        (b, t, _, h), s = q.shape, k.shape[1]
        low = jnp.zeros((b, t), jnp.int32)
        high = jnp.full((b, t), s, jnp.int32)
        if offset is not None:
            rows = jnp.arange(t, dtype=jnp.int32)
            high = jnp.clip(jnp.broadcast_to(rows + offset + 1, (b, t)), 0, s)
        out, logs = reference(q, k, v, Call(low, high), Spec(h**-0.5))
        return np.asarray(out), np.asarray(logs)


def close(found, expected, tolerance=2e-6):
    """float32 sums of at most 200 terms of size one."""
    out, logs, _ = found
    np.testing.assert_allclose(out, expected[0], atol=tolerance)
    np.testing.assert_allclose(logs, expected[1], atol=5e-6)


TWO_LEVEL = {"order": "q_outer", "block_k": 32, "inner": 8}
VARIANTS = {
    "FlashAttention": {"order": "k_outer", "block_k": 16},
    "FlashAttention-2": {"order": "q_outer", "block_k": 16},
    "FastAttention": TWO_LEVEL,
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("offset", [None, 0, 20, -20])
def test_every_order_is_attention(name, offset):
    """Odd lengths, grouped heads; with offset -20 the first rows see nothing."""
    arrays = draw(b=2, t=70, s=90, n=4, k=2)
    options = {} if offset is None else {"is_causal": True, "query_offset": offset}
    found = blockwise(*arrays, block_q=16, **VARIANTS[name], **options)
    close(found, defined(arrays, offset))


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_is_rounded_once_at_the_end(name):
    arrays = draw(dtype=jnp.bfloat16)
    found = blockwise(*arrays, block_q=16, **VARIANTS[name])
    assert found[0].dtype == jnp.bfloat16
    plain = jax.nn.dot_product_attention(*arrays)
    truth = defined(arrays)[0]
    ours, theirs = (
        np.abs(np.asarray(x, np.float64) - truth).max() for x in (found[0], plain)
    )
    assert ours <= 2 * theirs + 1e-3


@pytest.mark.parametrize("offset", [0, 16, 5])
def test_the_view_of_a_triangle_masks_as_indices_do(offset):
    arrays = draw(t=64, s=96)
    options = {"block_q": 16, "is_causal": True, "query_offset": offset, **TWO_LEVEL}
    plain = blockwise(*arrays, **options)
    viewed = blockwise(*arrays, tiling_mask=True, **options)
    np.testing.assert_array_equal(plain[0], viewed[0])
    close(viewed, defined(arrays, offset))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 12),
    keys=st.integers(1, 12),
    spare=st.integers(0, 3),
    r0=st.integers(0, 40),
    c0=st.integers(0, 40),
)
def test_views_and_kinds_are_those_of_the_indices(rows, keys, spare, r0, c0):
    seen = c0 + np.arange(keys) <= (r0 + np.arange(rows))[:, None]
    found = int(kind(r0 - c0, rows, keys))
    assert found == (FULL if seen.all() else PART if seen.any() else SKIP)
    if found == PART:
        whole = triangle(max(rows, keys) + spare)
        np.testing.assert_array_equal(view(whole, r0 - c0, rows, keys), seen)


def test_rows_are_independent_to_the_bit():
    """Row blocks may run in any order, or on different cores."""
    query, key, value = draw(t=64, s=48)
    options = {"block_q": 16, "block_k": 16, "is_causal": True}
    whole, logs, _ = blockwise(query, key, value, **options)
    for start in (48, 0, 32, 16):
        part = query[:, start : start + 16]
        out, of_part, _ = blockwise(part, key, value, query_offset=start, **options)
        np.testing.assert_array_equal(out, whole[:, start : start + 16])
        np.testing.assert_array_equal(of_part, logs[:, start : start + 16])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_counts_are_those_of_the_model(name, is_causal):
    t, h, block_q = 64, 8, 16
    options = VARIANTS[name]
    tile = io.Tile(block_q, options["block_k"])
    rows, keys = np.arange(0, t, block_q), np.arange(0, t, tile.block_k)
    visited = (keys < rows[:, None] + block_q) | (not is_causal)
    *_, count = blockwise(*draw(), block_q=block_q, is_causal=is_causal, **options)
    work = io.work(options["order"], t, t, h, tile, visited)
    assert count.tiles == visited.sum()
    assert (h * count.rescaled, h * count.divided) == (work.rescaled, work.divided)
    assert count.products == visited.sum() * tile.block_k // options.get(
        "inner", tile.block_k
    )
    if tile.block_k == block_q:  # only the tile on the diagonal is masked
        assert count.masked == (len(rows) if is_causal else 0)


def test_two_levels_rescale_once_a_large_tile():
    one = blockwise(*draw(), block_q=16, block_k=8)[2]
    two = blockwise(*draw(), block_q=16, **TWO_LEVEL)[2]
    assert one.products == two.products
    assert one.rescaled == 4 * two.rescaled


def test_errors_name_the_argument():
    arrays = draw()
    for options, message in (
        ({"order": "diagonal"}, "order is 'diagonal'"),
        ({"inner": 3}, "inner is 3"),
        ({"tiling_mask": True}, "tiling_mask needs is_causal"),
    ):
        with pytest.raises(ValueError, match=message):
            blockwise(*arrays, block_q=16, block_k=16, **options)
    with pytest.raises(ValueError, match="multiple of key's 2"):
        blockwise(*draw(n=3, k=2), block_q=16, block_k=16)
