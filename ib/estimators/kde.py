"""Bounds on the information of a noisy code, by kernels between its means.

T = h(X) + N(0, noise I) is a mixture of as many normal laws as there are inputs. With
X uniform over the n rows, and v = noise,

    -mean_i log mean_j exp(-|h_i - h_j|^2 / 8 v) <= I(X; T)
                                 <= -mean_i log mean_j exp(-|h_i - h_j|^2 / 2 v)

(Kolchinsky and Tracey 2017, arXiv:1706.02419, eq. 10 and 11: Bhattacharyya and
Kullback-Leibler distances between the components.)
"""

import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from .estimate import LOWER, UPPER, Estimate, estimate, rows_of, spread
from .neighbours import BLOCK, distances, each_row


def _information(h, noise, labels, block, scale, scale_given):
    """Rows' terms with kernels exp(-|.|^2 / scale v), less those within a label."""
    h = rows_of("h", h)
    n = h.shape[0]
    if labels is not None and labels.shape != (n,):
        raise ValueError(f"labels: shape {labels.shape}, but h has {n} rows")
    if isinstance(noise, int | float) and noise <= 0:
        raise ValueError(f"noise: {noise}, but a variance must be above 0")

    def row(i):
        squares = distances(h[i], h, "squares") / noise
        whole = logsumexp(-squares / scale) - jnp.log(jnp.asarray(n, h.dtype))
        if labels is None:
            return -whole
        same = labels == labels[i]
        within = logsumexp(jnp.where(same, -squares / scale_given, -jnp.inf))
        return within - jnp.log(same.sum().astype(h.dtype)) - whole

    return each_row(row, n, block)


def kde_upper(
    h: Float[Array, "n d"],
    noise: float | Array,
    *,
    labels: Int[Array, " n"] | None = None,
    block: int = BLOCK,
) -> Estimate:
    """Upper bound on I(X; T) in nats, or on I(T; Y) with the labels y; at least 0.

    noise is the variance of each feature of T. With labels, the bound on H(T) from
    above less that on H(T | Y) from below. ceiling: log n, what n inputs can hold.

    Raises: ValueError for what `rows_of` refuses, noise <= 0, labels not [n].

    >>> round(float(kde_upper(jnp.array([[0.0], [100.0]]), 1.0).value), 4)
    0.6931
    """
    terms = _information(h, noise, labels, block, 2, 8)
    return estimate(
        terms.mean(),
        spread(terms),
        ceiling=jnp.log(jnp.asarray(len(terms), terms.dtype)),
        direction=UPPER,
    )


def kde_lower(
    h: Float[Array, "n d"],
    noise: float | Array,
    *,
    labels: Int[Array, " n"] | None = None,
    block: int = BLOCK,
) -> Estimate:
    """Lower bound on I(X; T) in nats, or on I(T; Y) with labels (then maybe negative).

    As `kde_upper`, and raises as it does.
    """
    terms = _information(h, noise, labels, block, 8, 2)
    return estimate(
        terms.mean(),
        spread(terms),
        ceiling=jnp.log(jnp.asarray(len(terms), terms.dtype)),
        direction=LOWER,
    )
