"""What the TPU kernels share: their operands, and the scores of a tile.

Tiles of scores lie transposed, [keys, queries]: row statistics, bounds and document ids
are then short vectors along the lanes of the chip, and neither softmax nor its gradient
reduces across lanes. A tile is worked off in pieces, `PIECE` keys by `Tiling.columns`
queries; scores are kept in base 2, since the chip computes 2^x.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from . import dropout
from .call import Call, Spec

LOG2E = math.log2(math.e)
LANES = 128
PIECE = 256  # keys of one product of scores: as many rows as the widest unit has
FLOOR = -1e30  # no score that counts is below; twice of it is still finite
HIDDEN = 2 * FLOOR  # exp2(HIDDEN - FLOOR) is 0, so that hidden weights need no mask
VMEM_BYTES = 56 * 2**20  # of 64 MiB on v5p and 7x, 128 MiB on v5e and v6e


class Tiling(NamedTuple):
    """Sizes of tiles; see `tpu.BLOCKS` for those that are chosen by default."""

    q: int  # rows of a tile
    k: int  # keys that are fetched at a time
    compute: int  # keys to one update of the running maximum; divides k
    columns: int  # rows whose scores are computed while the ones before are summed
    rows: int = 16384  # rows whose gradient is held on chip in the backward pass


class Plan(NamedTuple):
    """Static facts of a call in this form."""

    spec: Spec
    blocks: Tiling
    interpret: Any

    def params(self, *dimensions: Any) -> dict[str, Any]:
        return {
            "interpret": self.interpret,
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=dimensions, vmem_limit_bytes=VMEM_BYTES
            ),
        }


class Place(NamedTuple):
    """Where a tile is: batch row, head, row of tiles, column of tiles."""

    b: Any
    n: Any
    i: Any
    j: Any


class Operand(NamedTuple):
    """An array, its block, and the block's index at a place."""

    array: Array
    block: tuple[int | None, ...]
    index: Callable[[Place], tuple]

    def at(self, place: Callable[..., Place]) -> pl.BlockSpec:
        return pl.BlockSpec(self.block, lambda *ids: self.index(place(*ids)))


def pad(x: Array, axis: int, multiple: int, mode: str = "constant") -> Array:
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    edges = [(0, 0)] * x.ndim
    edges[axis] = (0, missing)
    return jnp.pad(x, edges, mode=mode)


