"""The published orders of blockwise attention, side by side in plain JAX, counted.

One loop with options; the library's own form is `xla.py`. For row block i and key tile
j the papers differ in which loop is the outer one, when the output is normalised, how
often the softmax statistics are renewed, and where the mask comes from:

    order="k_outer"   FlashAttention, arXiv:2205.14135, Algorithm 1: output normalised
                      at every tile, kept with two statistics a row
    order="q_outer"   FlashAttention-2, arXiv:2307.08691, Algorithm 1: divided once
    inner             FastAttention, arXiv:2410.16663, two-level tiling: products in
                      pieces of `inner` keys, statistics once a tile of `block_k`
    tiling_mask       the same paper: causal tiles are masked by a view of one small
                      triangle in place of comparing indices

All give `reference` to rounding. `Count` is counted by the running loop.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .tiles import FULL, PART, SKIP

HIDDEN = -1e30  # finite, so that differences of two hidden scores are not NaN


class Count(NamedTuple):
    """What one head did; equal for all heads."""

    tiles: Int[Array, ""]  # visited
    masked: Int[Array, ""]  # visited tiles that needed a mask
    rescaled: Int[Array, ""]  # rows of out multiplied by exp(old - new maximum)
    divided: Int[Array, ""]  # rows of out divided by their sum
    products: Int[Array, ""]  # pieces of scores formed


def triangle(block: int) -> Bool[Array, "2*block 2*block"]:
    """The mask of which every causal tile of at most block x block is a view."""
    return jnp.tril(jnp.ones((2 * block, 2 * block), bool))


def view(
    triangle: Bool[Array, "m m"], delta: Int[Array, ""] | int, rows: int, keys: int
) -> Bool[Array, "rows keys"]:
    """Key c of a tile is seen by its row r iff c - r <= delta, for partial tiles.

    delta = first row + query offset - first key. Right for -rows < delta < keys - 1,
    that is where `kind` is PART, if rows and keys are at most half the triangle.
    """
    start = jnp.maximum(delta, 0), jnp.maximum(-delta, 0)
    return lax.dynamic_slice(triangle, start, (rows, keys))


def kind(delta, rows: int, keys: int):
    """SKIP, PART or FULL of a causal tile."""
    return jnp.where(delta <= -rows, SKIP, jnp.where(delta >= keys - 1, FULL, PART))


@functools.partial(
    jax.jit,
    static_argnames=(
        "order",
        "block_q",
        "block_k",
        "inner",
        "is_causal",
        "tiling_mask",
    ),
)
def blockwise(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k v"],
    *,
    order: str = "q_outer",
    block_q: int,
    block_k: int,
    inner: int | None = None,
    is_causal: bool = False,
    query_offset: int | Int[Array, ""] = 0,
    tiling_mask: bool = False,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b t n"], Count]:
    """Output, log-sum-exp (nats) and what one head did.

    Scores, sums and the accumulator are float32 (float64 if that comes in); the output
    has the query's dtype.

    Args:
      inner: keys of a piece; it divides block_k, which is the default.
      is_causal: row i sees keys j <= i + query_offset; tiles above are not visited.
      tiling_mask: only for causal attention whose blocks divide the lengths.

    Raises:
      ValueError: an order or sizes that do not exist or fit together.
    """
    (b, t, n, h), (_, s, k, v) = query.shape, value.shape
    inner = block_k if inner is None else inner
    if order not in ("q_outer", "k_outer"):
        raise ValueError(f"order is {order!r}; it must be 'q_outer' or 'k_outer'")
    if block_k % inner:
        raise ValueError(f"inner is {inner}; it must divide block_k = {block_k}")
    if tiling_mask and (not is_causal or t % block_q or s % block_k):
        raise ValueError(
            f"tiling_mask needs is_causal and blocks that divide the lengths; got "
            f"{t} rows in blocks of {block_q} and {s} keys in blocks of {block_k}"
        )
    if n % k:
        raise ValueError(f"query has {n} heads; it must be a multiple of key's {k}")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    plan = _Plan(t, s, block_q, block_k, inner, is_causal, tiling_mask, wide)
    run = {"q_outer": _q_outer, "k_outer": _k_outer}[order]
    offset = jnp.asarray(query_offset, jnp.int32)

    def head(index) -> Any:
        row, of_query = index // n, index % n
        of_key = of_query // (n // k)
        q = _pad(query[row, :, of_query] * h**-0.5, block_q)
        return run(
            plan,
            q,
            _pad(key[row, :, of_key], block_k),
            _pad(value[row, :, of_key], block_k),
            offset,
        )

    out, logs, count = lax.map(head, jnp.arange(b * n))
    out = out[:, :t].reshape(b, n, t, v).swapaxes(1, 2).astype(query.dtype)
    logs = logs[:, :t].reshape(b, n, t).swapaxes(1, 2)
    return out, logs, jax.tree.map(lambda x: x[0], count)


class _Plan(NamedTuple):
    t: int
    s: int
    block_q: int
    block_k: int
    inner: int
    is_causal: bool
    tiling_mask: bool
    wide: Any


def _pad(x, block):
    return jnp.pad(x, [(0, -x.shape[0] % block), (0, 0)])


def _block(x, i, size):
    return lax.dynamic_slice_in_dim(x, i * size, size)


def _dot(x, y, wide, y_axis):
    contract = (((1,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, contract, preferred_element_type=wide)


def _scores(plan, q_i, k, j):
    """[block_q, block_k] in pieces of `inner` keys."""
    k_j = _block(k, j, plan.block_k).reshape(-1, plan.inner, k.shape[1])
    pieces = lax.map(lambda piece: _dot(q_i, piece, plan.wide, 1), k_j)
    return jnp.moveaxis(pieces, 0, 1).reshape(len(q_i), plan.block_k)


def _weighted(plan, weights, v, j):
    """weights @ v_j, added up piece by piece."""
    v_j = _block(v, j, plan.block_k).reshape(-1, plan.inner, v.shape[1])
    pieces = jnp.moveaxis(weights.reshape(len(weights), -1, plan.inner), 1, 0)

    def add(total, piece):
        return total + _dot(piece[0].astype(v.dtype), piece[1], plan.wide, 0), None

    zero = jnp.zeros((len(weights), v.shape[1]), plan.wide)
    return lax.scan(add, zero, (pieces, v_j))[0]


def _delta(plan, i, j, offset):
    return i * plan.block_q + offset - j * plan.block_k


def _kind(plan, i, j, offset):
    hangs = (j + 1) * plan.block_k > plan.s
    found = jnp.where(hangs, PART, FULL)
    if plan.is_causal:
        of_tile = kind(_delta(plan, i, j, offset), plan.block_q, plan.block_k)
        found = jnp.minimum(found, of_tile)  # SKIP < PART < FULL
    return found


def _mask(plan, i, j, offset):
    delta = _delta(plan, i, j, offset)
    if plan.tiling_mask:
        whole = triangle(max(plan.block_q, plan.block_k))
        return view(whole, delta, plan.block_q, plan.block_k)
    rows = lax.broadcasted_iota(jnp.int32, (plan.block_q, plan.block_k), 0)
    keys = lax.broadcasted_iota(jnp.int32, (plan.block_q, plan.block_k), 1)
    seen = keys + j * plan.block_k < plan.s
    return seen & (keys - rows <= delta) if plan.is_causal else seen


def _step(plan, i, j, offset, q_i, k, top):
    """Weights of a tile, their row sums, the new maximum, exp(old - new)."""

    def weigh(masked):
        scores = _scores(plan, q_i, k, j)
        if not masked:
            new_top = jnp.maximum(top, scores.max(1))
            return jnp.exp(scores - new_top[:, None]), new_top
        seen = _mask(plan, i, j, offset)
        scores = jnp.where(seen, scores, HIDDEN)
        new_top = jnp.maximum(top, scores.max(1))
        return jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0), new_top

    part = _kind(plan, i, j, offset) == PART
    weights, new_top = lax.cond(part, lambda: weigh(True), lambda: weigh(False))
    return weights, weights.sum(1), new_top, jnp.exp(top - new_top)


def _counted(plan, count, i, j, offset, divided):
    return Count(
        count.tiles + 1,
        count.masked + (_kind(plan, i, j, offset) == PART),
        count.rescaled + plan.block_q,
        count.divided + divided,
        count.products + plan.block_k // plan.inner,
    )


def _nothing() -> Count:
    return Count(*[jnp.int32(0)] * len(Count._fields))


def _logsumexp(top, total):
    return jnp.where(
        total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total))
    )


def _q_outer(plan, q, k, v, offset):
    tiles_s = len(k) // plan.block_k

    def row_block(count, i):
        q_i = _block(q, i, plan.block_q)

        def tile(j, carry):
            out, top, total, count = carry
            weights, summed, top, shrink = _step(plan, i, j, offset, q_i, k, top)
            out = shrink[:, None] * out + _weighted(plan, weights, v, j)
            count = _counted(plan, count, i, j, offset, 0)
            return out, top, shrink * total + summed, count

        end = tiles_s
        if plan.is_causal:
            seen = (i + 1) * plan.block_q + offset  # keys below it
            end = jnp.clip(-(-seen // plan.block_k), 0, tiles_s)
        start = (
            jnp.zeros((plan.block_q, v.shape[1]), plan.wide),
            jnp.full(plan.block_q, HIDDEN, plan.wide),
            jnp.zeros(plan.block_q, plan.wide),
            count,
        )
        out, top, total, count = lax.fori_loop(0, end, tile, start)
        out = out / jnp.where(total == 0, 1, total)[:, None]
        count = count._replace(divided=count.divided + plan.block_q)
        return count, (out, _logsumexp(top, total))

    blocks = jnp.arange(len(q) // plan.block_q)
    count, (out, logs) = lax.scan(row_block, _nothing(), blocks)
    return out.reshape(len(q), -1), logs.reshape(-1), count


def _k_outer(plan, q, k, v, offset):
    tiles_t = len(q) // plan.block_q

    def key_block(carry, j):
        def tile(i, carry):
            out, top, total, count = carry
            old_out, old_top, old_total = (
                _block(x, i, plan.block_q) for x in (out, top, total)
            )
            q_i = _block(q, i, plan.block_q)
            weights, summed, new_top, shrink = _step(
                plan, i, j, offset, q_i, k, old_top
            )
            kept = shrink * old_total
            new_total = kept + summed
            new_out = kept[:, None] * old_out + _weighted(plan, weights, v, j)
            new_out /= jnp.where(new_total == 0, 1, new_total)[:, None]
            start = i * plan.block_q
            return (
                lax.dynamic_update_slice(out, new_out, (start, 0)),
                lax.dynamic_update_slice(top, new_top, (start,)),
                lax.dynamic_update_slice(total, new_total, (start,)),
                _counted(plan, count, i, j, offset, plan.block_q),
            )

        first = 0
        if plan.is_causal:
            # the first row block whose last row sees the first key of tile j
            first = jnp.clip((j * plan.block_k - offset) // plan.block_q, 0, tiles_t)
        return lax.fori_loop(first, tiles_t, tile, carry), None

    start = (
        jnp.zeros((len(q), v.shape[1]), plan.wide),
        jnp.full(len(q), HIDDEN, plan.wide),
        jnp.zeros(len(q), plan.wide),
        _nothing(),
    )
    blocks = jnp.arange(len(k) // plan.block_k)
    (out, top, total, count), _ = lax.scan(key_block, start, blocks)
    return out, _logsumexp(top, total), count
