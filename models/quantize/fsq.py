"""Finite scalar quantisation: each of a few numbers is rounded to its own levels.

    bounded = tanh(x + shift) (L - 1) (1 + eps) / 2 - offset
    z = round(bounded) / (L // 2)

with offset 1/2 for an even L and 0 else, and tanh(shift) (L - 1) (1 + eps) / 2 = offset
(arXiv:2309.15505, Sec. 3.1 and Appendix A.1). The codebook is the grid of levels:
nothing is searched, nothing is learned, and no code can die.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from .protocol import Quantized, Quantizer, State, positions

EPS = 1e-3
# Of about 2^n codes (Table 1, and halves of it below): n -> levels.
LEVELS = {
    4: (5, 3),
    6: (8, 8),
    8: (8, 6, 5),
    9: (8, 8, 8),
    10: (8, 5, 5, 5),
    11: (8, 8, 6, 5),
    12: (7, 5, 5, 5, 5),
    14: (8, 8, 8, 6, 5),
    16: (8, 8, 8, 5, 5, 5),
}


def levels_for(codes: int) -> tuple[int, ...]:
    """The paper's levels for about `codes` codes.

    >>> levels_for(1024)
    (8, 5, 5, 5)
    """
    bits = min(LEVELS, key=lambda n: abs(n - math.log2(codes)))
    if abs(bits - math.log2(codes)) > 0.5:
        raise ValueError(
            f"codes: {codes}, but levels are known for about 2^n codes with n in "
            f"{sorted(LEVELS)}; give the levels themselves"
        )
    return LEVELS[bits]


def fsq(
    levels: Sequence[int],
    *,
    symmetric: bool = False,
    bound: Literal["tanh", "clip"] = "tanh",
) -> Quantizer:
    """One index of prod(levels) codes; x has a number for each level.

    symmetric: codes 2 j / (L - 1) - 1, the same left and right of 0 for every L
        (arXiv:2411.19842, Sec. 3.2); needed for a level of 2.
    bound: "clip" is the identity within [-1, 1], for inputs that are bounded already.
    Everything is float32 whatever x is: in bfloat16 half of the codes are out of reach.

    >>> fsq((8, 5, 5, 5)).sizes
    (1000,)
    """
    levels = tuple(levels)
    if not levels or min(levels) < 2 or (min(levels) == 2 and not symmetric):
        raise ValueError(
            f"levels: {levels}, but each must be at least 3, or 2 with symmetric=True"
        )
    if bound not in ("tanh", "clip"):
        raise ValueError(f"bound: {bound!r}, but allowed are 'tanh' and 'clip'")
    size = math.prod(levels)
    if size >= 2**31:
        raise ValueError(
            f"levels: {levels} make {size} codes, but an index has 31 bits; "
            "compose several by `product`"
        )
    width = len(levels)
    count = np.array(levels, np.int32)
    radix = np.cumprod([1, *levels[:-1]]).astype(np.int32)
    low = 0 if symmetric else -(count // 2)  # of the integers that stand for levels
    reach = (count - 1) * (1 + EPS) / 2
    offset = np.where(count % 2, 0.0, 0.5)
    shift = np.arctanh(offset / reach) if bound == "tanh" else offset / reach

    def squash(x):
        return jnp.tanh(x) if bound == "tanh" else jnp.clip(x, -1.0, 1.0)

    def scale(level):
        """An integer level, or a number between two, as part of a code."""
        if symmetric:
            return 2 * level / (count - 1).astype(np.float32) - 1
        return level / (count // 2).astype(np.float32)

    def place(x):
        """Bounded numbers, and the integers that they round to."""
        if symmetric:
            bounded = (count - 1).astype(np.float32) * (squash(x) + 1) / 2
            return bounded, jnp.clip(jnp.floor(bounded + 0.5), 0, count - 1)
        bounded = squash(x + shift.astype(np.float32)) * reach.astype(np.float32)
        bounded = bounded - offset.astype(np.float32)
        return bounded, jnp.clip(jnp.round(bounded), low, low + count - 1)

    def encode(state: State, x):
        _, whole = place(positions(x, None, width)[0])
        return jnp.sum((whole.astype(jnp.int32) - low) * radix, -1, keepdims=True)

    def decode(state: State, indices):
        return scale((indices // radix % count + low).astype(jnp.float32))

    def quantize(state: State, x, mask=None) -> Quantized:
        wide, _ = positions(x, mask, width)
        bounded, whole = place(wide)
        between = scale(bounded)
        z = scale(whole) + (between - jax.lax.stop_gradient(between))
        return Quantized(z.astype(x.dtype), encode(state, wide), {})

    return Quantizer(
        width, width, (size,), lambda key: State(), encode, decode, quantize, {}
    )
