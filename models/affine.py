"""Affine quantisation: x is about scale * (q - zero), q of a few bits.

>>> grid = grid_of(jnp.array([-1.0, 0.5, 2.0]), bits=2)
>>> q = quantize(jnp.array([-1.0, 0.5, 2.0]), grid)
>>> q.tolist(), dequantize(q, grid).tolist()
([0, 2, 3], [-1.0, 1.0, 2.0])
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from .bottleneck import Waist


class Grid(NamedTuple):
    """`scale` is rounded to half precision, as it travels; both ends use that number.

    With leading axes there is a grid for each; they broadcast against what follows.
    """

    scale: Float[Array, "*b"]
    zero: Float[Array, "*b"]  # an integer in [0, 2^bits)
    top: int  # 2^bits - 1


def grid_of(x: Float[Array, "..."], bits: int = 8, *, axes: Any = None) -> Grid:
    """The grid of a tensor from its least and greatest value (one for each index that
    is not in `axes`); 0 is always on it.

    scale = (max - min) / (2^bits - 1), zero = round(-min / scale), where min is at most
    0 and max at least 0: a tensor all of one sign would else leave the grid. Then
    |x - dequantize(quantize(x))| <= scale, and at most scale / 2 but where the
    rounding of zero cuts an end off.

    Raises: ValueError for bits outside 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: {bits}, but must be from 1 to 8")
    top = 2**bits - 1
    low = jnp.minimum(x.min(axes), 0).astype(jnp.float32)
    high = jnp.maximum(x.max(axes), 0).astype(jnp.float32)
    scale = ((high - low) / top).astype(jnp.float16)
    tiny = jnp.finfo(jnp.float16).smallest_subnormal
    # Half precision may round down; one step up, the range is covered again.
    short = scale.astype(jnp.float32) * top < high - low
    scale = jnp.where(short, jnp.nextafter(scale, jnp.float16(jnp.inf)), scale)
    scale = jnp.maximum(scale, tiny).astype(jnp.float32)
    return Grid(scale, jnp.clip(jnp.round(-low / scale), 0, top), top)


def quantize(x: Float[Array, "..."], grid: Grid) -> UInt8[Array, "..."]:
    """round(zero + x / scale), clipped to the grid."""
    scale, zero = (_aligned(g, x) for g in grid[:2])
    q = jnp.round(zero + x.astype(jnp.float32) / scale)
    return jnp.clip(q, 0, grid.top).astype(jnp.uint8)


def dequantize(q: UInt8[Array, "..."], grid: Grid) -> Float[Array, "..."]:
    scale, zero = (_aligned(g, q) for g in grid[:2])
    return scale * (q.astype(jnp.float32) - zero)


def _aligned(value, x):
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


class Squeeze(nnx.Module):
    """A waist of few channels, each quantised on a fixed grid that both ends know.

    A position is projected to `channels` numbers, normalised by running averages of
    their mean and variance, clipped to 4 deviations, quantised to `bits` and projected
    back. So channels * bits bits pass a position, and nothing else travels: the
    averages change only in `update`. Gradients pass the quantiser unchanged.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: int = 8,
        bits: int = 8,
        decay: float = 0.99,
        rngs: nnx.Rngs,
    ):
        if not 1 <= bits <= 8 or channels < 1:
            raise ValueError(
                f"channels, bits: {channels}, {bits}, but channels must be at least 1 "
                "and bits from 1 to 8"
            )
        self.down = nnx.Linear(width, channels, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(channels, width, rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.square = nnx.BatchStat(jnp.ones(channels))
        self.bits, self.decay = bits, decay

    @property
    def capacity(self) -> float:
        """Bits that a position passes."""
        return float(self.bits * self.mean[...].size)

    def __call__(self, x: Float[Array, "*b d"], mask=None) -> Waist:
        keep = jnp.ones(x.shape[:-1], bool) if mask is None else mask
        held = jnp.where(keep[..., None], x, 0).astype(jnp.float32)
        h = self.down(held)
        spread = jnp.sqrt(jnp.maximum(self.square[...] - self.mean[...] ** 2, 1e-6))
        unit = jnp.clip((h - self.mean[...]) / spread, -4, 4)
        # Symmetric about 0: levels -4, ..., 4.
        top = 2**self.bits - 1
        level = jnp.round((unit + 4) * top / 8) * 8 / top - 4
        passed = unit + jax.lax.stop_gradient(level - unit)
        z = self.up(passed * spread + self.mean[...]).astype(x.dtype)
        axes = tuple(range(x.ndim - 1))
        counted = jax.lax.stop_gradient(jnp.where(keep[..., None], h, 0))
        stats = {
            "count": keep.sum(dtype=jnp.float32),
            "sum": counted.sum(axes),
            "square": (counted**2).sum(axes),
        }
        bits = jnp.where(keep, self.capacity, 0).astype(jnp.float32)
        return Waist(z, jnp.zeros((), jnp.float32), bits, stats)

    def update(self, stats: Any) -> dict[str, jax.Array]:
        """Move the averages towards a step's; a step without positions moves none."""
        count = jnp.maximum(stats["count"], 1)
        rate = jnp.where(stats["count"] > 0, 1 - self.decay, 0.0)
        for held, total in ((self.mean, "sum"), (self.square, "square")):
            held[...] = held[...] + rate * (stats[total] / count - held[...])
        spread = jnp.sqrt(jnp.maximum(self.square[...] - self.mean[...] ** 2, 0))
        return {"squeeze_deviation": spread.mean()}
