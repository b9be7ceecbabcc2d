"""The information of a noisy code, by kernels between its means.

T = h(X) + N(0, noise I) is a mixture of as many normal laws as there are inputs. With
X uniform over the n rows, and v = noise,

    -mean_i log mean_j exp(-|h_i - h_j|^2 / 8 v) <= I(X; T)
                                 <= -mean_i log mean_j exp(-|h_i - h_j|^2 / 2 v)

(Kolchinsky and Tracey 2017, arXiv:1706.02419, eq. 10 and 11: Bhattacharyya and
Kullback-Leibler distances between the components.) With t_i = h_i + e_i drawn,

    I(X; T) = E mean_i [-|e_i|^2 / 2 v - log mean_j exp(-|t_i - h_j|^2 / 2 v)]

has no bias at all. `ib.channel` has such bounds as objectives, with masks.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from ..kernels import by_rows, rows_of, squared_distances
from .estimate import LOWER, NEITHER, UPPER, Estimate, estimate, spread
from .neighbours import BLOCK


def _checked(h, noise, labels):
    h = rows_of("h", h, 2)
    if labels is not None and labels.shape != h.shape[:1]:
        raise ValueError(f"labels: shape {labels.shape}, but h has {h.shape[0]} rows")
    if isinstance(noise, int | float) and noise <= 0:
        raise ValueError(f"noise: {noise}, but a variance must be above 0")
    return h


def _log_means(t, h, noise, labels, block, scale, scale_given):
    """log mean_j exp(-|t_i - h_j|^2 / scale v) over all j, and over those of i's label.

    Without labels the second is 0.
    """
    own = jnp.zeros(len(h), jnp.int32) if labels is None else labels

    def rows(t, label):
        squares = squared_distances(t, h) / noise
        whole = logsumexp(-squares / scale, axis=1)
        whole -= jnp.log(jnp.asarray(len(h), h.dtype))
        if labels is None:
            return whole, jnp.zeros_like(whole)
        same = label[:, None] == own
        within = logsumexp(jnp.where(same, -squares / scale_given, -jnp.inf), axis=1)
        return whole, within - jnp.log(same.sum(1).astype(h.dtype))

    return by_rows(rows, t, own, block=block)


def _estimate(terms, direction) -> Estimate:
    ceiling = jnp.log(jnp.asarray(len(terms), terms.dtype))
    return estimate(terms.mean(), spread(terms), ceiling=ceiling, direction=direction)


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
    h = _checked(h, noise, labels)
    whole, within = _log_means(h, h, noise, labels, block, 2, 8)
    return _estimate(within - whole, UPPER)


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
    h = _checked(h, noise, labels)
    whole, within = _log_means(h, h, noise, labels, block, 8, 2)
    return _estimate(within - whole, LOWER)


def kde_sampled(
    key: Array,
    h: Float[Array, "n d"],
    noise: float | Array,
    *,
    labels: Int[Array, " n"] | None = None,
    block: int = BLOCK,
) -> tuple[Estimate, Estimate | None]:
    """I(X; T), and with labels I(T; Y), in nats from one draw of the noise a row.

    Unbiased where the n rows are the whole law; single draws may be below 0, or above
    log n. As an estimate for a law that the rows are a sample of, it is too low by
    what log n cuts off. Raises as `kde_upper`.
    """
    h = _checked(h, noise, labels)
    drawn = jax.random.normal(key, h.shape, h.dtype)
    t = h + jnp.sqrt(jnp.asarray(noise, h.dtype)) * drawn
    whole, within = _log_means(t, h, noise, labels, block, 2, 2)
    x_t = _estimate(-jnp.square(drawn).sum(1) / 2 - whole, NEITHER)
    return x_t, None if labels is None else _estimate(within - whole, NEITHER)


def kde_pair(
    h: Float[Array, "n d"],
    noise: float | Array,
    labels: Int[Array, " n"],
    *,
    bound: str = "upper",
    block: int = BLOCK,
) -> tuple[Estimate, Estimate]:
    """I(X; T) by `kde_upper` or `kde_lower`, and I(T; Y) by entropies of that one kind.

    The second is what the literature plots: H(T) - H(T | Y), both from the same side,
    so that much of their errors cancels. It is near the truth where the bounds of both
    sides are far apart, and no bound. Raises as `kde_upper`, or for another bound.
    """
    if bound not in ("upper", "lower"):
        raise ValueError(f"bound: {bound!r}, but allowed are 'upper' and 'lower'")
    h = _checked(h, noise, labels)
    scale, side = (2, UPPER) if bound == "upper" else (8, LOWER)
    whole, within = _log_means(h, h, noise, labels, block, scale, scale)
    return _estimate(-whole, side), _estimate(within - whole, NEITHER)
