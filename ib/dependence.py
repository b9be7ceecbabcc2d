"""Dependence of paired samples by kernels: HSIC, its normalised form, matrix entropy.

The normalised form and the entropies need all of an n x n matrix (a solve, an
eigendecomposition): they are for batches. HSIC itself goes by blocks of rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .kernels import (
    BLOCK,
    Width,
    by_rows,
    log_gaussian,
    log_weights,
    rows_of,
    same_rows,
    width_of,
    without_masked,
)


def hsic(
    x: Float[Array, "n d"],
    t: Float[Array, "n e"],
    *,
    width_x: Width = 1.0,
    width_t: Width = 1.0,
    mask: Bool[Array, " n"] | None = None,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """Hilbert-Schmidt independence criterion, biased: tr(K H Q H) / n^2, no unit.

    = mean (K o Q) + mean K mean Q - 2 mean_i (row mean K)(row mean Q), at least 0:
    `divergences.mmd` between p(x,t) and p(x)p(t) (Gretton et al. 2005). mask: rows
    that are False change nothing. K and Q enter less 1, which alters nothing but keeps
    the digits where wide kernels make all entries nearly 1.
    """
    x, t = rows_of("x", x), rows_of("t", t)
    same_rows(x=x, t=t, **({} if mask is None else {"mask": mask}))
    x, t = without_masked(x, mask), without_masked(t, mask)
    wide_x, wide_t = width_of("width_x", width_x, x), width_of("width_t", width_t, t)
    w = jnp.exp(log_weights(x, mask))

    def row(a, b):
        k = jnp.expm1(log_gaussian(a, x, wide_x))
        q = jnp.expm1(log_gaussian(b, t, wide_t))
        return (k * q) @ w, k @ w, q @ w

    joint, k, q = by_rows(row, x, t, block=block)
    return joint @ w + (k @ w) * (q @ w) - 2 * ((k * q) @ w)


def nhsic(
    x: Float[Array, "n d"],
    t: Float[Array, "n e"],
    *,
    width_x: Width = 1.0,
    width_t: Width = 1.0,
    epsilon: float = 1e-5,
) -> Float[Array, ""]:
    """Normalised HSIC: tr(K~ Q~), K~ = K_c (K_c + n epsilon I)^-1, K_c = H K H.

    The sum of squared kernel canonical correlations (Ma, Lewis and Kleijn 2020,
    arXiv:1908.01580, Eq. 8); between 0 and n - 1, no unit. O(n^2) memory, O(n^3) work.
    Raises: ValueError for samples that are not [n, d], or an epsilon not above 0.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon: {epsilon}, but it must be above 0")
    x, t = rows_of("x", x), rows_of("t", t)
    same_rows(x=x, t=t)
    wide_x, wide_t = width_of("width_x", width_x, x), width_of("width_t", width_t, t)

    def kept(kernel):
        n = kernel.shape[0]
        centred = kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()
        ridge = n * epsilon * jnp.eye(n, dtype=kernel.dtype)
        return jax.scipy.linalg.solve(centred + ridge, centred, assume_a="pos")

    k = kept(jnp.exp(log_gaussian(x, x, wide_x)))
    q = kept(jnp.exp(log_gaussian(t, t, wide_t)))
    return (k * q.T).sum()


def matrix_entropy(
    kernel: Float[Array, "n n"], *, alpha: float = 1.01
) -> Float[Array, ""]:
    """Renyi's matrix entropy log2 tr(A^alpha) / (1 - alpha), A = kernel / its trace.

    In bits, between 0 (all rows alike) and log2 n (all apart), for a positive
    semi-definite kernel (Sanchez Giraldo, Rao and Principe 2015, Eq. 11). alpha = 2
    needs no eigenvalues.
    Raises: ValueError for an alpha that is 1 or not above 0.

    >>> round(float(matrix_entropy(jnp.eye(8))), 3)
    3.0
    """
    if alpha <= 0 or alpha == 1:
        raise ValueError(f"alpha: {alpha}, but it must be above 0 and not 1")
    a = kernel / jnp.trace(kernel)
    if alpha == 2:
        return -jnp.log2(jnp.sum(a * a))
    values = jnp.maximum(jnp.linalg.eigvalsh(a), 0)
    return jnp.log2(jnp.sum(values**alpha)) / (1 - alpha)


def matrix_information(
    x: Float[Array, "n d"],
    t: Float[Array, "n e"],
    *,
    width_x: Width = 1.0,
    width_t: Width = 1.0,
    alpha: float = 1.01,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """S(K) + S(Q) - S(K o Q) in bits, S the `matrix_entropy` (ibid., Eq. 17).

    mask: rows that are False change nothing. O(n^2) memory, O(n^3) unless alpha = 2.
    """
    x, t = rows_of("x", x), rows_of("t", t)
    same_rows(x=x, t=t, **({} if mask is None else {"mask": mask}))
    x, t = without_masked(x, mask), without_masked(t, mask)
    wide_x, wide_t = width_of("width_x", width_x, x), width_of("width_t", width_t, t)
    k, q = log_gaussian(x, x, wide_x), log_gaussian(t, t, wide_t)
    keep = jnp.exp(log_weights(x, mask) / 2)
    keep = keep[:, None] * keep
    single, other, both = (
        matrix_entropy(keep * jnp.exp(log_kernel), alpha=alpha)
        for log_kernel in (k, q, k + q)
    )
    return single + other - both
