"""The nearest code, without the matrix of all distances.

|x - C_j|^2 is compared as |C_j|^2 / 2 - x C_j, which orders the codes alike, a block of
rows and of codes at a time. The best of a block is found by a minimum and then the
first place that holds it: two plain reductions, faster than one over pairs.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Metric = Literal["euclidean", "cosine"]
ROWS, CODES = 1024, 256  # of a block: 1 MiB of scores, which caches hold


def unit(x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """x / |x|, float32; 0 stays 0, with a gradient of 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x**2, -1, keepdims=True)
    safe = jnp.where(square > 0, square, 1.0)
    return jnp.where(square > 0, x * jax.lax.rsqrt(safe), 0.0)


def nearest(
    x: Float[Array, "*b e"],
    codes: Float[Array, "k e"],
    *,
    metric: Metric = "euclidean",
    rows: int = ROWS,
    block: int = CODES,
) -> Int[Array, "*b"]:
    """Index of the nearest code of each position, int32; ties go to the first code.

    Scores are float32 for every input dtype: in bfloat16 near codes tie. At most
    rows x block of them exist at a time. "cosine" takes the largest angle cosine. A
    position that holds a NaN gets some index in range.
    """
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric: {metric!r}, but allowed are 'euclidean', 'cosine'")
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    codes = codes.astype(jnp.float32)
    if metric == "cosine":  # the length of x does not change the order
        codes = unit(codes)
        half = jnp.zeros(len(codes))
    else:
        half = 0.5 * jnp.sum(codes**2, -1)
    spare = -len(codes) % min(block, len(codes))  # codes that are never chosen
    blocks = (
        jnp.pad(codes, ((0, spare), (0, 0))).reshape(
            -1, min(block, len(codes)), x.shape[-1]
        ),
        jnp.pad(half, (0, spare), constant_values=jnp.inf).reshape(
            -1, min(block, len(codes))
        ),
    )
    pieces = max(1, -(-len(flat) // rows))
    if pieces == 1:
        return _search(flat, *blocks).reshape(x.shape[:-1])
    # Piece j takes rows j, j + pieces, ...: where rows lie over devices, none moves.
    cut = jnp.pad(flat, ((0, -len(flat) % pieces), (0, 0)))
    cut = cut.reshape(-1, pieces, x.shape[-1]).swapaxes(0, 1)
    found = jax.lax.map(lambda piece: _search(piece, *blocks), cut)
    return found.swapaxes(0, 1).reshape(-1)[: len(flat)].reshape(x.shape[:-1])


def _search(x, codes, half) -> Int[Array, " n"]:
    """Over blocks of codes [m, j, e]; a later block must be nearer to win."""
    count, size, _ = codes.shape

    def best(codes, half):
        dots = jnp.einsum("ne,je->nj", x, codes, precision=jax.lax.Precision.HIGHEST)
        scores = half - dots
        least = scores.min(-1)
        place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        first = jnp.where(scores <= least[:, None], place, size).min(-1)
        return least, jnp.minimum(first, size - 1)  # `size` is found beside a NaN

    if count == 1:
        return best(codes[0], half[0])[1]

    def visit(held, block):
        least, index = held
        codes, half, offset = block
        score, place = best(codes, half)
        nearer = score < least
        held = jnp.where(nearer, score, least), jnp.where(nearer, place + offset, index)
        return held, None

    start = jnp.full_like(x[:, 0], jnp.inf), jnp.zeros_like(x[:, 0], jnp.int32)
    offsets = jnp.arange(count, dtype=jnp.int32) * size
    return jax.lax.scan(visit, start, (codes, half, offsets))[0][1]
