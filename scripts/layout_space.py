"""A space of layouts at a fixed batch, and three ways to look for its best point.

Exhaustive, random, and by a surrogate: a random forest is fitted to what was seen, and
the point with the least lower bound (mean less deviation over its trees) comes next, as
in the DeepHyper search of Dash et al. 2023 (arXiv:2312.12705, Section 5).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from narrows.parallel.layout import Layout
from narrows.parallel.plan_machines import Machine
from narrows.parallel.plan_model import Job, Sizes
from narrows.parallel.plan_search import Candidate, cost, divisors
from sklearn.ensemble import RandomForestRegressor

FIRST = 10  # points drawn at random before there is a surrogate
PENALTY = 2.0  # of a point that fails: so much slower than the slowest that runs


class Point(NamedTuple):
    """What the paper varies; the rest of the devices are data parallel."""

    stage: int
    tensor: int
    rows: int  # of a microbatch
    chunks: int
    shard_moments: int  # 0 or 1


def space(sizes: Sizes, devices: int, batch: int) -> list[Point]:
    """Every point whose stages and tensor parts divide the devices, refused or not."""
    powers = [n for n in divisors(devices) if n <= 64]
    return [
        Point(p, t, b, v, z)
        for p, t, b, v, z in itertools.product(
            powers, [n for n in powers if n <= 16], (1, 2, 4, 8, 16), (1, 2, 3), (0, 1)
        )
        if devices % (p * t) == 0 and not (v > 1 and p == 1)
    ]


def evaluate(
    point: Point, sizes: Sizes, devices: int, batch: int, machine: Machine
) -> Candidate:
    """By the cost model: moments of 14 bytes a parameter, a head on the last stage."""
    p, t, b, v, z = point
    layout = Layout(stage=p, data=devices // (p * t), tensor=t)
    job = Job(
        batch=batch,
        microbatches=max(1, batch // (layout.data * b)),
        chunks=v,
        state=14.0,
        shard_moments=bool(z),
        head_on_last=True,
    )
    if job.microbatch(layout) != b:
        refused = f"batch: {batch} rows do not divide over data={layout.data} x {b}"
        return Candidate(layout, job, None, refused)
    return cost(sizes, layout, job, machine)


def random_search(seconds: np.ndarray, budget: int, seed: int) -> float:
    """The least of so many points, drawn without repetition."""
    chosen = np.random.default_rng(seed).permutation(len(seconds))[:budget]
    return float(seconds[chosen].min())


def surrogate_search(
    points: Sequence[Point], look: Callable[[int], float], budget: int, seed: int
) -> tuple[float, dict[str, float]]:
    """The least found in `budget` looks, and how much each choice matters.

    look(i): seconds of point i, infinite where it fails; a failure is a bad value, not
    left out. Importance: the forest's fall in fit when a choice is shuffled.
    """
    rng = np.random.default_rng(seed)
    x = np.log2(1 + np.array(points, float))
    seen = [int(i) for i in rng.permutation(len(points))[: min(FIRST, budget)]]
    values = [look(i) for i in seen]

    def fitted() -> RandomForestRegressor:
        y = np.array(values)
        ran = np.isfinite(y)
        worst = PENALTY * y[ran].max() if ran.any() else 1.0
        forest = RandomForestRegressor(24, random_state=seed, min_samples_leaf=2)
        return forest.fit(x[seen], np.log(np.where(ran, y, worst)))

    while len(seen) < budget:
        forest = fitted()
        trees = np.stack([tree.predict(x) for tree in forest.estimators_])
        bound = trees.mean(0) - trees.std(0)
        bound[seen] = np.inf
        seen.append(int(bound.argmin()))
        values.append(look(seen[-1]))
    forest = fitted()
    base = forest.predict(x[seen])
    matter = {}
    for column, name in enumerate(Point._fields):
        shuffled = x[seen].copy()
        shuffled[:, column] = rng.permutation(shuffled[:, column])
        matter[name] = float(np.mean((forest.predict(shuffled) - base) ** 2))
    total = sum(matter.values()) or 1.0
    return min(values), {name: x / total for name, x in matter.items()}
