"""Sparse compressors: the largest entries, or random ones, with their places.

top_k: Stich et al. 2018, arXiv:1809.07599, Def. 2.1 and Eq. 6; random_k: Lemma A.1.
The error of top_k is exactly the sum of the d - k smallest squares.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from .compression import Compressor, Promise, Shape, size, wide


class Sparse(NamedTuple):
    places: Int[Array, "*b k"]  # uint8, uint16 or uint32, as the length asks
    values: Float[Array, "*b k"]  # float32, or float64 as they came


class Drawn(NamedTuple):
    values: Float[Array, "k"]  # float32, or float64 as they came
    seed: UInt32[Array, "2"]  # from which the receiver draws the same places


def top_k(
    ratio: float = 0.01, *, by: Literal["sort", "threshold"] = "sort"
) -> Compressor:
    """The max(1, round(ratio d)) largest magnitudes; of equal ones the first.

    delta = k / d. "threshold" finds the k-th magnitude by bisection on its bits, 31
    counts over x, and keeps what lies above: the same entries without a sort.
    """
    kept = _kept(ratio)
    find = {"sort": _sorted, "threshold": _bisected}
    if by not in find:
        raise ValueError(f"by: {by!r}, but allowed are {', '.join(find)}")

    def encode(key, x):
        del key
        flat = wide(x).reshape(-1)
        places = find[by](flat, kept(flat.size))
        return Sparse(places.astype(_unsigned(flat.size)), flat[places])

    def decode(payload, shape):
        flat = jnp.zeros(size(shape), payload.values.dtype)
        return flat.at[payload.places].set(payload.values).reshape(shape)

    return Compressor(
        encode, decode, lambda shape: Promise(delta=kept(size(shape)) / size(shape))
    )


def blocked_top_k(ratio: float = 1 / 16, *, block: int = 256) -> Compressor:
    """The largest magnitudes of every `block` entries: a short sort, places of a byte.

    delta = k / block, k = max(1, round(ratio block)): the promise of each block.
    """
    kept = _kept(ratio)(block)

    def encode(key, x):
        del key
        flat = wide(x).reshape(-1)
        blocks = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
        places = lax.top_k(jnp.abs(blocks), kept)[1]
        values = jnp.take_along_axis(blocks, places, -1)
        return Sparse(places.astype(_unsigned(block)), values)

    def decode(payload, shape):
        rows = jnp.arange(payload.places.shape[0])[:, None]
        blocks = jnp.zeros((rows.size, block), payload.values.dtype)
        blocks = blocks.at[rows, payload.places].set(payload.values)
        return blocks.reshape(-1)[: size(shape)].reshape(shape)

    return Compressor(encode, decode, lambda shape: Promise(delta=kept / block))


def random_k(ratio: float = 0.01, *, unbiased: bool = True) -> Compressor:
    """k entries drawn without replacement; the places travel as their seed.

    unbiased: times d / k, omega = d / k - 1. Else as they are, delta = k / d. With one
    key for all workers the places agree, and payloads may be averaged.
    """
    kept = _kept(ratio)

    def places(key: PRNGKeyArray, d: int) -> Int[Array, "k"]:
        # The largest of random words: one selection, where a permutation sorts twice.
        return lax.top_k(jax.random.bits(key, (d,)), kept(d))[1]

    def encode(key, x):
        flat = wide(x).reshape(-1)
        factor = flat.size / kept(flat.size) if unbiased else 1.0
        values = flat[places(key, flat.size)] * flat.dtype.type(factor)
        return Drawn(values, jax.random.key_data(key))

    def decode(payload, shape):
        d = size(shape)
        key = jax.random.wrap_key_data(payload.seed)
        flat = jnp.zeros(d, payload.values.dtype)
        return flat.at[places(key, d)].set(payload.values).reshape(shape)

    def promise(shape: Shape) -> Promise:
        part = kept(size(shape)) / size(shape)
        return Promise(omega=1 / part - 1) if unbiased else Promise(delta=part)

    return Compressor(encode, decode, promise, random=True, linear=True)


def _kept(ratio: float):
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: {ratio}, but it must lie in (0, 1]")
    return lambda d: max(1, round(ratio * d))


def _unsigned(d: int):
    return jnp.uint8 if d <= 2**8 else jnp.uint16 if d <= 2**16 else jnp.uint32


def _sorted(x: Float[Array, "d"], k: int) -> Int[Array, "k"]:
    return lax.top_k(jnp.abs(x), k)[1]


def _bisected(x: Float[Array, "d"], k: int) -> Int[Array, "k"]:
    """Bits of magnitudes are ordered like magnitudes: build the k-th from the top."""
    magnitude = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)

    def add_bit(i, low):
        high = low | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(magnitude >= high) >= k, high, low)

    kth = lax.fori_loop(0, 31, add_bit, jnp.uint32(0))
    above, equal = magnitude > kth, magnitude == kth
    spare = k - jnp.sum(above)
    chosen = above | (equal & (jnp.cumsum(equal) <= spare))
    slot = jnp.where(chosen, jnp.cumsum(chosen) - 1, k)
    return jnp.zeros(k, jnp.int32).at[slot].set(jnp.arange(x.size), mode="drop")
