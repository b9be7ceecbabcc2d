"""The contract of a bottleneck layer: what passes, what it costs, how many bits.

A layer is an nnx.Module called as `layer(x, mask=None) -> Waist`. The call is pure:
what the layer would learn from a batch without gradients leaves as `stats`, plain sums
over positions. The training step adds them over microbatches and devices and calls
`layer.update(stats)` once per optimizer step, so that rematerialisation, pipelines and
any cut of the batch give the same layer.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


class Waist(NamedTuple):
    """What a bottleneck returns; masked positions change nothing but their own z."""

    z: Float[Array, "*b d"]  # passes on, caller's dtype
    loss: Float[Array, ""]  # unweighted mean over unmasked positions, float32
    bits: Float[Array, "*b"]  # that passed at each position, float32; 0 where masked
    stats: Any = ()  # float32 sums over positions for `update`
    codes: Int[Array, "..."] | None = None
    concepts: Float[Array, "*b k"] | None = None
    assignments: Float[Array, "*b k"] | None = None


@runtime_checkable
class Bottleneck(Protocol):
    """The methods of every bottleneck layer."""

    def __call__(
        self, x: Float[Array, "*b d"], mask: Bool[Array, "*b"] | None = None
    ) -> Waist: ...

    def update(self, stats: Any) -> dict[str, jax.Array]:
        """Learn from a step's summed stats; return float32 scalars to log."""
        ...


class Open(nnx.Module):
    """The waist that is none: everything passes, at the bits of its floats.

    >>> Open()(jnp.zeros((2, 3, 4))).bits[0, 0].item()
    128.0
    """

    def __call__(self, x: Float[Array, "*b d"], mask=None) -> Waist:
        bits = jnp.full(
            x.shape[:-1], x.shape[-1] * jnp.finfo(x.dtype).bits, jnp.float32
        )
        if mask is not None:
            bits = jnp.where(mask, bits, 0.0)
        return Waist(x, jnp.zeros((), jnp.float32), bits)

    def update(self, stats: Any) -> dict[str, jax.Array]:
        return {}
