"""Samples of pairs whose information is known, for estimators to be tested on.

Every task draws (x, y) from a key and says I(X; Y) in nats. Maps that are one to one on
each side (`half_cube`, `uniform_margins`, `spiral`) change a sample, not its
information (the idea of Czyz et al. 2023, arXiv:2306.11078).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float
from scipy.special import digamma, gammaln

Sample = tuple[Float[Array, "n d"], Float[Array, "n e"]]


class Task(NamedTuple):
    sample: Callable[[Array, int], Any]  # of a key and n: a Sample, float32
    information: float  # I(X; Y) in nats


def _at_least(least: int, **numbers: float) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name}: {number}, but it must be at least {least}")


def _rotation(key: Array, dim: int) -> Float[Array, "d d"]:
    return jnp.linalg.qr(jax.random.normal(key, (dim, dim)))[0]


def gaussian(
    dim: int = 1, information: float = 1.0, *, pairs: int | None = None, seed: int = 0
) -> Task:
    """Normal x and y of `dim` features each; `pairs` of them hold the information.

    Each pair has correlation sqrt(1 - exp(-2 I / pairs)); pairs=None: all. Each side is
    then rotated at random, by the seed, so that no feature is left alone.

    Raises: ValueError for dim < 1, information < 0, pairs not in 1..dim.

    >>> x, y = gaussian(3, 2.0).sample(jax.random.key(0), 5)
    >>> x.shape, y.shape
    ((5, 3), (5, 3))
    """
    pairs = dim if pairs is None else pairs
    _at_least(1, dim=dim, pairs=pairs)
    _at_least(0, information=information)
    if pairs > dim:
        raise ValueError(f"pairs: {pairs}, but there are {dim} features")
    rho = math.sqrt(-math.expm1(-2 * information / pairs))

    def sample(key, n):
        key_x, key_y = jax.random.split(key)
        x, y = jax.random.normal(key_x, (n, dim)), jax.random.normal(key_y, (n, dim))
        share = jnp.where(jnp.arange(dim) < pairs, rho, 0)
        rest = jnp.where(jnp.arange(dim) < pairs, math.exp(-information / pairs), 1)
        y = share * x + rest * y
        if dim == 1:
            return x, y
        turn_x, turn_y = jax.random.split(jax.random.key(seed))
        return x @ _rotation(turn_x, dim), y @ _rotation(turn_y, dim)

    return Task(sample, information)


def _student_entropy(dim: int, dof: float) -> float:
    """Entropy of the standard t law in nats, less that of its scale matrix."""
    a, b = dof / 2, (dof + dim) / 2
    normaliser = dim / 2 * math.log(dof * math.pi) + gammaln(a) - gammaln(b)
    return float(normaliser + b * (digamma(b) - digamma(a)))


def student(dim: int = 1, information: float = 1.0, *, dof: float = 3.0) -> Task:
    """`gaussian` with both sides of a row divided by one sqrt(chi^2 / dof).

    information is that of the normal law; the tails add to it h(d) + h(d) - h(2 d), h
    the entropies of standard t laws (arXiv:2306.11078, appendix). Even at
    information=0 the sides are dependent. Raises: ValueError as `gaussian`, or dof < 1.
    """
    _at_least(1, dof=dof)
    normal = gaussian(dim, information)

    def sample(key, n):
        key, key_tail = jax.random.split(key)
        x, y = normal.sample(key, n)
        scale = jnp.sqrt(jax.random.chisquare(key_tail, dof, shape=(n, 1)) / dof)
        return x / scale, y / scale

    more = 2 * _student_entropy(dim, dof) - _student_entropy(2 * dim, dof)
    return Task(sample, information + more)


def mapped(task: Task, function: Callable[[Array], Array]) -> Task:
    """The task with both sides through a one-to-one function: the same information."""

    def sample(key, n):
        x, y = task.sample(key, n)
        return function(x), function(y)

    return Task(sample, task.information)


def half_cube(dim: int = 1, information: float = 1.0) -> Task:
    """`gaussian` features as sign(x) |x|^(3/2): longer tails. Raises as `gaussian`."""
    normal = gaussian(dim, information)
    return mapped(normal, lambda x: jnp.sign(x) * jnp.abs(x) ** 1.5)


def uniform_margins(dim: int = 1, information: float = 1.0) -> Task:
    """`gaussian` features as Phi(x), uniform on [0, 1]. Raises as `gaussian`."""
    return mapped(gaussian(dim, information), norm.cdf)


def spiral(dim: int = 2, information: float = 1.0, *, speed: float = 1 / 3) -> Task:
    """`gaussian` with its first two features turned by the angle speed |x|^2.

    Turning keeps |x|, so it can be undone. Raises: ValueError as `gaussian`, dim < 2.
    """
    _at_least(2, dim=dim)

    def turn(x):
        angle = speed * (x**2).sum(1)
        c, s = jnp.cos(angle), jnp.sin(angle)
        a, b = x[:, 0], x[:, 1]
        return x.at[:, 0].set(c * a - s * b).at[:, 1].set(s * a + c * b)

    return mapped(gaussian(dim, information), turn)


def mixture(dim: int = 1, *, correlation: float = 0.9) -> Task:
    """Feature pairs of correlation r or -r, each half of the rows: a cross, no slope.

    Margins are standard normal and no correlation is left. A feature's information is
    the integral of p log p / (p_x p_y), taken to 1e-6 by the trapezoidal rule.
    Raises: ValueError for dim < 1 or a correlation not in (0, 0.99].
    """
    _at_least(1, dim=dim)
    if not 0 < correlation <= 0.99:
        raise ValueError(f"correlation: {correlation}, but it must lie in (0, 0.99]")
    rest = 1 - correlation**2
    s = np.linspace(-12, 12, 1501)  # of half the sum and half the difference of x and y
    a, b = s[:, None] / 2**0.5, s / 2**0.5
    x, y = a + b, a - b
    each = [
        -(x**2 - 2 * r * x * y + y**2) / (2 * rest) - np.log(2 * np.pi * rest**0.5)
        for r in (correlation, -correlation)
    ]
    log_p = np.logaddexp(*each) - np.log(2)
    ratio = log_p + (x**2 + y**2) / 2 + np.log(2 * np.pi)
    information = float((np.exp(log_p) * ratio).sum() * (s[1] - s[0]) ** 2)

    def sample(key, n):
        key_x, key_y, key_sign = jax.random.split(key, 3)
        x = jax.random.normal(key_x, (n, dim))
        sign = jax.random.rademacher(key_sign, (n, dim), jnp.float32)
        noise = jax.random.normal(key_y, (n, dim))
        return x, sign * correlation * x + rest**0.5 * noise

    return Task(sample, dim * information)


def additive_noise(dim: int = 1, *, noise: float = 0.5) -> Task:
    """x uniform on [0, 1], y = x + uniform on [-noise, noise], features independent.

    A feature holds noise - log(2 noise) for noise <= 1/2, else 1 / (4 noise).
    Raises: ValueError for dim < 1 or noise <= 0.
    """
    _at_least(1, dim=dim)
    if noise <= 0:
        raise ValueError(f"noise: {noise}, but it must be above 0")
    each = noise - math.log(2 * noise) if noise <= 0.5 else 1 / (4 * noise)

    def sample(key, n):
        key_x, key_y = jax.random.split(key)
        x = jax.random.uniform(key_x, (n, dim))
        return x, x + jax.random.uniform(key_y, (n, dim), minval=-noise, maxval=noise)

    return Task(sample, dim * each)


def discrete_continuous(dim: int = 1, *, values: int = 5) -> Task:
    """x uniform on 0..m-1, y = x + uniform on [0, 2], features independent.

    A feature holds log m - (m - 1) / m log 2 (arXiv:1709.06212, section 5).
    Raises: ValueError for dim < 1 or values < 2.
    """
    _at_least(1, dim=dim)
    _at_least(2, values=values)
    each = math.log(values) - (values - 1) / values * math.log(2)

    def sample(key, n):
        key_x, key_y = jax.random.split(key)
        x = jax.random.randint(key_x, (n, dim), 0, values).astype(jnp.float32)
        return x, x + jax.random.uniform(key_y, (n, dim), maxval=2.0)

    return Task(sample, dim * each)


def labels(dim: int = 1, *, classes: int = 4) -> Task:
    """x uniform on [0, 1]^dim, y = floor(classes x_1): exactly log classes.

    Raises: ValueError for dim < 1 or classes < 2.
    """
    _at_least(1, dim=dim)
    _at_least(2, classes=classes)

    def sample(key, n):
        x = jax.random.uniform(key, (n, dim))
        return x, jnp.floor(classes * x[:, :1])

    return Task(sample, math.log(classes))


def conditional_gaussian(dim: int = 1, information: float = 1.0) -> Task:
    """Triples (x, y, z): `gaussian` x and y, both plus z ~ N(0, I): I(X; Y | Z).

    Raises as `gaussian`.
    """
    normal = gaussian(dim, information)

    def sample(key, n):
        key, key_z = jax.random.split(key)
        x, y = normal.sample(key, n)
        z = jax.random.normal(key_z, (n, dim))
        return x + z, y + z, z

    return Task(sample, information)


TASKS: dict[str, Callable[..., Task]] = {
    "gaussian": gaussian,
    "student": student,
    "half_cube": half_cube,
    "uniform_margins": uniform_margins,
    "spiral": spiral,
    "mixture": mixture,
    "additive_noise": additive_noise,
    "discrete_continuous": discrete_continuous,
    "labels": labels,
}


def make_task(name: str, dim: int, **options) -> Task:
    """A task by its name in the table, of `dim` features a side (y of `labels` has 1).

    Raises: ValueError for a name that is not in the table.
    """
    if name not in TASKS:
        raise ValueError(f"task: {name!r}, but allowed are {', '.join(TASKS)}")
    return TASKS[name](dim, **options)
