"""Ring self-attention as published: every score of a device's queries in memory.

Li et al. 2021 (arXiv:2105.13120, Section 3.2). Keys go around once and fill a row of
scores [b, n, t, L]; after a softmax over whole rows, values go around once. Memory
grows with the whole length L; `ring_attention` computes the same without.

Sends per device, in chunks of b t k h elements: forward 2 (N - 1). Backward the paper
forms dK and dV of the whole sequence on every device and adds them up by all-reduce,
4 (N - 1), beside two more rings for dP and dQ: 8 (N - 1) in all. The transpose of the
forward pass ("transposed") sends 2 (N - 1) backward and keeps every chunk instead.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .sequence import Order, check_order, own_positions


class Ring(NamedTuple):
    axis_name: str
    is_causal: bool
    order: Order


def full_score_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k v"],
    *,
    axis_name: str,
    is_causal: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    order: Order = "contiguous",
    backward: Literal["paper", "transposed"] = "paper",
) -> Float[Array, "b t n v"]:
    """Attention of this device's queries to all keys along `axis_name`.

    Scale 1 / sqrt(h) (the authors' code divides by the root of the whole width). Scores
    and sums are float32, the result has the query's dtype; a query that sees no key
    gives zero. Arguments as in `ring_attention`; call it inside `jax.shard_map`.

    Raises ValueError for an unknown or indivisible order, or an unknown `backward`.
    """
    parts = lax.axis_size(axis_name)
    check_order(order, parts * query.shape[1], parts)
    if backward not in ("paper", "transposed"):
        raise ValueError(
            f"backward: {backward!r}, but allowed are 'paper' and 'transposed'"
        )
    run = _attend if backward == "paper" else _values
    ring = Ring(axis_name, is_causal, order)
    return run(ring, query, key, value, segment_ids)


def _around(ring: Ring, use: Callable, chunk) -> Any:
    """use(hop, chunk of device r - hop) for hops 0..N - 1, stacked; N - 1 sends."""
    parts = lax.axis_size(ring.axis_name)
    pairs = [(r, (r + 1) % parts) for r in range(parts)]

    def turn(chunk, hop):
        chunk = jax.tree.map(lambda x: lax.ppermute(x, ring.axis_name, pairs), chunk)
        return chunk, use(hop, chunk)

    first = use(0, chunk)
    _, rest = lax.scan(turn, chunk, jnp.arange(1, parts))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)


def _visible(ring: Ring, hop, ids, key_ids, slots: int) -> Bool[Array, "#b 1 1 t s"]:
    owner = (lax.axis_index(ring.axis_name) - hop) % lax.axis_size(ring.axis_name)
    own = own_positions(ring.order, slots, ring.axis_name)
    theirs = own_positions(ring.order, slots, ring.axis_name, owner)
    seen = (theirs <= own[:, None]) | (not ring.is_causal)
    if ids is None:
        return seen[None, None, None]
    return (seen & (ids[:, :, None] == key_ids[:, None]))[:, None, None]


def _weights(ring, query, key, ids) -> Float[Array, "hop b k g t s"]:
    """Softmax over whole rows; head i of the query reads key head i // g."""
    grouped = _grouped(query, key.shape[2])

    def scores(hop, chunk):
        key, key_ids = chunk
        got = jnp.einsum("btkgh,bskh->bkgts", grouped, _wide(key))
        seen = _visible(ring, hop, ids, key_ids, query.shape[1])
        return jnp.where(seen, got * query.shape[-1] ** -0.5, -jnp.inf)

    rows = _around(ring, scores, (key, ids))
    top = lax.stop_gradient(rows.max((0, -1), keepdims=True))
    rows = jnp.exp(rows - jnp.where(top == -jnp.inf, 0, top))
    total = rows.sum((0, -1), keepdims=True)
    return rows / jnp.where(total == 0, 1, total)


def _values(ring, query, key, value, ids):
    weights = _weights(ring, query, key, ids)
    return _mixed(ring, weights, value, query)


def _mixed(ring, weights, value, query):
    def product(hop, value):
        return jnp.einsum("bkgts,bskv->btkgv", weights[hop], _wide(value))

    out = _around(ring, product, value).sum(0)
    return out.reshape(*query.shape[:-1], -1).astype(query.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, query, key, value, ids):
    return _values(ring, query, key, value, ids)


def _forward(ring, query, key, value, ids):
    weights = _weights(ring, query, key, ids)
    out = _mixed(ring, weights, value, query)
    return out, (query, key, value, weights)


def _backward(ring, saved, d_out):
    query, key, value, weights = saved
    d_out = _grouped(d_out, key.shape[2])
    scale = query.shape[-1] ** -0.5

    def product(hop, value):
        return jnp.einsum("btkgv,bskv->bkgts", d_out, _wide(value))

    d_weights = _around(ring, product, value)
    dots = (d_weights * weights).sum((0, -1), keepdims=True)
    d_scores = weights * (d_weights - dots) * scale

    def pulled(hop, key):
        return jnp.einsum("bkgts,bskh->btkgh", d_scores[hop], _wide(key))

    d_query = _around(ring, pulled, key).sum(0).reshape(query.shape)
    grouped = _grouped(query, key.shape[2])
    d_key = jnp.einsum("ibkgts,btkgh->ibskh", d_scores, grouped)
    d_value = jnp.einsum("ibkgts,btkgv->ibskv", weights, d_out)
    return (
        d_query.astype(query.dtype),
        _own_sum(ring, d_key.astype(key.dtype)),
        _own_sum(ring, d_value.astype(value.dtype)),
        None,
    )


_attend.defvjp(_forward, _backward)


def _own_sum(ring, of_hops: Float[Array, "hop b s k h"]) -> Float[Array, "b s k h"]:
    """All-reduce gradients of the whole sequence, then take the part of this device."""
    me, parts = lax.axis_index(ring.axis_name), lax.axis_size(ring.axis_name)
    whole = of_hops[(me - jnp.arange(parts)) % parts]  # by the chunk's owner
    return lax.dynamic_index_in_dim(lax.psum(whole, ring.axis_name), me, 0, False)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _grouped(x, heads: int):
    return _wide(x).reshape(*x.shape[:2], heads, -1, x.shape[-1])
