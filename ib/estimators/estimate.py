"""What every estimator returns, and the checks that every estimator makes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..kernels import rows_of

STABLE = 2.0  # sampling errors by which two settings of an estimator may differ
ROUNDING = 1e-5  # nats
LOWER, NEITHER, UPPER = -1, 0, 1  # a bound from below, no bound, a bound from above


class Estimate(NamedTuple):
    """Information in nats, and how far to believe it; all fields go through vmap.

    direction says on which side of the truth the expected value lies where the premise
    of the estimator holds; the table names the premise. converged is False where the
    estimator sees that its value is not to be reported: not finite, not stable under a
    change of its own setting, a critic that was still improving.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]  # of sampling; a bias only where one is seen
    ceiling: Float[Array, ""]  # no sample of this size gives more; inf for none
    direction: Int[Array, ""]  # LOWER, NEITHER or UPPER
    converged: Bool[Array, ""]

    @property
    def unit(self) -> str:
        return "nats"


def estimate(
    value: Float[Array, ""],
    standard_error: Float[Array, ""],
    *,
    ceiling: float | Array = jnp.inf,
    direction: int = NEITHER,
    converged: bool | Array = True,
    least: float = 0.0,
) -> Estimate:
    """An Estimate whose fields are arrays.

    Never converged where it is not finite, or 2 standard errors below `least`, which
    no information is: 0, but for entropies.
    """
    finite = jnp.isfinite(value) & jnp.isfinite(standard_error)
    finite &= value >= least - STABLE * standard_error - ROUNDING
    return Estimate(
        value,
        standard_error,
        jnp.asarray(ceiling, value.dtype),
        jnp.asarray(direction, jnp.int32),
        finite & converged,
    )


def spread(contributions: Float[Array, " n"]) -> Float[Array, ""]:
    """Standard error of a mean of n contributions: their deviation over sqrt n."""
    n = contributions.shape[0]
    return contributions.std() / jnp.sqrt(jnp.asarray(n, contributions.dtype))


def believed(
    terms: Float[Array, " n"], other: Float[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""], Bool[Array, ""]]:
    """Mean of terms, its error, and whether `other`, of another setting, agrees.

    A bias shows as a mean that moves with the setting. What it moves by is added to the
    error of sampling in squares; they agree where that is at most 2 sampling errors.
    """
    value, error = terms.mean(), spread(terms)
    moved = jnp.abs(value - other.mean())
    return value, jnp.hypot(error, moved), moved <= STABLE * error


def weighted(
    statistic: Callable[[Float[Array, " n"]], Float[Array, ""]], n: int, dtype
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """statistic(weights) at equal weights, and its standard error.

    The infinitesimal jackknife (Jaeckel 1972; Efron 1981, The jackknife, eq. 6.13): the
    gradient by the weights of the samples is each sample's influence, and

        error^2 = sum_i (g_i - mean g)^2,  g = d statistic / d weights

    It is right for statistics of pairs, where the terms of a mean are not independent.

    >>> value, error = weighted(lambda w: w @ jnp.array([1.0, 3.0]), 2, jnp.float32)
    >>> float(value), round(float(error), 4)
    (2.0, 0.7071)
    """
    value, slope = jax.value_and_grad(statistic)(jnp.full(n, 1 / n, dtype))
    return value, spread(slope)


def unit_variance(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Features less their mean over their deviation; a constant one becomes 0."""
    x = x - x.mean(0)
    deviation = x.std(0)
    return x / jnp.where(deviation > 0, deviation, 1)


def pair(
    x: Float[Array, "n d"], y: Float[Array, "n e"], least: int = 2
) -> tuple[Float[Array, "n d"], Float[Array, "n e"]]:
    """Both samples in one dtype, float32 or wider.

    Raises: ValueError for what `rows_of` refuses, or samples of different length.
    """
    x, y = rows_of("x", x, least), rows_of("y", y, least)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"y: {y.shape[0]} rows, but x has {x.shape[0]}; they are paired row by row"
        )
    wide = jnp.promote_types(x.dtype, y.dtype)
    return x.astype(wide), y.astype(wide)
