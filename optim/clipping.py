"""Clipping by the norm of a mean gradient that nobody has.

Once gradients are compressed only local ones are known. What separated their norm from
that of their mean while both were known is remembered, and divided out.
"""

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree


def learn_spread(
    spread: Float[Array, ""],
    local: PyTree,
    norm: Float[Array, ""],
    *,
    share: Float[Array, ""],
    axis_name: str,
) -> Float[Array, ""]:
    """A running mean, of weight `share`, of the norm of local gradients over `norm`."""
    mean = lax.pmean(optax.tree.norm(local, squared=True), axis_name)
    ratio = jnp.where(norm > 0, jnp.sqrt(mean) / jnp.where(norm > 0, norm, 1), 1)
    return spread + share * (ratio - spread)


def clip_local(
    local: PyTree, spread: Float[Array, ""], clip: float, *, axis_name: str
) -> PyTree:
    """Local gradients, scaled as clipping their mean to `clip` would scale it."""
    mean = lax.pmean(optax.tree.norm(local, squared=True), axis_name)
    norm = jnp.sqrt(mean) / spread
    return optax.tree.scale(clip / jnp.maximum(norm, clip), local)
