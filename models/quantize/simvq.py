"""SimVQ: frozen random codes times one learned matrix, so that all codes move together.

C_j = B_j W,  loss = |sg(x) - z|^2 + beta |x - sg(z)|^2  (arXiv:2411.02038, Eq. 6)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from . import losses
from .protocol import Quantized, Quantizer, State, positions
from .vq import nearest_code


class Basis(NamedTuple):
    basis: Float[Array, "e e"]  # W


class Frozen(NamedTuple):
    codes: Float[Array, "k e"]  # B


def simvq(
    width: int, codes: int, *, beta: float = 0.25, estimator: str = "straight"
) -> Quantizer:
    """`codes` codes B W: B ~ N(0, 1 / width) stays, W follows the gradient from 1.

    >>> simvq(16, 1024).capacity
    10.0
    """

    def init(key: jax.Array) -> State:
        frozen = jax.random.normal(key, (codes, width), jnp.float32) * width**-0.5
        return State(Basis(jnp.eye(width, dtype=jnp.float32)), Frozen(frozen))

    def table(state: State):
        return jnp.dot(
            state.memory.codes,
            state.params.basis,
            precision=jax.lax.Precision.HIGHEST,
        )

    def encode(state: State, x):
        return quantize(state, x).indices

    def decode(state: State, indices):
        return table(state)[indices[..., 0]]

    def quantize(state: State, x, mask=None) -> Quantized:
        wide, keep = positions(x, mask, width)
        learned = table(state)
        found = nearest_code(wide, learned, estimator=estimator)
        pull = losses.codebook(wide, learned[found.index])
        loss = {
            "codebook": losses.mean(pull, keep),
            "commitment": losses.mean(found.commitment, keep),
        }
        return Quantized(found.z.astype(x.dtype), found.index[..., None], loss)

    weights = {"codebook": 1.0, "commitment": beta}
    return Quantizer(width, width, (codes,), init, encode, decode, quantize, weights)
