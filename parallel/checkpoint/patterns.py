"""The patterns by which frameworks store arrays, as constructors of layout maps.

Each takes `parts`, the shapes of logical arrays by name, and returns their map. A
`Pattern` names a constructor, its options and the arrays it is for, all of it plain
data, so that a checkpoint can carry its own layout:

    arrange(shapes, [Pattern("blocks/.*", "pipelined", {"stages": 2, "repeats": 2})])

Patterns after Universal Checkpointing (arXiv:2406.18820, Section 3): unique,
replicated, averaged, fragment (even and uneven, of fused parameters), padded, expert.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .layout import (
    Box,
    LayoutMap,
    Piece,
    Reduction,
    Shape,
    check,
    each,
    flip,
    identity,
    join,
    ranges,
    sizes,
    whole_box,
)
from .reshaping import Parts, merged, recut, transposed


class Pattern(NamedTuple):
    """Arrays whose whole name matches, to be stored by one constructor.

    Each array alone; but where the expression has groups, arrays with equal groups go
    together: "(.*)/(?:query|key|value)/(.*)" finds the three of each block.
    """

    names: str
    make: str  # a name in PATTERNS
    options: dict[str, Any]  # of the constructor; JSON


def arrange(shapes: Parts, patterns: Sequence[Pattern]) -> LayoutMap:
    """The map of all arrays; those that no pattern matches are stored as they are.

    ValueError for an array that two patterns match, a pattern that matches none, an
    unknown constructor, and all that a constructor refuses.

    >>> shapes = {"embed": (50257, 768), "norm": (768,)}
    >>> vocabulary = Pattern("embed", "padded", {"axis": 0, "multiple": 128})
    >>> arrange(shapes, [vocabulary]).stored
    {'embed': (50304, 768), 'norm': (768,)}
    """
    taken: dict[str, str] = {}
    maps = []
    for pattern in patterns:
        groups: dict[tuple, dict[str, Shape]] = {}
        for name, shape in shapes.items():
            found = re.fullmatch(pattern.names, name)
            if found is None:
                continue
            if name in taken:
                raise ValueError(
                    f"layout: {name!r} matches {taken[name]!r} and {pattern.names!r}; "
                    "an array has one pattern"
                )
            taken[name] = pattern.names
            groups.setdefault(found.groups() or (name,), {})[name] = tuple(shape)
        if not groups:
            raise ValueError(f"layout: {pattern.names!r} matches no array")
        if pattern.make not in PATTERNS:
            raise ValueError(
                f"layout: no pattern is named {pattern.make!r}; there are "
                f"{', '.join(PATTERNS)}"
            )
        make = PATTERNS[pattern.make]
        maps += [make(parts, **pattern.options) for parts in groups.values()]
    rest = {name: shape for name, shape in shapes.items() if name not in taken}
    return check(join([*maps, identity(rest)]))


class Arrangement(NamedTuple):
    """How a state is stored: the shapes of its logical leaves, and their patterns."""

    logical: Mapping[str, Shape]
    patterns: Sequence[Pattern]

    def map(self) -> LayoutMap:
        return arrange(self.logical, self.patterns)

    def check(self, shapes: Mapping[str, Shape]) -> LayoutMap:
        """The map; ValueError unless it makes leaves of just these names and shapes."""
        made = self.map()
        if made.stored != shapes:
            wrong = sorted(
                name
                for name in made.stored.keys() | shapes.keys()
                if made.stored.get(name) != shapes.get(name)
            )
            first = wrong[0]
            raise ValueError(
                f"layout: it makes other leaves than there are, such as {wrong[:4]}: "
                f"{first!r} would be {made.stored.get(first)}, but is "
                f"{shapes.get(first)}"
            )
        return made

    def record(self) -> dict[str, Any]:
        """As JSON, for the header of a step."""
        return {"logical": dict(self.logical), "patterns": list(self.patterns)}


def copies(parts: Parts, *, ranks: int, reduction: Reduction) -> LayoutMap:
    """name/0 ... name/(ranks - 1), each whole: replicated, averaged or summed."""
    return each(
        parts,
        lambda name, shape: [
            Piece(name, whole_box(shape), f"{name}/{rank}", whole_box(shape))
            for rank in range(ranks)
        ],
        lambda name, shape: {f"{name}/{rank}": shape for rank in range(ranks)},
        reduction,
    )


def workers(parts: Parts, *, workers: int, reduction: Reduction) -> LayoutMap:
    """Copies on a leading axis: what a worker has of its own, in one array."""
    return each(
        parts,
        lambda name, shape: [
            Piece(name, whole_box(shape), name, ((rank, rank + 1), *whole_box(shape)))
            for rank in range(workers)
        ],
        lambda name, shape: {name: (workers, *shape)},
        reduction,
    )


def fragment(
    parts: Parts, *, axis: int, ranks: int = 0, widths: Sequence[int] = ()
) -> LayoutMap:
    """name/0, name/1, ...: cut along an axis, evenly or in the widths given."""

    def cuts(name: str, shape: Shape) -> list[int]:
        return _even(name, shape[axis], ranks) if ranks else list(widths)

    def pieces(name: str, shape: Shape) -> list[Piece]:
        return [
            Piece(name, box, f"{name}/{rank}", whole_box(sizes(box)))
            for rank, box in enumerate(_slabs(shape, axis, cuts(name, shape)))
        ]

    return each(
        parts,
        pieces,
        lambda name, shape: {p.stored: sizes(p.place) for p in pieces(name, shape)},
    )


def unrolled(parts: Parts, *, at: str) -> LayoutMap:
    """Stacked blocks one by one: `blocks/w` [L, ...] in `blocks/0/w` ... for "blocks".

    `at` is the part of the name behind which the index goes.
    """

    def named(name: str, index: int) -> str:
        before, found, after = f"/{name}/".partition(f"/{at}/")
        if not found:
            raise ValueError(f"layout: at={at!r} is no part of the name {name!r}")
        return f"{before}/{at}/{index}/{after}".strip("/")

    return each(
        parts,
        lambda name, shape: [
            Piece(name, box, named(name, index), whole_box(shape[1:]))
            for index, box in enumerate(_slabs(shape, 0, [1] * shape[0]))
        ],
        lambda name, shape: {named(name, i): shape[1:] for i in range(shape[0])},
    )


def stacked(parts: Parts, *, at: str) -> LayoutMap:
    """Blocks with an index in their names as one array: the inverse of `unrolled`."""
    found = {}
    for name, shape in parts.items():
        match = re.fullmatch(f"((?:.*/)?{re.escape(at)})/([0-9]+)(/.*)?", name)
        if match is None:
            raise ValueError(f"layout: no index behind at={at!r} in the name {name!r}")
        found[int(match[2])] = (match[1] + (match[3] or ""), tuple(shape))
    if sorted(found) != list(range(len(parts))) or len(set(found.values())) != 1:
        raise ValueError(
            f"layout: {sorted(parts)} are not blocks 0, 1, ... of one name and shape"
        )
    name, shape = found[0]
    return flip(unrolled({name: (len(parts), *shape)}, at=at))


def pipelined(
    parts: Parts, *, stages: int, repeats: int = 1, stage_first: bool = True
) -> LayoutMap:
    """L stacked blocks as [stages, repeats, L / (stages repeats), ...].

    Stage s runs the chunks s, s + stages, ... (interleaved, if repeats > 1): chunk c of
    consecutive blocks is at [c % stages, c // stages], or with `stage_first=False` at
    [c // stages, c % stages].
    """
    chunks = stages * repeats

    def pieces(name: str, shape: Shape) -> list[Piece]:
        width = _even(name, shape[0], chunks)[0]
        out = []
        for chunk, box in enumerate(_slabs(shape, 0, [width] * chunks)):
            repeat, stage = divmod(chunk, stages)
            place = (stage, repeat) if stage_first else (repeat, stage)
            lead = tuple((i, i + 1) for i in place)
            out.append(Piece(name, box, name, (*lead, *whole_box((width, *shape[1:])))))
        return out

    lead = (stages, repeats) if stage_first else (repeats, stages)
    return each(
        parts,
        pieces,
        lambda name, shape: {name: (*lead, shape[0] // chunks, *shape[1:])},
    )


def fused(
    parts: Parts,
    *,
    axis: int,
    order: Sequence[str],
    into: str,
    ranks: int = 1,
    widths: Mapping[str, Sequence[int]] | None = None,
) -> LayoutMap:
    """Projections side by side in one array, rank by rank: [q_0 k_0 v_0 q_1 k_1 ...].

    `order` lists the part of the name in which they differ, in the order that they are
    fused in; `into` replaces it. `widths` gives what each rank has of a projection,
    where it is not an equal share (grouped queries over uneven ranks). Fused heads,
    [q k v] for each head, are ranks=heads.
    """
    names = _in_order(parts, order)
    stored = _replaced(names, into)
    shapes = [tuple(parts[name]) for name in names]
    cuts = {
        key: list(widths[key])
        if widths and key in widths
        else _even(name, parts[name][axis], ranks)
        for key, name in zip(order, names, strict=True)
    }
    if any(len(cut) != ranks for cut in cuts.values()):
        raise ValueError(f"layout: widths {cuts} must have {ranks} ranks each")
    boxes = {
        name: list(_slabs(parts[name], axis, cuts[key]))
        for key, name in zip(order, names, strict=True)
    }
    pieces, start = [], 0
    for rank, name in itertools.product(range(ranks), names):
        box = boxes[name][rank]
        width = box[axis][1] - box[axis][0]
        place = _along(box, axis, (start, start + width))
        pieces.append(Piece(name, box, stored, place))
        start += width
    shape = (*shapes[0][:axis], start, *shapes[0][axis + 1 :])
    return check(LayoutMap(dict(parts), {stored: shape}, tuple(pieces), {}))


def padded(parts: Parts, *, axis: int, multiple: int) -> LayoutMap:
    """Zeros behind the end of an axis, up to a multiple: vocabularies over ranks."""

    def size(shape: Shape) -> int:
        return -(-shape[axis] // multiple) * multiple

    return each(
        parts,
        lambda name, shape: [Piece(name, whole_box(shape), name, whole_box(shape))],
        lambda name, shape: {name: (*shape[:axis], size(shape), *shape[axis + 1 :])},
    )


def flat(parts: Parts, *, ranks: int, into: str, align: int = 1) -> LayoutMap:
    """All in one buffer [ranks, n]: raveled, one behind the other, padded at the end.

    n is the least multiple of `align` that holds a rank's share (ZeRO's partitions).
    The buffer's name is `into`, behind what the names of its parts begin with.
    """
    total = sum(math.prod(shape) for shape in parts.values())
    if not total:
        raise ValueError(f"layout: {sorted(parts)} have no elements to make flat")
    width = -(-total // (ranks * align)) * align
    columns = zip(*(name.split("/")[:-1] for name in parts), strict=False)
    common = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    buffer = "/".join([*(column[0] for column in common), into])
    pieces, offset = [], 0
    for name, shape in parts.items():
        size = math.prod(shape)
        for rank in range(offset // width, ranks):
            start = max(offset, rank * width)
            stop = min(offset + size, (rank + 1) * width)
            at = start - rank * width
            for box in ranges(tuple(shape), start - offset, stop - offset):
                end = at + math.prod(sizes(box))
                place = ((rank, rank + 1), (at, end))
                pieces.append(Piece(name, box, buffer, place))
                at = end
        offset += size
    return LayoutMap(
        {n: tuple(s) for n, s in parts.items()},
        {buffer: (ranks, width)},
        tuple(pieces),
        {},
    )


def placed(parts: Parts, *, axis: int, order: Sequence[int]) -> LayoutMap:
    """Experts elsewhere: slot i holds expert order[i]; some may be there twice."""

    def pieces(name: str, shape: Shape) -> list[Piece]:
        boxes = list(_slabs(shape, axis, [1] * shape[axis]))
        if set(order) != set(range(shape[axis])):
            raise ValueError(
                f"layout: order {list(order)} must place each of the {shape[axis]} "
                f"experts of {name!r}"
            )
        return [
            Piece(name, boxes[e], name, _along(boxes[e], axis, (slot, slot + 1)))
            for slot, e in enumerate(order)
        ]

    return each(
        parts,
        pieces,
        lambda name, shape: {name: (*shape[:axis], len(order), *shape[axis + 1 :])},
        "replicate" if len(set(order)) < len(order) else "unique",
    )


PATTERNS = {
    make.__name__: make
    for make in (
        copies, workers, fragment, unrolled, stacked, pipelined, fused, padded, flat,
        recut, placed, merged, transposed,
    )
}  # fmt: skip


def _even(name: str, size: int, ranks: int) -> list[int]:
    if ranks < 1 or size % ranks:
        raise ValueError(f"layout: {size} of {name!r} do not divide over {ranks}")
    return [size // ranks] * ranks


def _slabs(shape: Shape, axis: int, widths: Sequence[int]):
    start = 0
    for width in widths:
        yield _along(whole_box(shape), axis, (start, start + width))
        start += width


def _along(box: Box, axis: int, span: tuple[int, int]) -> Box:
    return (*box[:axis], span, *box[axis + 1 :])


def _in_order(parts: Parts, order: Sequence[str]) -> list[str]:
    """The names of `parts`, in the order of the one component in which they differ."""
    at = _differing(list(parts))
    found = {name.split("/")[at]: name for name in parts}
    if set(found) != set(order) or len(order) != len(parts):
        raise ValueError(
            f"layout: order {list(order)} does not name {sorted(found)}, of which the "
            "fused array is made"
        )
    return [found[key] for key in order]


def _replaced(names: Sequence[str], into: str) -> str:
    parts = names[0].split("/")
    parts[_differing(names)] = into
    return "/".join(parts)


def _differing(names: Sequence[str]) -> int:
    columns = list(zip(*(name.split("/") for name in names), strict=False))
    differ = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    same_depth = len({name.count("/") for name in names}) == 1
    if len(differ) != 1 or not same_depth:
        raise ValueError(f"layout: {sorted(names)} must differ in one part of the name")
    return differ[0]
