"""Compressed extragradient for saddle points and other variational inequalities.

A. Beznosikov et al., "Distributed Methods with Compressed Communication for Solving
Variational Inequalities, with Theoretical Guarantees", NeurIPS 2022, arXiv:2110.03313,
Algorithms 1 (MASHA1) and 2 (MASHA2). To find z with F(z) = mean_m F_m(z) = 0 workers
send differences from an anchor w, which vanish at the solution:

    v = tau z + (1 - tau) w - rate F(w);   z_h = P(v)
    g = mean of C(F_m(z_h) - F_m(w));   z <- P(v - rate g)
    with probability 1 - tau: w <- z, and F(w) is exchanged whole

MASHA1 is a compressed mean over unbiased plain links, MASHA2 one over links "masha2"
(error feedback; the memories hold F, the rate stays outside, so schedules are safe).
P projects onto the set of the inequality, if there is one. For min_x max_y f take the
operator `extragradient.saddle(f)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from ..parallel.state import PerWorkerMean, replicate
from .compressed_mean import CompressedMean, MeanState
from .extragradient import Method, Operator, Project, whole_space


class MashaState(NamedTuple):
    count: Int[Array, ""]
    anchors: Int[Array, ""]  # whole exchanges made, with the first
    z: PyTree
    w: PyTree  # the anchor
    whole: PyTree  # F(w)
    own: PerWorkerMean  # F_m(w)
    mean: MeanState


def masha(
    operator: Operator,
    mean: CompressedMean,
    *,
    rate: float,
    tau: float,
    workers: int,
    axis_name: str = "data",
    project: Project = whole_space,
    seed: int = 0,
) -> Method:
    """MASHA for `operator(z, data) -> F_m(z)` of a worker's data.

    tau: 1 - tau is the chance of a whole exchange; as it costs d numbers, take for
    1 - tau the part of d that a compressed one costs. The first step makes one.
    """
    if not 0 <= tau < 1:
        raise ValueError(f"tau: {tau}, but it must lie in [0, 1)")

    def init(z):
        zeros = jax.tree.map(jnp.zeros_like, z)
        own = replicate(PerWorkerMean(zeros), workers)
        zero = jnp.int32(0)
        return MashaState(zero, zero, z, z, zeros, own, mean.init(z))

    def step(data, state: MashaState) -> MashaState:
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        coin = jax.random.uniform(jax.random.fold_in(key, 0)) < 1 - tau

        def exchange(state: MashaState) -> MashaState:
            own = operator(state.z, data)
            return state._replace(
                anchors=state.anchors + 1,
                w=state.z,
                whole=lax.pmean(own, axis_name),
                own=PerWorkerMean(own),
            )

        # The coin of the step before, which all workers throw alike.
        fresh = coin | (state.count == 0)
        state = lax.cond(fresh, exchange, lambda state: state, state)
        middle = jax.tree.map(
            lambda z, w, f: tau * z + (1 - tau) * w - rate * f,
            state.z,
            state.w,
            state.whole,
        )
        own = state.own.per_worker_mean
        difference = jax.tree.map(jnp.subtract, operator(project(middle), data), own)
        g, memory = mean.mean(difference, state.mean, jax.random.fold_in(key, 1))
        z = project(jax.tree.map(lambda m, g: m - rate * g, middle, g))
        return state._replace(count=state.count + 1, z=z, mean=memory)

    return Method(init, step)
