"""Gaussian kernels in the log domain, rules for their widths, sums over pairs by rows.

    log kappa(x, y) = -|x - y|^2 / (2 width^2)

What is built on kernels needs sums over all pairs of a sample. `by_rows` takes them a
block of rows at a time and computes the block again in the backward pass, so that no
n x n array is kept: memory is O(block n), for values and for gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float

BLOCK = 1024  # rows at a time; samples of up to this many are taken at once
NARROW = 8  # features up to which differences are taken one by one, without rounding

Rule = Callable[[Float[Array, "n d"]], Float[Array, ""]]  # of the sample
Width = float | Rule


def rows_of(name: str, x: Float[Array, "n d"], least: int = 1) -> Float[Array, "n d"]:
    """x in float32 or wider.

    Raises: ValueError unless it is [n, features] with at least `least` rows. A vector
    of n labels is not taken for n rows: broadcast against a column, it would make every
    row of a kernel matrix the same without a word.
    """
    x = jnp.asarray(x)
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(
            f"{name}: shape {x.shape}, but it must be [n, features]; "
            f"write {name}[:, None] for n numbers"
        )
    if x.shape[0] < least:
        raise ValueError(f"{name}: {x.shape[0]} rows, but at least {least} are needed")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def same_rows(**samples: Array) -> None:
    """Raises: ValueError unless all samples have equally many rows."""
    sizes = {name: x.shape[0] for name, x in samples.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"rows: {sizes}, but samples are paired row by row")


def squared_distances(
    x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Float[Array, "n m"]:
    """|x_i - y_j|^2, never negative; x and y float32 or float64.

    With many features by a matrix product of centred rows, exact to about 1e-6 of the
    largest squared norm; a shift of all rows changes nothing.

    Raises: ValueError where x and y have different features.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"y: {y.shape[1]} features, but x has {x.shape[1]}; they must agree"
        )
    if x.shape[1] <= NARROW:
        total = jnp.zeros((x.shape[0], y.shape[0]), x.dtype)
        for a, b in zip(x.T, y.T, strict=True):
            total += (a[:, None] - b) ** 2
        return total
    middle = lax.stop_gradient(y.mean(0))
    x, y = x - middle, y - middle
    products = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    found = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * products
    return jnp.maximum(found, 0)


def log_gaussian(
    x: Float[Array, "n d"], y: Float[Array, "m d"], width: Float[Array, ""] | float
) -> Float[Array, "n m"]:
    """log kappa(x_i, y_j), at most 0.

    >>> float(log_gaussian(jnp.zeros((1, 2)), jnp.ones((1, 2)), 1.0)[0, 0])
    -1.0
    """
    return -squared_distances(x, y) / (2 * jnp.square(width))


def median(factor: float = 1.0, *, points: int = 256, floor: float = 1e-3) -> Rule:
    """The rule width = factor sqrt(median of |x_i - x_j|^2 over i < j).

    No gradient passes. Of more than `points` rows only that many, evenly spaced, are
    compared; `floor` is what a sample of equal rows gets.

    Raises: ValueError for a factor or floor not above 0, or less than 2 points.

    >>> x = jnp.array([[0.0], [3.0], [4.0]])
    >>> float(median()(x))
    3.0
    """
    if factor <= 0 or floor <= 0 or points < 2:
        raise ValueError(
            f"median: factor={factor}, floor={floor}, points={points}, but they must "
            "be above 0, above 0 and at least 2"
        )

    def rule(x):
        x = lax.stop_gradient(x)
        stride = -(-x.shape[0] // points)
        x = x[::stride]
        pairs = jnp.triu_indices(x.shape[0], 1)
        middle = jnp.median(squared_distances(x, x)[pairs])
        return jnp.maximum(factor * jnp.sqrt(middle), floor)

    return rule


def spread(factor: float = 1.0, *, floor: float = 1e-3) -> Rule:
    """The rule width = factor sqrt(mean of |x_i - x_j|^2) = factor sqrt(2 tr cov x).

    No gradient passes. It sorts nothing: O(n d), for every step of a training run.

    >>> float(spread()(jnp.array([[0.0], [2.0]])))
    1.4142135381698608
    """

    def rule(x):
        total = lax.stop_gradient(x).var(0).sum()
        return jnp.maximum(factor * jnp.sqrt(2 * total), floor)

    return rule


def per_feature(scale: float = 1.0) -> Rule:
    """The fixed rule width = scale sqrt(d), for rows of unit mean square.

    >>> float(per_feature(5.0)(jnp.zeros((2, 4))))
    10.0
    """
    return lambda x: jnp.asarray(scale * x.shape[1] ** 0.5, x.dtype)


def width_of(name: str, rule: Width, x: Float[Array, "n d"]) -> Float[Array, ""]:
    """The width a rule gives for x. Raises: ValueError for a number not above 0."""
    if callable(rule):
        return rule(x)
    if isinstance(rule, int | float) and rule <= 0:
        raise ValueError(f"{name}: {rule}, but a kernel's width must be above 0")
    return jnp.asarray(rule, x.dtype)


def log_weights(
    x: Float[Array, "n d"], mask: Bool[Array, " n"] | None
) -> Float[Array, " n"]:
    """log of 1 / (number of rows that count), -inf for a row that does not."""
    if mask is None:
        return jnp.full(x.shape[0], -jnp.log(jnp.array(x.shape[0], x.dtype)), x.dtype)
    count = jnp.maximum(mask.sum(), 1).astype(x.dtype)
    return jnp.where(mask, -jnp.log(count), -jnp.inf)


def without_masked(
    x: Float[Array, "n d"], mask: Bool[Array, " n"] | None
) -> Float[Array, "n d"]:
    """Rows that do not count become 0: not even a NaN there goes further."""
    return x if mask is None else jnp.where(mask[:, None], x, 0)


def by_rows(function: Callable[..., Any], *rows: Array, block: int = BLOCK) -> Any:
    """function(*rows) for a function that gives each row its own result, by blocks.

    It is called with blocks of at most `block` rows of every argument and its results
    are joined; it is computed again in the backward pass.

    Raises: ValueError for a block below 1.

    >>> by_rows(lambda x: x.sum(1), jnp.ones((5, 3)), block=2).tolist()
    [3.0, 3.0, 3.0, 3.0, 3.0]
    """
    if block < 1:
        raise ValueError(f"block: {block} rows, but it must be at least 1")
    count = rows[0].shape[0]
    if count <= block:
        return function(*rows)
    whole = count // block * block
    cut = tuple(a[:whole].reshape(-1, block, *a.shape[1:]) for a in rows)
    again = jax.checkpoint(function)
    parts = lax.map(lambda arrays: again(*arrays), cut)
    parts = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), parts)
    if whole == count:
        return parts
    rest = again(*(a[whole:] for a in rows))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parts, rest)


def log_mean(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    width: Float[Array, ""] | float,
    *,
    block: int = BLOCK,
) -> Float[Array, ""]:
    """log of the mean of kappa(x_i, y_j) over all pairs, finite however far apart."""

    def row(a):
        return logsumexp(log_gaussian(a, y, width), axis=1)

    total = logsumexp(by_rows(row, x, block=block))
    return total - jnp.log(jnp.array(x.shape[0] * y.shape[0], x.dtype))
