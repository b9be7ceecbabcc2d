"""Logistic regression with a penalty that is not convex, by compressed means, float64.

f(x) = mean log(1 + exp(-y a.x)) + LAM sum_j x_j^2 / (1 + x_j^2) of points a and labels
y = +-1. Its Hessian is largest at 0, where it is A'A / (4 m) + 2 LAM.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from narrows.optim.compressed_mean import CompressedMean
from narrows.optim.ef21 import smoothness
from narrows.scripts.client_descent import Round, descent

LAM = 0.01


def loss(x, points, labels):
    margins = labels * (points @ x)
    return jnp.logaddexp(0, -margins).mean() + LAM * jnp.sum(x**2 / (1 + x**2))


def gradient(x, client, key=None):
    del key
    return jax.grad(loss)(x, *client)


@jax.jit
def _constants(points, labels, key):
    def of(client, key):
        zero = jnp.zeros(client[0].shape[-1], points.dtype)
        return smoothness(lambda x: gradient(x, client), zero, key, steps=200)

    keys = jax.random.split(key, len(points))
    return of(_all(points, labels), key), jax.vmap(of)((points, labels), keys)


def constants(
    points: Float[np.ndarray, "n m d"], labels: Float[np.ndarray, "n m"], seed: int
) -> tuple[float, Float[np.ndarray, "n"]]:
    """(L of the mean, L_i of every client), by power iteration at 0."""
    with jax.enable_x64(True):
        given = jnp.asarray(points), jnp.asarray(labels)
        whole, each = _constants(*given, jax.random.key(seed))
        return float(whole), np.asarray(each)


@functools.cache
def _program(mean: CompressedMean, clients: int, rounds: int, every: int):
    def run(points, labels, rate):
        flat = _all(points, labels)

        def size(x):
            return jnp.sum(gradient(x, flat) ** 2)

        def record(_, after: Round):
            return size(after.x)

        go = descent(
            gradient, mean, clients=clients, rounds=rounds, record=record, every=every
        )
        start = jnp.zeros(points.shape[-1], points.dtype)
        return go((points, labels), start, rate, jax.random.key(0)) / size(start)

    return jax.jit(jax.vmap(run, in_axes=(None, None, 0)))


def sizes(
    mean: CompressedMean,
    points: Float[np.ndarray, "n m d"],
    labels: Float[np.ndarray, "n m"],
    rates: Sequence[float],
    *,
    rounds: int,
    every: int,
) -> Float[np.ndarray, "r t"]:
    """|grad f|^2 over its start, after every `every`-th round, at each rate."""
    with jax.enable_x64(True):
        run = _program(mean, len(points), rounds, every)
        given = jnp.asarray(points), jnp.asarray(labels), jnp.asarray(rates)
        return np.asarray(run(*given))


def _all(points, labels):
    return points.reshape(-1, points.shape[-1]), labels.reshape(-1)
