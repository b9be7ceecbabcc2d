"""Multinomial logistic regression with an elastic net, in one compiled program.

    min  mean CE(x W^T + w, y) + strength (alpha |W|_1 + (1 - alpha) |W|_2^2)

by FISTA (Beck and Teboulle 2009, SIAM J. Imaging Sci. 2(1), Sec. 4): a gradient step
of the smooth part, soft thresholding, momentum, and no momentum where it points
uphill (O'Donoghue and Candes 2015, arXiv:1204.3982, Sec. 3.2). Zeros are exact. The
step is 1/L with L = lambda_max([x 1]^T [x 1] / n) / 2 + 2 strength (1 - alpha): the
Hessian of softmax has no eigenvalue above 1/2. A path of strengths starts each fit from
the one before.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from sklearn.exceptions import ConvergenceWarning

LEAST_TOL = 1e-6  # float32 gradients of a mean over rows are not known better


class Head(NamedTuple):
    """Weights and biases; `residual` says how far the optimum's conditions are missed.

    Of a path each has one more axis in front: the strengths.
    """

    weight: Float[Array, "*s m k"]
    bias: Float[Array, "*s m"]  # their sum is what it was at the start: 0
    residual: Float[Array, "*s"]
    steps: Int[Array, "*s"]


class _State(NamedTuple):
    at: tuple[Array, Array]  # weight, bias
    ahead: tuple[Array, Array]
    momentum: Array
    residual: Array
    steps: Array


def elastic_net_path(
    x: Float[Array | np.ndarray, "n k"],
    classes: Int[Array | np.ndarray, " n"],
    strengths: Sequence[float],
    *,
    alpha: float = 0.99,
    max_iter: int = 5000,
    tol: float = 1e-5,
) -> Head:
    """A head for each strength, each started from the one before; best given falling.

    x: of like scale in every column, since an L1 norm sees scale. classes: in [0, m).
    tol: the residual to reach: L times the largest entry of a proximal step.
    Warns `ConvergenceWarning` where max_iter steps leave a larger one.
    Raises ValueError for a strength, alpha, tol or class out of range.

    >>> x = np.array([[-1.0], [-1.0], [1.0], [1.0]])
    >>> heads = elastic_net_path(x, np.array([0, 0, 1, 1]), [10.0, 0.1])
    >>> bool(heads.weight[0].any()), bool(heads.weight[1].any())
    (False, True)
    """
    levels = np.asarray(strengths, np.float32)
    if levels.ndim != 1 or not np.all(levels > 0) or not 0 <= alpha <= 1:
        raise ValueError(
            f"strengths, alpha: {strengths}, {alpha}, but every strength must be "
            "above 0 and alpha from 0 to 1"
        )
    if tol < LEAST_TOL:
        raise ValueError(f"tol: {tol}, but float32 allows {LEAST_TOL} or more")
    labels = np.asarray(classes).astype(np.int32)
    if not np.array_equal(np.unique(labels), np.arange(labels.max() + 1)):
        raise ValueError(
            f"classes: {np.unique(labels).tolist()}, but each from 0 to the largest "
            "needs a row"
        )
    heads = _path(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(labels),
        jnp.asarray(levels),
        jnp.float32(alpha),
        jnp.float32(tol),
        max_iter,
        int(labels.max()) + 1,
    )
    if (worst := float(heads.residual.max())) > tol:
        warnings.warn(
            f"elastic net: residual {worst:.2g} after {max_iter} steps, above {tol}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return heads


@jax.jit(static_argnames=("max_iter", "classes"))
def _path(x, labels, strengths, alpha, tol, max_iter, classes) -> Head:
    """The fits one after another; arguments as `elastic_net_path` has them."""
    wide = jnp.concatenate([x, jnp.ones((len(x), 1))], 1)
    largest = jnp.linalg.eigvalsh(wide.T @ wide / len(x))[-1] / 2
    target = jax.nn.one_hot(labels, classes)

    def gradient(point, ridge):
        weight, bias = point
        error = (jax.nn.softmax(x @ weight.T + bias) - target) / len(x)
        return error.T @ x + ridge * weight, error.sum(0)

    def fit(point, strength):
        ridge = 2 * strength * (1 - alpha)
        bound = largest + ridge

        def step(state: _State) -> _State:
            (w, b), (v, c) = state.at, state.ahead
            dv, dc = gradient(state.ahead, ridge)
            weight, bias = v - dv / bound, c - dc / bound
            cut = strength * alpha / bound
            weight = jnp.sign(weight) * jnp.maximum(jnp.abs(weight) - cut, 0)
            uphill = jnp.sum((v - weight) * (weight - w)) + (c - bias) @ (bias - b)
            old = jnp.where(uphill > 0, 1.0, state.momentum)
            new = (1 + jnp.sqrt(1 + 4 * old**2)) / 2
            push = jnp.where(uphill > 0, 0.0, (old - 1) / new)
            moved = jnp.maximum(jnp.abs(v - weight).max(), jnp.abs(c - bias).max())
            ahead = weight + push * (weight - w), bias + push * (bias - b)
            return _State((weight, bias), ahead, new, bound * moved, state.steps + 1)

        def go_on(state: _State):
            return (state.residual > tol) & (state.steps < max_iter)

        start = _State(point, point, jnp.float32(1), jnp.float32(jnp.inf), jnp.int32(0))
        end = jax.lax.while_loop(go_on, step, start)
        return end.at, Head(*end.at, end.residual, end.steps)

    zero = jnp.zeros((classes, x.shape[1])), jnp.zeros(classes)
    return jax.lax.scan(fit, zero, strengths)[1]
