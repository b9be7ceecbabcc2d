"""Pipeline schedules: which stage does what in which order. Lists, no devices.

A pipeline of p devices runs m microbatches forward (F) and backward (B). With v chunks
of layers on each device, chunk c of device s is stage c p + s of v p. A schedule is one
list of operations for each device; when they start is `pipeline_simulator`'s business.

    gpipe        all F, then all B in reverse (Huang et al. 2019, arXiv:1811.06965)
    one_f_one_b  p - s - 1 F, then pairs, then the last B
    interleaved  the same over v chunks, in groups of p microbatches

The last two are those of Narayanan et al. 2021 (arXiv:2104.04473, Section 2.2).

With tf, tb the time of a device's whole share of a microbatch, the time of a batch is

    m (tf + tb) + (p - 1) (tf + tb) / v          (v = 1 for the first two),

and a device keeps the inputs of so many microbatches (of chunks, interleaved) at once:
m; min(p - s, m); min(2 (p - s - 1) + (v - 1) p + 1, m v).
"""

from fractions import Fraction
from typing import Literal, NamedTuple

Number = int | Fraction


class Op(NamedTuple):
    kind: Literal["F", "B"]
    microbatch: int
    chunk: int = 0


Schedule = list[list[Op]]  # [device][place in its order]


def gpipe(devices: int, microbatches: int) -> Schedule:
    """All forward, then all backward in reverse: the transpose of a forward loop.

    >>> [op.kind for op in gpipe(2, 2)[0]]
    ['F', 'F', 'B', 'B']
    """
    _check(devices, microbatches)
    forward = [Op("F", i) for i in range(microbatches)]
    backward = [Op("B", i) for i in reversed(range(microbatches))]
    return [forward + backward for _ in range(devices)]


def one_f_one_b(devices: int, microbatches: int) -> Schedule:
    """One forward, one backward, with a flush: as many microbatches as stages in flight

    >>> [op.kind for op in one_f_one_b(2, 3)[0]]
    ['F', 'F', 'B', 'F', 'B', 'B']
    """
    _check(devices, microbatches)
    forward = [Op("F", i) for i in range(microbatches)]
    backward = [Op("B", i) for i in range(microbatches)]
    return [_alternate(forward, backward, devices - s - 1) for s in range(devices)]


def interleaved(devices: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B over `chunks` groups of layers a device, microbatches in groups of p.

    Raises ValueError unless the microbatches are a multiple of the devices: with a rest
    the bubble is larger than 1 / v of the plain one.
    """
    _check(devices, microbatches)
    if chunks < 1:
        raise ValueError(f"chunks: {chunks}, but it must be at least 1")
    if microbatches % devices:
        low = microbatches // devices * devices
        near = " or ".join(str(n) for n in (low, low + devices) if n)
        raise ValueError(
            f"microbatches: {microbatches} are no multiple of the {devices} devices, "
            f"as the interleaved schedule needs; nearest: {near}"
        )
    groups = [range(i, i + devices) for i in range(0, microbatches, devices)]
    order = [(i, c) for group in groups for c in range(chunks) for i in group]
    forward = [Op("F", i, c) for i, c in order]
    backward = [Op("B", i, chunks - 1 - c) for i, c in order]
    return [
        _alternate(forward, backward, 2 * (devices - s - 1) + (chunks - 1) * devices)
        for s in range(devices)
    ]


def _alternate(forward: list[Op], backward: list[Op], warm_up: int) -> list[Op]:
    """`warm_up` forward operations, then pairs of both, then what is left."""
    warm_up = min(warm_up, len(forward))
    ahead = forward[warm_up:]
    pairs = [op for pair in zip(ahead, backward, strict=False) for op in pair]
    return forward[:warm_up] + pairs + backward[len(ahead) :]


def make_schedule(name: str, devices: int, microbatches: int, chunks: int) -> Schedule:
    """A schedule by name. Raises ValueError for chunks that it does not know."""
    if name == "interleaved":
        return interleaved(devices, microbatches, chunks)
    plain = {"gpipe": gpipe, "one_f_one_b": one_f_one_b}
    if name not in plain:
        raise ValueError(
            f"schedule: {name!r}, but allowed are {', '.join((*plain, 'interleaved'))}"
        )
    if chunks != 1:
        raise ValueError(f"chunks: {chunks}, but {name} has one chunk a device")
    return plain[name](devices, microbatches)


class Closed(NamedTuple):
    """What the papers say of a schedule."""

    makespan: Fraction  # time of a batch
    bubble: Fraction  # idle time of a device over its work
    stash: tuple[
        Fraction, ...
    ]  # inputs kept by each device, in microbatches of a stage


def closed_form(
    name: str,
    devices: int,
    microbatches: int,
    chunks: int,
    forward: Number,
    backward: Number,
) -> Closed:
    """(arXiv:2104.04473, Sec. 2.2; arXiv:1811.06965, Sec. 2.3), for equal stages."""
    p, m, v = devices, microbatches, chunks
    work = m * Fraction(forward + backward)
    idle = (p - 1) * Fraction(forward + backward) / v
    kept = {
        "gpipe": lambda s: m,
        "one_f_one_b": lambda s: min(p - s, m),
        "interleaved": lambda s: min(2 * (p - s - 1) + (v - 1) * p + 1, m * v),
    }[name]
    stash = tuple(Fraction(kept(s), v) for s in range(p))
    return Closed(work + idle, idle / work, stash)


def _check(devices: int, microbatches: int) -> None:
    for name, value in (("devices", devices), ("microbatches", microbatches)):
        if value < 1:
            raise ValueError(f"{name}: {value}, but it must be at least 1")
