"""Bounds on information from a critic's scores of all pairs of a sample.

scores[i, j] = critic(x_i, y_j): the diagonal holds the true pairs, all else stands for
independent ones. For `club` and `leave_one_out` the scores are log q(y_j | x_i).
Expectations are weighted means, so that `estimate.weighted` gives their errors.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from .estimate import LOWER, NEITHER, UPPER, Estimate, estimate, weighted

BELIEVED = 0.8  # of log n: lower bounds beyond it are not reported as converged


def _scores(scores: Float[Array, "n n"]) -> Float[Array, "n n"]:
    scores = jnp.asarray(scores)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise ValueError(
            f"scores: shape {scores.shape}, but it must be [n, n] with n of 2 or more"
        )
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def _apart(w: Float[Array, " n"]) -> Float[Array, "n n"]:
    """Log weights of pairs i != j, normalised; -inf on the diagonal."""
    pairs = jnp.log(w)[:, None] + jnp.log(w)
    pairs = jnp.where(jnp.eye(len(w), dtype=bool), -jnp.inf, pairs)
    return pairs - logsumexp(pairs)


def _bound(
    statistic: Callable[[Array, Array], Array], scores, direction: int
) -> Estimate:
    scores = _scores(scores)
    n = scores.shape[0]
    value, error = weighted(lambda w: statistic(w, scores), n, scores.dtype)
    log_n = jnp.log(jnp.asarray(n, scores.dtype))
    if direction == UPPER:
        return estimate(value, error, direction=direction)
    ceiling = log_n if statistic is _infonce else jnp.inf
    believed = value <= BELIEVED * log_n
    return estimate(
        value, error, ceiling=ceiling, direction=direction, converged=believed
    )


def _dv(w, s):
    return (w * jnp.diagonal(s)).sum() / w.sum() - logsumexp(_apart(w) + s)


def _nwj(w, s):
    return 1 + (w * jnp.diagonal(s)).sum() / w.sum() - jnp.exp(logsumexp(_apart(w) + s))


def _infonce(w, s):
    w = w / w.sum()
    apart = s - jnp.diagonal(s)[:, None]  # so that large scores cost no digits
    return -(w * logsumexp(apart + jnp.log(w), axis=1)).sum()


def _club(w, s):
    apart = jnp.exp(_apart(w))
    return (w * jnp.diagonal(s)).sum() / w.sum() - (apart * s).sum()


def _leave_one_out(w, s):
    w = w / w.sum()
    others = jnp.where(jnp.eye(len(w), dtype=bool), -jnp.inf, jnp.log(w)[:, None])
    others = logsumexp(others + s, axis=0) - logsumexp(others, axis=0)
    return (w * (jnp.diagonal(s) - others)).sum()


def donsker_varadhan(scores: Float[Array, "n n"]) -> Estimate:
    """mean s_ii - log mean_{i != j} exp s_ij in nats; may be negative.

    (Donsker and Varadhan 1983; MINE, arXiv:1801.04062, eq. 10.) A lower bound for the
    whole law; the logarithm of a mean over a sample is too low on average, so that a
    small sample gives too much: see `converged`. Raises: ValueError unless [n, n].
    """
    return _bound(_dv, scores, LOWER)


def nwj(scores: Float[Array, "n n"]) -> Estimate:
    """1 + mean s_ii - mean_{i != j} exp s_ij in nats; may be negative.

    (Nguyen, Wainwright and Jordan 2010; arXiv:1905.06922, eq. 4, with f = 1 + s.) On
    average a lower bound at every n, of large variance where information is. Raises as
    above.

    >>> float(nwj(jnp.zeros((3, 3))).value)
    0.0
    """
    return _bound(_nwj, scores, LOWER)


def infonce(scores: Float[Array, "n n"]) -> Estimate:
    """log n + mean_i log softmax_j(s_i)_i in nats: never above log n; may be negative.

    (arXiv:1807.03748, section 2.3.) A lower bound on average for every critic.

    >>> float(infonce(100 * jnp.eye(4)).value) <= float(jnp.log(4))
    True
    """
    return _bound(_infonce, scores, LOWER)


def smile(scores: Float[Array, "n n"], *, clip: float = 5.0) -> Estimate:
    """Donsker-Varadhan with scores clipped to [-clip, clip] in the second term, nats.

    (arXiv:1910.06222, eq. 17.) Less variance, and no bound on either side: what is
    clipped off is missing from what is subtracted. Raises: ValueError for clip <= 0.
    """
    if clip <= 0:
        raise ValueError(f"clip: {clip}, but it must be above 0")

    def statistic(w, s):
        clipped = jnp.clip(s, -clip, clip)
        return (w * jnp.diagonal(s)).sum() / w.sum() - logsumexp(_apart(w) + clipped)

    return _bound(statistic, scores, NEITHER)


def club(log_q: Float[Array, "n n"]) -> Estimate:
    """mean log q(y_i | x_i) - mean_{i != j} log q(y_j | x_i) in nats.

    (arXiv:2006.12013, eq. 6.) An upper bound where q is the true conditional density.
    With a fitted q it is none: a poor q gives too little, down to below 0.
    """
    return _bound(_club, log_q, UPPER)


def leave_one_out(log_q: Float[Array, "n n"]) -> Estimate:
    """mean_j [log q(y_j | x_j) - log mean_{i != j} q(y_j | x_i)] in nats.

    (arXiv:1905.06922, eq. 7.) An upper bound on average where q is the true conditional
    density, below `club` then. With a fitted q it is none.
    """
    return _bound(_leave_one_out, log_q, UPPER)


def vub(log_ratio: Float[Array, "n n"]) -> Estimate:
    """mean_i log_ratio_ii in nats, log_ratio_ij = log q(y_j | x_i) - log r(y_j).

    (Agakov's bound; Alemi et al. 2017, arXiv:1612.00410, eq. 14.) An upper bound where
    q is the true conditional density, whatever the density r: by KL(p(y); r) above the
    truth. With a fitted q it is none. Only the diagonal counts.
    """
    return _bound(lambda w, s: (w * jnp.diagonal(s)).sum() / w.sum(), log_ratio, UPPER)


def mine_loss(
    scores: Float[Array, "n n"], log_average: Float[Array, ""], *, keep: float = 0.99
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """MINE's loss with a moving average, and the logarithm of that average.

        -mean s_ii + mean_{i != j} exp(s_ij) / average

    (arXiv:1801.04062, eq. 12 and section 3.2.) The average of mean exp over batches,
    without a gradient, stands in the denominator where a batch's own mean would make
    the gradient of Donsker and Varadhan's logarithm biased.
    """
    n = scores.shape[0]
    apart = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, scores)
    now = logsumexp(apart) - jnp.log(jnp.asarray(n * (n - 1), scores.dtype))
    latest = jnp.log1p(-keep) + jax.lax.stop_gradient(now)
    log_average = jnp.logaddexp(jnp.log(keep) + log_average, latest)
    return jnp.exp(now - log_average) - jnp.diagonal(scores).mean(), log_average


def js_loss(scores: Float[Array, "n n"]) -> Float[Array, ""]:
    """Logistic loss of telling true pairs from others: the critic that SMILE trains.

    (arXiv:1910.06222, section 4.)
    """
    n = scores.shape[0]
    diagonal = jnp.diagonal(scores)
    negative = jax.nn.softplus(scores).sum() - jax.nn.softplus(diagonal).sum()
    return jax.nn.softplus(-diagonal).mean() + negative / (n * (n - 1))
