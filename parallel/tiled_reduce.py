"""Sums over devices, tile by tile, so that one tile travels while the next is computed.

Tensor-parallel attention ends with a projection whose partial results are added up over
the mesh axis that the heads are cut along. Lin et al. 2024 (FastAttention,
arXiv:2410.16663, "tiling-AllReduce") cut the rows: while tile i is being reduced, tile
i + 1 is computed. With times c_i to compute and r_i to reduce a tile, one after another
on each of the two resources, n equal tiles take

    c + (n - 1) max(c, r) + r    in place of    n (c + r).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def tiled_reduce(
    partial: Callable[[Array], Float[Array, "rows ..."]],
    rows: Array,
    axis_name: str | tuple[str, ...],
    *,
    tiles: int,
) -> Float[Array, "rows ..."]:
    """psum of partial(rows) over `axis_name`, inside shard_map, in one psum a tile.

    Equal to `lax.psum(partial(rows), axis_name)` for a `partial` that treats rows
    alone, such as attention and output projection of the local heads. A turn of the
    loop computes a tile and reduces the one before: neither waits for the other, and
    no compiler merges reductions of different turns, as it does with a row of them
    (two tiles are one turn, which may be inlined and merged: give at least three).

    Args:
      rows: cut along its first axis.
      tiles: how many; it divides the rows.

    Raises:
      ValueError: tiles that do not divide the rows.
    """
    if tiles < 1 or len(rows) % tiles:
        raise ValueError(f"tiles is {tiles}; it must divide the {len(rows)} rows")
    cut = rows.reshape(tiles, len(rows) // tiles, *rows.shape[1:])

    def turn(waiting, tile):
        return partial(tile), lax.psum(waiting, axis_name)

    last, done = lax.scan(turn, partial(cut[0]), cut[1:])
    done = jnp.concatenate([done, lax.psum(last, axis_name)[None]])
    return done.reshape(len(rows), *last.shape[1:])


def project(
    heads: Float[Array, "rows features"],
    weight: Float[Array, "features d"],
    axis_name: str | tuple[str, ...],
    *,
    tiles: int = 1,
) -> Float[Array, "rows d"]:
    """The output projection of local heads, summed over the axis they are cut along.

    Products are accumulated in float32 and travel in the dtype of `heads`.
    """

    def partial(x):
        return jnp.dot(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)

    return tiled_reduce(partial, heads, axis_name, tiles=tiles)


def finish(compute: Sequence[float], reduce: Sequence[float]) -> float:
    """When the last reduction ends: tiles in order, one processor and one wire.

    Times in any one unit; tile i is reduced once it is computed and the wire is free.
    """
    computed = reduced = 0.0
    for c, r in zip(compute, reduce, strict=True):
        computed += c
        reduced = max(computed, reduced) + r
    return reduced
