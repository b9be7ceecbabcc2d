"""Extragradient for saddle points and other variational inequalities, over a mean.

To find z in a convex set Z with <F(z), u - z> >= 0 for all u in Z, F = mean_m F_m; in
the whole space that is F(z) = 0. G. M. Korpelevich, "The Extragradient Method for
Finding Saddle Points and Other Problems", Matecon 12 (1976):

    z_h = P(z - rate F(z));   z <- P(z - rate F(z_h))

P is the projection onto Z. Over a compressed mean it is the natural, and failing,
baseline of MASHA: F(z) is not small at the solution, so neither is what is lost of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .compressed_mean import CompressedMean, MeanState

Operator = Callable[[PyTree, Any], PyTree]  # (z, a worker's data) -> F_m(z)
Project = Callable[[PyTree], PyTree]


class Method(NamedTuple):
    """Run `step` inside `jax.shard_map` or `parallel.state.simulate`."""

    init: Callable[[PyTree], Any]  # z -> state of all workers
    step: Callable[[Any, Any], Any]  # a worker's (data, state) -> state; state.z


class ExtragradientState(NamedTuple):
    count: Int[Array, ""]
    z: PyTree
    mean: MeanState


def whole_space(z: PyTree) -> PyTree:
    return z


def saddle(function: Callable[..., Float[Array, ""]]) -> Operator:
    """The operator (grad_x f, -grad_y f) of min_x max_y function(x, y, data).

    z is the pair (x, y). Steps go along -F, so y ascends: negate nothing after it.

    >>> x, y = saddle(lambda x, y, data: x * y)((jnp.ones(()), jnp.ones(())), None)
    >>> float(x), float(y)
    (1.0, -1.0)
    """
    gradients = jax.grad(function, argnums=(0, 1))

    def operator(z, data):
        x, y = z
        down, up = gradients(x, y, data)
        return down, jax.tree.map(jnp.negative, up)

    return operator


def extragradient(
    operator: Operator,
    mean: CompressedMean,
    *,
    rate: float,
    project: Project = whole_space,
    seed: int = 0,
) -> Method:
    """Two operators and two means a step; `mean` over plain links is the exact one."""

    def init(z):
        return ExtragradientState(jnp.int32(0), z, mean.init(z))

    def step(data, state: ExtragradientState) -> ExtragradientState:
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        first, second = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

        def moved(by):
            return project(jax.tree.map(lambda z, f: z - rate * f, state.z, by))

        here, memory = mean.mean(operator(state.z, data), state.mean, first)
        ahead, memory = mean.mean(operator(moved(here), data), memory, second)
        return ExtragradientState(state.count + 1, moved(ahead), memory)

    return Method(init, step)
