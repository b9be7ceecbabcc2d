"""When the operations of a pipeline schedule run: exact, in rational numbers.

A device runs its operations in order, each as soon as what it needs is there:

    F(i, k) needs F(i, k - 1),      B(i, k) needs B(i, k + 1) and F(i, k),

over the stages k = c p + s; what comes from another device needs `send` more. All time
claims about schedules come from here: one compiled program moves its stages in step and
cannot show them (see docs/layouts.md).
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from .schedules import Number, Op, Schedule


class Span(NamedTuple):
    """An operation of a device, from when to when."""

    op: Op
    start: Fraction
    finish: Fraction


class Timeline(NamedTuple):
    spans: list[list[Span]]  # [device], in order of time
    makespan: Fraction
    busy: tuple[Fraction, ...]  # [device]
    stash: tuple[int, ...]  # [device]: most inputs (of a chunk each) kept at once

    @property
    def bubble(self) -> Fraction:
        """Idle time over work, of all devices together."""
        work = sum(self.busy)
        return (len(self.busy) * self.makespan - work) / work

    @property
    def idle_share(self) -> Fraction:
        """Idle time over all time."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan)


def simulate(
    schedule: Schedule,
    *,
    forward: Number | Sequence[Number] = 1,
    backward: Number | Sequence[Number] = 2,
    send: Number = 0,
) -> Timeline:
    """Run a schedule on devices of given speed.

    forward, backward: time of a stage for one microbatch, one number or one for each
    of the v p stages, in the same unit as `send`, the time of one message.

    Raises ValueError for a schedule that waits for ever, or lacks an operation.

    >>> from .schedules import gpipe
    >>> simulate(gpipe(4, 8), forward=1, backward=2).makespan
    Fraction(33, 1)
    """
    devices = len(schedule)
    chunks = 1 + max(op.chunk for ops in schedule for op in ops)
    stages = devices * chunks
    cost = {"F": _each(forward, stages), "B": _each(backward, stages)}
    finished: dict[tuple[str, int, int], Fraction] = {}
    spans: list[list[Span]] = [[] for _ in schedule]
    clock = [Fraction(0)] * devices
    moving = True
    while moving:
        moving = False
        for device, ops in enumerate(schedule):
            while len(spans[device]) < len(ops):
                op = ops[len(spans[device])]
                stage = op.chunk * devices + device
                start = _ready(op, stage, stages, finished, Fraction(send), devices)
                if start is None:
                    break
                start = max(start, clock[device])
                clock[device] = start + cost[op.kind][stage]
                finished[op.kind, op.microbatch, stage] = clock[device]
                spans[device].append(Span(op, start, clock[device]))
                moving = True
    _check_complete(schedule, spans, stages)
    busy = tuple(sum((s.finish - s.start for s in row), Fraction(0)) for row in spans)
    return Timeline(spans, max(clock), busy, tuple(_stash(ops) for ops in schedule))


def _ready(op, stage, stages, finished, send, devices) -> Fraction | None:
    """When all that an operation needs is there; None if some is not known yet."""
    i = op.microbatch
    needs = [("F", i, stage - 1)] if op.kind == "F" and stage else []
    if op.kind == "B":
        needs = [("F", i, stage)]
        needs += [("B", i, stage + 1)] if stage + 1 < stages else []
    if any(need not in finished for need in needs):
        return None
    far = [devices > 1 and need[2] != stage for need in needs]
    times = zip(needs, far, strict=True)
    return max((finished[n] + (send if f else 0) for n, f in times), default=Fraction())


def _each(cost: Number | Sequence[Number], stages: int) -> list[Fraction]:
    costs = list(cost) if isinstance(cost, Sequence) else [cost] * stages
    if len(costs) != stages:
        raise ValueError(
            f"forward, backward: {len(costs)} times, but there are {stages} stages"
        )
    return [Fraction(c) for c in costs]


def _stash(ops: Sequence[Op]) -> int:
    held = most = 0
    for op in ops:
        held += 1 if op.kind == "F" else -1
        most = max(most, held)
    return most


def _check_complete(schedule, spans, stages) -> None:
    for device, ops in enumerate(schedule):
        if len(spans[device]) < len(ops):
            raise ValueError(
                f"schedule: device {device} waits for ever before "
                f"{ops[len(spans[device])]}"
            )
    done = [(*op, d) for d, ops in enumerate(schedule) for op in ops]
    microbatches = 1 + max(op.microbatch for ops in schedule for op in ops)
    if len(done) != len(set(done)) or len(done) != 2 * microbatches * stages:
        raise ValueError(
            f"schedule: {len(done)} operations, but {microbatches} microbatches on "
            f"{stages} stages take {2 * microbatches * stages}, each once"
        )
