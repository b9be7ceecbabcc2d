"""Sliced information: a mean over random directions of one feature a side."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .estimate import LOWER, Estimate, estimate, pair
from .ksg import ksg


def _directions(key: Array, count: int, d: int, dtype) -> Float[Array, "m d"]:
    drawn = jax.random.normal(key, (count, d), dtype)
    return drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)


def sliced(
    key: Array,
    x: Float[Array, "n d"],
    y: Float[Array, "n e"],
    *,
    slices: int = 32,
    estimator: Callable[[Array, Array], Estimate] = ksg,
) -> Estimate:
    """mean_m I(u_m . X; v_m . Y) in nats, u and v uniform on their spheres.

    (Goldfeld and Greenewald 2021, arXiv:2110.05279, definition 1.) A quantity of its
    own, without the curse of dimension and at most I(X; Y): directions lose
    information. 0 for independent samples alone. The error is that over directions and
    the mean error within one, which the same rows give to all. Converged where at least
    nine tenths of the slices are.

    Raises: ValueError for what `pair` or the estimator refuses, or slices < 2.
    """
    x, y = pair(x, y)
    if slices < 2:
        raise ValueError(f"slices: {slices}, but at least 2 are needed")
    key_x, key_y = jax.random.split(key)
    u = _directions(key_x, slices, x.shape[1], x.dtype)
    v = _directions(key_y, slices, y.shape[1], y.dtype)
    found = lax.map(
        lambda uv: estimator((x @ uv[0])[:, None], (y @ uv[1])[:, None]), (u, v)
    )
    between = found.value.std() / jnp.sqrt(jnp.asarray(slices, x.dtype))
    error = jnp.hypot(between, found.standard_error.mean())
    converged = found.converged.mean() >= 0.9
    return estimate(found.value.mean(), error, direction=LOWER, converged=converged)
