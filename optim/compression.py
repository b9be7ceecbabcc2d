"""What a compressor is: two functions and a promise, and the identity as the first one.

`encode(key, x)` gives the payload, a tree of packed arrays whose bytes are exactly what
travels; `decode(payload, shape)` gives float32 back. x is a tensor whose last axis is a
row; all is computed in float32, so bfloat16 values give the same payload whichever way
they are passed. A row of zeros decodes to zeros, and a value that is not finite to one
that is not. Of float64, in which theory is tried, `identity` and the sparse compressors
keep all digits; others round to float32, which their promises bear to 1e-6.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

Shape = tuple[int, ...]


class Promise(NamedTuple):
    """Constants for a shape, each None where nothing is promised; norms are 2-norms.

    delta: E|C(x) - x|^2 <= (1 - delta) |x|^2, contractive.
    omega: E C(x) = x and E|C(x) - x|^2 <= omega |x|^2, unbiased.
    """

    delta: float | None = None
    omega: float | None = None


class Compressor(NamedTuple):
    encode: Callable[[PRNGKeyArray, Array], Any]  # (key, x [*s]) -> payload
    decode: Callable[[Any, Shape], Array]  # (payload, shape) -> float32 [*s]
    promise: Callable[[Shape], Promise]
    random: bool = False  # uses its key
    linear: bool = False  # with one key, means of payloads decode to means


def compress(
    c: Compressor, key: PRNGKeyArray, x: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """What the receiver sees, in the dtype of x."""
    return c.decode(c.encode(key, x), x.shape).astype(x.dtype)


def payload_of(c: Compressor, shape: Shape, dtype: Any = jnp.float32) -> Any:
    """Shapes and dtypes of a payload, without computing one."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(c.encode, jax.eval_shape(lambda: jax.random.key(0)), x)


def bits(c: Compressor, shape: Shape) -> int:
    """Bits on the wire for one tensor of `shape`: eight times the payload's bytes."""
    leaves = jax.tree.leaves(payload_of(c, shape))
    return 8 * sum(x.size * x.dtype.itemsize for x in leaves)


def identity() -> Compressor:
    """All of it, in float32."""

    def encode(key, x):
        del key
        return wide(x)

    return Compressor(
        encode, lambda x, shape: x, lambda shape: Promise(1.0, 0.0), linear=True
    )


def chunked(c: Compressor) -> Compressor:
    """`c` on every x[i] by itself, with a payload and a key for each."""

    def encode(key, x):
        keys = jax.random.split(key, x.shape[0])
        return jax.vmap(c.encode)(keys, x)

    def decode(payload, shape):
        return jax.vmap(lambda p: c.decode(p, shape[1:]))(payload)

    return c._replace(
        encode=encode, decode=decode, promise=lambda shape: c.promise(shape[1:])
    )


def scaled(c: Compressor) -> Compressor:
    """An unbiased compressor made contractive, C / (1 + omega): delta 1 / (1 + omega).

    Horvath and Richtarik, arXiv:2006.11077, Sec. 2.1.
    """

    def factor(shape):
        omega = c.promise(shape).omega
        if omega is None:
            raise ValueError(
                f"c: promises no omega for shape {shape}, so its mean is x"
            )
        return 1 / (1 + omega)

    def decode(payload, shape):
        return factor(shape) * c.decode(payload, shape)

    return c._replace(decode=decode, promise=lambda s: Promise(delta=factor(s)))


def unit(x: Float[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, ""]]:
    """x in float32 over a power of two, so that no square of it can overflow, and it.

    Division by a power of two is exact: C(2^k x) = 2^k C(x) bit for bit.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), initial=0.0)
    exponent = jnp.clip(jnp.frexp(largest)[1] - 1, -126, 126)
    exponent = jnp.where((largest > 0) & jnp.isfinite(largest), exponent, 0)
    return x * _power(-exponent), _power(exponent)


def _power(exponent: Int[Array, ""]) -> Float[Array, ""]:
    """2**exponent, written into the bits: exact on every device."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def wide_type(dtype: Any) -> Any:
    """Float32, or float64 for float64: what signals are sent and remembered in."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: Array) -> Array:
    return x.astype(wide_type(x.dtype))


def size(shape: Shape) -> int:
    return math.prod(shape)
