"""A Gaussian posterior of parameters from the path of training, and what it knows.

    theta | S ~ N(mean, diag(variance) + D D^T / (K - 1))

mean and variance over all snapshots, the columns of D the deviations of the last K from
the running mean (Maddox et al. 2019, arXiv:1902.02476, Sec. 3.2). Posteriors of several
training sets S give an estimate of I(theta; S), what parameters keep of their data
(Kawaguchi et al. 2023, arXiv:2305.18887, Sec. 4). Tensors are taken as independent:
give one posterior for each, and add.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

LEAST = 1e-6  # added to the variance of every number


class Posterior(NamedTuple):
    """Of one tensor, flattened; float32. Leading axes go through vmap."""

    mean: Float[Array, " d"]
    variance: Float[Array, " d"]  # LEAST or more
    deviations: Float[Array, "k d"]


class Moments(NamedTuple):
    """Running means over snapshots; any shape."""

    count: Float[Array, ""]
    first: Array
    second: Array


def no_moments(like: Array) -> Moments:
    zeros = jnp.zeros(like.shape, jnp.float32)
    return Moments(jnp.zeros(()), zeros, zeros)


def collected(moments: Moments, snapshot: Array) -> Moments:
    """The moments with one snapshot more."""
    count = moments.count + 1
    return Moments(
        count,
        moments.first + (snapshot - moments.first) / count,
        moments.second + (jnp.square(snapshot) - moments.second) / count,
    )


def posterior(moments: Moments, deviations: Float[Array, "k ..."]) -> Posterior:
    """From running moments, and the last K snapshots less the running mean then.

    Raises: ValueError for less than two deviations.
    """
    if deviations.shape[0] < 2:
        raise ValueError(
            f"deviations: {deviations.shape[0]}, but a covariance needs at least 2"
        )
    spread = jnp.maximum(moments.second - jnp.square(moments.first), 0) + LEAST
    flat = deviations.reshape(deviations.shape[0], -1)
    return Posterior(moments.first.reshape(-1), spread.reshape(-1), flat)


def sample(key: Array, of: Posterior) -> Float[Array, " d"]:
    """One draw of the posterior."""
    one, two = jax.random.split(key)
    k = of.deviations.shape[0]
    own = jnp.sqrt(of.variance) * jax.random.normal(one, of.mean.shape)
    shared = jax.random.normal(two, (k,)) @ of.deviations / jnp.sqrt(k - 1.0)
    return of.mean + own + shared


def log_density(theta: Float[Array, " d"], of: Posterior) -> Float[Array, ""]:
    """log of the posterior's density at theta, nats, by Woodbury's identity: O(k^2 d).

    >>> of = Posterior(jnp.zeros(1), jnp.ones(1), jnp.zeros((2, 1)))
    >>> round(float(log_density(jnp.zeros(1), of)), 4)  # -log(2 pi) / 2
    -0.9189
    """
    k, d = of.deviations.shape
    scaled = of.deviations / jnp.sqrt((k - 1.0) * of.variance)
    error = (theta - of.mean) / jnp.sqrt(of.variance)
    inner = jnp.eye(k) + jnp.matmul(
        scaled, scaled.T, precision=jax.lax.Precision.HIGHEST
    )
    factor = jnp.linalg.cholesky(inner)
    along = jax.scipy.linalg.solve_triangular(factor, scaled @ error, lower=True)
    square = jnp.square(error).sum() - jnp.square(along).sum()
    log_det = jnp.log(of.variance).sum() + 2 * jnp.log(jnp.diag(factor)).sum()
    return -0.5 * (square + log_det + d * jnp.log(2 * jnp.pi))


def parameter_information(
    key: Array, of: list[Posterior], *, bound: str = "mixture", draws: int = 10
) -> Float[Array, " m"]:
    """What theta of each of m training sets says of which set it was, in nats.

        E log p(theta | S_i) - log mean_j p(theta | S_j)       "mixture", at most log m
        E log p(theta | S_i) - mean_j log p(theta | S_j)       "jensen", no ceiling

    theta ~ p(. | S_i); `draws` of them. of: a posterior for each tensor, whose arrays
    have a leading axis of the m sets. The mean over i estimates I(theta; S).
    Raises: ValueError for another bound.
    """
    if bound not in ("mixture", "jensen"):
        raise ValueError(f"bound: {bound!r}, but allowed are 'mixture' and 'jensen'")

    def of_tensor(key, tensor: Posterior) -> Float[Array, "m draws m"]:
        def one(key, own):
            theta = sample(key, own)
            return jax.vmap(lambda other: log_density(theta, other))(tensor)

        keys = jax.random.split(key, (tensor.mean.shape[0], draws))
        return jax.vmap(jax.vmap(one, (0, None)))(keys, tensor)

    keys = jax.random.split(key, len(of))
    total = sum(of_tensor(k, tensor) for k, tensor in zip(keys, of, strict=True))
    own = jnp.diagonal(total, axis1=0, axis2=2)  # [draws, m]
    if bound == "jensen":
        return (own - total.mean(2).T).mean(0)
    others = logsumexp(total, axis=2).T - jnp.log(float(total.shape[2]))
    return (own - others).mean(0)
