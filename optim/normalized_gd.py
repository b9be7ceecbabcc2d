"""Normalised gradient descent for the logistic loss, and the perceptrons it tends to.

A. Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient
Descent with Large Step Sizes", arXiv:2412.08424. On separable data gradient descent on
the logistic loss tends, as its step grows, to the *batch perceptron*: every wrong point
pulls with weight 1/n, so a single wrong point among n is corrected in steps of 1/n.
Dividing the gradient by the mean residual gives back the perceptron's rate:

    th <- th + gamma (sum_i s_i z_i) / (sum_i s_i),   s_i = sigmoid(-z_i.th),

z_i = y_i a_i. In the limit it adds the mean of the misclassified points, and stops
within R^2 / mu^2 steps, R = max |z_i|, mu the margin; the batch perceptron needs up to
n R^2 / mu^2. (The normaliser is derived from that limit, as are both bounds.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from scipy.optimize import nnls


class Surrogate(NamedTuple):
    """A loss of the negative margin -z.w and its derivative, the residual."""

    loss: Callable[[Array], Array]
    residual: Callable[[Array], Array]


LOGISTIC = Surrogate(jax.nn.softplus, jax.nn.sigmoid)  # nats; both free of overflow
PERCEPTRON = Surrogate(jax.nn.relu, lambda x: jnp.heaviside(x, 0.5))  # as gamma -> inf


class Separation(NamedTuple):
    """Where a descent stopped, and why."""

    w: Float[Array, "d"]
    iterations: Int[Array, ""]  # updates made
    separated: Bool[Array, ""]  # every z_i.w > 0; if False the cap was reached
    loss: Float[Array, ""]  # mean surrogate loss at w


class Online(NamedTuple):
    """Where the online perceptron stopped."""

    w: Float[Array, "d"]
    average: Float[Array, "d"]  # mean of w over all visits
    mistakes: Int[Array, ""]  # updates made, at most R^2 / mu^2 on separable data
    visits: Int[Array, ""]  # points looked at
    separated: Bool[Array, ""]


def normalize_by_residuals() -> optax.GradientTransformationExtraArgs:
    """Divide the gradient of a mean loss by the mean residual.

    `update(grads, state, params, residuals=s)` takes s_i = |d loss_i / d margin_i| of
    the samples that `grads` averages (logistic loss: 1 - probability of the label), in
    any shape; a scalar is taken as their mean, as after a `pmean` over workers. Where
    the mean underflows (all samples far on the right side) the update is zero.
    """

    def update(updates, state, params=None, *, residuals=None, **extra):
        del params, extra
        if residuals is None:
            raise ValueError(
                "residuals is missing: call update(grads, state, params, residuals=s) "
                "with s_i = |d loss_i / d margin_i| of the samples"
            )
        s = jnp.asarray(residuals)
        wide = jnp.promote_types(s.dtype, jnp.float32)
        return _divide(updates, s.mean(dtype=wide)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def normalize_by_loss() -> optax.GradientTransformationExtraArgs:
    """Divide the gradient by the loss, given as `value`: a relative of the above.

    It descends log f instead of f. Where the loss underflows the update is zero.
    """

    def update(updates, state, params=None, *, value=None, **extra):
        del params, extra
        if value is None:
            raise ValueError(
                "value is missing: call update(grads, state, params, value=loss)"
            )
        return _divide(updates, jnp.asarray(value)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def normalized_gd(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Normalised gradient descent: `update(grads, state, params, residuals=s)`.

    >>> tx, grads = normalized_gd(100.0), jnp.array([1.0, -2.0])
    >>> residuals = jnp.array([0.25, 0.75])  # sigmoid(-margin) of the samples
    >>> updates, _ = tx.update(grads, tx.init(grads), residuals=residuals)
    >>> updates.tolist()
    [-200.0, 400.0]
    """
    return optax.chain(
        normalize_by_residuals(), optax.scale_by_learning_rate(learning_rate)
    )


