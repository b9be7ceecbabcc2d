"""What every quantiser offers, as a NamedTuple of pure functions."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class State(NamedTuple):
    """All that a quantiser keeps: plain arrays."""

    params: Any = ()  # follow gradients
    memory: Any = ()  # follows sums over positions, or stays as it was drawn


class Quantized(NamedTuple):
    """What a quantiser makes of x; masked positions change nothing but their own z."""

    z: Float[Array, "*b e"]  # decode(indices), x's dtype, with a gradient to x
    indices: Int[Array, "*b q"]  # index j in [0, sizes[j])
    losses: dict[str, Float[Array, ""]]  # means over unmasked positions, float32
    stats: Any = ()  # float32 sums over unmasked positions, for `update`


def nothing_to_learn(state: State, stats: Any) -> tuple[State, dict]:
    return state, {}


def nothing_to_start(key, state: State, x, mask=None) -> State:
    return state


class Quantizer(NamedTuple):
    """Sizes and functions; see the package's docstring for their arguments."""

    width: int  # numbers of x
    code_width: int  # numbers of z; all but random projections keep the width
    sizes: tuple[int, ...]  # codes that each index chooses from
    init: Callable[[jax.Array], State]
    encode: Callable[[State, jax.Array], jax.Array]
    decode: Callable[[State, jax.Array], jax.Array]
    quantize: Callable[..., Quantized]  # (state, x, mask=None)
    weights: Mapping[str, float]  # proposed, of its losses
    update: Callable[[State, Any], tuple[State, dict]] = nothing_to_learn
    start: Callable[..., State] = nothing_to_start  # (key, state, x, mask=None)

    @property
    def capacity(self) -> float:
        """Bits of all indices of a position."""
        return sum(math.log2(size) for size in self.sizes)


def positions(
    x: Float[Array, "*b e"], mask: Bool[Array, "*b"] | None, width: int
) -> tuple[Float[Array, "*b e"], Float[Array, "*b"]]:
    """x in float32, 0 where masked (not even a NaN there goes on), and 1 where kept."""
    if x.shape[-1] != width:
        raise ValueError(
            f"x: {x.shape[-1]} numbers a position, but the quantizer takes {width}"
        )
    x = x.astype(jnp.float32)
    if mask is None:
        return x, jnp.ones(x.shape[:-1], jnp.float32)
    return jnp.where(mask[..., None], x, 0.0), mask.astype(jnp.float32)
