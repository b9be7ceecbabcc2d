"""A waist of any quantiser: each position passes as its indices and nothing else.

    e = W_in norm(x),  z = W_out decode(encode(e))

with e brought to unit mean square where codes are learned by distance: the commitment
loss would else shrink all to one point.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..bottleneck import Waist
from . import traffic
from .protocol import Quantizer, State


class Memory(nnx.Variable):
    """Learned from sums instead of gradients."""


class Sums(NamedTuple):
    counts: Float[Array, " k"]  # how often each code was chosen
    inner: Any  # the quantiser's own stats


def unit_square(e: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """To a mean square of 1."""
    return e * jax.lax.rsqrt(jnp.mean(e**2, -1, keepdims=True) + 1e-6)


class Quantize(nnx.Module):
    """`width` numbers in and out at each position, whatever axes come before.

    unit: bring what is quantised to unit mean square.
    weights: of the quantiser's losses in the waist's; default its own.
    window: optimizer steps over which usage and code frequencies are counted.
    """

    def __init__(
        self,
        width: int,
        quantizer: Quantizer,
        *,
        unit: bool = False,
        weights: dict[str, float] | None = None,
        window: int = 32,
        rngs: nnx.Rngs,
    ):
        if window < 1:
            raise ValueError(f"window: {window} steps, but it must be at least 1")
        self.weights = dict(quantizer.weights)
        unknown = set(weights or {}) - set(self.weights)
        if unknown:
            raise ValueError(
                f"weights: {sorted(unknown)} are no losses of the quantizer, whose "
                f"losses are {sorted(self.weights)}"
            )
        self.weights |= weights or {}
        self.quantizer, self.unit = quantizer, unit
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        linear: Callable = nnx.Linear
        self.inward = linear(width, quantizer.width, use_bias=False, rngs=rngs)
        self.outward = linear(quantizer.code_width, width, use_bias=False, rngs=rngs)
        state = quantizer.init(rngs.params())
        self.learned = nnx.Param(state.params)
        self.memory = Memory(state.memory)
        self.traffic = Memory(traffic.quiet(window, quantizer.sizes))

    @property
    def capacity(self) -> float:
        """Bits of all indices of a position, which mean bits cannot exceed."""
        return self.quantizer.capacity

    @property
    def state(self) -> State:
        return State(self.learned.get_value(), self.memory.get_value())

    def encode(self, x: Float[Array, "*b d"]) -> Int[Array, "*b q"]:
        return self.quantizer.encode(self.state, self._inward(x))

    def decode(self, codes: Int[Array, "*b q"]) -> Float[Array, "*b d"]:
        """float32; the call casts it to the dtype of x."""
        return self.outward(self.quantizer.decode(self.state, codes))

    def __call__(
        self, x: Float[Array, "*b d"], mask: Bool[Array, "*b"] | None = None
    ) -> Waist:
        """bits are those of `traffic.bits`; codes hold all indices."""
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)  # not even a NaN there goes further
        out = self.quantizer.quantize(self.state, self._inward(x), mask)
        sizes = self.quantizer.sizes
        keep = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
        loss = jnp.zeros((), jnp.float32)
        for name, value in out.losses.items():
            loss += self.weights[name] * value
        bits = traffic.bits(self.traffic.get_value(), out.indices, keep, sizes)
        stats = Sums(traffic.count(out.indices, keep, sizes), out.stats)
        z = self.outward(out.z).astype(x.dtype)
        return Waist(z, loss, bits, jax.lax.stop_gradient(stats), codes=out.indices)

    def update(self, stats: Sums) -> dict[str, jax.Array]:
        """Let the codes learn and count the window. Call once a step."""
        state, said = self.quantizer.update(self.state, stats.inner)
        self.memory.set_value(state.memory)
        self.traffic.set_value(traffic.record(self.traffic.get_value(), stats.counts))
        found = {f"waist_{name}": value for name, value in said.items()}
        return traffic.report(self.traffic.get_value(), self.quantizer.sizes) | found

    def start(
        self,
        key: jax.Array,
        x: Float[Array, "*b d"],
        mask: Bool[Array, "*b"] | None = None,
    ) -> None:
        """Put codes where data lie, as k-means does; once, before the first step."""
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        state = self.quantizer.start(key, self.state, self._inward(x), mask)
        self.memory.set_value(state.memory)

    def _inward(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        e = self.inward(self.norm(x.astype(jnp.float32)))
        return unit_square(e) if self.unit else e
