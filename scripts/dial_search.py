"""One budget of tuning for every method: a search over dials, then a sweep of beta.

Each method gets SEARCH + SWEEP runs for each task and seed. The search varies learning
rate, beta and two numbers of the method's own (widths of kernels, mostly) over ranges,
on logarithmic scales, at points of a Halton sequence that all methods share; PLAIN of
them have beta = 0. The sweep takes beta from 0 to the end of its range, at the dials
that validated best. A choice is made by validation error, for each task and seed anew.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from narrows.scripts import bottleneck_study as study
from narrows.scripts.bottleneck_study import Dials, Run, Shape, Task, train
from scipy.stats import qmc

SEARCH, PLAIN, SWEEP = 5, 3, 5  # runs


class Method(NamedTuple):
    """What a search varies, from and to, on a logarithmic scale."""

    make: study.Method
    beta: tuple[float, float] | None  # None: has no penalty
    first: tuple[float, float] = (1.0, 1.0)
    second: tuple[float, float] = (1.0, 1.0)


@functools.cache
def points() -> np.ndarray:
    """[SEARCH, 4] in [0, 1): learning rate, first, second, beta; for all methods."""
    return qmc.Halton(4, seed=0).random(SEARCH)


def along(ends: tuple[float, float], share) -> np.ndarray:
    low, high = np.log(ends)
    return np.exp(low + (high - low) * np.asarray(share))


def search_dials(method: Method, rates: tuple[float, float]) -> Dials:
    """[SEARCH], the first PLAIN of them at beta = 0."""
    at = points().T
    beta = np.zeros(SEARCH)
    if method.beta:
        beta[PLAIN:] = along(method.beta, at[3, PLAIN:])
    first, second = along(method.first, at[1]), along(method.second, at[2])
    return Dials(beta, along(rates, at[0]), first, second)


def sweep_dials(method: Method, chosen: Dials) -> Dials:
    """[tasks, SWEEP] from the dials that did best on each task."""
    if method.beta:
        betas = np.concatenate([[0], np.geomspace(*method.beta, SWEEP - 1)])
        rate = 1.0
    else:  # what others spend on betas goes into the learning rate
        betas, rate = np.zeros(SWEEP), np.geomspace(0.5, 2, SWEEP)
    wide = [np.repeat(np.asarray(a)[:, None], SWEEP, 1) for a in chosen]
    return Dials(np.broadcast_to(betas, wide[0].shape), wide[1] * rate, *wide[2:])


class Tuned(NamedTuple):
    """All runs of a method on all tasks: the search first, then the sweep."""

    runs: Run  # leaves [tasks, SEARCH + SWEEP, ...]
    dials: Dials  # [tasks, SEARCH + SWEEP]

    def best(self, among=None) -> np.ndarray:
        """For each task the run that validates best, of those that `among` marks."""
        error = np.asarray(self.runs.valid)
        return np.where(True if among is None else among, error, np.inf).argmin(1)

    def rmse(self, which: np.ndarray) -> np.ndarray:
        mse = np.asarray(self.runs.test_mse)
        return np.sqrt(mse[np.arange(len(which)), which])


def tuned(
    method: Method, tasks: Task, seed: int, rates: tuple[float, float], shape: Shape
) -> Tuned:
    """All runs of a method; rates: learning rates from, to."""
    count = len(tasks.y)

    def run(dials: Dials) -> Run:
        flat = Dials(*(jnp.asarray(a, jnp.float32).reshape(-1) for a in dials))
        each = len(flat.beta) // count
        which = jnp.repeat(jnp.arange(count), each)
        seeds = jnp.full(len(which), seed, jnp.int32)
        found = train(tasks, which, flat, seeds, shape=shape, method=method.make)
        return jax.tree.map(lambda a: a.reshape(count, each, *a.shape[1:]), found)

    one = search_dials(method, rates)
    search = Dials(*(np.broadcast_to(a, (count, SEARCH)) for a in one))
    first = run(search)
    best = np.asarray(first.valid).argmin(1)
    sweep = sweep_dials(method, Dials(*(a[best] for a in one)))
    runs = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), first, run(sweep))
    joined = (np.concatenate(pair, 1) for pair in zip(search, sweep, strict=True))
    return Tuned(runs, Dials(*joined))


def at_half(compression: np.ndarray, rmse: np.ndarray) -> float:
    """RMSE where the method's own information is half of that without compression.

    Linear in r = 1 - I / I(beta = 0) along the betas; the last where none reaches it.
    """
    r = np.maximum.accumulate(1 - compression / compression[0])
    return float(np.interp(0.5, r, rmse))
