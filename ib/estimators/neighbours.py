"""Distances of one row to all rows, and maps over rows by blocks.

A block of `block` rows holds block x n distances at a time, whatever the number of
features: they are taken in one by one.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 256

Norm = Literal["max", "squares"]


def distances(
    point: Float[Array, " d"], rows: Float[Array, "n d"], norm: Norm
) -> Float[Array, " n"]:
    """max_f |point_f - row_f|, or the sum of squares of the same differences.

    >>> distances(jnp.array([0.0, 0.0]), jnp.array([[3.0, 4.0]]), "max").tolist()
    [4.0]
    """

    def take_in(total, columns):
        a, column = columns
        gap = jnp.abs(a - column)
        return (jnp.maximum(total, gap) if norm == "max" else total + gap**2), None

    start = jnp.zeros_like(rows, shape=rows.shape[:1])
    return lax.scan(take_in, start, (point, rows.T))[0]


def to_others(
    index: Int[Array, ""], rows: Float[Array, "n d"], norm: Norm
) -> Float[Array, " n"]:
    """Distances of rows[index] to all rows, inf to itself."""
    found = distances(rows[index], rows, norm)
    return jnp.where(jnp.arange(rows.shape[0]) == index, jnp.inf, found)


def nearest(distance: Float[Array, " n"], k: int) -> Float[Array, " k"]:
    """The k least, in rising order.

    They lie in the k groups of the least minima, so that no more than these are sorted.

    >>> nearest(jnp.array([3.0, 1.0, 2.0]), 2).tolist()
    [1.0, 2.0]
    """
    n = distance.shape[0]
    size = round((n / k) ** 0.5)  # the least work: n / size minima, k size candidates
    groups = -(-n // size)
    if groups > 2 * k:
        filled = jnp.full(size * groups - n, jnp.inf, distance.dtype)
        grouped = jnp.concatenate([distance, filled]).reshape(size, groups)
        chosen = lax.top_k(-grouped.min(0), k)[1]
        distance = grouped[:, chosen].ravel()
    return -lax.top_k(-distance, k)[0]


def each_row(function: Callable[[Int[Array, ""]], Any], n: int, block: int) -> Any:
    """function(i) for i < n, `block` of them at a time.

    Raises: ValueError for a block below 1.
    """
    if block < 1:
        raise ValueError(f"block: {block} rows, but it must be at least 1")
    return lax.map(function, jnp.arange(n), batch_size=min(block, n))


def check_k(k: int, n: int) -> None:
    """Raises: ValueError unless 1 <= k < n."""
    if not 1 <= k < n:
        raise ValueError(f"k: {k} neighbours, but with {n} rows 1 to {n - 1} exist")
