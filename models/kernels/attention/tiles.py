"""Which tiles of the scores a call visits, and which of them need no mask.

One table for all kernels: a tile of `block_q` rows and `block_k` keys is

    SKIP  no row sees a key of it: not visited
    PART  visited, and masked entry by entry
    FULL  every row sees every key: visited without a mask

The table is computed inside jit, so that it follows masks, lengths and documents
without compiling anew. It never calls a tile SKIP that is seen, nor FULL one that is
not; a tile that is called PART may be either.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int8

from .call import Call, Spec

SKIP, PART, FULL = 0, 1, 2


class Spans(NamedTuple):
    """Key tiles of each row tile by the bounds alone, each a range of tile numbers."""

    first: Int[Array, "b tiles_t"]  # [first, last) are visited
    last: Int[Array, "b tiles_t"]
    full_first: Int[Array, "b tiles_t"]  # [full_first, full_last) within need no mask
    full_last: Int[Array, "b tiles_t"]


def spans(call: Call, s: int, block_q: int, block_k: int) -> Spans:
    """What `call.low` and `call.high` let a tile see; all else is left unread."""
    low, high = call.low, jnp.minimum(call.high, s)
    empty = low >= high
    # a row that sees nothing widens no tile's range, but keeps the tile from being FULL
    low, high = jnp.where(empty, s, low), jnp.where(empty, 0, high)
    first = _fold(low, block_q, jnp.min, s) // block_k
    last = -(-_fold(high, block_q, jnp.max, 0) // block_k)
    full_first = -(-_fold(low, block_q, jnp.max, 0) // block_k)
    full_last = _fold(high, block_q, jnp.min, s) // block_k
    last = jnp.maximum(last, first)
    full_first = jnp.clip(full_first, first, last)
    return Spans(first, last, full_first, jnp.clip(full_last, full_first, last))


def visits(
    call: Call, spec: Spec, s: int, block_q: int, block_k: int
) -> Int8[Array, "#b #n tiles_t tiles_s"]:
    """The table of a call with s keys; the last tiles may hang over the edge.

    Axes b and n are 1 where all rows or all heads agree. Rows beyond the last see
    nothing and are nobody's: they make no tile PART. A tile with keys beyond the last
    is never FULL.
    """
    t = call.low.shape[1]
    tile = jnp.arange(-(-s // block_k), dtype=jnp.int32)
    span = [x[..., None] for x in spans(call, s, block_q, block_k)]
    seen = (tile >= span[0]) & (tile < span[1])
    full = (tile >= span[2]) & (tile < span[3])
    if call.segments is not None:
        q_ids, k_ids = call.segments
        q_min, q_max = (
            _fold(q_ids, block_q, f, "edge")[..., None] for f in (jnp.min, jnp.max)
        )
        k_min, k_max = (
            _fold(k_ids, block_k, f, "edge")[:, None] for f in (jnp.min, jnp.max)
        )
        seen &= (q_min <= k_max) & (k_min <= q_max)
        full &= (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
    seen, full = seen[:, None], full[:, None]
    for any_, all_ in _pooled(call, spec, t, s, block_q, block_k):
        seen, full = seen & any_, full & all_
    seen, full = jnp.broadcast_arrays(seen, full)
    return jnp.where(seen, jnp.where(full, FULL, PART), SKIP).astype(jnp.int8)


def _fold(x, block, reduce, fill):
    """[b, length] -> [b, tiles], by blocks; what hangs over does not count."""
    missing = -x.shape[1] % block
    if fill == "edge":
        x = jnp.pad(x, ((0, 0), (0, missing)), mode="edge")
    else:
        x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
    return reduce(x.reshape(x.shape[0], -1, block), axis=2)


def _pooled(call, spec, t, s, block_q, block_k):
    """(any, all) per tile of the mask, the cells and the function of indices."""
    reductions = (jnp.any, jnp.all)
    if call.mask is not None:
        yield [
            _pool(_pool(call.mask, 2, block_q, f), 3, block_k, f) for f in reductions
        ]
    if call.kept is not None and spec.cell is not None:
        rows, keys = (2, t, block_q, spec.cell[0]), (3, s, block_k, spec.cell[1])
        yield [
            _by_cells(_by_cells(call.kept, *rows, every), *keys, every)
            for every in (False, True)
        ]
    if spec.sees is not None:
        yield _ask(spec.sees, t, s, block_q, block_k)


def _pool(mask, axis, block, reduce):
    """Blocks of one axis reduced; an axis of length 1 speaks for every tile."""
    length = mask.shape[axis]
    if length == 1:
        return mask
    whole = length - length % block  # the rest apart: padding would copy the mask
    body = lax.slice_in_dim(mask, 0, whole, axis=axis)
    shape = (*mask.shape[:axis], whole // block, block, *mask.shape[axis + 1 :])
    body = reduce(body.reshape(shape), axis=axis + 1)
    if whole == length:
        return body
    rest = lax.slice_in_dim(mask, whole, length, axis=axis)
    rest = reduce(rest, axis=axis, keepdims=True)
    return jnp.concatenate([body, rest], axis)


def _by_cells(kept, axis, length, block, cell, every):
    """Cells of one axis to tiles: whether any, or every, cell of a tile is kept."""
    starts = jnp.arange(0, length, block)
    first, last = starts // cell, (jnp.minimum(starts + block, length) - 1) // cell
    edges = [(0, 0)] * kept.ndim
    edges[axis] = (1, 0)
    counts = jnp.cumsum(jnp.pad(kept.astype(jnp.int32), edges), axis)
    counts = jnp.take(counts, last + 1, axis) - jnp.take(counts, first, axis)
    if not every:
        return counts > 0
    cells = (last + 1 - first).reshape([-1 if a == axis else 1 for a in range(4)])
    return counts == cells


def _ask(sees, t, s, block_q, block_k):
    """The function of every pair, a row of tiles at a time: work t s, memory s."""
    keys = jnp.minimum(jnp.arange(-(-s // block_k) * block_k, dtype=jnp.int32), s - 1)

    def row(i):
        rows = i * block_q + jnp.arange(block_q, dtype=jnp.int32)[:, None]
        seen = sees(jnp.minimum(rows, t - 1), keys).reshape(block_q, -1, block_k)
        return seen.any((0, 2)), seen.all((0, 2))

    any_, all_ = lax.map(row, jnp.arange(-(-t // block_q), dtype=jnp.int32))
    return any_[None, None], all_[None, None]
