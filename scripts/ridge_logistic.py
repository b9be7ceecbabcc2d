"""Logistic regression with a ridge by compressed means: excess loss at every rate.

f(x) = mean log(1 + exp(-y a.x)) + LAM / 2 |x|^2 of points a and labels y = +-1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from narrows.optim.compressed_mean import CompressedMean
from narrows.scripts.client_descent import descent
from scipy import optimize

RATES = tuple(2.0**-k for k in range(9))  # of every method
LAM = 1e-2  # of the squared norm: the solution is finite


def logistic(x, points, labels):
    margins = labels * (points @ x)
    return jnp.logaddexp(0, -margins).mean() + LAM / 2 * x @ x


def whole_gradient(x, client, key):
    del key
    return jax.grad(logistic)(x, *client)


def batch_gradient(x, client, key):
    chosen = jax.random.randint(key, (4,), 0, len(client[1]))
    return jax.grad(logistic)(x, *(part[chosen] for part in client))


@functools.cache
def _program(mean: CompressedMean, clients: int, rounds: int, sampled, momentum):
    """Mean loss of the last quarter of the rounds, and the last, at every rate."""

    def run(points, labels, rate, key):
        flat = points.reshape(-1, points.shape[-1]), labels.reshape(-1)
        go = descent(
            batch_gradient if sampled else whole_gradient,
            mean,
            clients=clients,
            rounds=rounds,
            record=lambda before, after: logistic(after.x, *flat),
            momentum=momentum,
            every=10,
        )
        start = jnp.zeros(points.shape[-1], points.dtype)
        losses = go((points, labels), start, rate, key)
        return losses[-len(losses) // 4 :].mean(), losses[-1]

    return jax.jit(jax.vmap(run, in_axes=(None, None, 0, None)))


def excess_losses(
    mean: CompressedMean,
    points: Float[np.ndarray, "n m d"],
    labels: Float[np.ndarray, "n m"],
    *,
    rounds: int,
    sampled: bool,
    momentum: float = 1.0,
    seed: int = 0,
) -> Float[np.ndarray, "r"]:
    """f(x) - min f at every rate of RATES, at least 1e-15; 1e9 where it diverged.

    sampled: gradients of four rows, and the mean loss of the last quarter of the
    rounds; else whole gradients and the last loss.
    """
    with jax.enable_x64(True):
        run = _program(mean, len(points), rounds, sampled, momentum)
        given = jnp.asarray(points), jnp.asarray(labels), jnp.asarray(RATES)
        tail, last = run(*given, jax.random.key(seed))
    excess = np.asarray(tail if sampled else last) - optimum(points, labels)
    return np.where(np.isfinite(excess), np.maximum(excess, 1e-15), 1e9)


def optimum(points: np.ndarray, labels: np.ndarray) -> float:
    """The least mean loss, by Newton's method with a trust region."""
    flat, signs = points.reshape(-1, points.shape[-1]), labels.reshape(-1)

    def slope(x):
        return 1 / (1 + np.exp(signs * (flat @ x)))

    def gradient(x):
        return -(flat * (signs * slope(x))[:, None]).mean(0) + LAM * x

    def hessian(x):
        s = slope(x)
        return (flat.T * (s * (1 - s))) @ flat / len(flat) + LAM * np.eye(len(x))

    def value(x):
        margins = signs * (flat @ x)
        return np.logaddexp(0, -margins).mean() + LAM / 2 * x @ x

    start = np.zeros(flat.shape[1])
    options = {"gtol": 1e-12}
    done = optimize.minimize(
        value, start, jac=gradient, hess=hessian, method="trust-exact", options=options
    )
    return float(done.fun)
