"""Which device of a sequence axis owns which positions.

N devices own t = length / N slots each, in one of two orders:

    contiguous  device r owns the positions r t, ..., r t + t - 1
    zigzag      device r owns the half chunks r and 2 N - 1 - r, each of t / 2 positions

Under a causal mask device r of the contiguous order has (2 r + 1) / N of the mean
work; in zigzag order all have the same, hop by hop. Slots of a device ascend in
position in both orders.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Shaped

Order = Literal["contiguous", "zigzag"]
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")


def check_order(order: str, length: int, parts: int) -> None:
    """Raise ValueError unless `length` positions can lie over `parts` in this order."""
    if order not in ORDERS:
        raise ValueError(f"order: {order!r}, but allowed are {', '.join(ORDERS)}")
    unit = parts if order == "contiguous" or parts == 1 else 2 * parts
    if length % unit:
        low, high = length // unit * unit, -(-length // unit) * unit
        near = f"{low} or {high}" if low else f"{high}"
        raise ValueError(
            f"length: {length} positions do not divide over seq={parts} in {order} "
            f"order, which takes multiples of {unit}; nearest: {near}"
        )


def positions(order: Order, length: int, parts: int) -> np.ndarray:
    """The position in every slot of the whole sequence, device after device.

    >>> positions("zigzag", 8, 2)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    check_order(order, length, parts)
    index = np.arange(length)
    if order == "contiguous" or parts == 1:
        return index
    halves = index.reshape(2 * parts, -1)
    return np.stack([halves[:parts], halves[: parts - 1 : -1]], 1).reshape(-1)


def arrange(
    x: Shaped[Array, "b t *s"], order: Order, parts: int
) -> Shaped[Array, "b t *s"]:
    """From ascending positions to slots. Cheap where x is whole on every device."""
    if order == "contiguous" or parts == 1:
        return x
    return jnp.take(x, positions(order, x.shape[1], parts), axis=1)


def ascend(
    x: Shaped[Array, "b t *s"], order: Order, parts: int
) -> Shaped[Array, "b t *s"]:
    """The inverse of `arrange`."""
    if order == "contiguous" or parts == 1:
        return x
    return jnp.take(x, np.argsort(positions(order, x.shape[1], parts)), axis=1)


def own_positions(
    order: Order, slots: int, axis_name: str, device: Int[Array, ""] | None = None
) -> Int[Array, " t"]:
    """Positions of this device's slots (or of another's), inside `jax.shard_map`."""
    parts = lax.axis_size(axis_name)
    check_order(order, slots * parts, parts)
    device = lax.axis_index(axis_name) if device is None else device
    if order == "contiguous" or parts == 1:
        return device * slots + jnp.arange(slots, dtype=jnp.int32)
    half = jnp.arange(slots // 2, dtype=jnp.int32)
    first, last = device, 2 * parts - 1 - device
    return jnp.concatenate([first * len(half) + half, last * len(half) + half])


def causal_work(order: Order, length: int, parts: int) -> np.ndarray:
    """[device, hop]: how many scores the causal mask leaves each device at each hop.

    At hop i device r holds the keys of device (r - i) mod N.
    """
    own = positions(order, length, parts).reshape(parts, -1)
    table = np.empty((parts, parts), int)
    for device in range(parts):
        for hop in range(parts):
            keys = own[(device - hop) % parts]
            table[device, hop] = (keys[None] <= own[device][:, None]).sum()
    return table
