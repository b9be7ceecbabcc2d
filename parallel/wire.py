"""The meter of the wire: every collective of a program, its mesh axes and its bytes.

Two readers give the same rows. `collectives` reads a compiled step, so it also sees
what the partitioner wrote, in the dtypes that really travel (XLA:CPU widens bfloat16 to
float32, TPU does not). `jaxpr_collectives` reads a traced program: exact for code
written with `jax.shard_map`, on any machine and in the dtypes one wrote, but it knows
nothing of what the partitioner adds along Auto axes.

A collective over one device, or a permutation that moves nothing, is left out by both.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from . import hlo

UNKNOWN = ("?",)  # the axes of groups that are no set of axes of the mesh


class Collective(NamedTuple):
    """One collective of a program, as one device sees it.

    `bytes` and `wire_bytes` are of one run; a step moves `count` times as much.
    """

    kind: str  # a key of SENT
    axes: tuple[str, ...]  # that its groups span, in mesh order; ("?",): no such set
    size: int  # devices in a group
    dtype: str  # "float32"; "bfloat16+float32" where a combined one mixes them
    shapes: tuple[tuple[int, ...], ...]  # of its operands on one device
    count: int  # runs a step: the product of the lengths of the loops around it
    exact: bool  # False: in a loop of unknown length (counted once) or in a branch
    bytes: int  # of the operands on one device
    wire_bytes: float  # one device sends, by the ring algorithm
    op_name: str  # where in the program it came from


class Traffic(NamedTuple):
    """What one device moves in a step by all collectives of a kind over some axes."""

    count: int  # runs
    bytes: int  # of operands, all runs
    wire_bytes: float  # sent, all runs


SENT = {  # operand bytes b, group size n -> bytes each device sends around a ring
    "all-reduce": lambda b, n: 2 * (n - 1) * b / n,
    "all-gather": lambda b, n: (n - 1) * b,  # (n - 1) / n of the gathered array
    "reduce-scatter": lambda b, n: (n - 1) * b / n,
    "all-to-all": lambda b, n: (n - 1) * b / n,
    "ragged-all-to-all": lambda b, n: (n - 1) * b / n,  # as if its buffer were full
    "collective-permute": lambda b, n: b,  # a device that has a target
}


def summary(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], Traffic]:
    """Total per (kind, axes), sorted; each row is a plain triple to compare with."""
    total: dict[tuple[str, tuple[str, ...]], Traffic] = {}
    for c in found:
        old = total.get((c.kind, c.axes), Traffic(0, 0, 0))
        total[c.kind, c.axes] = Traffic(
            old.count + c.count,
            old.bytes + c.count * c.bytes,
            old.wire_bytes + c.count * c.wire_bytes,
        )
    return dict(sorted(total.items()))


def table(
    found: Sequence[Collective], title: str = "Bytes a device moves in a step"
) -> Table:
    """The summary as a `rich` table; "~" marks rows that hold inexact counts."""
    rough = {(c.kind, c.axes) for c in found if not c.exact}
    out = Table(title=title)
    for name in ("collective", "axes"):
        out.add_column(name)
    for name in ("runs", "operand bytes", "sent bytes"):
        out.add_column(name, justify="right")
    rows = summary(found)
    for key, row in rows.items():
        runs = f"{'~' if key in rough else ''}{row.count:,}"
        out.add_row(key[0], ", ".join(key[1]), runs, *(f"{x:,.0f}" for x in row[1:]))
    out.add_section()
    totals = (sum(column) for column in zip(*rows.values(), strict=True))
    out.add_row("total", "", *(f"{x:,.0f}" for x in totals))
    return out


def _collective(kind, axes, size, arrays, count, exact, op_name) -> Collective:
    """`arrays`: dtype name and shape of each operand."""
    bits = sum(_bits(dtype) * math.prod(shape) for dtype, shape in arrays)
    payload = -(-bits // 8)
    return Collective(
        kind,
        axes,
        size,
        "+".join(sorted({dtype for dtype, _ in arrays})),
        tuple(shape for _, shape in arrays),
        count,
        exact and kind != "ragged-all-to-all",
        payload,
        SENT[kind](payload, size),
        op_name,
    )


def _bits(dtype: str) -> int:
    """Width of a dtype by its name: int4 has 4 bits, which `itemsize` rounds up."""
    return 8 if dtype == "bool" else int(re.findall(r"\d+", dtype)[0])


PRIMITIVES = {  # those that the compiler writes with the same collective
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "unreduced_psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "ppermute": "collective-permute",
}


def jaxpr_collectives(jaxpr) -> list[Collective]:
    """Every collective by name in `jax.make_jaxpr(fn)(*args)`, in program order.

    Shapes are those inside `jax.shard_map`. A scan multiplies by its length; a while
    loop counts once and each branch of a `cond` as if taken, both with `exact=False`.

    Raises ValueError for an axis that no `shard_map` around it binds.
    """
    return list(_traced(jaxpr, {}, 1, True, ()))


def _traced(jaxpr, mesh: dict[str, int], times, exact, path) -> Iterator[Collective]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:  # closed or open
        name = eqn.primitive.name
        here = (*path, *filter(None, [str(eqn.source_info.name_stack)]), name)
        kind = PRIMITIVES.get(name.removesuffix("_start"))
        if kind:
            axes, size = _named_axes(eqn.params, mesh)
            # A ragged exchange also takes its output buffer and offsets: not payload.
            sent = eqn.invars[:1] if kind == "ragged-all-to-all" else eqn.invars
            if size > 1:
                arrays = [_operand(v.aval) for v in sent]
                yield _collective(
                    kind, axes, size, arrays, times, exact, "/".join(here)
                )
            continue
        inside = mesh | dict(eqn.params["mesh"].shape) if name == "shard_map" else mesh
        runs = times * eqn.params["length"] if name == "scan" else times
        sure = exact and name not in ("while", "cond")
        for inner in _jaxprs(eqn.params):
            yield from _traced(inner, inside, runs, sure, here)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(x, "eqns") or hasattr(x, "jaxpr"):
                yield x


def _operand(aval) -> tuple[str, tuple[int, ...]]:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):  # travels as its words
        aval = jax.eval_shape(jax.random.key_data, aval)
    return aval.dtype.name, tuple(aval.shape)


def _named_axes(params, mesh) -> tuple[tuple[str, ...], int]:
    """Axes in mesh order and devices in a group."""
    given = params["axes"] if "axes" in params else params["axis_name"]
    given = given if isinstance(given, tuple) else (given,)
    given = [a for a in given if not isinstance(a, int)]  # a position: under vmap
    if unbound := [a for a in given if a not in mesh]:
        raise ValueError(
            f"jaxpr: axis {unbound[0]!r} is bound by no jax.shard_map in it; trace the "
            "function that calls shard_map, not its body"
        )
    if groups := params.get("axis_index_groups"):
        return UNKNOWN, max(map(len, groups))
    spanned = [a for a in mesh if a in given and mesh[a] > 1]
    if "perm" in params:
        pairs = np.array(params["perm"], int).reshape(-1, 2)
        ends = np.stack(np.unravel_index(pairs, [mesh[a] for a in given]), -1)
        crossed = dict(zip(given, (ends[:, 0] != ends[:, 1]).any(0), strict=True))
        spanned = [a for a in spanned if crossed[a]]
    return tuple(spanned), math.prod(mesh[a] for a in spanned)


def collectives(compiled, mesh) -> list[Collective]:
    """Every collective of `jax.jit(fn).lower(*args).compile()`, or of its text.

    Ids in replica groups count places in the program's device assignment, not device
    ids. Where the executable names its devices they are looked up in `mesh.devices`;
    else (text, a topology without devices, several processes) the program must have
    been compiled over `mesh` in its own order, the axis of slices first. A loop whose
    length the text does not give counts once and each branch of a conditional as if
    taken, both with `exact=False`.

    Raises ValueError where the program runs on devices that `mesh` does not hold.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    module = hlo.Module(text)
    if module.devices > mesh.size:
        raise ValueError(
            f"mesh: {mesh.size} devices, but the program runs on {module.devices}; "
            "give the mesh that it was compiled for"
        )
    place = _coordinates(compiled, mesh)
    found = []
    for op, kind, times, exact, name in module.runs(SENT):
        sent = module.operands(op)
        if op.opcode == "send":  # to the same place in every other slice
            axes = _spanned([range(0, mesh.size, module.devices)], place, mesh)
            size, sent = mesh.size // module.devices, sent[:1]
        elif (pairs := hlo.pairs(op)) is not None:
            axes = _crossed(pairs, place, mesh)
            size = math.prod(mesh.shape[a] for a in axes)
        else:
            groups = hlo.groups(op, module.devices)
            axes, size = _spanned(groups, place, mesh), max(map(len, groups))
        sent = sent[:1] if kind == "ragged-all-to-all" else sent
        if size > 1:
            arrays = [a for operand in sent for a in hlo.arrays(operand)]
            found.append(_collective(kind, axes, size, arrays, times, exact, name))
    return found


