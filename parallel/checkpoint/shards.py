"""This process's share of an array, in chunks that are copied and written at a time."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from .layout import Box, Shape, sizes
from .storage import words


class Chunk(NamedTuple):
    """A box of an array that lies in one shard; of a key's data, for keys."""

    shard: int  # index into `addressable_shards`
    start: Shape  # of the shard
    box: Box  # in the whole array
    of: Shape  # the whole array
    grid: Shape  # shape of the stored chunks
    dtype: np.dtype  # unsigned words

    @property
    def shape(self) -> Shape:
        return sizes(self.box)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def chunks_of(leaf: jax.Array, most: int) -> Iterator[Chunk]:
    """One copy of each element that this process holds the first replica of.

    Chunks have at most `most` bytes where the first dimension of a shard has a divisor
    that makes them so small, and none without elements.
    """
    dtype = words(leaf.dtype)
    data = _data(leaf)
    if not data.size:
        return
    each = data.sharding.shard_shape(data.shape)
    grid = tuple(each)
    if each:
        rows = _rows(each[0], math.prod(each[1:]) * dtype.itemsize, most)
        grid = (rows, *each[1:])
    for index, shard in enumerate(data.addressable_shards):
        if shard.replica_id:
            continue
        edges = [s.indices(n)[:2] for s, n in zip(shard.index, data.shape, strict=True)]
        start = tuple(edge[0] for edge in edges)
        if not each:
            yield Chunk(index, start, (), (), (), dtype)
            continue
        for row in range(edges[0][0], edges[0][1], grid[0]):
            box = ((row, row + grid[0]), *edges[1:])
            yield Chunk(index, start, box, data.shape, grid, dtype)


def copies(leaf: jax.Array, most: int) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Chunks with their elements as words, each shard brought to the host once.

    On a CPU the words are no copy, but a view of the device's memory, which must be
    dropped before the array may be donated.
    """
    words_of, held = np.empty(0), -1
    for chunk in chunks_of(leaf, most):
        if chunk.shard != held:
            held = chunk.shard
            words_of = np.asarray(_data(leaf).addressable_shards[held].data)
        if chunk.box:
            first = chunk.box[0][0] - chunk.start[0]
            yield chunk, words_of[first : first + chunk.shape[0]].view(chunk.dtype)
        else:
            yield chunk, words_of.reshape(1).view(chunk.dtype).reshape(())


def _data(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def _rows(rows: int, row_bytes: int, most: int) -> int:
    """The largest divisor of `rows` whose bytes are at most `most`, or 1."""
    fits = max(1, min(rows, most // max(1, row_bytes)))
    return next(n for n in range(fits, 0, -1) if rows % n == 0)
