"""How a tensor is cut for n workers, each of which owns one chunk of whole rows.

`split` gives [n, rows, width] and `join` undoes it. Along a stated dimension chunk j is
worker j's shard of the tensor, as a sharding rule cuts it. Without one the tensor is
cut in reading order, filled up with rows of zeros; then a row is a part of a row of the
tensor, never a part of two, so that what is zero row by row stays so.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Shaped

Shape = tuple[int, ...]
WASTE = 1 / 8  # of the tensor, at most, as rows of zeros


def chunk_shape(shape: Shape, workers: int, dimension: int | None = None) -> Shape:
    """(rows, width) of a chunk. Raises ValueError for a dimension that does not divide.

    Freely cut rows are as wide as a divisor of the last dimension allows without
    filling up by more than an eighth.
    """
    if dimension is None:
        size, last = math.prod(shape), shape[-1] if shape else 1
        for width in sorted(_divisors(last), reverse=True):
            rows = -(-size // (width * workers))
            if rows * width * workers <= (1 + WASTE) * size:
                return rows, width
        return -(-size // workers), 1
    if shape[dimension] % workers:
        raise ValueError(
            f"dimension: {dimension} of shape {shape} does not divide over {workers} "
            "workers; cut along another one, or None"
        )
    part = shard_shape(shape, workers, dimension)
    return math.prod(part[:-1]), part[-1]


def shard_shape(shape: Shape, workers: int, dimension: int) -> Shape:
    return (*shape[:dimension], shape[dimension] // workers, *shape[dimension + 1 :])


def split(
    x: Shaped[Array, "*s"], workers: int, dimension: int | None = None
) -> Shaped[Array, "n r w"]:
    rows, width = chunk_shape(x.shape, workers, dimension)
    if dimension is None:
        flat = jnp.pad(x.reshape(-1), (0, workers * rows * width - x.size))
    else:
        flat = jnp.stack(jnp.split(x, workers, dimension))
    return flat.reshape(workers, rows, width)


def join(
    chunks: Shaped[Array, "n r w"], shape: Shape, dimension: int | None = None
) -> Shaped[Array, "*s"]:
    if dimension is None:
        return chunks.reshape(-1)[: math.prod(shape)].reshape(shape)
    part = shard_shape(shape, len(chunks), dimension)
    return jnp.concatenate([c.reshape(part) for c in chunks], dimension)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
