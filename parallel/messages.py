"""Payloads as messages: one row of bytes for a whole tree, swapped or shared.

A tree of packed arrays of any dtypes becomes one uint8 array, so that one collective
moves it and nothing on the way widens it (XLA:CPU sends bfloat16 as float32 and int4 as
int8). The same code runs under `jax.shard_map` and under `jax.vmap(axis_name=...)`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8


def to_bytes(payload: Any) -> UInt8[Array, "m"]:
    """The bytes of every leaf, one after the other."""
    parts = []
    for leaf in jax.tree.leaves(payload):
        parts.append(lax.bitcast_convert_type(leaf, jnp.uint8).reshape(-1))
    return jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.uint8)


def from_bytes(message: UInt8[Array, "m"], like: Any) -> Any:
    """The payload again; `like` is a tree of its shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(like)
    if message.size != message_size(like):
        raise ValueError(
            f"message: has {message.size} bytes, but the payload has "
            f"{message_size(like)}"
        )
    found, at = [], 0
    for leaf in leaves:
        width = leaf.dtype.itemsize
        count = math.prod(leaf.shape)
        part = message[at : at + count * width]
        shape = leaf.shape if width == 1 else (*leaf.shape, width)
        found.append(lax.bitcast_convert_type(part.reshape(shape), leaf.dtype))
        at += count * width
    return jax.tree.unflatten(treedef, found)


def message_size(like: Any) -> int:
    """Bytes of a payload, given as arrays or shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(like))


def swap(payloads: Any, axis_name: str) -> Any:
    """payloads[j] goes to worker j: [destination, ...] -> [source, ...].

    One all-to-all of uint8; each worker sends (n - 1) / n of the message's bytes.
    """
    messages = jax.vmap(to_bytes)(payloads)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), payloads)
    messages = lax.all_to_all(messages, axis_name, 0, 0, tiled=True)
    return jax.vmap(lambda m: from_bytes(m, like))(messages)


def share(payload: Any, axis_name: str) -> Any:
    """Every worker gets every payload: [...] -> [source, ...].

    One all-gather of uint8; around a ring each worker sends n - 1 messages.
    """
    messages = lax.all_gather(to_bytes(payload), axis_name)
    return jax.vmap(lambda m: from_bytes(m, payload))(messages)
