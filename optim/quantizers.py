"""Quantisers: fewer bits for each entry, rounded at random or to the nearest.

qsgd: Alistarh et al. 2017, arXiv:1610.02132, Eq. 2 and Lemma 3.1. natural: Horvath et
al. 2019, arXiv:1905.10988, Def. 1 and Theorem 1. blocks: block-wise integers as in
Dettmers et al. 2022, arXiv:2110.02861, Sec. 2, with evenly spaced codes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from .bits import pack_bits, pack_codes, unpack_bits, unpack_codes
from .compression import Compressor, Promise, Shape, size, unit

MANTISSA = 23  # bits of a float32 below its exponent


class Codes(NamedTuple):
    codes: UInt8[Array, "m"]  # packed without gaps
    scale: Float[Array, "*b"]  # float32; of the whole, or of each block


class Powers(NamedTuple):
    exponents: UInt8[Array, "d"]
    signs: UInt8[Array, "m"]  # eight a byte, 1 where negative


def qsgd(levels: int = 7) -> Compressor:
    """|x| sgn(x_i) l_i / s, l_i rounded at random from s |x_i| / |x|, s = `levels`.

    omega = min(d / s^2, sqrt(d) / s). An entry takes the bits of 2 s + 1 codes.
    """
    if levels < 1:
        raise ValueError(f"levels: {levels}, but at least 1 is needed")
    width = (2 * levels).bit_length()

    def encode(key, x):
        small, power = unit(x.reshape(-1))
        norm = jnp.sqrt(jnp.sum(small**2))
        level = jnp.abs(small) / jnp.where(norm > 0, norm, 1) * levels
        level = jnp.minimum(
            jnp.floor(level + jax.random.uniform(key, level.shape)), levels
        )
        codes = (jnp.sign(small) * level + levels).astype(jnp.uint32)
        return Codes(pack_codes(codes, width), norm * power)

    def decode(payload, shape):
        codes = unpack_codes(payload.codes, size(shape), width).astype(jnp.float32)
        return ((codes - levels) * (payload.scale / levels)).reshape(shape)

    def promise(shape: Shape) -> Promise:
        d = size(shape)
        return Promise(omega=min(d / levels**2, d**0.5 / levels))

    return Compressor(encode, decode, promise, random=True)


def natural() -> Compressor:
    """Round to one of the two nearest powers of two at random: 9 bits, omega = 1/8.

    The odds are the mantissa's, so that exactly E Q(x) = x; powers of two stay as they
    are. Up to 2^127; below 2^-126, where float32 has no mantissa left, to 0 or 2^-126.
    """

    def encode(key, x):
        x = x.astype(jnp.float32).reshape(-1)
        word = lax.bitcast_convert_type(x, jnp.uint32)
        mantissa = word & (2**MANTISSA - 1)
        up = mantissa > jax.random.bits(key, x.shape) >> (32 - MANTISSA)
        exponent = (word >> MANTISSA) & 255
        exponent = jnp.minimum(exponent + up, jnp.where(exponent == 255, 255, 254))
        return Powers(exponent.astype(jnp.uint8), pack_bits(word >> 31 == 1))

    def decode(payload, shape):
        negative = unpack_bits(payload.signs, size(shape)).astype(jnp.uint32)
        word = negative << 31 | payload.exponents.astype(jnp.uint32) << MANTISSA
        return lax.bitcast_convert_type(word, jnp.float32).reshape(shape)

    return Compressor(encode, decode, lambda shape: Promise(omega=1 / 8), random=True)


def blocks(width: int = 8, *, block: int = 64, stochastic: bool = False) -> Compressor:
    """Integers in [-L, L], L = 2^(width - 1) - 1, with a float32 scale a block.

    The scale is max|block| / L. To the nearest: every entry within half a scale, so
    delta = 1 - block / (4 L^2). Stochastic: omega = block / (4 L^2).
    """
    if not 2 <= width <= 8:
        raise ValueError(f"width: {width} bits, but allowed are 2 to 8")
    top = 2 ** (width - 1) - 1

    def encode(key, x):
        flat = x.astype(jnp.float32).reshape(-1)
        cut = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
        scale = jnp.max(jnp.abs(cut), -1) / top
        steps = cut / jnp.where(scale > 0, scale, 1)[:, None]
        if stochastic:
            steps = jnp.floor(steps + jax.random.uniform(key, steps.shape))
        codes = jnp.clip(jnp.round(steps), -top, top).reshape(-1)[: flat.size]
        return Codes(pack_codes((codes + top).astype(jnp.uint32), width), scale)

    def decode(payload, shape):
        d = size(shape)
        codes = unpack_codes(payload.codes, d, width).astype(jnp.float32) - top
        cut = jnp.pad(codes, (0, -d % block)).reshape(-1, block)
        return (cut * payload.scale[:, None]).reshape(-1)[:d].reshape(shape)

    def promise(shape: Shape) -> Promise:
        share = min(block, size(shape)) / (4 * top**2)
        if stochastic:
            return Promise(omega=share)
        return Promise(delta=1 - share if share < 1 else None)

    return Compressor(encode, decode, promise, random=stochastic)
