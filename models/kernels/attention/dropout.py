"""Which weights dropout keeps: a function of the place alone, whatever the tiling.

Counter-based: the bits of a weight are Threefry-2x32 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3", 20 rounds) of its row and key under a key of its
batch row and head. Plain 32-bit operations: every kernel can compute it in place.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    counter: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Threefry-2x32 of a two-word counter under a two-word key, elementwise."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for turn in ROTATIONS[block % 2]:
            x = x + y
            y = (y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))
            y = y ^ x
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return x, y


def head_key(
    key: UInt32[Array, "2"], row: Int[Array, "..."], head: Int[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The key of one head of one batch row."""
    return threefry(
        (key[0], key[1]),
        (jnp.asarray(row).astype(jnp.uint32), jnp.asarray(head).astype(jnp.uint32)),
    )


def keep(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    rows: Int[Array, "..."],
    keys: Int[Array, "..."],
    rate: float,
) -> Bool[Array, "..."]:
    """True with probability 1 - rate, to 2^-32; rows and keys broadcast."""
    rows, keys = jnp.broadcast_arrays(rows, keys)
    bits, _ = threefry(key, (rows.astype(jnp.uint32), keys.astype(jnp.uint32)))
    return bits >= jnp.uint32(round(rate * 2**32))
