"""Both sides in one process, taking turns: ratios with their spread.

Machines are shared and noisy. A round times every side once, right after each other; a
ratio is taken within its round, and the median over rounds is reported with quartiles.
On a CPU, the processor time of the process comes first: wall time also counts what
others take.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from rich.progress import track


class Timed(NamedTuple):
    cpu: np.ndarray  # seconds of processor time per call, one for each round
    wall: np.ndarray  # seconds of wall time


class Spread(NamedTuple):
    median: float
    low: float  # quartiles over rounds
    high: float


def alternate(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, calls: int, console
) -> dict[str, Timed]:
    """Time `calls` calls of each side per round; a call must end with its work done."""
    for run in sides.values():  # compile, and reach the working set
        run()
        run()
    taken = {name: ([], []) for name in sides}
    for _ in track(range(rounds), "measure", console=console):
        for name, run in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(calls):
                run()
            taken[name][0].append((time.process_time() - cpu) / calls)
            taken[name][1].append((time.perf_counter() - wall) / calls)
    return {name: Timed(*map(np.array, pair)) for name, pair in taken.items()}


def ratio(ours: np.ndarray, theirs: np.ndarray) -> Spread:
    """How many times faster ours is: theirs / ours, round by round."""
    low, middle, high = np.percentile(theirs / ours, [25, 50, 75])
    return Spread(float(middle), float(low), float(high))
