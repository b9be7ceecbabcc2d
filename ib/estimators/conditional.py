"""Information given a third variable, I(X; Y | Z): directly and by the chain rule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma
from jaxtyping import Array, Float

from .estimate import NEITHER, Estimate, believed, estimate, pair, unit_variance
from .neighbours import BLOCK, check_k, each_row, nearest, to_others


def _triple(x, y, z):
    x, y = pair(x, y)
    x, z = pair(x, z)
    return x, y, z


def conditional_ksg(
    x: Float[Array, "n d"],
    y: Float[Array, "n e"],
    z: Float[Array, "n f"],
    *,
    k: int = 4,
    block: int = BLOCK,
) -> Estimate:
    """psi(k) - mean[psi(n_xz + 1) + psi(n_yz + 1) - psi(n_z + 1)] in nats.

    (Frenzel and Pompe 2007, doi:10.1103/PhysRevLett.99.204101, eq. 6, with counts as in
    `ksg`.) Counts are those nearer than the k-th neighbour of all three, in maximum
    norms of unit variance features. May be negative; error and flag as `ksg`. It is
    drawn to 0 where Z is close to telling X or Y: then n_xz is near n_z.

    Raises: ValueError for what `pair` refuses, 2 k >= n or block < 1.
    """
    x, y, z = (unit_variance(a) for a in _triple(x, y, z))
    n = x.shape[0]
    check_k(2 * k, n)

    def counts(i):
        dx, dy, dz = (to_others(i, a, "max") for a in (x, y, z))
        xz, yz = jnp.maximum(dx, dz), jnp.maximum(dy, dz)
        radius = nearest(jnp.maximum(xz, yz), 2 * k)[jnp.array([k - 1, 2 * k - 1])]
        return tuple((d < radius[:, None]).sum(1) for d in (xz, yz, dz))

    inside = [digamma(c.astype(x.dtype) + 1) for c in each_row(counts, n, block)]
    terms = digamma(jnp.array([k, 2 * k], x.dtype)) - inside[0] - inside[1] + inside[2]
    value, error, stable = believed(terms[:, 0], terms[:, 1])
    return estimate(value, error, converged=stable)


def chain_rule(
    estimator: Callable[[Array, Array, Array], Estimate],
    key: Array,
    x: Float[Array, "n d"],
    y: Float[Array, "n e"],
    z: Float[Array, "n f"],
) -> Estimate:
    """I(X; (Y, Z)) - I(X; Z) by an estimator of (key, x, y); nats, may be negative.

    A difference of bounds is no bound. The errors are added in squares, though the
    rows are the same; converged where both are. Raises: ValueError for what `pair` or
    the estimator refuses.

    >>> from .gaussian import gaussian
    >>> x, y, z = jax.random.normal(jax.random.key(0), (3, 500, 1))
    >>> normal = lambda key, x, y: gaussian(x, y)
    >>> found = chain_rule(normal, jax.random.key(1), x + z, y + z, z)  # independent
    >>> bool(abs(found.value) < 0.03 < gaussian(x + z, y + z).value)
    True
    """
    x, y, z = _triple(x, y, z)
    first, second = jax.random.split(key)
    whole = estimator(first, x, jnp.concatenate([y, z], 1))
    part = estimator(second, x, z)
    return estimate(
        whole.value - part.value,
        jnp.hypot(whole.standard_error, part.standard_error),
        direction=NEITHER,
        converged=whole.converged & part.converged,
    )
