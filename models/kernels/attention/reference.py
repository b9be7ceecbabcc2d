"""What attention is: the definition every other form must match."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from . import dropout
from .call import Call, Spec


def visible(call: Call, spec: Spec, s: int) -> Bool[Array, "#b #n t s"]:
    """The mask in full; only the definition and its tests build it."""
    t = call.low.shape[1]
    rows, keys = jnp.arange(t, dtype=jnp.int32)[:, None], jnp.arange(s, dtype=jnp.int32)
    seen = (keys >= call.low[..., None]) & (keys < call.high[..., None])
    if call.segments is not None:
        query_ids, key_ids = call.segments
        seen &= query_ids[:, :, None] == key_ids[:, None, :]
    seen = seen[:, None]
    if call.mask is not None:
        seen = seen & call.mask
    if call.kept is not None and spec.cell is not None:
        kept = jnp.repeat(call.kept, spec.cell[0], 2)[:, :, :t]
        seen = seen & jnp.repeat(kept, spec.cell[1], 3)[..., :s]
    if spec.sees is not None:
        seen = seen & spec.sees(rows, keys)
    return seen


def reference(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k v"],
    call: Call,
    spec: Spec,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b t n"]]:
    """Output and log-sum-exp as `call` defines them, all scores in memory at once.

    (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1.) Everything is computed in float32
    (float64 if that comes in); the output has the query's dtype, L stays wide.
    """
    (b, t, n, h), (_, s, k, _) = query.shape, key.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    (query_, bad_q), (key_, bad_k), (value_, bad_v) = (
        _clean(x.astype(wide)) for x in (query, key, value)
    )
    grouped = query_.reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key_)
    scores = spec.scale * scores.reshape(b, n, t, s)
    bad = jnp.repeat(bad_k, n // k, 1)[:, :, None]
    scores = scores + bad + bad_q[..., None]
    if call.bias is not None:
        scores = scores + call.bias.astype(wide)
    seen = visible(call, spec, s)
    scores = jnp.where(seen, scores, 0)  # or a hidden NaN comes back through the cap
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    top = jnp.max(scores, -1, keepdims=True, where=seen, initial=-jnp.inf)
    if call.sinks is not None:
        sinks = call.sinks.astype(wide)[:, None, None]
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    # the inner where keeps a hidden score from overflowing into the gradient
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - top, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    if call.sinks is not None:
        total = total + jnp.exp(sinks - top)
    nothing = total == 0
    safe = jnp.where(nothing, 1, total)
    weights = weights / safe
    logsumexp = jnp.where(nothing, -jnp.inf, top + jnp.log(safe))[..., 0]
    if call.dropout_key is not None:
        weights = weights * _kept(call, spec, weights.shape)
    bad = jnp.repeat(bad_v, n // k, 1)[:, :, None]
    weights = jnp.where(seen, weights + bad, 0).reshape(b, k, n // k, t, s)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value_)
    out = out.reshape(b, t, n, value.shape[-1]).astype(query.dtype)
    return out, logsumexp.swapaxes(1, 2)


def _clean(x):
    """x [b, s, k, h] with 0 for what is not finite; [b, k, s]: NaN where it had such.

    0 times such a number is NaN, and it must reach those alone that see it.
    """
    bad = lax.stop_gradient((0 * x).sum(-1)).swapaxes(1, 2)
    return jnp.where(jnp.isfinite(x), x, 0), bad


def _kept(call, spec, shape):
    """1 / (1 - rate) where dropout keeps a weight, else 0."""
    b, n, t, s = (jnp.arange(size, dtype=jnp.int32) for size in shape)
    key = dropout.head_key(call.dropout_key, b[:, None, None, None], n[:, None, None])
    kept = dropout.keep(key, t[:, None], s, spec.dropout_rate)
    return kept / (1 - spec.dropout_rate)
