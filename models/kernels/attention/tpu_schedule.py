"""In which order the TPU kernels visit tiles: lists of those that are not SKIP.

A grid over all tiles would pay for each step over a hidden one; a grid over such a list
is as long as the list, which is known when the step runs. The lists lie in scalar
memory, where the pipeline reads ahead which blocks to fetch.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32

from .tiles import PART, SKIP

SMEM_BYTES = 2**19  # what the two lists of tiles may take of the 1 MiB of scalars


class Visits(NamedTuple):
    """Tiles in the order of their work, one number each, for every row and head.

    A number holds: bit 0, the first of its line (row or column of tiles); bit 1, the
    last; bits 2 and 3, SKIP, PART or FULL; 13 bits for the place in the line, 13 bits
    for the line.
    """

    steps: Int32[Array, " batch*heads*steps"]
    held: Int32[Array, " batch*heads*steps"]  # the nearest PART tile, for its operands
    count: Int32[Array, ""]  # steps of the longest list
    shape: tuple[int, int, int]  # batch, heads, steps


def schedule(table: Int8[Array, "b n outer inner"]) -> Visits:
    """The tiles that are not SKIP, line by line, so that the others cost no step.

    A line with no such tile has one step all the same: its result is zero, which
    somebody must write. Lists that are shorter than the longest repeat their end.
    """
    b, n, outer, inner = table.shape
    if max(outer, inner) >= 2**13 or 8 * b * n * outer * inner > SMEM_BYTES:
        raise NotImplementedError(
            f"tpu: {b} x {n} tables of {outer} x {inner} tiles do not fit the scalar "
            "memory; larger blocks make fewer tiles"
        )
    table = table.astype(jnp.int32)
    places = jnp.arange(inner, dtype=jnp.int32)
    listed = table != SKIP
    listed |= ~listed.any(-1, keepdims=True) & (places == 0)
    first = listed & (jnp.cumsum(listed, -1) == 1)
    last = listed & (jnp.cumsum(listed[..., ::-1], -1)[..., ::-1] == 1)
    lines = jnp.arange(outer, dtype=jnp.int32)[:, None]
    code = (lines << 17) | (places << 4) | (table << 2) | (last << 1) | first
    code, listed = (x.reshape(b, n, outer * inner) for x in (code, listed))
    order = jnp.argsort(~listed, axis=-1, stable=True)
    steps = jnp.take_along_axis(code, order, -1)
    count = listed.sum(-1, dtype=jnp.int32)[..., None]
    end = jnp.take_along_axis(steps, count - 1, -1) & ~15
    index = jnp.arange(outer * inner, dtype=jnp.int32)
    steps = jnp.where(index < count, steps, end)
    part = (steps >> 2) & 3 == PART
    latest = lax.cummax(jnp.where(part, index, -1), axis=2)
    latest = jnp.where(latest < 0, jnp.argmax(part, -1, keepdims=True), latest)
    held = jnp.take_along_axis(steps, latest, -1)
    return Visits(steps.ravel(), held.ravel(), count.max(), (b, n, outer * inner))


class Step(NamedTuple):
    first: Any  # of its line
    last: Any
    kind: Any
    inner: Any
    outer: Any


def read(steps, shape, b, n, step) -> Step:
    """Entry of a list in scalar memory."""
    batch, heads, length = shape
    row = (b if batch > 1 else 0) * heads + (n if heads > 1 else 0)
    code = steps[row * length + step]
    line = code >> 17
    return Step(code & 1, (code >> 1) & 1, (code >> 2) & 3, (code >> 4) & 8191, line)
