"""Momentum SGD on compressed means, by any link and topology.

The pieces are optax transformations that run where the axis of workers is bound:
`per_worker` gives a transformation a state for each worker, `exchange` replaces every
worker's own tree by the compressed mean. Their chain is classic error feedback, EF21
with momentum of the clients (EF21-SGDM, Fatkhullin et al. 2023, arXiv:2305.15155),
EControl or DIANA, as the link says.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from ..parallel.state import PerWorkerMean, replicate
from .compressed_mean import (
    PLAIN,
    CompressedMean,
    MeanState,
    Topology,
    Way,
    compressed_mean,
)
from .quantizers import blocks

FOUR_BITS = Way("feedback", blocks(4, block=32))


class ExchangeState(NamedTuple):
    count: Int[Array, ""]
    mean: MeanState


def exchange(mean: CompressedMean, *, seed: int = 0) -> optax.GradientTransformation:
    """Every worker's tree becomes the compressed mean of all workers' trees."""

    def init(params):
        return ExchangeState(jnp.int32(0), mean.init(params))

    def update(updates, state: Any, params=None):
        del params
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        updates, new = mean.mean(updates, state.mean, key)
        return updates, ExchangeState(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def per_worker(
    tx: optax.GradientTransformation, *, workers: int
) -> optax.GradientTransformation:
    """`tx` of each worker's own updates, with a state for each.

    When the number of workers changes all get the mean of the states, so that a mean
    over workers of what is linear in them (moments) is what it was.
    """

    def init(params):
        return replicate(PerWorkerMean(tx.init(params)), workers)

    def update(updates, state: Any, params=None):
        updates, new = tx.update(updates, state.per_worker_mean, params)
        return updates, PerWorkerMean(new)

    return optax.GradientTransformation(init, update)


def compressed_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    workers: int,
    axis_name: str = "data",
    momentum: float = 0.9,
    average: float = 0.0,
    up: Way = FOUR_BITS,
    down: Way | None = None,
    topology: Topology = "two_phase",
) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum of the compressed mean gradient.

    average: of each worker's gradients before they are sent, v <- average v +
    (1 - average) g. Ways: 4-bit blocks with error feedback up, and down in two phases.

    >>> tx = compressed_sgd(0.1, workers=4, average=0.9)
    >>> len(tx.init(jnp.zeros(3)))
    4
    """
    if down is None:
        down = FOUR_BITS if topology == "two_phase" else PLAIN
    mean = compressed_mean(
        up, down, workers=workers, axis_name=axis_name, topology=topology
    )
    return optax.chain(
        per_worker(optax.ema(average, debias=False), workers=workers)
        if average
        else optax.identity(),
        exchange(mean),
        optax.trace(momentum) if momentum else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )
