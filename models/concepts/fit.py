"""Training a concept model on rows that fit in memory, as one compiled program."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from .contract import Labels

M = TypeVar("M", bound=nnx.Module)
Losses = Callable[[M, Array, Labels, Array], Mapping[str, Array]]


def fit(
    model: M,
    losses: Losses,
    x: Float[Array | np.ndarray, "n d"],
    labels: Labels,
    *,
    key: Key[Array, ""],
    weights: Mapping[str, float],
    steps: int = 500,
    batch: int = 128,
    learning_rate: float | Array | optax.Schedule = 1e-2,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[M, dict[str, Float[Array, " steps"]]]:
    """A trained copy of the model, and each named loss at each step.

    losses: (model, x, labels, key) -> named means in nats, of which the weighted sum is
        minimised. Rows are drawn with replacement; Adam unless an optimizer is given.
    Raises ValueError where weights and losses name different parts.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"steps, batch: {steps}, {batch}, but both must be at least 1")
    x = jnp.asarray(x, jnp.float32)
    keep = labels.mask.reshape(-1, *[1] * (x.ndim - 1))
    x = jnp.where(keep, x, 0.0)  # not even a NaN of a masked row goes further
    parts = jax.eval_shape(lambda: losses(model, x[:1], _rows(labels, slice(1)), key))
    if set(parts) != set(weights):
        raise ValueError(
            f"weights: {sorted(weights)}, but the losses are {sorted(parts)}"
        )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optimizer or optax.adam(learning_rate)

    def total(params, x, labels, key):
        said = losses(nnx.merge(graph, params, rest), x, labels, key)
        return sum(weights[name] * said[name] for name in weights), said

    def step(carry, key):
        params, state = carry
        where, how = jax.random.split(key)
        rows = jax.random.randint(where, (batch,), 0, len(x))
        gradient, said = jax.grad(total, has_aux=True)(
            params, x[rows], _rows(labels, rows), how
        )
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), said

    @jax.jit
    def run(params, keys):
        return jax.lax.scan(step, (params, tx.init(params)), keys)

    (params, _), history = run(params, jax.random.split(key, steps))
    return nnx.merge(graph, params, rest), history


def _rows(labels: Labels, rows) -> Labels:
    return jax.tree.map(lambda leaf: leaf[rows], labels)
