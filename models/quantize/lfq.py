"""Lookup-free quantisation: each number passes as its sign, codes are {-1, 1}^d.

Entropy losses make choices confident and codes used (arXiv:2310.05737, Eq. 4 and 5):

    loss = E[H(p(code | x))] - gamma H(E[p(code | x)]),  p(code | x) ~ exp(2 x code / T)

The probability of a code is a product over its d signs. So it is kept as two halves,
a[i] b[j] for code i 2^(d/2) + j, and sums over codes and positions are products of
matrices: no array of positions x codes exists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import losses
from .protocol import Quantized, Quantizer, State, positions


class Use(NamedTuple):
    """Of codes, as a matrix [2^(d - d // 2), 2^(d // 2)] in their order."""

    average: Float[Array, "i j"]  # running mean probability


class UseSums(NamedTuple):
    count: Float[Array, ""]
    probability: Float[Array, "i j"]  # summed over positions


def halves(
    x: Float[Array, "*b d"], temperature: float
) -> tuple[Float[Array, "*b i"], Float[Array, "*b j"]]:
    """p(code | x) = a[i] b[j]; the first number is the highest bit of the code."""
    one = jax.nn.sigmoid(4 * x.astype(jnp.float32) / temperature)
    cut = x.shape[-1] - x.shape[-1] // 2
    return _joint(one[..., :cut]), _joint(one[..., cut:])


def sample_entropy(x: Float[Array, "*b d"], temperature: float) -> Float[Array, "*b"]:
    """H(p(code | x)) in nats: the sum of the entropies of the d signs."""
    logits = 4 * x.astype(jnp.float32) / temperature
    return jnp.sum(jax.nn.softplus(logits) - logits * jax.nn.sigmoid(logits), -1)


def batch_entropy(
    x: Float[Array, "*b d"], temperature: float, keep: Float[Array, "*b"] | None = None
) -> Float[Array, ""]:
    """H(mean over positions of p(code | x)) in nats, of this batch exactly."""
    a, b = halves(x, temperature)
    keep = jnp.ones(x.shape[:-1]) if keep is None else keep
    p = _summed(a, b, keep) / jnp.maximum(keep.sum(), 1.0)
    return losses.entropy(p.reshape(-1))


def lfq(
    width: int,
    *,
    temperature: float = 0.01,
    gamma: float = 1.0,
    decay: float = 0.9,
    entropy_weight: float = 0.1,
    commitment_weight: float = 0.25,
) -> Quantizer:
    """One index of 2^width codes; x has `width` numbers.

    Losses: "entropy" of each choice, "crowding" (sum_k p_k log of the running mean of
    p_k, whose decay a step is `decay`) and "commitment". With decay 0 and one batch,
    crowding's value and gradient are those of -H of the batch's mean: see
    `losses.crowding`. The running mean makes it a sum over positions.

    >>> lfq(10).sizes
    (1024,)
    """
    if not 1 <= width <= 30:
        raise ValueError(f"width: {width}, but signs of 1 to 30 numbers make an index")
    bit = np.array([1 << (width - 1 - i) for i in range(width)], np.int32)
    shape = (2 ** (width - width // 2), 2 ** (width // 2))

    def init(key: jax.Array) -> State:
        return State(memory=Use(jnp.full(shape, 2.0**-width, jnp.float32)))

    def encode(state: State, x):
        x, _ = positions(x, None, width)
        return jnp.sum(jnp.where(x > 0, bit, 0), -1, keepdims=True)

    def decode(state: State, indices):
        return jnp.where(indices & bit, 1.0, -1.0)

    def quantize(state: State, x, mask=None) -> Quantized:
        wide, keep = positions(x, mask, width)
        z = jnp.where(wide > 0, 1.0, -1.0)
        a, b = halves(wide, temperature)
        likely = jnp.log(jnp.maximum(state.memory.average, 1e-12))
        crowding = jnp.einsum("...i,ij,...j->...", a, jax.lax.stop_gradient(likely), b)
        loss = {
            "entropy": losses.mean(sample_entropy(wide, temperature), keep),
            "crowding": losses.mean(crowding, keep),
            "commitment": losses.mean(losses.commitment(wide, z), keep),
        }
        stats = jax.lax.stop_gradient(UseSums(keep.sum(), _summed(a, b, keep)))
        z = z + (wide - jax.lax.stop_gradient(wide))
        return Quantized(z.astype(x.dtype), encode(state, wide), loss, stats)

    def update(state: State, stats: UseSums):
        seen = stats.probability / jnp.maximum(stats.count, 1.0)
        average = decay * state.memory.average + (1 - decay) * seen
        average = jnp.where(stats.count > 0, average, state.memory.average)
        return state._replace(memory=Use(average)), {}

    weights = {
        "entropy": entropy_weight,
        "crowding": gamma * entropy_weight,
        "commitment": commitment_weight,
    }
    return Quantizer(
        width, width, (2**width,), init, encode, decode, quantize, weights, update
    )


def _joint(one: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
    """Probabilities of all 2^d rows of signs, from that of each being +1."""
    p = jnp.ones((*one.shape[:-1], 1))
    for i in range(one.shape[-1]):
        bit = one[..., i, None, None]
        pair = jnp.concatenate([1 - bit, bit], -1)
        p = (p[..., None] * pair).reshape(*p.shape[:-1], -1)
    return p


def _summed(a, b, keep) -> Float[Array, "i j"]:
    a, b = (a * keep[..., None]).reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return jnp.einsum("ni,nj->ij", a, b, precision=jax.lax.Precision.HIGHEST)
