"""Leaves under stable names: what is stored of a tree, whatever its containers."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32

SHOWN = 8  # names listed of each kind in an error


class Record(NamedTuple):
    dtype: str  # "float32", "bfloat16", "key<fry>", ...
    shape: tuple[int, ...]
    bits: int  # fingerprint of the values, see `fingerprint`


def named(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` in flattening order, under names like "params/block/0/w".

    A list index, a dict key and a field of a NamedTuple all give their plain text, so
    that a change of container leaves the names as they were. Raises ValueError where
    two leaves would share a name or one name would lie inside another.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name:
            raise ValueError(
                "a state must be a container, got a single bare leaf: put it in a dict"
            )
        if name in leaves:
            raise ValueError(f"two leaves are named {name!r}: rename one of the keys")
        leaves[name] = leaf
    if not leaves:
        raise ValueError("a state must hold at least one array, got an empty tree")
    for name in leaves:
        parts = name.split("/")
        for end in range(1, len(parts)):
            if (parent := "/".join(parts[:end])) in leaves:
                raise ValueError(
                    f"leaf {name!r} lies inside leaf {parent!r}: a key may not hold '/'"
                )
    return leaves


def text(leaf: Any) -> str:
    """dtype[shape] of an array, a ShapeDtypeStruct or a Record."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def differences(stored: dict[str, Record], target: dict[str, Any]) -> str:
    """One clause for each kind of disagreement; empty where names and types agree."""
    missing = [name for name in target if name not in stored]
    extra = [name for name in stored if name not in target]
    other = [
        f"{name} (stored {text(stored[name])}, target {text(leaf)})"
        for name, leaf in target.items()
        if name in stored and text(stored[name]) != text(leaf)
    ]
    kinds = [
        (missing, "missing in the checkpoint"),
        (extra, "in the checkpoint but not in the target"),
        (other, "with another dtype or shape"),
    ]
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}"
        + (", ..." if len(names) > SHOWN else "")
        for names, what in kinds
        if names
    )


def _mix(x: Array) -> Array:
    """A bijection of 32-bit words that spreads every bit (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def fingerprint(x: Array) -> UInt32[Array, ""]:
    """sum_i mix(mix(i) ^ bits(x_i)) mod 2^32 over the logical index i.

    It is the same under every sharding, since it is an integer sum. A change in one
    32-bit word always changes it, since mix is a bijection; several changes cancel
    with a chance of about 2^-32. It guards against accidents, not against forgers.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = jax.device_put(x, jax.memory.Space.Device)  # it may be offloaded to the host
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(jax.dtypes.itemsize_bits(x.dtype), 32)  # 64 bits split into two words
    words = lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    index = functools.reduce(
        jnp.add,
        (
            lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            * jnp.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
            for axis in range(words.ndim)
        ),
        jnp.zeros(words.shape, jnp.uint32),
    )
    return jnp.sum(_mix(_mix(index) ^ words), dtype=jnp.uint32)


def records(leaves: dict[str, Any]) -> dict[str, Record]:
    """Name, type and fingerprint of each leaf; waits until the arrays are computed."""
    # One at a time: each holds an all-reduce, and many in flight at once can starve
    # each other of threads where devices are simulated on few cores.
    return {
        name: Record(
            str(leaf.dtype), tuple(leaf.shape), int(jax.device_get(fingerprint(leaf)))
        )
        for name, leaf in leaves.items()
    }