def upright(width: int) -> int:
    """Sublanes that a width takes: the tiles of 16-bit numbers have 16 rows."""
    return -(-width // 16) * 16


def of_rows(x: Array, blocks: Tiling) -> Operand:
    """[b, t, n, h], heads side by side: what is [b, t, n h] anyway is not moved."""
    x = pad(pad(x, 1, blocks.q), 3, LANES)
    block = (None, blocks.q, x.shape[3])
    return Operand(
        x.reshape(*x.shape[:2], -1), block, lambda place: (place.b, place.i, place.n)
    )


def of_keys(x: Array, blocks: Tiling, group: int) -> Operand:
    """[b, s, k, h], the same for keys; a group of heads reads one."""
    x = pad(pad(x, 1, blocks.k), 3, LANES)
    block = (None, blocks.k, x.shape[3])
    return Operand(
        x.reshape(*x.shape[:2], -1),
        block,
        lambda place: (place.b, place.j, lax.div(place.n, group)),
    )


def parted(x: Array, length: int, heads: int, width: int) -> Array:
    """[b, length', n h'] -> [b, length, n, h]."""
    return x.reshape(*x.shape[:2], heads, -1)[:, :length, :, :width]


def of_statistics(x: Array, blocks: Tiling) -> Operand:
    """[b, n, t], one number a row."""
    return Operand(
        pad(x, 2, blocks.q)[:, :, None],
        (None, None, 1, blocks.q),
        lambda place: (place.b, place.n, 0, place.i),
    )


def of_pairs(name: str, x: Array, blocks: Tiling) -> dict[str, Operand]:
    """[#b, #n, #t, #s] as the tiles lie; what is the same for all rows, or for all
    keys, stays a vector under a name of its own."""
    b, n = (1 if size > 1 else 0 for size in x.shape[:2])
    if x.shape[2] == 1:
        x = pad(x, 3, blocks.k)
        return {
            f"{name}_keys": Operand(
                x,
                (None, None, 1, blocks.k),
                lambda place: (place.b * b, place.n * n, 0, place.j),
            )
        }
    x = pad(x, 2, blocks.q).swapaxes(2, 3)
    if x.shape[2] == 1:
        return {
            f"{name}_rows": Operand(
                x,
                (None, None, 1, blocks.q),
                lambda place: (place.b * b, place.n * n, 0, place.i),
            )
        }
    return {
        name: Operand(
            pad(x, 2, blocks.k),
            (None, None, blocks.k, blocks.q),
            lambda place: (place.b * b, place.n * n, place.j, place.i),
        )
    }


def of_cells(kept: Array, cell: tuple[int, int], t: int, s: int, blocks: Tiling):
    """[#b, #n, cells_t, cells_s] -> a small matrix for every tile."""

    def split(x, axis, size, length, block):
        tiles = -(-length // block)
        if size > block:
            x = jnp.repeat(x, size // block, axis)
            return jnp.expand_dims(lax.slice_in_dim(x, 0, tiles, axis=axis), axis + 1)
        x = pad(x, axis, block // size)
        return x.reshape(*x.shape[:axis], tiles, block // size, *x.shape[axis + 1 :])

    kept = split(kept, 3, cell[1], s, blocks.k)
    kept = split(kept, 2, cell[0], t, blocks.q)  # [#b, #n, i, rows, j, keys]
    kept = kept.transpose(0, 1, 4, 2, 5, 3).astype(jnp.float32)
    b, n = (1 if size > 1 else 0 for size in kept.shape[:2])
    return Operand(
        kept,
        (None, None, None, None, *kept.shape[4:]),
        lambda place: (place.b * b, place.n * n, place.j, place.i, 0, 0),
    )


def of_mask(call: Call, spec: Spec, s: int, blocks: Tiling) -> dict[str, Operand]:
    """What a PART tile needs to know what it sees."""

    def vector(x, axis, mode="constant"):
        block = blocks[axis]
        return Operand(
            pad(x.astype(jnp.int32), 1, block, mode)[:, None],
            (None, 1, block),
            lambda place: (place.b, 0, place[2 + axis]),
        )

    t = call.low.shape[1]
    found = {
        "low": vector(call.low, 0),
        "high": vector(jnp.minimum(call.high, s), 0),  # 0 beyond t: sees nothing
    }
    if call.segments is not None:
        found["row_ids"] = vector(call.segments[0], 0, "edge")
        found["key_ids"] = vector(call.segments[1], 1, "edge")
    if call.mask is not None:
        whole = min(call.mask.shape[2:]) > 1
        mask = call.mask.astype(jnp.int8 if whole else jnp.int32)
        found |= of_pairs("mask", mask, blocks)
    if call.kept is not None and spec.cell is not None:
        found["kept"] = of_cells(call.kept, spec.cell, t, s, blocks)
    return found


def columns(refs: dict) -> dict[str, Array]:
    """Vectors of keys, turned upright once for a tile: [keys, LANES], lanes alike."""
    names = {"key_ids", "mask_keys", "bias_keys"} & refs.keys()
    return {
        name: jnp.broadcast_to(refs[name][...], (LANES, refs[name].shape[1])).T
        for name in names
    }


def scalars(call: Call, spec: Spec, b: int, n: int) -> dict[str, Array]:
    """Numbers a head, for the scalar memory."""
    found = {}
    if call.sinks is not None:
        found["sinks"] = call.sinks.astype(jnp.float32)
    if call.dropout_key is not None and spec.dropout_rate:
        rows, heads = jnp.arange(b)[:, None], jnp.arange(n)
        words = jnp.stack(dropout.head_key(call.dropout_key, rows, heads), -1)
        found["dropout_key"] = lax.bitcast_convert_type(words, jnp.int32).ravel()
    return found


class Piece(NamedTuple):
    """Part of a tile: its keys and rows, in the tile and among all."""

    keys: slice
    rows: slice
    first_key: Any
    first_row: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.keys.stop - self.keys.start, self.rows.stop - self.rows.start

    def indices(self) -> tuple[Array, Array]:
        """(rows, keys) of every entry."""
        return (
            self.first_row + lax.broadcasted_iota(jnp.int32, self.shape, 1),
            self.first_key + lax.broadcasted_iota(jnp.int32, self.shape, 0),
        )


def piece(blocks: Tiling, i, j, keys: slice, rows: slice) -> Piece:
    return Piece(keys, rows, j * blocks.k + keys.start, i * blocks.q + rows.start)


def _pair(refs, upright, name, part):
    """A mask or bias at a piece, or None."""
    if name in refs:
        return refs[name][part.keys, part.rows]
    if f"{name}_rows" in refs:
        return refs[f"{name}_rows"][:, part.rows]
    if f"{name}_keys" in refs:
        return _spread(upright[f"{name}_keys"], part)
    return None


def _spread(upright, part):
    return jnp.tile(upright[part.keys], (1, part.shape[1] // LANES))


def visible(refs: dict, upright: dict, plan: Plan, part: Piece) -> Array:
    """The mask of a piece."""
    rows, keys = part.indices()
    seen = keys >= refs["low"][:, part.rows]
    seen &= keys < refs["high"][:, part.rows]
    if "row_ids" in refs:
        seen &= _spread(upright["key_ids"], part) == refs["row_ids"][:, part.rows]
    mask = _pair(refs, upright, "mask", part)
    if mask is not None:
        seen &= mask.astype(jnp.int32) != 0
    if "kept" in refs:
        seen &= _cells(refs["kept"][...], part, plan.blocks) > 0.5
    if plan.spec.sees is not None:
        seen &= plan.spec.sees(rows, keys)
    return seen


def _cells(kept, part, blocks):
    """The cells of a tile spread over a piece, by two products with 0 and 1."""

    def chosen(axis, start, cell):
        shape = part.shape[axis], kept.shape[axis]
        place = start + lax.broadcasted_iota(jnp.int32, shape, 0)
        first = cell * lax.broadcasted_iota(jnp.int32, shape, 1)
        return ((place >= first) & (place < first + cell)).astype(jnp.float32)

    by_keys = chosen(0, part.keys.start, blocks.k // kept.shape[0])
    by_rows = chosen(1, part.rows.start, blocks.q // kept.shape[1])
    return dot(dot(by_keys, kept, 1, 0), by_rows, 1, 1)


def scores(
    refs: dict, upright: dict, spec: Spec, part: Piece, seen: Array | None
) -> tuple[Array, Array | None]:
    """Scores in base 2, HIDDEN where not seen, and the slope of the cap."""
    raw = dot(refs["key"][part.keys, :], refs["query"][part.rows, :], 1, 1)
    bias = _pair(refs, upright, "bias", part)
    slope = None
    if bias is None and spec.soft_cap is None:
        raw = raw * (spec.scale * LOG2E)
    else:
        raw = raw * spec.scale
        if bias is not None:
            raw = raw + bias.astype(jnp.float32)
        if spec.soft_cap is None:
            raw = raw * LOG2E
        else:
            capped = jnp.tanh(raw * (1 / spec.soft_cap))
            slope = 1 - capped * capped
            raw = capped * (spec.soft_cap * LOG2E)
    return raw if seen is None else jnp.where(seen, raw, HIDDEN), slope


def kept_by_dropout(refs: dict, spec: Spec, at: int, part: Piece) -> Array | None:
    """Which weights of a piece dropout keeps; `at` counts batch rows and heads."""
    if "dropout_key" not in refs:
        return None
    words = refs["dropout_key"]
    head = words[2 * at].astype(jnp.uint32), words[2 * at + 1].astype(jnp.uint32)
    return dropout.keep(head, *part.indices(), spec.dropout_rate)


def dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """A product in float32; float32 operands are not rounded to bfloat16."""
    return lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def finite(x: Array) -> Array:
    """x, and 0 where it is not finite: 0 times a hidden NaN would be one."""
    wide = x.astype(jnp.float32)
    return jnp.where(jnp.abs(wide) < jnp.inf, wide, 0).astype(x.dtype)


def pipeline(units: list, front: Callable, back: Callable) -> None:
    """back(unit, front(unit)) for all, each front issued before the back before it.

    The compiler orders instructions much as they come: so the matrix unit works on the
    next scores while the vector unit works on these (a tenth fewer cycles on v6e).
    """
    ahead = front(units[0])
    for unit, following in zip(units, [*units[1:], None], strict=True):
        after = None if following is None else front(following)
        back(unit, ahead)
        ahead = after


def cut(length: int, size: int) -> list[slice]:
    return [slice(x, min(x + size, length)) for x in range(0, length, size)]
