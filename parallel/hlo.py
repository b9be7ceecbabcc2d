"""Reads the text of a compiled module: who calls whom how often, and groups of devices.

Checked against what jaxlib 0.10 writes for CPU and, ahead of time, for TPU v5e.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Instruction(NamedTuple):
    """`%name = type opcode(rest`, where rest holds operands and attributes."""

    name: str
    type: str  # "f32[8,128]{1,0:T(8,128)}" or a tuple of such
    opcode: str
    rest: str


class Run(NamedTuple):
    """An instruction where the program reaches it."""

    op: Instruction
    kind: str  # its collective, without "-start"
    times: int  # product of the lengths of the loops around it
    exact: (
        bool  # False: in a loop of unknown length (once) or in a branch (as if taken)
    )
    op_name: str


_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALL = re.compile(
    r"\b(?:calls|to_apply|branch_computations|called_computations"
    r"|true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_GROUP_LISTS = re.compile(r"replica_groups=\{([\d,{} ]*)\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=" + _IOTA)
_GROUP_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}"
)


class Module:
    """The text, cut into computations; `devices` is the number of its partitions."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.named: dict[str, Instruction] = {}
        self.entry = here = ""
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if head := _HEAD.match(line):
                here = head[2]
                self.computations[here] = []
                self.entry = here if head[1] else self.entry
            elif match := _LINE.match(line):
                op = Instruction(*match.groups()[1:])
                self.computations[here].append(op)
                self.named[op.name] = op
                if match[1]:
                    self.roots[here] = op
        if not self.entry:
            raise ValueError(
                "text: no ENTRY computation; give the whole compiled module"
            )
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(partitions[1]) if partitions else 1

    def operands(self, op: Instruction) -> list[Instruction]:
        depth, end = 1, 0
        while depth:  # layouts in typed operands hold parentheses too
            depth += {"(": 1, ")": -1}.get(op.rest[end], 0)
            end += 1
        return [self.named[n] for n in re.findall(r"%([\w.-]+)", op.rest[:end])]

    def runs(self, kinds) -> Iterator[Run]:
        """Every instruction whose opcode is in `kinds`, or starts such a one."""
        return self._runs(kinds, self.entry, 1, True)

    def _runs(self, kinds, name: str, times: int, exact: bool) -> Iterator[Run]:
        in_fusions = set()
        for op in self.computations[name]:
            kind = op.opcode.removesuffix("-start")
            label = (_OP_NAME.search(op.rest) or ("", ""))[1]
            if op.opcode == "send" and (slices := _SLICES.search(op.rest)):
                # Between slices of TPUs a host runtime carries out the collective.
                kind = slices[1].lower().replace("_", "-")
                kind = kind.replace("one-to-one", "collective-permute")
            if kind in kinds:
                yield Run(op, kind, times, exact, label)
            elif loop := _LOOP.search(op.rest):
                trips = self._trips(op, *loop.groups())
                sure = exact and trips is not None
                trips = 1 if trips is None else trips
                yield from self._runs(kinds, loop[1], times * (trips + 1), sure)
                yield from self._runs(kinds, loop[2], times * trips, sure)
            elif not op.opcode.endswith(("-done", "-update")):  # only starts call
                sure = exact and op.opcode != "conditional"
                called = ",".join(n for m in _CALL.findall(op.rest) for n in m if n)
                for callee in re.findall(r"[\w.-]+", called):
                    for run in self._runs(kinds, callee, times, sure):
                        if op.opcode == "fusion":
                            # TPU text repeats an asynchronous collective in each of the
                            # fusions that help it along.
                            channel = re.findall(r"channel_id=\d+", run.op.rest)
                            same = (run.kind, *channel, *arrays(run.op))
                            if channel and same in in_fusions:
                                continue
                            in_fusions.add(same)
                        if callee.startswith("all-reduce-scatter"):
                            # TPU text writes it as a fused all-reduce and slice.
                            run = run._replace(kind="reduce-scatter")
                        yield run._replace(op_name=run.op_name or label)

    def _trips(self, loop: Instruction, condition: str, body: str) -> int | None:
        """As the text states, else n of `i = 0; while i < n: i += 1`.

        TPU text states nothing, but scans keep that form there.
        """
        if stated := _TRIPS.search(loop.rest):
            return int(stated[1])
        test, step = self.roots[condition], self.roots[body]
        start = self.operands(loop)[0]
        if not (start.opcode == step.opcode == "tuple" and "direction=LT" in test.rest):
            return None
        counter, end = map(self._origin, self.operands(test))
        if (index := _element(counter)) is None:
            return None
        first = self._origin(self.operands(start)[index])
        last = self._origin(self.operands(step)[index])
        if last.opcode != "add" or _integer(first) != 0:
            return None
        terms = [self._origin(term) for term in self.operands(last)]
        by_one = 1 in map(_integer, terms) and index in map(_element, terms)
        return _integer(end) if by_one else None

    def _origin(self, op: Instruction) -> Instruction:
        while op.opcode in ("copy", "bitcast"):
            op = self.operands(op)[0]
        return op


