"""Outer steps: what becomes of the mean pseudo-gradient when a round has ended.

A round starts from x on all workers; worker i arrives at y_i after some steps of its
own optimizer. The pseudo-gradient is the mean over workers of x - y_i, and an outer
step is any optax transformation of it, whose result is added to x. A method is one
line of `OUTERS`:

    name        outer step                                      exchange  source
    local_sgd   x - rate d                                      waited    1805.09767
    slowmo      m = b m + d; x - rate m                         waited    1910.00643
    diloco      Nesterov's momentum of d                        waited    2311.08105
    co2         m = clip(b m + d / Lambda, phi); x - rate m     stale     2401.16265

`stale`: the exchange of a round travels while the next round computes, so d is that of
the round before. Lambda >= 1 is the penalty of the staleness gap.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

Gap = Callable[[Array, Array], Array]  # (rms of the last step, usual rms) -> Lambda


class Outer(NamedTuple):
    tx: optax.GradientTransformationExtraArgs  # of d; takes `moved`, see `gap_penalty`
    stale: bool


class GapState(NamedTuple):
    count: Int[Array, ""]
    usual: Float[Array, ""]  # running mean of the rms of d, its bias not corrected


class ClippedTraceState(NamedTuple):
    trace: optax.Updates  # float32


def rms(tree: PyTree) -> Float[Array, ""]:
    """Root of the mean square over all numbers of a tree, float32."""
    tree = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    return optax.tree.norm(tree) / math.sqrt(max(1, optax.tree.size(tree)))


def relative_gap(moved: Float[Array, ""], usual: Float[Array, ""]) -> Float[Array, ""]:
    """Lambda = 1 + rms(x_t - x_{t-1}) / S, with S the usual rms of a round's d.

    The paper names the gap and leaves its form open; this is the gap-aware form of
    Barkai et al. 2020 (arXiv:1909.10802) that it descends from.
    """
    return 1 + jnp.where(usual > 0, moved / jnp.where(usual > 0, usual, 1), 0)


def gap_penalty(
    gap: Gap = relative_gap, *, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """d / Lambda, of a pseudo-gradient that is one round old.

    Its update takes `moved`, the rms of the last outer step x_t - x_{t-1}; S is the
    running mean (by `decay`) of the rms of d, this one included.
    """

    def init(params):
        del params
        return GapState(jnp.int32(0), jnp.float32(0))

    def update(updates, state: Any, params=None, **extra):
        del params
        moved = extra["moved"]
        count = state.count + 1
        usual = optax.tree.update_moment(rms(updates), state.usual, decay, 1)
        penalty = gap(moved, optax.tree.bias_correction(usual, decay, count))
        return optax.tree.scale(1 / penalty, updates), GapState(count, usual)

    return optax.GradientTransformationExtraArgs(init, update)


def clipped_trace(decay: float, limit: float) -> optax.GradientTransformation:
    """m = clip(decay m + d, -limit, limit), number by number; what is kept is clipped.

    Arguments: `limit` in the unit of the parameters; inf leaves plain momentum.
    """

    def init(params):
        return ClippedTraceState(
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        )

    def update(updates, state: Any, params=None):
        del params
        trace = jax.tree.map(
            lambda m, d: jnp.clip(decay * m + d, -limit, limit), state.trace, updates
        )
        return trace, ClippedTraceState(trace)

    return optax.GradientTransformation(init, update)


def _co2(rate: float, momentum: float, *, clip: float = 1.0, gap: Gap = relative_gap):
    return optax.chain(
        gap_penalty(gap), clipped_trace(momentum, clip), optax.scale(-rate)
    )


class Method(NamedTuple):
    make: Callable[..., optax.GradientTransformation]  # (rate, momentum, **options)
    stale: bool
    rate: float  # defaults of the source
    momentum: float


OUTERS: dict[str, Method] = {
    "local_sgd": Method(lambda rate, _: optax.scale(-rate), False, 1.0, 0.0),
    "slowmo": Method(lambda rate, b: optax.sgd(rate, momentum=b), False, 1.0, 0.5),
    "diloco": Method(
        lambda rate, b: optax.sgd(rate, momentum=b, nesterov=True), False, 0.7, 0.9
    ),
    "co2": Method(_co2, True, 1.0, 0.0),
}


def make_outer(
    name: str, *, rate: float | None = None, momentum: float | None = None, **options
) -> Outer:
    """A line of the table. Only "co2" has options: `clip` (phi) and `gap`.

    Raises ValueError for another name, a rate that is not above 0 and a momentum
    outside [0, 1).

    >>> make_outer("diloco").stale
    False
    """
    if name not in OUTERS:
        raise ValueError(f"outer: {name!r}, but allowed are {', '.join(OUTERS)}")
    method = OUTERS[name]
    rate = method.rate if rate is None else rate
    momentum = method.momentum if momentum is None else momentum
    if not rate > 0:
        raise ValueError(f"rate: {rate}, but an outer step needs one above 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: {momentum}, but it must lie in [0, 1)")
    if momentum and name == "local_sgd":
        raise ValueError(f"momentum: {momentum}, but with one local_sgd is slowmo")
    tx = optax.with_extra_args_support(method.make(rate, momentum, **options))
    return Outer(tx, method.stale)


def is_stable(
    rate: float, momentum: float, contraction: float, penalty: float, *, stale: bool
) -> bool:
    """Whether rounds on a quadratic converge, along one direction of curvature.

    contraction: rho = 1 - (1 - inner rate x curvature)^steps of a round. With
    kappa = rate rho / Lambda the errors follow z^2 - (1 + b) z + b + kappa = 0 if the
    exchange is stale, z^2 - (1 + b - kappa) z + b = 0 if it is waited for.
    """
    kappa = rate * contraction / penalty
    return 0 < kappa < (1 - momentum if stale else 2 * (1 + momentum))
