"""Machines to plan for: arithmetic, memory and links, as their makers state them."""

import math
from typing import NamedTuple

from .layout import Layout


class Machine(NamedTuple):
    """One device and the links of its group.

    links: (devices that are joined so, bytes a second that one of them sends), fastest
    first; the last joins any number. `matmul` is the share of `peak` that large matrix
    products reach: an assumption of every plan, printed with it.
    """

    name: str
    peak: float  # operations a second of bfloat16 products
    memory: float  # bytes
    bandwidth: float  # bytes a second between memory and the unit
    links: tuple[tuple[float, float], ...]
    latency: float  # seconds of one message
    matmul: float
    source: str


ANY = math.inf
_ICI = "Google's page of the chip; a mesh axis is taken as one ring of two links"
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("v4", 275e12, 32e9, 1.2e12, ((ANY, 90e9),), 1e-6, 0.85, _ICI),
        Machine("v5e", 197e12, 16e9, 0.819e12, ((ANY, 90e9),), 1e-6, 0.85, _ICI),
        Machine("v5p", 459e12, 95e9, 2.765e12, ((ANY, 180e9),), 1e-6, 0.85, _ICI),
        Machine("v6e", 918e12, 32e9, 1.64e12, ((ANY, 180e9),), 1e-6, 0.85, _ICI),
        Machine(  # 8 joined by NVSwitch, one 200 Gbit/s adapter each
            "a100",
            312e12,
            80e9,
            2.039e12,
            ((8, 300e9), (ANY, 25e9)),
            5e-6,
            0.8,
            "NVIDIA's page of the DGX A100 640GB; arXiv:2104.04473, Section 5",
        ),
        Machine(  # a die of an MI250X; pairs, then 8 of a node with 4 adapters
            "mi250x",
            191.5e12,
            64e9,
            1.6e12,
            ((2, 200e9), (8, 50e9), (ANY, 12.5e9)),
            10e-6,
            0.8,
            "the Frontier user guide; a die is half of a package",
        ),
    )
}


def machine(name: str) -> Machine:
    """By name. Raises ValueError with the names there are."""
    if name not in MACHINES:
        raise ValueError(
            f"machine: {name!r}, but known are {', '.join(sorted(MACHINES))}"
        )
    return MACHINES[name]


def stride(layout: Layout, axis: str) -> int:
    """Devices between neighbours along an axis: those of all axes inside it."""
    names = [*layout.__dataclass_fields__]
    return math.prod(getattr(layout, name) for name in names[names.index(axis) + 1 :])


def rate(machine: Machine, layout: Layout, axis: str) -> float:
    """Bytes a second that one device sends around rings along an axis.

    A ring that leaves a group of fast links does so by the slow links of all of the
    group's devices that take part: k of them have k adapters.

    >>> a100, whole = MACHINES["a100"], Layout(data=4, tensor=8)
    >>> rate(a100, whole, "tensor") / 1e9, rate(a100, whole, "data") / 1e9
    (300.0, 25.0)
    """
    apart, n = stride(layout, axis), getattr(layout, axis)
    slowest, inside = math.inf, 1
    for joined, speed in machine.links:
        if inside < n:  # some neighbours are joined by this link
            slowest = min(slowest, speed * inside)
        inside = max(inside, min(n, int(joined // apart) if joined != ANY else n))
    return slowest
