"""Patterns that keep an array whole: its elements in another shape or axis order."""

import math
from collections.abc import Mapping, Sequence

from .layout import LayoutMap, Piece, Shape, each, ranges, sizes, whole_box

Parts = Mapping[str, Shape]


def recut(parts: Parts, *, shape: Sequence[int]) -> LayoutMap:
    """Arrays of one dimension, filled into `shape` in reading order."""
    shape = tuple(shape)

    def pieces(name: str, logical: Shape) -> list[Piece]:
        out, start = [], 0
        for place in ranges(shape, 0, logical[0]):
            stop = start + math.prod(sizes(place))
            out.append(Piece(name, ((start, stop),), name, place))
            start = stop
        return out

    return each(parts, pieces, lambda name, logical: {name: shape})


def merged(parts: Parts, *, axis: int, count: int = 2) -> LayoutMap:
    """`count` axes from `axis` on as one: heads and their width, [n, h] as [n h]."""

    def shape(name: str, logical: Shape) -> Shape:
        if count < 1 or not 0 <= axis <= len(logical) - count:
            raise ValueError(
                f"layout: {name!r} of shape {logical} has no {count} axes from "
                f"axis {axis} on to merge"
            )
        end = axis + count
        return (*logical[:axis], math.prod(logical[axis:end]), *logical[end:])

    return each(
        parts,
        lambda name, logical: [
            Piece(name, whole_box(logical), name, whole_box(shape(name, logical)))
        ],
        lambda name, logical: {name: shape(name, logical)},
    )


def transposed(parts: Parts, *, axes: Sequence[int]) -> LayoutMap:
    """What `numpy.transpose` makes with `axes`: [in, out] as [out, in] for (1, 0)."""

    def shape(name: str, logical: Shape) -> Shape:
        if sorted(axes) != list(range(len(logical))):
            raise ValueError(
                f"layout: axes {list(axes)} do not order the {len(logical)} axes of "
                f"{name!r}"
            )
        return tuple(logical[axis] for axis in axes)

    inverse = tuple(sorted(range(len(axes)), key=lambda i: axes[i]))
    return each(
        parts,
        lambda name, logical: [
            Piece(
                name, whole_box(logical), name, whole_box(shape(name, logical)), inverse
            )
        ],
        lambda name, logical: {name: shape(name, logical)},
    )
