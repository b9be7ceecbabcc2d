"""Exact attention over a sequence that lies over a mesh axis: keys travel in a ring.

Each of N devices holds the queries, keys and values of its own slots. Keys and values
go once around; what a query has seen is kept as (output, log-sum-exp) and joined with
each block's share (Liu et al. 2023, arXiv:2310.01889, on the ring of Li et al. 2021,
arXiv:2105.13120):

    L' = log(e^L + e^Lb),    o' = e^(L - L') o + e^(Lb - L') ob

No score leaves its block, so memory does not grow with N. The backward pass goes around
once more, from (q, k, v, o, L) alone: with delta = sum(do * o), p = exp(s - L),

    ds = p (do v^T - delta),    dq += ds k,    dk += ds^T q,    dv += p^T do,

where the sums dk, dv travel behind their chunk and arrive home at the end.

Sends per device, in chunks of b t k h elements: forward 2 (N - 1), of k and v; backward
2 (N - 1) of k and v again and 2 (N - 1) of dk and dv, the latter in float32. Segment
ids travel with the keys: N - 1 times b t int32 each way.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .sequence import Order, check_order


class Ring(NamedTuple):
    """Static facts of a call."""

    axis_name: str
    block: Callable
    is_causal: bool
    order: Order


def ring_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k v"],
    *,
    axis_name: str,
    block: Callable,
    is_causal: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    order: Order = "contiguous",
) -> Float[Array, "b t n v"]:
    """Attention of this device's queries to all keys along `axis_name`.

    Call it inside `jax.shard_map`, or `jax.vmap` with an axis name, a simulation
    whose gradients are taken inside too (the rule must find the axis bound).
    Sums over hops are float32 (float64 if that comes in); the result has the query's
    dtype. A query that sees no key gives zero.

    Args:
      block: attention on one device with its log-sum-exp, differentiable in both:
        block(q, k, v, is_causal=..., segment_ids=None or (of q, of k)) -> (out [b t n
        v], logs [b t n] float32, -inf where a row sees nothing). It is called for equal
        causal lengths, and for lengths that differ without a causal mask.
      segment_ids: positions see equal ids only; padding has an id of its own.
      order: which positions the slots hold, see `sequence`. With a causal mask, zigzag
        gives every device the same work and skips what no query sees.

    Raises:
      ValueError: an order that is unknown or does not divide.
    """
    parts = lax.axis_size(axis_name)
    check_order(order, parts * query.shape[1], parts)
    return _attend(
        Ring(axis_name, block, is_causal, order), query, key, value, segment_ids
    )


def ring_values(ring: Ring, query, key, value, ids):
    """Output and log-sum-exp. Differentiable, but then every chunk that came by stays
    in memory: `ring_attention` has a rule of its own.
    """
    parts = lax.axis_size(ring.axis_name)
    out, logs = _block(ring, query, key, value, (ids, ids), ring.is_causal)
    seen = out.astype(logs.dtype), logs

    def look(seen, hop, chunk):
        return _join(*seen, *_at_hop(ring, hop, lambda part: part, query, chunk, ids))

    def turn(carry, hop):
        chunk, seen = carry
        return (_pass_on(ring, chunk), look(seen, hop, chunk)), None

    if parts > 1:
        chunk = _pass_on(ring, (key, value, ids))
        if parts > 2:
            hops = jnp.arange(1, parts - 1)
            (chunk, seen), _ = lax.scan(turn, (chunk, seen), hops)
        seen = look(seen, parts - 1, chunk)
    return seen[0].astype(query.dtype), seen[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, query, key, value, ids):
    return ring_values(ring, query, key, value, ids)[0]


def _forward(ring, query, key, value, ids):
    out, logs = ring_values(ring, query, key, value, ids)
    return out, (query, key, value, ids, out, logs)


def _backward(ring, saved, d_out):
    query, key, value, ids, out, logs = saved
    parts = lax.axis_size(ring.axis_name)
    wide = logs.dtype
    d_out = d_out.astype(wide)
    rows = d_out, logs, (out.astype(wide) * d_out).sum(-1)

    def gradients(part):
        return functools.partial(_pull, part, rows)

    def look(sums, hop, chunk):
        got = _at_hop(ring, hop, gradients, query, chunk, ids)
        return jax.tree.map(jnp.add, sums, got)

    def mine(q, k, v, ids):
        return _block(ring, q, k, v, ids, ring.is_causal)

    d_query, *d_mine = gradients(mine)(query, key, value, (ids, ids))

    def turn(carry, hop):
        chunk, (d_query, *d_chunk) = carry
        d_query, *d_chunk = look((d_query, *d_chunk), hop, chunk)
        chunk, d_chunk = _pass_on(ring, (chunk, d_chunk))
        return (chunk, (d_query, *d_chunk)), None

    if parts > 1:
        chunk = _pass_on(ring, (key, value, ids))
        sums = d_query, *(jnp.zeros_like(x) for x in d_mine)
        if parts > 2:
            hops = jnp.arange(1, parts - 1)
            (chunk, sums), _ = lax.scan(turn, (chunk, sums), hops)
        d_query, *d_chunk = look(sums, parts - 1, chunk)
        d_mine = jax.tree.map(jnp.add, d_mine, _pass_on(ring, d_chunk))
    d_key, d_value = d_mine
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)


def _pass_on(ring, tree):
    """Everything one device further: r -> r + 1."""
    parts = lax.axis_size(ring.axis_name)
    turn = [(r, (r + 1) % parts) for r in range(parts)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis_name, turn), tree)


def _block(ring, query, key, value, ids, is_causal):
    pair = None if ids[0] is None else ids
    return ring.block(query, key, value, is_causal=is_causal, segment_ids=pair)


def _at_hop(ring, hop, use, query, chunk, ids):
    """`use(part)` of the one part of the scores that the mask leaves at a hop >= 1.

    The chunk is that of device (r - hop) mod N, which stands before r if hop <= r. In
    zigzag order queries see the first half of the keys from before, and only their own
    last half sees those from after; both are 2 (t / 2)^2 scores.
    """
    key, value, key_ids = chunk
    operands = query, key, value, (ids, key_ids)

    def whole(q, k, v, ids):
        return _block(ring, q, k, v, ids, False)

    def first_keys(q, k, v, ids):
        half = k.shape[1] // 2
        ids = ids[0], None if ids[1] is None else ids[1][:, :half]
        return _block(ring, q, k[:, :half], v[:, :half], ids, False)

    def last_queries(q, k, v, ids):
        half = q.shape[1] // 2
        ids = None if ids[0] is None else ids[0][:, half:], ids[1]
        out, logs = _block(ring, q[:, half:], k, v, ids, False)
        before = ((0, 0), (half, 0), (0, 0))
        out = jnp.pad(out, (*before, (0, 0)))
        return out, jnp.pad(logs, before, constant_values=-jnp.inf)

    def nothing(q, k, v, ids):
        wide = jnp.promote_types(q.dtype, jnp.float32)
        out = lax.full_like(q, 0, shape=(*q.shape[:-1], v.shape[-1]))
        return out, lax.full_like(q, -jnp.inf, wide, q.shape[:-1])

    if not ring.is_causal:
        return use(whole)(*operands)
    zigzag = ring.order == "zigzag"
    before, after = (first_keys, last_queries) if zigzag else (whole, nothing)
    from_before = hop <= lax.axis_index(ring.axis_name)
    return lax.cond(from_before, use(before), use(after), *operands)


def _pull(part, rows, query, key, value, ids):
    """Gradients, in float32, of what one part contributes to the whole softmax.

    The block knows its own softmax alone: p = pb exp(Lb - L). With w = exp(Lb - L) its
    rule gives ds = pb (w do v^T - (w sum(do * ob) - dLb)), so dLb is chosen to make
    that p (do v^T - delta).
    """
    d_out, logs, delta = rows
    (out, own), pull = jax.vjp(lambda *x: part(*x, ids), query, key, value)
    share = _share(own, logs)
    d_part = share[..., None] * d_out
    d_logs = (out.astype(share.dtype) * d_part).sum(-1) - share * delta
    got = pull((d_part.astype(out.dtype), d_logs))
    return tuple(x.astype(logs.dtype) for x in got)


def _share(part, whole):
    """exp(part - whole); 0 where the part saw nothing."""
    nothing = part == -jnp.inf
    return jnp.where(nothing, 0, jnp.exp(jnp.where(nothing, 0, part - whole)))


def _join(out, logs, more, more_logs):
    """The softmax over two sets of keys from that over each (arXiv:1805.02867)."""
    total = jnp.logaddexp(logs, more_logs)
    out = _share(logs, total)[..., None] * out
    return out + _share(more_logs, total)[..., None] * more, total
