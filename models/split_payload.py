"""The bytes of a quantised bottleneck, as they travel from a device to a server.

    byte 0      version in the high half, bits a number in the low half
    bytes 1-3   height, width, channels
    bytes 4-5   scale, half precision, little-endian
    byte 6      zero
    then        the numbers, row by row, packed; the last byte filled up with zeros

Every byte is checked before it is believed: a payload comes from elsewhere.

>>> payload = pack(np.arange(8).reshape(2, 2, 2) / 7, bits=4)
>>> len(payload), unpack(payload).shape
(11, (2, 2, 2))
"""

import struct

import numpy as np
from jaxtyping import Float, Float32, UInt8

from .affine import Grid, dequantize, grid_of, quantize

HEADER = struct.Struct("<BBBBeB")
VERSION = 1


def payload_size(height: int, width: int, channels: int, bits: int) -> int:
    """Bytes of a payload, header included."""
    return HEADER.size + -(-height * width * channels * bits // 8)


def pack(x: Float[np.ndarray, "h w c"], *, bits: int = 8) -> bytes:
    """Quantise one picture's bottleneck on its own grid and write it down."""
    if x.ndim != 3 or not all(1 <= n <= 255 for n in x.shape):
        raise ValueError(f"x: shape {x.shape}, but must be three sizes from 1 to 255")
    if not np.isfinite(x).all():
        raise ValueError("x: holds numbers that are not finite")
    grid = grid_of(np.asarray(x, np.float32), bits)
    q = np.asarray(quantize(np.asarray(x, np.float32), grid))
    head = HEADER.pack(VERSION << 4 | bits, *x.shape, float(grid.scale), int(grid.zero))
    return head + _packed(q.reshape(-1), bits)


def unpack(payload: bytes) -> Float32[np.ndarray, "h w c"]:
    """What the server's part goes on with.

    Raises: ValueError for another version, bits, length, scale or zero than `pack`
    can have written.
    """
    if len(payload) < HEADER.size:
        raise ValueError(f"payload: {len(payload)} bytes, fewer than its header has")
    kind, height, width, channels, scale, zero = HEADER.unpack_from(payload)
    version, bits = kind >> 4, kind & 15
    if version != VERSION or not 1 <= bits <= 8:
        raise ValueError(
            f"payload: version {version} of {bits} bits a number, but known is version "
            f"{VERSION} of 1 to 8"
        )
    expected = payload_size(height, width, channels, bits)
    if len(payload) != expected or not height * width * channels:
        raise ValueError(
            f"payload: {len(payload)} bytes, but {height} x {width} x {channels} "
            f"numbers of {bits} bits take {expected} and are at least one"
        )
    if not 0 < scale < np.inf or zero >= 2**bits:
        raise ValueError(f"payload: scale {scale} and zero {zero} make no grid")
    q = _unpacked(payload[HEADER.size :], bits, height * width * channels)
    grid = Grid(np.float32(scale), np.float32(zero), 2**bits - 1)  # type: ignore
    return np.asarray(dequantize(q.reshape(height, width, channels), grid))  # type: ignore


def _packed(q: UInt8[np.ndarray, " n"], bits: int) -> bytes:
    return np.packbits(np.unpackbits(q[:, None], axis=1)[:, 8 - bits :]).tobytes()


def _unpacked(data: bytes, bits: int, count: int) -> UInt8[np.ndarray, " n"]:
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits)
    numbers = np.zeros((count, 8), np.uint8)
    numbers[:, 8 - bits :] = flat.reshape(count, bits)
    return np.packbits(numbers, axis=1)[:, 0]
