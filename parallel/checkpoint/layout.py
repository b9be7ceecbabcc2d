"""Layouts of stored arrays as geometry: logical boxes beside stored boxes.

A sharding needs no map, it moves no element to another index. A pipeline's stack, a
fused projection, padding, a flat buffer, copies do: the *stored* arrays hold the
elements of the *logical* ones elsewhere, several times, or in a sum. A `LayoutMap` says
where, piece by piece; a piece is a box of a logical array and a box of a stored one
with as many elements, in the same reading order (or, turned, in that of permuted
axes). `patterns.py` builds maps.

    cut(logical, map) -> stored      union(stored, map) -> logical

Everything is numpy, and bits are moved, not values: union(cut(x, m), m) == x bit for
bit for every map, so cut(union(s, a), b) brings any layout to any other.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # (start, stop) in each dimension
Reduction = Literal["unique", "replicate", "mean", "sum"]


class Piece(NamedTuple):
    logical: str
    box: Box
    stored: str
    place: Box  # as many elements as `box`, in the same reading order
    axes: Shape = ()  # place.transpose(axes) is read like `box`; (): as it is


class LayoutMap(NamedTuple):
    """Where every element of the logical arrays is stored.

    Reductions say what a logical element is, of the stored ones that pieces give it:

        unique     the only one (for every name that is not in `reductions`)
        replicate  any of them: they have equal bits
        mean       their mean; it is cut into copies
        sum        their sum; it is cut into itself, at the first, and zeros

    Stored elements in no piece are padding, and zero.
    """

    logical: dict[str, Shape]
    stored: dict[str, Shape]
    pieces: tuple[Piece, ...]
    reductions: dict[str, Reduction]


def whole_box(shape: Iterable[int]) -> Box:
    return tuple((0, size) for size in shape)


def volume(box: Box) -> int:
    return math.prod(sizes(box))


def sizes(box: Box) -> Shape:
    return tuple(stop - start for start, stop in box)


def ranges(shape: Shape, start: int, stop: int) -> list[Box]:
    """Elements start ... stop - 1 in reading order, as few boxes, in that order."""
    if start >= stop:
        return []
    if not shape:
        return [()]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        at = start // row
        inner = ranges(shape[1:], start - at * row, stop - at * row)
        return [((at, at + 1), *box) for box in inner]
    out: list[Box] = []
    if start < first * row:
        inner = ranges(shape[1:], start - (first - 1) * row, row)
        out += [((first - 1, first), *box) for box in inner]
    if first < last:
        out.append(((first, last), *whole_box(shape[1:])))
    if last * row < stop:
        inner = ranges(shape[1:], 0, stop - last * row)
        out += [((last, last + 1), *box) for box in inner]
    return out


def identity(shapes: Mapping[str, Shape]) -> LayoutMap:
    """Every array is stored as it is."""
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    pieces = [Piece(n, whole_box(s), n, whole_box(s)) for n, s in shapes.items()]
    return LayoutMap(shapes, dict(shapes), tuple(pieces), {})


def join(maps: Iterable[LayoutMap]) -> LayoutMap:
    """All of them beside each other; ValueError where two have an array in common."""
    whole = LayoutMap({}, {}, (), {})
    pieces: list[Piece] = []
    for part in maps:
        for kind, mine, new in (
            ("logical", whole.logical, part.logical),
            ("stored", whole.stored, part.stored),
        ):
            if twice := mine.keys() & new.keys():
                raise ValueError(
                    f"layout: two maps hold the {kind} array {min(twice)!r}; each "
                    "array belongs to one"
                )
        whole.logical.update(part.logical)
        whole.stored.update(part.stored)
        whole.reductions.update(part.reductions)
        pieces += part.pieces
    return whole._replace(pieces=tuple(pieces))


def flip(layout: LayoutMap) -> LayoutMap:
    """Stored and logical exchanged: the map of the opposite change, without copies."""
    if layout.reductions:
        raise ValueError(
            f"layout: {min(layout.reductions)!r} is stored several times, and only a "
            "map without copies can be turned round"
        )
    pieces = tuple(
        Piece(p.stored, p.place, p.logical, p.box, _inverse(p.axes))
        for p in layout.pieces
    )
    return LayoutMap(layout.stored, layout.logical, pieces, {})


def each(
    parts: Mapping[str, Shape],
    pieces: Callable[[str, Shape], Iterable[Piece]],
    stored: Callable[[str, Shape], dict[str, Shape]],
    reduction: Reduction = "unique",
) -> LayoutMap:
    """The map of arrays that have nothing to do with each other."""
    maps = []
    for name, shape in parts.items():
        shape = tuple(shape)
        reductions: dict[str, Reduction] = {name: reduction}
        if reduction == "unique":
            reductions = {}
        made = tuple(pieces(name, shape))
        maps.append(LayoutMap({name: shape}, stored(name, shape), made, reductions))
    return check(join(maps))


def check(layout: LayoutMap) -> LayoutMap:
    """The map itself, if it is one; else ValueError that names the array.

    Boxes lie inside their arrays and match in size; no stored element has two pieces; a
    logical element has one, or, where its array is reduced, the copies of it are cut
    alike; none is missing.
    """
    by_stored: dict[str, list[Box]] = {name: [] for name in layout.stored}
    by_logical: dict[str, list[Box]] = {name: [] for name in layout.logical}
    for piece in layout.pieces:
        for kind, name, box, shapes in (
            ("logical", piece.logical, piece.box, layout.logical),
            ("stored", piece.stored, piece.place, layout.stored),
        ):
            if name not in shapes:
                raise ValueError(f"layout: a piece names {kind} {name!r}, not there")
            if len(box) != len(shapes[name]) or any(
                not 0 <= start <= stop <= size
                for (start, stop), size in zip(box, shapes[name], strict=True)
            ):
                raise ValueError(
                    f"layout: box {box} does not lie in {kind} {name!r} of shape "
                    f"{shapes[name]}"
                )
        if volume(piece.box) != volume(piece.place):
            raise ValueError(
                f"layout: a piece of {piece.logical!r} has {volume(piece.box)} "
                f"elements and {volume(piece.place)} in stored {piece.stored!r}"
            )
        turned = tuple(sizes(piece.place)[axis] for axis in piece.axes)
        if piece.axes and turned != sizes(piece.box):
            raise ValueError(
                f"layout: a piece of {piece.logical!r} turns {sizes(piece.place)} by "
                f"axes {piece.axes} to {turned}, not to {sizes(piece.box)}"
            )
        by_stored[piece.stored].append(piece.place)
        by_logical[piece.logical].append(piece.box)
    for name, boxes in by_stored.items():
        if not boxes:
            raise ValueError(f"layout: stored {name!r} holds no piece of anything")
        if _overlap(boxes):
            raise ValueError(f"layout: two pieces share elements of stored {name!r}")
    for name, boxes in by_logical.items():
        if name in layout.reductions:
            boxes = list(dict.fromkeys(boxes))
        if both := _overlap(boxes):
            raise ValueError(
                f"layout: {name!r} is held twice at {both}; say how copies are "
                "reduced, and cut them alike"
            )
        missing = math.prod(layout.logical[name]) - sum(map(volume, boxes))
        if missing:
            raise ValueError(
                f"layout: {missing} elements of {name!r}, shape "
                f"{layout.logical[name]}, are in no piece: a fragment is missing"
            )
    return layout


def cut(logical: Mapping[str, np.ndarray], layout: LayoutMap) -> dict[str, np.ndarray]:
    """The stored arrays of logical ones; ValueError for a wrong name or shape."""
    _expect(logical, layout.logical, "logical")
    return {name: cut_one(name, logical.__getitem__, layout) for name in layout.stored}


def union(stored: Mapping[str, np.ndarray], layout: LayoutMap) -> dict[str, np.ndarray]:
    """The logical arrays of stored ones; ValueError for a wrong name or shape, and for
    copies that differ where they must be equal."""
    _expect(stored, layout.stored, "stored")
    return {
        name: union_one(name, stored.__getitem__, layout) for name in layout.logical
    }


def cut_one(
    name: str, logical: Callable[[str], np.ndarray], layout: LayoutMap
) -> np.ndarray:
    """One stored array; `logical` gives the arrays that it holds elements of."""
    pieces = [piece for piece in layout.pieces if piece.stored == name]
    shape = layout.stored[name]
    dtypes = {p.logical: logical(p.logical).dtype for p in pieces}
    dtype = _one_dtype(name, dtypes)
    (only, *others) = pieces
    summed = any(layout.reductions.get(p.logical) == "sum" for p in pieces)
    alone = not (others or summed or only.axes)
    if alone and only.box == only.place == whole_box(shape):
        source = logical(only.logical)  # nothing moves, nothing is copied
        return source if source.shape == shape else source[_slices(only.box)]
    out = np.zeros(shape, dtype)
    owners = _owners(layout) if summed else {}
    for piece in pieces:
        if layout.reductions.get(piece.logical) == "sum" and (
            owners[piece.logical, piece.box] != piece
        ):
            continue  # zeros: the first copy has it all
        part = logical(piece.logical)[_slices(piece.box)]
        if piece.axes:
            part = part.transpose(_inverse(piece.axes))
        out[_slices(piece.place)] = part.reshape(sizes(piece.place))
    return out


def union_one(
    name: str, stored: Callable[[str], np.ndarray], layout: LayoutMap
) -> np.ndarray:
    """One logical array; `stored` gives the arrays that hold elements of it."""
    copies: dict[Box, list[np.ndarray]] = {}
    dtypes = {}
    for piece in layout.pieces:
        if piece.logical == name:
            source = stored(piece.stored)
            dtypes[piece.stored] = source.dtype
            part = source[_slices(piece.place)]
            if piece.axes:
                part = part.transpose(piece.axes)
            copies.setdefault(piece.box, []).append(part.reshape(sizes(piece.box)))
    dtype = _one_dtype(name, dtypes)
    reduce = _REDUCE.get(layout.reductions.get(name, "unique"))
    if list(copies) == [whole_box(layout.logical[name])]:
        (parts,) = copies.values()
        return reduce(name, parts) if reduce else parts[0]
    out = np.zeros(layout.logical[name], dtype)
    for box, parts in copies.items():
        out[_slices(box)] = reduce(name, parts) if reduce else parts[0]
    return out


def _equal(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """The first of copies; ValueError unless all have the same bits."""
    first = _bits(parts[0])
    for part in parts[1:]:
        if (first != _bits(part)).any():
            gap = np.nanmax(np.abs(_wide(part) - _wide(parts[0])))
            raise ValueError(
                f"layout: copies of {name!r} differ by up to {gap:g}, but they must "
                "be equal; average them if they may drift"
            )
    return parts[0]


def _mean(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """In float64, rounded once; where the copies are equal, their very bits."""
    bits = [_bits(part) for part in parts]
    same = np.logical_and.reduce([b == bits[0] for b in bits]).all(axis=-1)
    mean = np.sum([_wide(part) for part in parts], axis=0) / len(parts)
    return np.where(same, parts[0], mean.astype(parts[0].dtype))


def _sum(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """In float64, rounded once; where all but one are zero, the bits of that one."""
    alone = parts[0]
    for part in parts[1:]:
        alone = np.where(part == 0, alone, part)
    few = np.sum([part != 0 for part in parts], axis=0) <= 1
    total = np.sum([_wide(part) for part in parts], axis=0)
    return np.where(few, alone, total.astype(parts[0].dtype))


_REDUCE = {"replicate": _equal, "mean": _mean, "sum": _sum}


def _wide(x: np.ndarray) -> np.ndarray:
    """For sums: exact for integers, 29 bits to spare for float32."""
    if np.issubdtype(x.dtype, np.complexfloating):
        return x.astype(np.complex128)
    exact = np.issubdtype(x.dtype, np.integer)
    return x.astype(np.int64 if exact else np.float64)


def _bits(x: np.ndarray) -> np.ndarray:
    """The bytes of each element along a new last axis."""
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return flat.reshape(*x.shape, x.dtype.itemsize)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _inverse(axes: Shape) -> Shape:
    return tuple(axes.index(axis) for axis in range(len(axes)))


def _owners(layout: LayoutMap) -> dict[tuple[str, Box], Piece]:
    """The first piece that holds each logical box."""
    return {(p.logical, p.box): p for p in reversed(layout.pieces)}


def _overlap(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, if there are any."""
    boxes = [box for box in boxes if volume(box)]
    if len(boxes) < 2 or not boxes[0]:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    edges = np.array(boxes)  # [boxes, dimensions, 2]
    for i in range(len(boxes) - 1):
        low = np.maximum(edges[i, :, 0], edges[i + 1 :, :, 0])
        high = np.minimum(edges[i, :, 1], edges[i + 1 :, :, 1])
        if (met := np.flatnonzero((low < high).all(axis=1))).size:
            return boxes[i], boxes[i + 1 + met[0]]
    return None


def _expect(arrays: Mapping[str, np.ndarray], shapes: dict[str, Shape], kind: str):
    if arrays.keys() != shapes.keys():
        raise ValueError(
            f"layout: the {kind} arrays are not those of the map; missing "
            f"{sorted(shapes.keys() - arrays.keys())}, unknown "
            f"{sorted(arrays.keys() - shapes.keys())}"
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"layout: {kind} {name!r} has shape {arrays[name].shape}, but the map "
                f"says {shape}"
            )


def _one_dtype(name: str, dtypes: dict[str, np.dtype]) -> np.dtype:
    if len(set(dtypes.values())) != 1:
        said = ", ".join(f"{part} {dtype}" for part, dtype in dtypes.items())
        raise ValueError(f"layout: {name!r} mixes dtypes ({said}); nothing is cast")
    return next(iter(dtypes.values()))
