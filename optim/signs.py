"""One bit an entry, and the ternary gradient.

Bernstein et al. 2018, arXiv:1802.04434 (the sign); Karimireddy et al. 2019,
arXiv:1901.09847, Sec. 4 (its l1 scale); Tang et al. 2021, arXiv:2102.02888, Sec. 4 (its
rms scale); Wen et al. 2017, arXiv:1705.07878, Eq. 3 (ternary).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from .bits import pack_bits, pack_trits, unpack_bits, unpack_trits
from .compression import Compressor, Promise, Shape, size, unit


class Signs(NamedTuple):
    signs: UInt8[Array, "m"]  # eight entries a byte, 1 where x >= 0
    present: UInt8[Array, "p"]  # eight rows a byte, 1 where the row is not zero
    scale: Float[Array, ""]  # float32


class Trits(NamedTuple):
    trits: UInt8[Array, "m"]  # five entries a byte
    scale: Float[Array, ""]  # float32, the largest magnitude


def sign(scale: Literal["l1", "rms"] = "l1") -> Compressor:
    """r sgn(x) with sgn(0) = 1, and 0 in rows (of the last axis) that are zero.

    l1: r = mean |x| over the d' entries of the other rows, and exactly
    |C(x) - x|^2 = |x|^2 - |x|_1^2 / d', so delta = 1 / d at worst and 2 / pi for
    Gaussian entries. rms: r = |x| / sqrt(d'); the norm is kept, and nothing is
    promised: |C(x) - x|^2 = 2 |x|^2 (1 - |x|_1 / (sqrt(d') |x|)) can exceed |x|^2.
    """
    if scale not in ("l1", "rms"):
        raise ValueError(f"scale: {scale!r}, but allowed are 'l1' and 'rms'")

    def encode(key, x):
        del key
        rows = _rows(x)
        present = jnp.any(rows != 0, -1)
        small, power = unit(rows)
        count = jnp.maximum(jnp.sum(present) * rows.shape[-1], 1)
        if scale == "l1":
            r = jnp.sum(jnp.abs(small)) / count
        else:
            r = jnp.sqrt(jnp.sum(small**2) / count)
        return Signs(pack_bits(rows >= 0), pack_bits(present), r * power)

    def decode(payload, shape):
        rows = size(shape[:-1])
        positive = unpack_bits(payload.signs, size(shape)).reshape(rows, -1)
        present = unpack_bits(payload.present, rows)[:, None]
        signed = jnp.where(positive, payload.scale, -payload.scale)
        return jnp.where(present, signed, 0.0).reshape(shape)

    def promise(shape: Shape) -> Promise:
        return Promise(delta=1 / size(shape)) if scale == "l1" else Promise()

    return Compressor(encode, decode, promise)


def terngrad() -> Compressor:
    """max|x| sgn(x) with probability |x| / max|x|, else 0: 1.6 bits an entry.

    E|Q(x) - x|^2 = max|x| |x|_1 - |x|^2, so omega = (sqrt(d) - 1) / 2: the worst x is
    (1, t, ..., t) with t = 1 / (1 + sqrt(d)).
    """

    def encode(key, x):
        x = x.astype(jnp.float32).reshape(-1)
        largest = jnp.max(jnp.abs(x), initial=0.0)
        kept = jax.random.uniform(key, x.shape) * largest < jnp.abs(x)
        trits = jnp.where(kept, jnp.where(x > 0, 2, 0), 1).astype(jnp.uint32)
        return Trits(pack_trits(trits), largest)

    def decode(payload, shape):
        trits = unpack_trits(payload.trits, size(shape)).astype(jnp.float32)
        return ((trits - 1) * payload.scale).reshape(shape)

    return Compressor(
        encode,
        decode,
        lambda shape: Promise(omega=(size(shape) ** 0.5 - 1) / 2),
        random=True,
    )


def _rows(x: Float[Array, "*s w"]) -> Float[Array, "r w"]:
    if x.ndim == 0:
        raise ValueError("x: is a scalar, but rows are asked for; reshape it to (1,)")
    return x.astype(jnp.float32).reshape(-1, x.shape[-1])
