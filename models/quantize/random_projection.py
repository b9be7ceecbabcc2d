"""BEST-RQ: labels by a random projection and random codes, none of which ever learns.

index = argmin_j | unit(C_j) - unit(P norm(x)) |   (arXiv:2202.01855, Eq. 1)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import losses
from .protocol import Quantized, Quantizer, State, positions
from .search import unit
from .vq import nearest_code


class Labels(NamedTuple):
    """As drawn, for ever."""

    projection: Float[Array, "d e"]
    codes: Float[Array, "k e"]  # unit length


def random_projection(width: int, codes: int, *, code_width: int = 16) -> Quantizer:
    """`codes` unit codes of `code_width` numbers, in the space of a frozen projection.

    A position is first brought to mean 0 and variance 1 over its numbers. P is drawn as
    Xavier does, codes are normal (Sec. 3.1). z lies in the space of the codes.

    >>> random_projection(80, 8192).capacity
    13.0
    """

    def init(key: jax.Array) -> State:
        one, two = jax.random.split(key)
        xavier = jax.nn.initializers.glorot_normal()
        drawn = jax.random.normal(two, (codes, code_width), jnp.float32)
        projection = xavier(one, (width, code_width), jnp.float32)
        return State(memory=Labels(projection, unit(drawn)))

    def encode(state: State, x):
        return quantize(state, x).indices

    def decode(state: State, indices):
        return state.memory.codes[indices[..., 0]]

    def quantize(state: State, x, mask=None) -> Quantized:
        wide, keep = positions(x, mask, width)
        centred = wide - wide.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        projected = jnp.dot(
            normal, state.memory.projection, precision=jax.lax.Precision.HIGHEST
        )
        found = nearest_code(projected, state.memory.codes, metric="cosine")
        loss = {"commitment": losses.mean(found.commitment, keep)}
        return Quantized(found.z.astype(x.dtype), found.index[..., None], loss)

    weights = {"commitment": 0.0}  # nothing needs to be pulled anywhere
    return Quantizer(
        width, code_width, (codes,), init, encode, decode, quantize, weights
    )
