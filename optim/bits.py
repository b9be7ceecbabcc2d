"""Codes of a few bits and trits, packed into bytes: what a compressor really sends."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8, UInt32

TRITS = 5  # in a byte: 3**5 = 243


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits."""
    return -(-count * width // 8)


def pack_bits(bits: Bool[Array, "*s"]) -> UInt8[Array, "m"]:
    """Eight booleans a byte, the last byte filled with zeros."""
    return jnp.packbits(bits.reshape(-1))


def unpack_bits(packed: UInt8[Array, "m"], count: int) -> Bool[Array, "d"]:
    return jnp.unpackbits(packed, count=count).astype(bool)


def pack_codes(codes: UInt32[Array, "d"], width: int) -> UInt8[Array, "m"]:
    """Codes in [0, 2**width), the highest bit first, without gaps between them."""
    shifts = jnp.arange(width - 1, -1, -1, dtype=jnp.uint32)
    return pack_bits((codes[:, None] >> shifts) & 1 == 1)


def unpack_codes(
    packed: UInt8[Array, "m"], count: int, width: int
) -> UInt32[Array, "d"]:
    bits = jnp.unpackbits(packed, count=count * width).reshape(count, width)
    shifts = jnp.arange(width - 1, -1, -1, dtype=jnp.uint32)
    return (bits.astype(jnp.uint32) << shifts).sum(-1, dtype=jnp.uint32)


def pack_trits(trits: UInt32[Array, "d"]) -> UInt8[Array, "m"]:
    """Digits 0, 1, 2, five a byte: 1.6 bits each."""
    powers = 3 ** jnp.arange(TRITS, dtype=jnp.uint32)
    groups = jnp.pad(trits, (0, -trits.size % TRITS)).reshape(-1, TRITS)
    return (groups * powers).sum(-1).astype(jnp.uint8)


def unpack_trits(packed: UInt8[Array, "m"], count: int) -> UInt32[Array, "d"]:
    powers = 3 ** jnp.arange(TRITS, dtype=jnp.uint32)
    digits = packed[:, None].astype(jnp.uint32) // powers % 3
    return digits.reshape(-1)[:count]
