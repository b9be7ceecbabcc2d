"""The one attention call of the library."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .reference import Visible, reference
from .xla import xla

IMPLEMENTATIONS = {"xla": xla, "reference": reference}

# Scores of one head below which the plain form is faster on CPUs (measured), and
# bytes of scores above which it takes too much memory anywhere.
FEW_SCORES = 64 * 64
MANY_BYTES = 2**30


def attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: int | Int[Array, "..."] | None = None,
    segment_ids: Int[Array, "b t"]
    | tuple[Int[Array, "b t"], Int[Array, "b s"]]
    | None = None,
    key_value_seq_lengths: Int[Array, " b"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t n h"]:
    """softmax(scale q k^T) v over the keys each query sees.

    The result of `jax.nn.dot_product_attention` where that takes the call, except
    that a query which sees no key gives zero. Softmax and sums are float32, the
    result has the query's dtype. Runs on one device; put it into `jax.shard_map`
    over batch and heads for more.

    Args:
      query: n heads; n is a multiple of the k heads of key and value, and query
        head i reads key head i // (n / k).
      scale: 1 / sqrt(h) by default.
      is_causal: query i sees keys j <= i + query_offset.
      query_offset: position of the first query among the keys, one number or one
        for each row of the batch; 0 by default. Only with `is_causal`.
      segment_ids: a query sees keys of its own id only; one array for both (t == s)
        or a pair. No id is special: padding has an id of its own, and the caller's
        loss leaves it out.
      key_value_seq_lengths: keys at or beyond this length are hidden.
      implementation: a name of `IMPLEMENTATIONS` insists on it (NotImplementedError
        where it cannot serve); None picks by backend and size.

    Raises:
      ValueError: shapes or options that do not fit together.
    """
    _check(query, key, value, is_causal, query_offset, implementation)
    (b, t, n, h), s = query.shape, key.shape[1]
    if not query.size or not s:
        return jnp.zeros_like(query)  # nothing asks, or nothing is seen
    if key_value_seq_lengths is None:
        lengths = jnp.full(b, s, jnp.int32)
    else:
        lengths = jnp.minimum(jnp.asarray(key_value_seq_lengths, jnp.int32), s)
    offset = None
    if is_causal:
        offset = jnp.asarray(0 if query_offset is None else query_offset, jnp.int32)
        offset = jnp.broadcast_to(offset, (b,))
    seen = Visible(lengths, offset, _pair(segment_ids, b, t, s))
    if implementation is None:
        implementation = _pick(b * n, t, s)
    serve = IMPLEMENTATIONS[implementation]
    return serve(
        query, key, value, scale=h**-0.5 if scale is None else scale, seen=seen
    )


def _pick(heads, t, s):
    if 4 * heads * t * s > MANY_BYTES:
        return "xla"
    on_cpu = jax.default_backend() == "cpu"
    return "xla" if on_cpu and t > 1 and t * s > FEW_SCORES else "reference"


def _pair(segment_ids, b, t, s):
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
    if len(pair) != 2 or pair[0].shape != (b, t) or pair[1].shape != (b, s):
        raise ValueError(
            f"segment_ids has shapes {[ids.shape for ids in pair]}; they must be "
            f"{[(b, t), (b, s)]}, given as a pair unless query and key are as long"
        )
    return pair


def _check(query, key, value, is_causal, query_offset, implementation):
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"query {query.shape}, key {key.shape} and value {value.shape} must be "
            "[b, t, n, h], [b, s, k, h] and [b, s, k, h]"
        )
    (b, _, n, h), (key_b, _, k, key_h) = query.shape, key.shape
    if (b, h) != (key_b, key_h) or n % k:
        raise ValueError(
            f"query {query.shape} and key {key.shape} must have the same batch and "
            "head width, and the query's heads must be a multiple of the key's"
        )
    if query_offset is not None and not is_causal:
        raise ValueError("query_offset moves the causal mask: give is_causal=True too")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; it must be None or one of "
            f"{sorted(IMPLEMENTATIONS)}"
        )
