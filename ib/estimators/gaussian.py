"""Information of jointly normal samples, and of samples with a normal copula."""

import math

import jax.numpy as jnp
from jax.scipy.special import digamma, ndtri
from jax.scipy.stats import rankdata
from jaxtyping import Array, Float

from .estimate import Estimate, estimate, pair, spread, unit_variance


def _log_det_bias(n: int, d: int, dtype) -> Float[Array, ""]:
    """E log|S| - log|Sigma| of the covariance S of n normal rows (Wishart's law)."""
    halves = (n - jnp.arange(1, d + 1, dtype=dtype)) / 2
    return digamma(halves).sum() - d * jnp.log(jnp.asarray((n - 1) / 2, dtype))


def whitened(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Array]:
    """Rows of covariance I, and log|S|; NaN for a covariance without full rank."""
    x = x - x.mean(0)
    root = jnp.linalg.cholesky(x.T @ x / (x.shape[0] - 1))
    white = jnp.linalg.solve(root, x.T).T
    return white, 2 * jnp.log(jnp.diagonal(root)).sum()


def gaussian(x: Float[Array, "n d"], y: Float[Array, "n e"]) -> Estimate:
    """I = (log|S_x| + log|S_y| - log|S_xy|) / 2 in nats, without its bias.

    Features are brought to unit variance first, so that scales do not matter. The bias
    of each log-determinant under a normal law is known exactly and taken out. The error
    is that of the mean log-density ratio, and sqrt(d e / 2) / n for its law at I = 0.
    Right for normal samples alone; for others neither a bound from above nor below.

    Raises: ValueError for what `pair` refuses, or n <= d + e + 1.
    Not converged (NaN) where a covariance has not full rank.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 1))
    >>> y = x + jax.random.normal(jax.random.key(1), (1000, 1))
    >>> bool(abs(gaussian(x, y).value - 0.3466) < 0.07)
    True
    """
    x, y = pair(x, y)
    n, d, e = x.shape[0], x.shape[1], y.shape[1]
    if n <= d + e + 1:
        raise ValueError(
            f"x: {n} rows, but {d} + {e} features need at least {d + e + 2}"
        )
    x, y = unit_variance(x), unit_variance(y)
    parts = [whitened(a) for a in (x, y, jnp.concatenate([x, y], 1))]
    (ratio_x, log_x), (ratio_y, log_y), (ratio_xy, log_xy) = (
        (log_det + (white**2).sum(1), log_det - _log_det_bias(*white.shape, x.dtype))
        for white, log_det in parts
    )
    error = spread((ratio_x + ratio_y - ratio_xy) / 2)
    error = jnp.hypot(error, math.sqrt(d * e / 2) / n)
    return estimate((log_x + log_y - log_xy) / 2, error)


def normal_scores(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Phi^-1(rank / (n + 1)) of each feature; equal values share their mean rank."""
    ranks = rankdata(x, method="average", axis=0).astype(x.dtype)
    return ndtri(ranks / (x.shape[0] + 1))


def gaussian_copula(x: Float[Array, "n d"], y: Float[Array, "n e"]) -> Estimate:
    """`gaussian` of normal scores: the same for every monotone map of a feature, nats.

    (Ince et al. 2017, doi:10.1002/hbm.23471, eq. 2.) Right where some monotone maps of
    the features are jointly normal. Raises as `gaussian`.
    """
    x, y = pair(x, y)
    return gaussian(normal_scores(x), normal_scores(y))