def _coordinates(compiled, mesh) -> np.ndarray:
    """[place in the device assignment, axis of the mesh] -> coordinate."""
    sizes = tuple(mesh.shape.values())
    grid = np.stack(np.unravel_index(np.arange(mesh.size), sizes), axis=-1)
    executable = None if isinstance(compiled, str) else compiled.runtime_executable()
    if executable is None or not hasattr(executable, "local_devices"):
        return grid
    devices = executable.local_devices()
    index = {device: i for i, device in enumerate(mesh.devices.flat)}
    if strangers := [d for d in devices if d not in index]:
        raise ValueError(
            f"mesh: does not hold {strangers[0]}, on which the program runs; give the "
            "mesh that it was compiled for"
        )
    return grid[[index[d] for d in devices]] if len(devices) == mesh.size else grid


def _spanned(groups, place, mesh) -> tuple[str, ...]:
    """The axes that every group runs through completely, all others being fixed."""
    sizes = np.array(list(mesh.shape.values()))
    spans = set()
    for group in groups:
        at = place[list(group)]
        varies = (at != at[0]).any(0)
        spans.add(
            tuple(varies.tolist()) if sizes[varies].prod() == len(group) else None
        )
    return (
        _names(spans.pop(), mesh) if len(spans) == 1 and None not in spans else UNKNOWN
    )


def _crossed(pairs, place, mesh) -> tuple[str, ...]:
    """The axes along which some source differs from its target."""
    ends = place[np.array(pairs, int).reshape(-1, 2)]
    return _names((ends[:, 0] != ends[:, 1]).any(0), mesh)


def _names(chosen, mesh) -> tuple[str, ...]:
    return tuple(a for a, c in zip(mesh.axis_names, chosen, strict=True) if c)