def _integer(op: Instruction) -> int | None:
    """Value of an integer constant."""
    match = re.match(r"(-?\d+)\)", op.rest)
    return int(match[1]) if op.opcode == "constant" and match else None


def _element(op: Instruction) -> int | None:
    """Which element of its tuple a get-tuple-element takes."""
    match = re.search(r"index=(\d+)", op.rest)
    return int(match[1]) if op.opcode == "get-tuple-element" and match else None


def arrays(op: Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each array of a result; bf16[2,3] is ("bfloat16", (2, 3))."""
    long = {"f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}
    found = []
    for short, shape in _ARRAY.findall(op.type):
        letters, bits, rest = re.findall(r"^([a-z]+)(\d*)(.*)$", short)[0]
        name = "bool" if letters == "pred" else long.get(letters, letters) + bits
        found.append((f"{name}_{rest}" if rest else name, tuple(_integers(shape))))
    return found


def pairs(op: Instruction) -> list[list[int]] | None:
    """(source, target) places of a permutation; None for other collectives."""
    match = _PAIRS.search(op.rest)
    return _lists(match[1]) if match else None


def groups(op: Instruction, devices: int) -> list[list[int]]:
    """Places in the device assignment that take part together; all where none is named.

    Reads `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` and `mesh['x'=2,'y'=4] {'y'}`.
    """
    if lists := _GROUP_LISTS.search(op.rest):
        return _lists(lists[1]) or [list(range(devices))]
    if iota := _GROUP_IOTA.search(op.rest):
        return _transposed(iota[2], iota[3]).reshape(_integers(iota[1])).tolist()
    if named := _GROUP_MESH.search(op.rest):
        return _mesh_groups(named[1], named[2] or "", named[3]).tolist()
    raise ValueError(f"text: no replica groups could be read in {op.name}({op.rest}")


def _mesh_groups(axes: str, order: str, grouped: str) -> np.ndarray:
    """`'x'=2,'y'=8`, an order of devices, and the axes to group, such as `'y':(2)4`.

    That is a part of y: with y cut into its digits [2, 4, 1], the one of size 4.
    """
    sizes = {name: int(n) for name, n in re.findall(r"([^',=]+)'?=(\d+)", axes)}
    wanted = re.findall(r"([^',:]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", grouped)
    iota = re.fullmatch(_IOTA, order)
    places = _transposed(iota[1], iota[2]) if iota else np.array(_integers(order), int)
    places = places if places.size else np.arange(math.prod(sizes.values()))
    shape, digit = [], {}
    for name, n in sizes.items():
        done = 1
        for before, part in sorted(
            (int(b), int(p)) for a, b, p in wanted if a == name and p
        ):
            shape += [before // done, part]
            digit[name, str(before)] = len(shape) - 1
            done = before * part
        shape.append(n // done)
        digit[name, ""] = len(shape) - 1
    inner = [digit[name, before] for name, before, _ in wanted]
    outer = [i for i in range(len(shape)) if i not in inner]
    size = math.prod(shape[i] for i in inner)
    return places.reshape(shape).transpose(outer + inner).reshape(-1, size)


def _transposed(dims: str, permutation: str | None) -> np.ndarray:
    """`[4,2]T(1,0)`: count through dims, then transpose."""
    array = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return array.transpose(_integers(permutation)) if permutation else array


def _lists(text: str) -> list[list[int]]:
    return [_integers(group) for group in re.findall(r"\{([\d, ]*)\}", text)]


def _integers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]
