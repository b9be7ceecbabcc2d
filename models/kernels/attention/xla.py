"""Blockwise attention in plain XLA: memory linear in length, made for CPUs.

One head at a time, a block of queries against a block of keys, so that the scores
of the moment stay in the second-level cache (Dao et al. 2022, arXiv:2205.14135,
Algorithms 1 and 2, with the divisions put off to the end as in arXiv:2307.08691,
Section 3.1). Key blocks that no query of a block sees are not visited, and only
blocks that some query sees in part are masked.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .reference import Visible

# A block of scores is block x block; measured on CPUs with 0.5 to 1 MB of
# second-level cache, head width 64: 64 is best up to length 512, 128 beyond.
SHORT, SMALL_BLOCK, LARGE_BLOCK = 512, 64, 128
HIDDEN = -1e30  # finite, so that differences of two hidden scores are not NaN


class Spec(NamedTuple):
    """Static facts of one call."""

    scale: float
    block_q: int
    block_k: int


def xla(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    *,
    scale: float,
    seen: Visible,
) -> Float[Array, "b t n h"]:
    """Same result as `reference`; saves the output and one float per row.

    Scores, softmax and sums are float32 (float64 if that comes in); weights enter
    the second product in the value's dtype.
    """
    t, s = query.shape[1], key.shape[1]
    block = SMALL_BLOCK if max(t, s) <= SHORT else LARGE_BLOCK
    spec = Spec(scale, min(block, t), min(block, s))
    query, key, value = (
        _pad(query, spec.block_q),
        _pad(key, spec.block_k),
        _pad(value, spec.block_k),
    )
    if seen.segments is not None:
        query_ids, key_ids = seen.segments
        ids = _pad(query_ids, spec.block_q, "edge"), _pad(key_ids, spec.block_k, "edge")
        seen = seen._replace(segments=ids)
    out: Any = _attend(spec, query, key, value, seen)
    return out[:, :t]


def _pad(x, block, mode="constant"):
    """Fill axis 1 up to whole blocks; padded keys lie beyond every length."""
    missing = -x.shape[1] % block
    if not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), mode=mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, query, key, value, seen):
    return _forward(spec, query, key, value, seen)[0]


def _forward(spec, query, key, value, seen):
    b, t, n, h = query.shape
    group = n // key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)

    def one_head(index, carry):
        row, head = index // n, index % n
        q = _head(query, row, head)
        k, v = _head(key, row, head // group), _head(value, row, head // group)
        out, logsumexp = _forward_head(spec, q, k, v, _tiles(spec, seen, row))
        outs, logs = carry
        outs = _put(outs, out.astype(outs.dtype), row, head)
        return outs, lax.dynamic_update_slice(logs, logsumexp[None], (index, 0))

    start = _zeros_like(query, (b, t, n, h)), _zeros_like(query, (b * n, t), wide)
    out, logsumexp = lax.fori_loop(0, b * n, one_head, start)
    return out, (query, key, value, seen, out, logsumexp)


def _backward(spec, saved, d_out):
    query, key, value, seen, out, logsumexp = saved
    b, _, n, _ = query.shape
    group = n // key.shape[2]
    wide = logsumexp.dtype

    def one_head(index, carry):
        d_query, d_key, d_value = carry
        row, head = index // n, index % n
        kv_head = head // group
        d_q, d_k, d_v = _backward_head(
            spec,
            [_head(x, row, head) for x in (query, out, d_out)],
            [_head(x, row, kv_head) for x in (key, value)],
            logsumexp[index],
            # the heads of a group add to one gradient
            [_head(x, row, kv_head) for x in (d_key, d_value)],
            _tiles(spec, seen, row),
        )
        return (
            _put(d_query, d_q.astype(d_query.dtype), row, head),
            _put(d_key, d_k, row, kv_head),
            _put(d_value, d_v, row, kv_head),
        )

    start = (
        _zeros_like(query, query.shape),
        _zeros_like(query, key.shape, wide),
        _zeros_like(query, value.shape, wide),
    )
    d_query, d_key, d_value = lax.fori_loop(0, b * n, one_head, start)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)


class Tiles(NamedTuple):
    """Which key blocks a query block visits, and what it sees there."""

    length: Int[Array, ""]
    offset: Int[Array, ""] | None
    segments: tuple[Int[Array, " t"], Int[Array, " s"]] | None
    touch: Bool[Array, "q k"] | None  # False: no id of the one is in the other


def _tiles(spec, seen, row):
    offset = None if seen.offset is None else seen.offset[row]
    if seen.segments is None:
        return Tiles(seen.lengths[row], offset, None, None)
    query_ids, key_ids = (ids[row] for ids in seen.segments)
    q, k = query_ids.reshape(-1, spec.block_q), key_ids.reshape(-1, spec.block_k)
    touch = (q.min(1)[:, None] <= k.max(1)) & (k.min(1) <= q.max(1)[:, None])
    return Tiles(seen.lengths[row], offset, (query_ids, key_ids), touch)


def _visit(spec, tiles, i, tile, carry):
    """Run `tile(j, masked, carry)` over the key blocks that query block i sees."""
    last = tiles.length  # keys below it may be seen by the last query of the block
    full = tiles.length  # keys below it are seen by every query of the block
    if tiles.offset is not None:
        first_row = i * spec.block_q + tiles.offset
        last = jnp.minimum(last, first_row + spec.block_q)
        full = jnp.minimum(full, first_row + 1)
    end = jnp.maximum(last + spec.block_k - 1, 0) // spec.block_k
    if tiles.segments is not None:

        def where_touching(j, carry):
            return lax.cond(
                tiles.touch[i, j], lambda c: tile(j, True, c), lambda c: c, carry
            )

        return lax.fori_loop(0, end, where_touching, carry)
    whole = jnp.maximum(full, 0) // spec.block_k
    carry = lax.fori_loop(0, whole, lambda j, c: tile(j, False, c), carry)
    return lax.fori_loop(whole, end, lambda j, c: tile(j, True, c), carry)


def _mask(spec, tiles, i, j, *, keys_first):
    """The visible pairs of a tile, [q, k] or, with `keys_first`, [k, q]."""
    shape = (spec.block_q, spec.block_k)
    shape, q_axis = (shape[::-1], 1) if keys_first else (shape, 0)
    rows = i * spec.block_q + lax.broadcasted_iota(jnp.int32, shape, q_axis)
    columns = j * spec.block_k + lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
    mask = columns < tiles.length
    if tiles.offset is not None:
        mask &= columns <= rows + tiles.offset
    if tiles.segments is not None:
        q_ids = _block(tiles.segments[0], i, spec.block_q)
        k_ids = _block(tiles.segments[1], j, spec.block_k)
        mask &= jnp.expand_dims(q_ids, 1 - q_axis) == jnp.expand_dims(k_ids, q_axis)
    return mask


def _forward_head(spec, q, k, v, tiles):
    """[t, h], [s, h], [s, h] -> output [t, h] and log-sum-exp [t], both wide."""
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def one_block(i):
        q_i = (_block(q, i, spec.block_q).astype(wide) * spec.scale).astype(q.dtype)

        def tile(j, masked, carry):
            out, top, total = carry
            scores = _dot(q_i, _block(k, j, spec.block_k), 1, 1)
            if masked:
                mask = _mask(spec, tiles, i, j, keys_first=False)
                scores = jnp.where(mask, scores, HIDDEN)
            new_top = jnp.maximum(top, scores.max(1))
            weights = jnp.exp(scores - new_top[:, None])
            if masked:
                weights = jnp.where(mask, weights, 0)
            shrink = jnp.exp(top - new_top)
            total = shrink * total + weights.sum(1)
            more = _dot(weights.astype(v.dtype), _block(v, j, spec.block_k), 1, 0)
            return shrink[:, None] * out + more, new_top, total

        start = (
            _zeros_like(q, q_i.shape, wide),
            _zeros_like(q, (spec.block_q,), wide) + HIDDEN,
            _zeros_like(q, (spec.block_q,), wide),
        )
        out, top, total = _visit(spec, tiles, i, tile, start)
        # a row that saw nothing has total 0: output 0, log-sum-exp -inf
        return out / jnp.where(total == 0, 1, total)[:, None], top + jnp.log(total)

    out, logsumexp = lax.map(one_block, jnp.arange(len(q) // spec.block_q))
    return out.reshape(q.shape), logsumexp.reshape(-1)


def _backward_head(spec, queries, keys, logsumexp, summed, tiles):
    """Gradients of one head; the scores lie transposed, [k, q].

    So three of the five products contract rows with columns, which is the fast
    order on CPUs, and the row statistics broadcast along the fast axis.
    """
    (q, out, d_out), (k, v), wide = queries, keys, logsumexp.dtype
    row_dot = (out.astype(wide) * d_out.astype(wide)).sum(1)

    def one_block(i, carry):
        d_q, d_k, d_v = carry
        q_i, d_out_i, logsumexp_i, row_dot_i = (
            _block(x, i, spec.block_q) for x in (q, d_out, logsumexp, row_dot)
        )
        q_i = (q_i.astype(wide) * spec.scale).astype(q.dtype)

        def tile(j, masked, carry):
            d_q_i, d_k, d_v = carry
            k_j, v_j = _block(k, j, spec.block_k), _block(v, j, spec.block_k)
            weights = jnp.exp(_dot(k_j, q_i, 1, 1) - logsumexp_i)
            if masked:
                mask = _mask(spec, tiles, i, j, keys_first=True)
                weights = jnp.where(mask, weights, 0)
            d_scores = weights * (_dot(v_j, d_out_i, 1, 1) - row_dot_i)
            d_scores = d_scores.astype(q.dtype)
            d_v = _add(d_v, _dot(weights.astype(v.dtype), d_out_i, 1, 0), j)
            d_k = _add(d_k, _dot(d_scores, q_i, 1, 0), j)
            return d_q_i + _dot(d_scores, k_j, 0, 0), d_k, d_v

        start = _zeros_like(q, q_i.shape, wide), d_k, d_v
        d_q_i, d_k, d_v = _visit(spec, tiles, i, tile, start)
        place = (i * spec.block_q, 0)
        return lax.dynamic_update_slice(d_q, spec.scale * d_q_i, place), d_k, d_v

    start = (_zeros_like(q, q.shape, wide), *summed)
    return lax.fori_loop(0, len(q) // spec.block_q, one_block, start)


def _dot(x, y, x_axis, y_axis):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    contract = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, contract, preferred_element_type=wide)


def _block(x, i, size):
    return lax.dynamic_slice_in_dim(x, i * size, size)


def _add(x, more, j):
    place = (j * len(more), 0)
    old = lax.dynamic_slice(x, place, more.shape)
    return lax.dynamic_update_slice(x, old + more, place)


def _head(x, row, head):
    _, length, _, width = x.shape
    block = lax.dynamic_slice(x, (row, 0, head, 0), (1, length, 1, width))
    return block.reshape(length, width)


def _put(x, block, row, head):
    return lax.dynamic_update_slice(x, block[None, :, None], (row, 0, head, 0))


def _zeros_like(x, shape, dtype=None):
    """Zeros that vary over the manual mesh axes that x varies over."""
    return lax.full_like(x, 0, dtype, shape)
