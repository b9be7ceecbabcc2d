"""Information by neighbour counts: Kraskov, Stoegbauer and Grassberger."""

import jax.numpy as jnp
from jax.scipy.special import digamma
from jaxtyping import Array, Float

from .estimate import Estimate, believed, estimate, pair, unit_variance
from .neighbours import BLOCK, check_k, each_row, nearest, to_others


def ksg(
    x: Float[Array, "n d"], y: Float[Array, "n e"], *, k: int = 4, block: int = BLOCK
) -> Estimate:
    """psi(k) + psi(n) - mean[psi(n_x + 1) + psi(n_y + 1)] in nats; may be negative.

    (Kraskov et al. 2004, arXiv:cond-mat/0305641, eq. 8.) n_x counts the rows nearer in
    x than the k-th neighbour in max(|dx|, |dy|), maximum norms. Bias shows as a value
    that moves with k, see `believed`: converged where 2 k neighbours agree.
    Features are brought to unit variance. Equal rows need `mixed_ksg`.

    Raises: ValueError for what `pair` refuses, 2 k >= n or block < 1.
    """
    x, y = (unit_variance(a) for a in pair(x, y))
    n = x.shape[0]
    check_k(2 * k, n)

    def counts(i):
        dx, dy = to_others(i, x, "max"), to_others(i, y, "max")
        radius = nearest(jnp.maximum(dx, dy), 2 * k)[jnp.array([k - 1, 2 * k - 1])]
        return (dx < radius[:, None]).sum(1), (dy < radius[:, None]).sum(1)

    inside_x, inside_y = each_row(counts, n, block)  # [n, 2]
    terms = digamma(jnp.array([k, 2 * k], x.dtype)) + digamma(jnp.asarray(n, x.dtype))
    terms = terms - digamma(inside_x + jnp.ones((), x.dtype))
    terms = terms - digamma(inside_y + jnp.ones((), x.dtype))
    value, error, stable = believed(terms[:, 0], terms[:, 1])
    ceiling = digamma(jnp.asarray(n, x.dtype)) - digamma(jnp.asarray(k, x.dtype))
    return estimate(value, error, ceiling=ceiling, converged=stable)


def mixed_ksg(
    x: Float[Array, "n d"], y: Float[Array, "n e"], *, k: int = 4, block: int = BLOCK
) -> Estimate:
    """KSG for laws with atoms: discrete, continuous or both, in nats.

        mean[psi(k_i) + log n - psi(n_x) - psi(n_y)]

    (Gao et al. 2017, arXiv:1709.06212, Algorithm 1.) Where the k-th neighbour is at
    distance 0, k_i counts all equal rows, and n_x, n_y the rows equal in x, in y; the
    row itself counts. Raises as `ksg`; converged by the same rule.
    """
    x, y = (unit_variance(a) for a in pair(x, y))
    n = x.shape[0]
    check_k(2 * k, n)
    ks = jnp.array([k, 2 * k])

    def counts(i):
        dx, dy = to_others(i, x, "max"), to_others(i, y, "max")
        both = jnp.maximum(dx, dy)
        radius = nearest(both, 2 * k)[ks - 1]
        atom, wide = radius == 0, radius[:, None]

        def inside(d):
            return 1 + jnp.where(atom, (d == 0).sum(), (d < wide).sum(1))

        return jnp.where(atom, 1 + (both == 0).sum(), ks), inside(dx), inside(dy)

    found, inside_x, inside_y = (a.astype(x.dtype) for a in each_row(counts, n, block))
    terms = digamma(found) - digamma(inside_x) - digamma(inside_y)
    terms = terms + jnp.log(jnp.asarray(n, x.dtype))
    value, error, stable = believed(terms[:, 0], terms[:, 1])
    return estimate(value, error, converged=stable)