def separate(
    tx: optax.GradientTransformation,
    z: Float[Array, "n d"],
    *,
    max_steps: int | Int[Array, ""],
    surrogate: Surrogate = LOGISTIC,
) -> Separation:
    """Descend the mean surrogate loss from w = 0 until every z_i.w > 0.

    z_i = y_i a_i holds a point times its label. `tx` is any optax transformation; it is
    offered `residuals` and `value`. With PERCEPTRON and `optax.sgd(1.0)` this is the
    batch perceptron, with `normalized_gd(1.0)` the normalised one. There is no limit on
    data that are not separable: `max_steps` is the cap, and `separated` says so.
    Computes in the dtype of z: float32 is too coarse to compare steps above 1e4.
    """
    tx = optax.with_extra_args_support(tx)

    def unsolved(carry):
        _, _, steps, margins = carry
        return (steps < max_steps) & ~jnp.all(margins > 0)

    def step(carry):
        w, state, steps, margins = carry
        s = surrogate.residual(-margins)
        grads = -(s @ z) / z.shape[0]
        extra = {"residuals": s, "value": surrogate.loss(-margins).mean()}
        updates, state = tx.update(grads, state, w, **extra)
        w = jnp.asarray(optax.apply_updates(w, updates))
        return w, state, steps + 1, z @ w

    w = jnp.zeros(z.shape[1], z.dtype)
    start = w, tx.init(w), jnp.zeros((), jnp.int32), z @ w  # margins 0: unsolved
    w, _, steps, margins = lax.while_loop(unsolved, step, start)
    loss = surrogate.loss(-margins).mean()
    return Separation(w, steps, jnp.all(margins > 0), loss)


def online_perceptron(
    z: Float[Array, "n d"],
    *,
    max_visits: int,
    key: PRNGKeyArray | None = None,
) -> Online:
    """The perceptron: visit one point at a time, add it if it is not on the right side.

    Points come in cyclic order, or at random with replacement if a key is given.
    Novikoff (1962): at most R^2 / mu^2 mistakes whatever the order.
    """
    n, d = z.shape

    def unsolved(carry):
        return (carry.visits < max_visits) & ~carry.separated

    def visit(carry: Online) -> Online:
        if key is None:
            i = carry.visits % n
        else:
            i = jax.random.randint(jax.random.fold_in(key, carry.visits), (), 0, n)
        wrong = z[i] @ carry.w <= 0
        w = carry.w + jnp.where(wrong, z[i], 0)
        average = carry.average + (w - carry.average) / (carry.visits + 1)
        mistakes = carry.mistakes + wrong
        return Online(w, average, mistakes, carry.visits + 1, jnp.all(z @ w > 0))

    zero, none = jnp.zeros(d, z.dtype), jnp.zeros((), jnp.int32)
    start = Online(zero, zero, none, none, jnp.zeros((), bool))
    return lax.while_loop(unsolved, visit, start)


def margin(z: np.ndarray) -> float:
    """max over |w| = 1 of min_i z_i.w, exactly; 0.0 if the data are not separable.

    The least-distance problem min |w| subject to z_i.w >= 1 by non-negative least
    squares (Lawson and Hanson 1974, Ch. 23): a residual of zero certifies that no w
    exists. Host code in float64; a margin below 1e-9 R counts as none.
    """
    z = np.asarray(z, np.float64)
    radius = np.linalg.norm(z, axis=1).max()
    if radius == 0:
        return 0.0
    z = z / radius
    wanted = np.append(np.zeros(z.shape[1]), 1.0)
    system = np.vstack([z.T, np.ones(len(z))])
    dual, residual = nnls(system, wanted, maxiter=50 * len(z))
    if residual < 1e-9:
        return 0.0
    gap = wanted - system @ dual
    w = -gap[:-1] / gap[-1]
    return float(radius * (z @ w).min() / np.linalg.norm(w))


def _divide(updates: Any, by: Float[Array, ""]) -> Any:
    """updates / by in each leaf's dtype, and zero where `by` is no normal number."""
    normal = by >= jnp.finfo(by.dtype).tiny
    scale = jnp.where(normal, 1 / jnp.where(normal, by, 1), 0)
    return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates)
