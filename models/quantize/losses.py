"""Losses of quantisers, each alone, unweighted, in float32.

Those of positions return one number each; `mean` averages them where a mask keeps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .search import unit


def mean(values: Float[Array, "*b"], keep: Float[Array, "*b"]) -> Float[Array, ""]:
    """Over the positions kept (1, others 0); 0 where none is."""
    return jnp.sum(values * keep) / jnp.maximum(jnp.sum(keep), 1.0)


def commitment(x: Float[Array, "*b e"], z: Float[Array, "*b e"]) -> Float[Array, "*b"]:
    """|x - sg(z)|^2: pulls the input to its code (arXiv:1711.00937, Eq. 3, third)."""
    off = x.astype(jnp.float32) - jax.lax.stop_gradient(z).astype(jnp.float32)
    return jnp.sum(off**2, -1)


def codebook(x: Float[Array, "*b e"], z: Float[Array, "*b e"]) -> Float[Array, "*b"]:
    """|sg(x) - z|^2: pulls the code to its input (arXiv:1711.00937, Eq. 3, second)."""
    return commitment(z, x)


def entropy(p: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """-sum_k p_k log p_k in nats, at most log k; small for a confident choice."""
    p = p.astype(jnp.float32)
    return -jnp.sum(jax.scipy.special.xlogy(p, p), -1)


def crowding(
    p: Float[Array, "*b k"], average: Float[Array, " k"]
) -> Float[Array, "*b"]:
    """sum_k p_k log sg(average_k) in nats: spreads use over codes; at least -log k.

    With the batch's own mean as the average, its mean over the batch is -H(mean p),
    with that gradient (arXiv:2310.05737, Eq. 5, second). With a running average it is
    a plain sum over positions, so that any cut of the batch gives the same loss.
    """
    average = jax.lax.stop_gradient(average).astype(jnp.float32)
    return jnp.sum(jax.scipy.special.xlogy(p, jnp.maximum(average, 1e-12)), -1)


def divergence(logits: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """KL(softmax(logits) || uniform) = log k - H, in nats."""
    p = jax.nn.softmax(logits.astype(jnp.float32))
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.log(logits.shape[-1]) + jnp.sum(p * log_p, -1)


def orthogonality(codes: Float[Array, "k e"]) -> Float[Array, ""]:
    """|U U^T|^2 / k^2 - 1 / k of unit codes U (arXiv:2112.00384, Eq. 2); 0 at best.

    Taken as |U^T U|^2, which is the same number from e x e instead of k x k.
    """
    k, u = len(codes), unit(codes)
    gram = jnp.einsum("ke,kf->ef", u, u, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(gram**2) / k**2 - 1 / k
