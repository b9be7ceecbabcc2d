"""Which tiles of the scores a call visits, and which of them need no mask.

One table for all kernels: a tile of `block_q` rows and `block_k` keys is

    SKIP  no row sees a key of it: not visited
    PART  visited, and masked entry by entry
    FULL  every row sees every key: visited without a mask

The table is computed inside jit, so that it follows masks, lengths and documents
without compiling anew. It never calls a tile SKIP that is seen, nor FULL one that is
not; a tile that is called PART may be either.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8

from .call import Call, Spec

SKIP, PART, FULL = 0, 1, 2


def visits(
    call: Call, spec: Spec, s: int, block_q: int, block_k: int
) -> Int8[Array, "#b #n tiles_t tiles_s"]:
    """The table of a call with s keys; the last tiles may hang over the edge.

    Axes b and n are 1 where all rows or all heads agree. Rows beyond the last see
    nothing and are nobody's: they make no tile PART.
    """
    t = call.low.shape[1]
    starts = jnp.arange(-(-s // block_k), dtype=jnp.int32) * block_k
    low, high = call.low, jnp.minimum(call.high, s)
    empty = low >= high
    # a row that sees nothing widens no tile's range, but keeps the tile from being FULL
    low, high = jnp.where(empty, s, low), jnp.where(empty, 0, high)
    first, last = _fold(low, block_q, jnp.min, s), _fold(high, block_q, jnp.max, 0)
    seen = (starts < last[..., None]) & (starts + block_k > first[..., None])
    first, last = _fold(low, block_q, jnp.max, 0), _fold(high, block_q, jnp.min, s)
    full = (starts >= first[..., None]) & (starts + block_k <= last[..., None])
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
    if call.kept is not None:
        yield [
            _by_cells(
                _by_cells(call.kept, 2, t, block_q, spec.cell[0], f),
                *(3, s, block_k, spec.cell[1], f),
            )
            for f in reductions
        ]
    if spec.sees is not None:
        yield _ask(spec.sees, t, s, block_q, block_k)


def _pool(mask, axis, block, reduce):
    """Blocks of one axis reduced; an axis of length 1 speaks for every tile."""
    if mask.shape[axis] == 1:
        return mask
    edges = [(0, 0)] * mask.ndim
    edges[axis] = (0, -mask.shape[axis] % block)
    mask = jnp.pad(mask, edges, mode="edge")
    shape = (*mask.shape[:axis], -1, block, *mask.shape[axis + 1 :])
    return reduce(mask.reshape(shape), axis=axis + 1)


def _by_cells(kept, axis, length, block, cell, reduce):
    """Cells of one axis, pooled or repeated, to tiles."""
    if block % cell == 0:
        return _pool(kept, axis, block // cell, reduce)
    if cell % block == 0:
        kept = jnp.repeat(kept, cell // block, axis)
        return lax.slice_in_dim(kept, 0, -(-length // block), axis=axis)
    raise NotImplementedError(
        f"cells of {cell} and tiles of {block} must be multiples of one another"
    )


def _ask(sees, t, s, block_q, block_k):
    """The function of every pair, a row of tiles at a time: work t s, memory s."""
    keys = jnp.minimum(jnp.arange(-(-s // block_k) * block_k, dtype=jnp.int32), s - 1)

    def row(i):
        rows = i * block_q + jnp.arange(block_q, dtype=jnp.int32)[:, None]
        seen = sees(jnp.minimum(rows, t - 1), keys).reshape(block_q, -1, block_k)
        return seen.any((0, 2)), seen.all((0, 2))

    any_, all_ = lax.map(row, jnp.arange(-(-t // block_q), dtype=jnp.int32))
    return any_[None, None], all_[None, None]
