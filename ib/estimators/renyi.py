"""Matrix-based Renyi information: entropies of the eigenvalues of kernel matrices."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .estimate import Estimate, estimate, pair, spread, unit_variance


def _kernel(x: Float[Array, "n d"], width: float | None) -> Float[Array, "n n"]:
    """exp(-|x_i - x_j|^2 / 2 s^2), unit variance features, s = width n^(-1/(4+d))."""
    n, d = x.shape
    x = unit_variance(x)
    s = n ** (-1 / (4 + d)) * d**0.5 if width is None else width
    squares = (x**2).sum(1)
    gaps = squares[:, None] + squares - 2 * jnp.matmul(x, x.T, precision="highest")
    kernel = jnp.exp(-jnp.maximum(gaps, 0) / (2 * s**2))
    return jnp.where(jnp.eye(n, dtype=bool), 1, kernel)


def _entropy(kernel: Float[Array, "n n"], alpha: float) -> tuple[Array, Array]:
    """S = log(tr A^alpha) / (1 - alpha) of A = K / n, and each row's influence on it.

    The influence of row i on tr A^alpha is alpha n (A^alpha)_ii.
    """
    n = kernel.shape[0]
    values, vectors = jnp.linalg.eigh(kernel / n)
    powers = jnp.maximum(values, 0) ** alpha
    total = powers.sum()
    influence = alpha / (1 - alpha) * n * (vectors**2 @ powers) / total
    return jnp.log(total) / (1 - alpha), influence


def matrix_renyi(
    x: Float[Array, "n d"],
    y: Float[Array, "n e"],
    *,
    alpha: float = 1.01,
    width: float | None = None,
) -> Estimate:
    """S(A) + S(B) - S(A o B / tr) in nats of order alpha: from 0 to log n.

    (Sanchez Giraldo et al. 2015, arXiv:1211.2459, eq. 10 to 14.) A quantity of its own,
    not an estimate of Shannon's information: it depends on the kernel's width (features
    have unit variance; None: sqrt(d) n^(-1/(4 + d))). Compare values of one n and one
    width alone. O(n^3) time, O(n^2) memory.

    Raises: ValueError for what `pair` refuses, alpha <= 0 or 1, width <= 0.
    """
    x, y = pair(x, y)
    if alpha <= 0 or alpha == 1:
        raise ValueError(f"alpha: {alpha}, but it must be above 0 and not 1")
    if width is not None and width <= 0:
        raise ValueError(f"width: {width}, but a kernel's width must be above 0")
    a, b = _kernel(x, width), _kernel(y, width)
    (sa, ia), (sb, ib), (sab, iab) = (_entropy(k, alpha) for k in (a, b, a * b))
    ceiling = jnp.log(jnp.asarray(x.shape[0], x.dtype))
    return estimate(sa + sb - sab, spread(ia + ib - iab), ceiling=ceiling)
