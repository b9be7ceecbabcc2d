"""Cauchy-Schwarz divergences of samples by Gaussian kernels, and their relatives.

    D_CS(p; q) = -log (int p q)^2 / (int p^2 int q^2)                     [nats]

(Yu et al. 2024, Cauchy-Schwarz divergence information bottleneck, ICLR; Principe 2010.)
It is 0 only for p = q, symmetric, and finite wherever kernels overlap at all. Samples
estimate it for the densities smoothed by a normal law of standard deviation
width / sqrt 2. All sums are taken in the log domain and by blocks of rows
(`kernels.by_rows`); samples are float32 or wider inside, narrower ones are cast.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float

from .kernels import (
    BLOCK,
    Width,
    by_rows,
    log_gaussian,
    log_mean,
    log_weights,
    rows_of,
    same_rows,
    width_of,
    without_masked,
)

FLOOR = 1e-12  # nats; least self-information by which a ratio is normalised


def cs_divergence(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    width: Width = 1.0,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """D_CS between the laws of two samples, in nats.

        log mean kappa(x, x') + log mean kappa(y, y') - 2 log mean kappa(x, y)

    With one width for both, D_CS = -2 log cos of the angle between the mean
    embeddings whose squared distance is `mmd`. A rule of width is applied to x.
    Raises: ValueError for samples that are not [n, d], or a width not above 0.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> float(cs_divergence(x, x))
    0.0
    """
    x, y = rows_of("x", x), rows_of("y", y)
    wide = width_of("width", width, x)
    own = log_mean(x, x, wide, block=block) + log_mean(y, y, wide, block=block)
    return own - 2 * log_mean(x, y, wide, block=block)


def conditional_cs(
    x: Float[Array, "n d"],
    y: Float[Array, "n k"],
    predicted: Float[Array, "n k"],
    *,
    width_x: Width = 1.0,
    width_y: Width = 1.0,
    over: Literal["space", "inputs"] = "space",
    block: int = BLOCK,
) -> Float[Array, ""]:
    """D_CS(p(y|x); q(predicted|x)) in nats: the prediction term (Prop. 1).

        log sum_j r_j(L1) + log sum_j r_j(L2) - 2 log sum_j r_j(L21),
        r_j(L) = sum_i K_ji L_ji / (sum_i K_ji)^2,

    K of x, L1 of y, L2 of predicted, L21_ji = kappa(predicted_j, y_i). A rule of
    width_y is applied to y. A narrow width_x leaves -2 log mean kappa(predicted_j,
    y_j); a wide one is blind to which prediction belongs to which x.

    over: what the integrals over x run over. "space" is the paper's: every place of
        the input space counts alike, so a row weighs the inverse of the density there,
        and rows far from the others outweigh all. "inputs" integrates over p(x) dx,
        with sum_i K_ji in place of its square: every row counts about alike.
    Raises: ValueError for samples that are not [n, d], or of different lengths, or
    another `over`.
    """
    if over not in ("space", "inputs"):
        raise ValueError(f"over: {over!r}, but allowed are 'space' and 'inputs'")
    x, y = rows_of("x", x), rows_of("y", y)
    predicted = rows_of("predicted", predicted)
    same_rows(x=x, y=y, predicted=predicted)
    wide_x, wide_y = width_of("width_x", width_x, x), width_of("width_y", width_y, y)

    def row(a, b, c):
        k = log_gaussian(a, x, wide_x)
        norm = (2 if over == "space" else 1) * logsumexp(k, axis=1)
        pairs = ((b, y), (c, predicted), (c, y))
        sums = [logsumexp(k + log_gaussian(u, v, wide_y), axis=1) for u, v in pairs]
        return jnp.stack(sums, -1) - norm[:, None]

    true, ours, cross = logsumexp(by_rows(row, x, y, predicted, block=block), axis=0)
    return true + ours - 2 * cross


def cs_qmi(
    x: Float[Array, "n d"],
    t: Float[Array, "n e"],
    *,
    width_x: Width = 1.0,
    width_t: Width = 1.0,
    mask: Bool[Array, " n"] | None = None,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """Cauchy-Schwarz quadratic mutual information D_CS(p(x,t); p(x)p(t)), nats.

        log mean(K o Q) + log mean K mean Q - 2 log mean_i (row mean K)(row mean Q)

    (Prop. 2), at least 0 up to rounding. It is not Shannon's: smoothing and order 2
    make it smaller. mask: rows that are False change nothing.
    Raises: ValueError for samples that are not [n, d], or of different lengths.
    """
    x, t, log_w, widths = _pair(x, t, width_x, width_t, mask)
    joint, k, q = _kernel_rows(x, t, log_w, widths, block)
    return _information(joint, k, q, log_w)


def normalized_cs_qmi(
    x: Float[Array, "n d"],
    t: Float[Array, "n e"],
    *,
    width_x: Width = 1.0,
    width_t: Width = 1.0,
    mask: Bool[Array, " n"] | None = None,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """I(x;t) / sqrt(I(x;x) I(t;t)), each a `cs_qmi`; no unit.

    The compression that the released trainer of the paper weighs. It is no
    correlation: values above 1 occur, and none is clipped. Self-informations below
    1e-12 nats, those of constant samples, count as that.
    """
    x, t, log_w, widths = _pair(x, t, width_x, width_t, mask)
    joint, k, q, kk, qq = _kernel_rows(x, t, log_w, widths, block, own=True)
    own = [
        jnp.maximum(_information(both, one, one, log_w), FLOOR)
        for both, one in ((kk, k), (qq, q))
    ]
    return _information(joint, k, q, log_w) / jnp.sqrt(own[0] * own[1])


def _pair(x, t, width_x, width_t, mask):
    x, t = rows_of("x", x), rows_of("t", t)
    same_rows(x=x, t=t, **({} if mask is None else {"mask": mask}))
    x, t = without_masked(x, mask), without_masked(t, mask)
    widths = width_of("width_x", width_x, x), width_of("width_t", width_t, t)
    return x, t, log_weights(x, mask), widths


def _kernel_rows(x, t, log_w, widths, block, own=False) -> tuple[Array, ...]:
    """log of the row means of K o Q, K and Q, and with `own` of K o K and Q o Q."""

    def row(a, b):
        k, q = log_gaussian(a, x, widths[0]), log_gaussian(b, t, widths[1])
        kernels = (k + q, k, q, 2 * k, 2 * q) if own else (k + q, k, q)
        return tuple(logsumexp(kernel + log_w, axis=1) for kernel in kernels)

    return by_rows(row, x, t, block=block)


def _information(joint, k, q, log_w) -> Float[Array, ""]:
    total = logsumexp(joint + log_w) + logsumexp(k + log_w) + logsumexp(q + log_w)
    return total - 2 * logsumexp(k + q + log_w)


def conditional_cs_qmi(
    x: Float[Array, "n d"],
    t: Float[Array, "n e"],
    y: Float[Array, "n k"],
    *,
    width_x: Width = 1.0,
    width_t: Width = 1.0,
    width_y: Width = 1.0,
    block: int = 256,
) -> Float[Array, ""]:
    """I_CS(x;t|y) = D_CS(p(x,t|y); p(x|y)p(t|y)) in nats.

        log sum_j (MKQ)_j / m_j^2 + log sum_j A_j B_j / m_j
            - 2 log sum_j (MK)_j (MQ)_j / m_j^3

    M the kernel of y, m its row sums, (MKQ)_j = sum_i M_ji K_ji Q_ji, (MK)_j and
    (MQ)_j likewise, A_j = sum_il W_ji W_jl K_il with W = M / m, B_j the same of Q:
    the integrals of p(x,t|y)^2, of p(x|y)^2 p(t|y)^2 and of their product, estimated
    as in Prop. 1. Every sum holds its diagonal, so none underflows. O(n^3) work,
    O(block n) memory. Raises: ValueError as `cs_qmi` does.
    """
    x, t, y = rows_of("x", x), rows_of("t", t), rows_of("y", y)
    same_rows(x=x, t=t, y=y)
    wide_x, wide_t = width_of("width_x", width_x, x), width_of("width_t", width_t, t)
    wide_y = width_of("width_y", width_y, y)

    def kept(w, sample, wide):
        """sum_il w_ji w_jl kappa(sample_i, sample_l), over blocks of i."""

        def part(rows, weights):
            kernel = jnp.exp(log_gaussian(rows, sample, wide))
            inner = jnp.matmul(kernel, w.T, precision=jax.lax.Precision.HIGHEST)
            return inner * weights

        return by_rows(part, sample, w.T, block=block).sum(0)

    def row(a, b, c):
        m = log_gaussian(c, y, wide_y)
        norm = logsumexp(m, axis=1)
        k, q = log_gaussian(a, x, wide_x), log_gaussian(b, t, wide_t)
        both, mk, mq = (logsumexp(m + kernel, axis=1) for kernel in (k + q, k, q))
        w = jnp.exp(m - norm[:, None])
        split = jnp.log(kept(w, x, wide_x)) + jnp.log(kept(w, t, wide_t))
        return jnp.stack([both - 2 * norm, split - norm, mk + mq - 3 * norm], -1)

    joint, apart, cross = logsumexp(by_rows(row, x, t, y, block=block), axis=0)
    return joint + apart - 2 * cross


def mmd(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    width: Width = 1.0,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """Squared maximum mean discrepancy of two samples, biased: at least 0, no unit.

        mean kappa(x, x') + mean kappa(y, y') - 2 mean kappa(x, y)

    (Gretton et al. 2012, Eq. 5.) A rule of width is applied to x.
    """
    x, y = rows_of("x", x), rows_of("y", y)
    wide = width_of("width", width, x)
    means = [log_mean(a, b, wide, block=block) for a, b in ((x, x), (y, y), (x, y))]
    return jnp.exp(means[0]) + jnp.exp(means[1]) - 2 * jnp.exp(means[2])


def kl_kde(
    y: Float[Array, "n k"],
    predicted: Float[Array, "m k"],
    *,
    width: Width = 1.0,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """KL(p(y); q(predicted)) between kernel density estimates, at the y_i, in nats.

        mean_i log mean_j kappa(y_i, y_j) - log mean_j kappa(y_i, predicted_j)

    Finite however far the predictions lie. A rule of width is applied to y.
    """
    y, predicted = rows_of("y", y), rows_of("predicted", predicted)
    wide = width_of("width", width, y)

    def row(a):
        own, other = (
            logsumexp(log_gaussian(a, b, wide), axis=1) - jnp.log(float(b.shape[0]))
            for b in (y, predicted)
        )
        return own - other

    return by_rows(row, y, block=block).mean()


def conditional_kl(
    x: Float[Array, "n d"],
    y: Float[Array, "n k"],
    predicted: Float[Array, "n k"],
    *,
    width_x: Width = 1.0,
    width_y: Width = 1.0,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """KL(p(y|x); q(predicted|x)) between kernel estimates, at the samples, in nats.

        mean_i log sum_j K_ij kappa(y_i, y_j) - log sum_j K_ij kappa(y_i, predicted_j)

    K of x. Rules of width as in `conditional_cs`.
    """
    x, y = rows_of("x", x), rows_of("y", y)
    predicted = rows_of("predicted", predicted)
    same_rows(x=x, y=y, predicted=predicted)
    wide_x, wide_y = width_of("width_x", width_x, x), width_of("width_y", width_y, y)

    def row(a, b):
        k = log_gaussian(a, x, wide_x)
        true, ours = (
            logsumexp(k + log_gaussian(b, c, wide_y), axis=1) for c in (y, predicted)
        )
        return true - ours

    return by_rows(row, x, y, block=block).mean()
