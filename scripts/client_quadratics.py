"""Clients descend on quadratics in float64; the exact law of links that keep e."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from narrows.data.quadratics import Quadratics
from narrows.optim.compressed_mean import CompressedMean
from narrows.scripts.client_descent import Round, descent


class Ends(NamedTuple):
    """Of every problem, [problems]."""

    least: Any  # |grad f|^2 in the last 500 rounds
    last: Any
    largest: Any
    tail: Any  # mean |x - x*|^2 of the last `tail` rounds
    law: Any  # largest entry of y' - y + rate mean g, y = x - rate mean e
    sizes: Any  # [problems, rounds], |grad f|^2


def noisy(x, client, key):
    """A client's gradient with noise of deviation sigma in every entry."""
    a, c, sigma = client
    return a * (x - c) + sigma * jax.random.normal(key, x.shape, x.dtype)


@functools.cache
def _program(mean: CompressedMean, clients: int, rounds: int, tail: int, momentum):
    def run(a, c, sigma, rate, key, first=None):
        problem = Quadratics(a, c)

        def record(before: Round, after: Round):
            grad = problem.gradients(after.x).mean(0)
            gap = jnp.sum((after.x - problem.solution) ** 2)
            return jnp.sum(grad**2), gap, broken(before, after)

        def broken(before, after):
            old, new = before.mean.up.worker[0].e, after.mean.up.worker[0].e
            if isinstance(old, tuple):
                return jnp.zeros(())
            sent = after.average.per_worker_mean.mean(0)
            moved = (after.x - rate * new.mean(0)) - (before.x - rate * old.mean(0))
            return jnp.abs(moved + rate * sent).max()

        go = descent(
            noisy,
            mean,
            clients=clients,
            rounds=rounds,
            record=record,
            momentum=momentum,
        )
        start = jnp.zeros(a.shape[1], a.dtype)
        data = (a, c, jnp.broadcast_to(sigma, (clients,)))
        sizes, gaps, law = go(data, start, rate, key, first=first)
        return Ends(
            least=sizes[-500:].min(),
            last=sizes[-1],
            largest=sizes.max(),
            tail=gaps[rounds - tail :].mean(),
            law=law.max(),
            sizes=sizes,
        )

    return jax.jit(jax.vmap(run, in_axes=(0, 0, None, None, 0, 0)))


def solved(
    mean: CompressedMean,
    problems: Sequence[Quadratics],
    *,
    rate: float,
    rounds: int,
    tail: int = 1,
    sigma: float = 0.0,
    momentum: float = 1.0,
    known: bool = False,
    seed: int = 0,
) -> Ends:
    """Of problems of one shape, from 0. known: every h starts at the solution's."""
    with jax.enable_x64(True):
        run = _program(mean, len(problems[0].a), rounds, tail, momentum)
        a, c = (jnp.asarray(np.stack(x)) for x in zip(*problems, strict=True))
        keys = jax.random.split(jax.random.key(seed), len(problems))
        first = None
        if known:
            first = jnp.asarray(np.stack([p.gradients(p.solution) for p in problems]))
        out = run(a, c, jnp.float64(sigma), jnp.float64(rate), keys, first)
        return jax.tree.map(np.asarray, out)
