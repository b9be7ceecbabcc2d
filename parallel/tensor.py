"""Tensor parallelism written out: what the partitioner does with the rules, by hand.

Narayanan et al. 2021 (arXiv:2104.04473, Section 2.3), inside `jax.shard_map` with its
default check, where both conjugate operators of the paper are free: what is replicated
becomes varying on entry, the transpose of which is a sum over the axis (f), and a psum
on exit has a transpose that sends nothing (g). A block of two matrix products, the
first cut by columns, the second by rows, so sends 2 all-reduces of its stream [b t d]
forward and backward together; a transformer layer has two such blocks.

These are forms to count bytes with and to test the automatic ones against; models get
theirs from `rules.TRANSFORMER`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def enter(x: Float[Array, "*s"], axis_name: str) -> Float[Array, "*s"]:
    """f: the identity forward, a sum over the axis backward."""
    return lax.pcast(x, (axis_name,), to="varying")


def leave(x: Float[Array, "*s"], axis_name: str) -> Float[Array, "*s"]:
    """g: a sum over the axis forward, the identity backward."""
    return lax.psum(x, axis_name)


def split_block(
    x: Float[Array, "b t d"], inner: Callable, axis_name: str
) -> Float[Array, "b t d"]:
    """x + sum over devices of inner(x), `inner` being this device's heads or units."""
    return x + leave(inner(enter(x, axis_name)), axis_name)


def vocabulary_lookup(
    tokens: Int[Array, "*b"], table: Float[Array, "own d"], axis_name: str
) -> Float[Array, "*b d"]:
    """Rows of a table that lies over the axis by rows; each device adds its own."""
    own = tokens - lax.axis_index(axis_name) * len(table)
    here = (own >= 0) & (own < len(table))
    rows = jnp.where(here[..., None], table[jnp.where(here, own, 0)], 0)
    return leave(rows, axis_name)


def vocabulary_nats(
    logits: Float[Array, "*b own"], targets: Int[Array, "*b"], axis_name: str
) -> Float[Array, "*b"]:
    """-log softmax(logits)[target] where the vocabulary lies over the axis, in nats.

        loss = log sum exp(logits - mx) + mx - y

    Three numbers a position travel (maximum mx, sum, logit y of the target), float32,
    and none backward: the gradient of the own logits is softmax - onehot.
    """
    logits = logits.astype(jnp.float32)
    most = lax.pmax(lax.stop_gradient(logits.max(-1)), axis_name)
    total = leave(jnp.exp(logits - most[..., None]).sum(-1), axis_name)
    first = lax.axis_index(axis_name) * logits.shape[-1]
    chosen = jnp.arange(logits.shape[-1]) + first == targets[..., None]
    picked = leave(jnp.where(chosen, logits, 0).sum(-1), axis_name)
    return jnp.log(total) + most - picked
