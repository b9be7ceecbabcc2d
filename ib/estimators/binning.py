"""Information of discretised samples: plug-in entropies of cells."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..kernels import rows_of
from .estimate import LOWER, Estimate, estimate, pair, spread

FILLED = 4  # rows a joint cell needs, on average, to be believed


def fixed_bins(
    x: Float[Array, "n d"], bins: int, low: float, high: float
) -> Int[Array, "n d"]:
    """floor((x - low) / (high - low) bins), values outside in the outermost bins.

    The value `high` belongs to the last bin. Raises: ValueError for bins < 1 or a range
    that is empty.

    >>> fixed_bins(jnp.array([[-1.0], [0.0], [1.0]]), 30, -1, 1)[:, 0].tolist()
    [0, 15, 29]
    """
    x = rows_of("x", x)
    if bins < 1 or not low < high:
        raise ValueError(
            f"bins: {bins} over [{low}, {high}], but it needs at least 1 and low < high"
        )
    cells = jnp.floor((x - low) / (high - low) * bins).astype(jnp.int32)
    return jnp.clip(cells, 0, bins - 1)


def quantile_bins(x: Float[Array, "n d"], bins: int) -> Int[Array, "n d"]:
    """Bins of each feature between its own quantiles: equally filled without ties.

    Equal values share a bin. Raises: ValueError for bins < 1.

    >>> quantile_bins(jnp.array([[5.0], [7.0], [100.0], [6.0]]), 2)[:, 0].tolist()
    [0, 1, 1, 0]
    """
    x = rows_of("x", x)
    if bins < 1:
        raise ValueError(f"bins: {bins}, but at least 1 is needed")
    below = jnp.stack([jnp.searchsorted(jnp.sort(c), c) for c in x.T], 1)
    return (below * bins // x.shape[0]).astype(jnp.int32)


def symbols(cells: Int[Array, "n d"]) -> Int[Array, " n"]:
    """One number below n a row; equal rows get equal numbers."""
    n = cells.shape[0]
    return jnp.unique(cells, axis=0, size=n, return_inverse=True)[1].reshape(n)


def _shares(symbol: Int[Array, " n"], dtype) -> tuple[Array, Array]:
    """The share of rows in each row's cell, and the number of cells in use."""
    counts = jnp.bincount(symbol, length=symbol.shape[0])
    return counts[symbol] / jnp.asarray(symbol.shape[0], dtype), (counts > 0).sum()


def discrete(cells_x: Int[Array, "n d"], cells_y: Int[Array, "n e"]) -> Estimate:
    """Plug-in I(X; Y) of two discrete samples in nats, with no correction of its bias.

    Exact where the rows are the whole law. From 0 to min(log cells of x, of y), which
    is the ceiling. On samples it is too large by about (cells - 1) / 2 n: converged
    where a joint cell holds 4 rows on average.

    Raises: ValueError unless both are [n, features] with one n.

    >>> a = jnp.array([[0], [1], [2], [3]])
    >>> round(float(discrete(a, a).value / jnp.log(2)), 4)
    2.0
    """
    cells_x, cells_y = jnp.asarray(cells_x), jnp.asarray(cells_y)
    for name, cells in (("cells_x", cells_x), ("cells_y", cells_y)):
        if cells.ndim != 2 or cells.shape[0] != cells_x.shape[0]:
            raise ValueError(
                f"{name}: shape {cells.shape}, but both must be [n, features], one n"
            )
    x, y = symbols(cells_x), symbols(cells_y)
    both = symbols(jnp.stack([x, y], 1))
    dtype = jnp.result_type(float)
    (p, kx), (q, ky), (pq, kxy) = (_shares(s, dtype) for s in (x, y, both))
    ratio = jnp.log(pq) - jnp.log(p) - jnp.log(q)
    ceiling = jnp.log(jnp.minimum(kx, ky).astype(dtype))
    filled = kxy * FILLED <= x.shape[0]
    return estimate(ratio.mean(), spread(ratio), ceiling=ceiling, converged=filled)


def binned(
    x: Float[Array, "n d"], y: Float[Array, "n e"], *, bins: int = 16
) -> Estimate:
    """I of quantile bins in nats, by Miller and Madow's correction; may be negative.

        plug-in + (cells_x + cells_y - cells_xy - 1) / 2 n

    A function of x holds no more than x: a lower bound where the cells are filled
    (converged). Raises: ValueError for what `pair` refuses or bins < 1.
    """
    x, y = pair(x, y)
    cells = quantile_bins(x, bins), quantile_bins(y, bins)
    plain = discrete(*cells)
    kx, ky, kxy = (
        jnp.unique(c, axis=0, size=len(x), fill_value=-1).min(1)
        for c in (*cells, jnp.concatenate(cells, 1))
    )
    kx, ky, kxy = ((k >= 0).sum() for k in (kx, ky, kxy))
    value = plain.value + (kx + ky - kxy - 1) / (2 * x.shape[0])
    return plain._replace(value=value, direction=jnp.int32(LOWER))
