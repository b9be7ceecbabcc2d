"""Descent by compressed means, as the claims about links measure it.

One program runs all rounds of n clients on one device: the library's own compressed
mean, simulated, between the clients' gradients and the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from narrows.optim.compressed_mean import CompressedMean, MeanState
from narrows.parallel.state import PerWorkerMean, simulate

Gradient = Callable[[Array, Any, PRNGKeyArray], Array]  # (x, a client's data, key)


class Round(NamedTuple):
    count: Int[Array, ""]
    x: Float[Array, "d"]
    average: PerWorkerMean  # [n, d], of every client's gradients
    mean: MeanState


def descent(
    gradient: Gradient,
    mean: CompressedMean,
    *,
    clients: int,
    rounds: int,
    record: Callable[[Round, Round], Any],
    momentum: float = 1.0,
    present: float = 1.0,
    every: int = 1,
) -> Callable[..., Any]:
    """run(data, x, rate, key, weights=None, first=None) -> records of all rounds.

    x <- x - rate (compressed mean of v_i / w_i weighted by w_i), v_i <- momentum g_i +
    (1 - momentum) v_i. A round finds each client with chance `present`. Every h starts
    at the first gradients, or at `first` [n, d]. `record` gets what was before and
    after each `every`-th round. data has a leading axis of clients.
    """

    def run(data, x, rate, key, weights=None, first=None):
        def worker(data, state: Round):
            now, index = jax.random.fold_in(key, state.count), lax.axis_index("data")
            own = jax.random.fold_in(now, index)
            g = gradient(state.x, data, jax.random.fold_in(own, 0))
            v = momentum * g + (1 - momentum) * state.average.per_worker_mean
            here: Any = True
            if present < 1:
                here = jax.random.bernoulli(jax.random.fold_in(own, 1), present)
            signal = v if weights is None else v / weights[index]
            step, memory = mean.mean(
                signal,
                state.mean,
                jax.random.fold_in(now, clients),
                active=here,
                weights=weights,
            )
            x = state.x - rate * step
            return 0.0, Round(state.count + 1, x, PerWorkerMean(v), memory)

        go = simulate(worker, workers=clients, axis_name="data")

        def one(state, _):
            if every > 1:
                state = lax.fori_loop(0, every - 1, lambda _, s: go(data, s)[1], state)
            after = go(data, state)[1]
            return after, record(state, after)

        keys = jax.random.split(jax.random.fold_in(key, 2**31), clients)
        g = jax.vmap(gradient, in_axes=(None, 0, 0))(x, data, keys)
        known = g if first is None else first
        if weights is not None:
            known = known / weights[:, None]
        memory = mean.init(x, first=known, weights=weights)
        start = Round(jnp.int32(0), x, PerWorkerMean(g), memory)
        return lax.scan(one, start, None, length=rounds // every)[1]

    return run
