"""Multi-head attention of a transformer block: projections, positions, cache.

The attention itself is one call, `kernels.attention`, run on each device's own rows and
heads, or as the block of a ring where a sequence lies over several devices; nothing
here computes it by hand.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..parallel.layout import ROWS, devices_along, on_each_device
from ..parallel.ring_attention import ring_attention
from ..parallel.sequence import Order
from .kernels.attention import attention, decode_attention
from .linear import dot_general

HEADS = (ROWS, "seq", "tensor", None)  # [b, t, n, h]
BLOCK = functools.partial(attention, return_residual=True)


class LayerCache(NamedTuple):
    """Keys and values of the positions so far; room for s of them."""

    keys: Float[Array, "b s k h"]
    values: Float[Array, "b s k h"]


def turns(
    positions: Int[Array, "b t"], head_width: int, base: float = 10_000.0
) -> tuple[Float[Array, "b t 1 i"], Float[Array, "b t 1 i"]]:
    """Cosine and sine of the angles, position * base**(-2i / head_width)."""
    half = head_width // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    # Kept apart, or the compiler evaluates them anew inside each of their uses.
    return jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))


def rotate(
    x: Float[Array, "b t n h"],
    cosine: Float[Array, "b t 1 i"],
    sine: Float[Array, "b t 1 i"],
) -> Float[Array, "b t n h"]:
    """Rotary position (Su et al. 2021, arXiv:2104.09864, Eq. 34); pairs i, i + h/2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [a * cosine - b * sine, b * cosine + a * sine]
    return jnp.concatenate(turned, -1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention: `heads` queries share `kv_heads` keys and values.

    kernels: query [d, n, h], key and value [d, k, h], out [n, h, d].
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        head_width: int,
        qk_norm: bool,
        rotary: bool,
        rotary_base: float = 10_000.0,
        causal: bool,
        bias: bool,
        residual_scale: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.rotary, self.rotary_base, self.causal = rotary, rotary_base, causal
        inward: dict[str, Any] = {"use_bias": bias, "dtype": dtype, "rngs": rngs}
        inward["dot_general"] = dot_general
        self.query = nnx.LinearGeneral(width, (heads, head_width), **inward)
        self.key = nnx.LinearGeneral(width, (kv_heads, head_width), **inward)
        self.value = nnx.LinearGeneral(width, (kv_heads, head_width), **inward)
        self.out = nnx.LinearGeneral(
            (heads, head_width),
            width,
            axis=(-2, -1),
            use_bias=bias,
            dtype=dtype,
            dot_general=dot_general,
            kernel_init=nnx.initializers.variance_scaling(
                residual_scale**2, "fan_in", "normal"
            ),
            rngs=rngs,
        )
        self.query_norm = nnx.RMSNorm(head_width, rngs=rngs) if qk_norm else None
        self.key_norm = nnx.RMSNorm(head_width, rngs=rngs) if qk_norm else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        cache: LayerCache | None = None,
        length: Int[Array, ""] | None = None,
        order: Order = "contiguous",
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Attend within equal segment ids, or after the cache's `length` positions.

        order: how positions lie over the devices of a seq axis, see `parallel.sequence`
        """
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query = self.query_norm(query).astype(x.dtype)
            key = self.key_norm(key).astype(x.dtype)
        if self.rotary:
            angles = turns(positions, query.shape[-1], self.rotary_base)
            query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is None:
            mixed = self._attend(query, key, value, segment_ids, order)
        else:
            start = (0, 0 if length is None else length, 0, 0)
            cache = LayerCache(
                jax.lax.dynamic_update_slice(cache.keys, key, start),
                jax.lax.dynamic_update_slice(cache.values, value, start),
            )
            mixed = self._continue(query, cache, length)
        return self.out(mixed), cache

    def _continue(self, query, cache, length):
        """Attend to all that the cache holds, the new positions last."""
        if query.shape[1] == 1:
            held = 1 if length is None else length + 1
            return decode_attention(query, *cache, key_value_seq_lengths=held)
        return attention(query, *cache, is_causal=True, query_offset=length)

    def _attend(self, query, key, value, segment_ids, order):
        parts = devices_along("seq")

        def attend(q, k, v, ids=None):
            options: dict[str, Any] = {"is_causal": self.causal, "segment_ids": ids}
            if parts == 1:
                return attention(q, k, v, **options)
            options |= {"block": BLOCK, "order": order}
            return ring_attention(q, k, v, axis_name="seq", **options)

        ids = () if segment_ids is None else (segment_ids,)
        return on_each_device(
            attend,
            in_axes=(HEADS,) * 3 + ((ROWS, "seq"),) * len(ids),
            out_axes=HEADS,
        )(query, key, value, *ids)
