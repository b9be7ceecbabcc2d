"""What attention is: the definition every other form must match."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Visible(NamedTuple):
    """Which keys a query sees: all conditions that are given hold at once."""

    lengths: Int[Array, " b"]  # keys at or beyond it are hidden
    offset: Int[Array, " b"] | None  # causal: key j <= query i + offset
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None  # equal ids only


def visible(seen: Visible, t: int, s: int) -> Bool[Array, "b t s"]:
    """The mask in full; only the definition and its tests build it."""
    rows, columns = jnp.arange(t)[:, None], jnp.arange(s)
    mask = jnp.broadcast_to(
        columns < seen.lengths[:, None, None], (len(seen.lengths), t, s)
    )
    if seen.offset is not None:
        mask &= columns <= rows + seen.offset[:, None, None]
    if seen.segments is not None:
        query_ids, key_ids = seen.segments
        mask &= query_ids[:, :, None] == key_ids[:, None, :]
    return mask


def reference(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    *,
    scale: float,
    seen: Visible,
) -> Float[Array, "b t n h"]:
    """o_i = sum_j p_ij v_j with p = softmax over the visible keys of scale q_i . k_j.

    (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1.) A row that sees no key gives
    zero. Everything is computed in float32 (float64 if that comes in); the result
    has the query's dtype. Memory grows with b n t s.
    """
    (b, t, n, h), (_, s, k, _) = query.shape, key.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(b, t, k, n // k, h).astype(wide)
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", grouped, key.astype(wide))
    mask = visible(seen, t, s)[:, None, None]
    top = jnp.max(scores, -1, keepdims=True, where=mask, initial=-jnp.inf)
    top = jnp.where(jnp.isfinite(top), top, 0)
    # the inner where keeps a hidden score from overflowing into the gradient
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(wide))
    return out.reshape(b, t, n, h).astype(query.dtype)
