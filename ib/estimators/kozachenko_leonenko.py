"""Weighted Kozachenko-Leonenko entropy, and information from three entropies."""

import math

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma
from jaxtyping import Array, Float, Int
from scipy.special import gammaln

from ..kernels import rows_of
from .estimate import Estimate, believed, estimate, pair, spread
from .gaussian import whitened
from .neighbours import BLOCK, check_k, each_row, nearest, to_others


def neighbour_weights(d: int, k: int) -> np.ndarray:
    """Weights of the 1st to k-th neighbour: least squares under Berrett's conditions.

    sum_j w_j = 1; sum_j w_j Gamma(j + 2 l / d) / Gamma(j) = 0 for l = 1..floor(d / 4);
    w_j = 0 but for j = floor(i k / d).  (Berrett, Samworth and Yuan 2019,
    arXiv:1606.00304, eq. 2.)  Up to 3 features the k-th neighbour alone.

    Raises: ValueError where k neighbours are too few for the conditions.

    >>> neighbour_weights(2, 3).tolist()
    [0.0, 0.0, 1.0]
    """
    weights = np.zeros(k)
    if d < 4:
        weights[-1] = 1
        return weights
    allowed = np.unique(np.arange(1, d + 1) * k // d)
    allowed = allowed[allowed > 0]
    orders = np.arange(d // 4 + 1)[:, None]
    if allowed.size <= d // 4:
        raise ValueError(
            f"k: {k} neighbours, but {d} features need at least {d // 4 + 1}"
        )
    rows = np.exp(gammaln(allowed + 2 * orders / d) - gammaln(allowed))
    length = np.linalg.norm(rows, axis=1)
    target = np.zeros(len(rows))
    target[0] = 1 / length[0]
    weights[allowed - 1] = np.linalg.lstsq(rows / length[:, None], target, rcond=1e-6)[
        0
    ]
    return weights


def _log_volumes(
    log_radii: Float[Array, "n k"], d: int, weights: np.ndarray
) -> Float[Array, " n"]:
    """sum_j w_j (log V_d + d log r_j - psi(j)): minus the log density, less log n."""
    used = weights.nonzero()[0]  # a row equal to an unused neighbour does no harm
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    dtype = log_radii.dtype
    logs = log_ball + d * log_radii[:, used] - digamma(jnp.asarray(used + 1, dtype))
    return logs @ jnp.asarray(weights[used], dtype)


def _terms(
    x: Float[Array, "n d"], ks: tuple[int, ...], block: int
) -> list[Float[Array, " n"]]:
    """Each row's part of the entropy: weighted log volumes around it, for every k."""
    n, d = x.shape
    white, log_det = whitened(x)
    most = max(ks)
    squares = each_row(
        lambda i: nearest(to_others(i, white, "squares"), most), n, block
    )
    logs = jnp.log(squares) / 2
    shift = math.log(n - 1) + log_det / 2
    return [_log_volumes(logs, d, neighbour_weights(d, k)) + shift for k in ks]


def kl_entropy(x: Float[Array, "n d"], *, k: int = 5, block: int = BLOCK) -> Estimate:
    """Differential entropy in nats: -mean_i sum_j w_j log rho_j(i); may be negative.

        log rho_j = psi(j) - log V_d - d log r_j - log(n - 1)

    r_j is the distance to the j-th neighbour of whitened rows, the log-determinant of
    the whitening is added back. (Kozachenko and Leonenko 1987; weights as above.)
    Raises: ValueError for what `rows_of` refuses, k >= n, too few neighbours.
    Not converged (not finite) where k neighbours are equal to a row, or the covariance
    has not full rank.
    """
    x = rows_of("x", x, 2)
    check_k(k, x.shape[0])
    (terms,) = _terms(x, (k,), block)
    return estimate(terms.mean(), spread(terms), least=-math.inf)


def kl_information(
    x: Float[Array, "n d"], y: Float[Array, "n e"], *, k: int = 8, block: int = BLOCK
) -> Estimate:
    """H(X) + H(Y) - H(X, Y) in nats, each by `kl_entropy`; may be negative.

    (arXiv:2305.08013, section 3.) The error: see `believed`. Converged where
    half of the neighbours give the same within 2 standard errors.

    Raises: ValueError for what `pair` refuses, k >= n, or k // 2 neighbours too few for
    d + e features.
    """
    x, y = pair(x, y)
    check_k(k, x.shape[0])
    if k // 2 < (x.shape[1] + y.shape[1]) // 4 + 1:
        raise ValueError(
            f"k: {k} neighbours, but {x.shape[1]} + {y.shape[1]} features need at "
            f"least {2 * ((x.shape[1] + y.shape[1]) // 4 + 1)}"
        )
    parts = x, y, jnp.concatenate([x, y], 1)
    found = [_terms(a, (k, k // 2), block) for a in parts]
    terms, other = (hx + hy - hxy for hx, hy, hxy in zip(*found, strict=True))
    value, error, stable = believed(terms, other)
    return estimate(value, error, converged=stable)


def kl_label_information(
    x: Float[Array, "n d"], labels: Int[Array, " n"], *, k: int = 8, block: int = BLOCK
) -> Estimate:
    """H(X) - sum_y p(y) H(X | Y = y) in nats for labels; may be negative.

    (arXiv:2305.08013, section 3.) Neighbours within a row's label stand against those
    among all; one whitening serves both, so that its log-determinant drops out.
    Converged as `kl_information`, and where each label has more than k rows.

    Raises: ValueError for what `rows_of` refuses, labels not [n], k >= n, or k // 2 too
    few neighbours for d features.
    """
    x = rows_of("x", x, 2)
    n, d = x.shape
    check_k(k, n)
    if labels.shape != (n,):
        raise ValueError(f"labels: shape {labels.shape}, but x has {n} rows")
    white, _ = whitened(x)

    def radii(i):
        squares = to_others(i, white, "squares")
        same = labels == labels[i]
        within = nearest(jnp.where(same, squares, jnp.inf), k)
        return nearest(squares, k), within, same.sum()

    whole, within, rows = each_row(radii, n, block)
    ratio = jnp.log(rows.astype(x.dtype) - 1) - math.log(n - 1)

    def terms(k):
        weights = neighbour_weights(d, k)
        all_rows, own = (
            _log_volumes(jnp.log(squares) / 2, d, weights)
            for squares in (whole, within)
        )
        return all_rows - own - ratio

    value, error, stable = believed(terms(k), terms(k // 2))
    return estimate(value, error, converged=stable & (rows > k).all())
