"""One query against a long cache, and the sum of attentions over parts of the keys."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from . import api
from .call import Call, Spec

# Keys of a part: enough to fill a core, few enough that parts share out the cores.
FEWEST_KEYS = 512


def merge(
    out1: Float[Array, "*rows v"],
    logs1: Float[Array, "*rows"],
    out2: Float[Array, "*rows v"],
    logs2: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows v"], Float[Array, "*rows"]]:
    """Attention over two sets of keys from the attention over each.

        L = log(exp L1 + exp L2),    o = exp(L1 - L) o1 + exp(L2 - L) o2

    (Milakov and Gimelshein 2018, arXiv:1805.02867, Eq. 4.) Associative and commutative
    up to rounding; (0, -inf), no key at all, is neutral. Computed in float32 (float64
    if that comes in); the output has the dtype of `out1`. Differentiable.
    """
    wide = jnp.promote_types(logs1.dtype, jnp.float32)
    logs1, logs2 = logs1.astype(wide), logs2.astype(wide)
    top = lax.stop_gradient(jnp.maximum(logs1, logs2))
    top = jnp.where(top == -jnp.inf, 0, top)
    one, two = jnp.exp(logs1 - top), jnp.exp(logs2 - top)
    nothing = one + two == 0
    total = jnp.where(nothing, 1, one + two)
    out = (one / total)[..., None] * out1 + (two / total)[..., None] * out2
    logs = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
    return out.astype(out1.dtype), logs


def decode_attention(
    query: Float[ArrayLike, "b n h"] | Float[ArrayLike, "b 1 n h"],
    key: Float[ArrayLike, "b s k h"],
    value: Float[ArrayLike, "b s k v"],
    *,
    key_value_seq_lengths: int | Int[ArrayLike, "#b"] | None = None,
    bias: Float[ArrayLike, "#b #n 1 #s"] | None = None,
    mask: Bool[ArrayLike, "#b #n 1 #s"] | None = None,
    scale: float | None = None,
    local_window_size: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[ArrayLike, " n"] | None = None,
    splits: int | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """`attention` of the newest position to a cache of keys and values.

    The query stands at the last position held, `key_value_seq_lengths - 1`, and sees
    all that is held, or `local_window_size` keys before it. The heads of a group are
    rows of one product; the keys are cut into `splits` parts that run side by side and
    are joined by `merge` (Dao et al. 2023, "Flash-Decoding").

    Args:
      key_value_seq_lengths: how much of the room s is filled, one number or one for
        each row of the batch; s by default. What lies beyond is not read, where the
        implementation can skip it.
      splits: a divisor of s; by default as many as the device has cores to fill.
      bias, mask, scale, soft_cap, sinks, implementation, return_residual: as for
        `attention`.

    Returns:
      The output, with the query's axes; with `return_residual` the log-sum-exp too.

    Raises:
      ValueError: shapes or options that do not fit together.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    shape = query.shape
    if query.ndim == 3:
        query = query[:, None]
    if query.ndim != 4 or query.shape[1] != 1:
        raise ValueError(
            f"query has shape {shape}; it must be [b, n, h] or [b, 1, n, h]"
        )
    api.check_operands(query, key, value)
    (b, _, n, h), (_, s, k, v) = query.shape, value.shape
    splits = _splits(b * k, s) if splits is None else splits
    if splits < 1 or s % splits:
        raise ValueError(f"splits is {splits}; it must be a divisor of the {s} keys")
    spec = Spec(
        h**-0.5 if scale is None else float(scale),
        None if soft_cap is None else api.positive("soft_cap", soft_cap),
    )
    held = s if key_value_seq_lengths is None else key_value_seq_lengths
    high = jnp.broadcast_to(jnp.minimum(jnp.asarray(held, jnp.int32), s), (b,))
    low = jnp.zeros_like(high)
    if local_window_size is not None:
        low = jnp.maximum(low, high - 1 - local_window_size)
    # row (batch, part) of the cut call, and the heads of a group as its queries
    first = jnp.arange(splits, dtype=jnp.int32) * (s // splits)
    group = n // k

    def bound(x):
        x = jnp.clip(x[:, None] - first, 0, s // splits).reshape(-1, 1)
        return jnp.broadcast_to(x, (b * splits, group))

    def cut(x):
        return x.reshape(b * splits, s // splits, k, x.shape[-1])

    def spread(x):
        """[#b, #n, 1, #s] to [b parts, #k, #group, #keys of a part]"""
        if x is None:
            return None
        heads = (k, group) if x.shape[1] == n else (1, 1)
        x = jnp.broadcast_to(x, (b, *x.shape[1:3], s))
        x = x.reshape(b, *heads, splits, s // splits)
        return jnp.moveaxis(x, 3, 1).reshape(b * splits, *heads, s // splits)

    call = Call(
        bound(low),
        bound(high),
        mask=spread(api.over("mask", mask, (b, n, 1, s))),
        bias=spread(api.over("bias", bias, (b, n, 1, s))),
    )
    rows = jnp.repeat(query.reshape(b, k, group, h).swapaxes(1, 2), splits, 0)
    if s and rows.size and v:
        out, logs = api.serve(implementation, rows, cut(key), cut(value), call, spec)
    else:
        out, logs = api.nothing(rows, cut(value), call)
    out, logs = _join(
        out.reshape(b, splits, group, k, v).astype(logs.dtype),
        logs.reshape(b, splits, group, k),
    )
    out = out.swapaxes(1, 2).reshape(b, n, v)
    logs = logs.swapaxes(1, 2).reshape(b, n)
    if sinks is not None:
        one_more = jnp.broadcast_to(jnp.asarray(api.sinks_of(sinks, n)), (b, n))
        out, logs = merge(out, logs, jnp.zeros_like(out), one_more)
    out = out.astype(query.dtype).reshape(*shape[:-1], v)
    return (out, logs.reshape(shape[:-1])) if return_residual else out


def _join(out, logs):
    """Merge the parts along axis 1, by halves."""
    while (parts := out.shape[1]) > 1:
        half = parts // 2
        rest = out[:, 2 * half :], logs[:, 2 * half :]
        one, two = slice(0, half), slice(half, 2 * half)
        pair = merge(out[:, one], logs[:, one], out[:, two], logs[:, two])
        out, logs = (jnp.concatenate(x, 1) for x in zip(pair, rest, strict=True))
    return out[:, 0], logs[:, 0]


def _splits(heads, s):
    """The most parts that divide s, are long enough, and do not outnumber the cores."""
    cores = getattr(jax.devices()[0], "core_count", None) or 1
    most = max(1, min(s // FEWEST_KEYS, 2 * cores // max(heads, 1)))
    return next(parts for parts in range(most, 0, -1) if s % parts == 0)
