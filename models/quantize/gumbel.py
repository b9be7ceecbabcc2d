"""Gumbel-softmax: a code drawn by learned logits, differentiated as if it were soft.

    index = argmax_j (l_j + g_j)
    z = C_index, with the gradient of softmax((l + g) / T) C

(arXiv:1611.01144, Sec. 2.2, straight-through). Here codes learn by the gradient of z.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from . import losses
from .protocol import Quantized, Quantizer, State, positions


class Learned(NamedTuple):
    logits: Float[Array, "e k"]  # W
    codes: Float[Array, "k e"]


class Drawn(NamedTuple):
    key: Array  # uint32 [2]
    steps: Int[Array, ""]  # updates that were not of padding alone


def fingerprint(x: Float[Array, "*b e"]) -> UInt32[Array, "*b"]:
    """A hash of each position's float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.uint32)
    odd = jax.random.bits(jax.random.key(0), (x.shape[-1],), jnp.uint32) | 1
    mixed = jnp.sum((bits ^ (bits >> 15)) * odd, -1, dtype=jnp.uint32)
    return (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)


def gumbel(
    width: int, codes: int, *, temperature: float = 1.0, noise: float = 1.0
) -> Quantizer:
    """One of `codes` codes, drawn from softmax(W x) when noise is 1.

    noise: scales g; at 0 the likeliest code passes, as at the end of training. A state
        of the one fits the other.
    What a position draws follows from its numbers and the count of updates alone, so
    that it is the same in any cut of the batch, and encode sends what quantize sent;
    equal positions of one step draw equally. The loss "divergence" is KL to uniform.

    >>> gumbel(16, 512).capacity
    9.0
    """
    if temperature <= 0 or noise < 0:
        raise ValueError(
            f"gumbel: temperature={temperature}, noise={noise}, but the one must be "
            "above 0 and the other at least 0"
        )

    def init(key: jax.Array) -> State:
        one, two, three = jax.random.split(key, 3)
        params = Learned(
            logits=jax.random.normal(one, (width, codes), jnp.float32) * width**-0.5,
            codes=jax.random.normal(two, (codes, width), jnp.float32),
        )
        draw = Drawn(jax.random.bits(three, (2,), jnp.uint32), jnp.zeros((), jnp.int32))
        return State(params, draw)

    def scores(state: State, x):
        high = jax.lax.Precision.HIGHEST
        logits = jnp.dot(x, state.params.logits, precision=high)
        if noise == 0:
            return logits, logits
        key = jax.random.wrap_key_data(state.memory.key, impl="threefry2x32")
        key = jax.random.fold_in(key, state.memory.steps)
        marks = fingerprint(jax.lax.stop_gradient(x))
        keys = jax.vmap(lambda mark: jax.random.fold_in(key, mark))(marks.reshape(-1))
        drawn = jax.vmap(lambda key: jax.random.gumbel(key, (codes,)))(keys)
        return logits, logits + noise * drawn.reshape(logits.shape)

    def encode(state: State, x):
        _, noisy = scores(state, positions(x, None, width)[0])
        return jnp.argmax(noisy, -1, keepdims=True).astype(jnp.int32)

    def decode(state: State, indices):
        return state.params.codes[indices[..., 0]]

    def quantize(state: State, x, mask=None) -> Quantized:
        wide, keep = positions(x, mask, width)
        logits, noisy = scores(state, wide)
        index = jnp.argmax(noisy, -1, keepdims=True).astype(jnp.int32)
        soft = jax.nn.softmax(noisy / temperature) @ state.params.codes
        hard = jax.lax.stop_gradient(decode(state, index))
        z = hard + (soft - jax.lax.stop_gradient(soft))
        loss = {"divergence": losses.mean(losses.divergence(logits), keep)}
        return Quantized(z.astype(x.dtype), index, loss, keep.sum())

    def update(state: State, stats):
        steps = state.memory.steps + (stats > 0)
        return state._replace(memory=state.memory._replace(steps=steps)), {}

    weights = {"divergence": 5e-4}
    return Quantizer(
        width, width, (codes,), init, encode, decode, quantize, weights, update
    )
