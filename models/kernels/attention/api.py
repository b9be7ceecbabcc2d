"""The one attention call of the library."""

import importlib
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from .blocks import Blocks
from .call import Call, Spec

# Every form, best first, and where it runs; sm90 is the Hopper generation.
IMPLEMENTATIONS = {
    "hopper": ("cuda sm90",),
    "gpu": ("cuda", "cuda sm90", "rocm"),
    "tpu": ("tpu",),
    "xla": ("cpu", "cuda", "cuda sm90", "rocm", "tpu"),
    "reference": ("cpu", "cuda", "cuda sm90", "rocm", "tpu"),
}

# Length up to which the plain form is faster on CPUs (measured).
SHORT = 64


@overload
def attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    return_residual: Literal[True],
    **rest: Any,
) -> tuple[Array, Array]: ...
@overload
def attention(query, key, value, bias=None, mask=None, **rest: Any) -> Array: ...
def attention(
    query: Float[ArrayLike, "*b t n h"],
    key: Float[ArrayLike, "*b s k h"],
    value: Float[ArrayLike, "*b s k v"],
    bias: Float[ArrayLike, "*#b #n #t #s"] | None = None,
    mask: Bool[ArrayLike, "*#b #n #t #s"] | Blocks | Callable | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: int | Int[ArrayLike, "..."] | None = None,
    query_seq_lengths: Int[ArrayLike, " b"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, " b"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Int[ArrayLike, "*b t"]
    | tuple[Int[ArrayLike, "*b t"], Int[ArrayLike, "*b s"]]
    | None = None,
    soft_cap: float | None = None,
    sinks: Float[ArrayLike, " n"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | Callable | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """softmax(cap tanh((scale q k^T + bias) / cap)) v over the keys each query sees.

    Takes every call of `jax.nn.dot_product_attention` and gives its result, except
    that a query which sees no key gives zero. A query sees the keys that everything
    given lets it see. Softmax and sums are float32 (float64 for float64), the result
    has the query's dtype. Runs on one device; put it into `jax.shard_map` over batch
    and heads for more.

    Args:
      query: n heads, with or without a batch axis; n is a multiple of the k heads of
        key and value, and query head i reads key head i // (n / k).
      bias: added to the scores; differentiable. Fewer axes than four stand for the
        last ones.
      mask: True where a key is seen; or `Blocks`, a table of cells; or a function of
        row and key indices (int32 arrays that broadcast) to such booleans, evaluated
        tile by tile, which may close over numbers and numpy arrays alone.
      scale: 1 / sqrt(h) by default.
      is_causal: the query at position p sees keys j <= p.
      query_offset: position of the first query among the keys, one number or one
        for each row of the batch; 0 by default. Only with `is_causal` or a window.
      query_seq_lengths: queries at or beyond this length see nothing.
      key_value_seq_lengths: keys at or beyond this length are hidden.
      local_window_size: (left, right), or one number for both: the query at position
        p sees keys p - left <= j <= p + right.
      segment_ids: a query sees keys of its own id only; one array for both (t == s)
        or a pair. No id is special: padding has an id of its own, and the caller's
        loss leaves it out.
      soft_cap: bounds the scores (Gemma Team 2024, arXiv:2408.00118, Sec. 2); off by
        default.
      sinks: one score per head, beside those of the keys, that takes its share of
        every row's softmax and gives nothing.
      dropout_rate: share of the weights that is dropped; the rest is scaled up.
      dropout_key: decides which; needed where the rate is positive. The same key drops
        the same weights in every implementation.
      implementation: a name of `IMPLEMENTATIONS` insists on it (NotImplementedError
        where it cannot serve), as does a function of the form in `call`; None picks
        by what the call compiles for and by size.
      return_residual: also return the log of each row's sum of exponentials [*b t n],
        float32, -inf for a row that sees nothing; differentiable.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the implementation named cannot serve, and why.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    shape = query.shape[:-1]
    if query.ndim == key.ndim == value.ndim == 3:
        query, key, value = query[None], key[None], value[None]
        if segment_ids is not None:
            segment_ids = jax.tree.map(lambda ids: jnp.asarray(ids)[None], segment_ids)
    check_operands(query, key, value)
    (b, t, n, h), s = query.shape, key.shape[1]
    sees = mask if callable(mask) else None
    spec = Spec(
        h**-0.5 if scale is None else float(scale),
        None if soft_cap is None else positive("soft_cap", soft_cap),
        _rate(dropout_rate, dropout_key),
        (mask.rows, mask.keys) if isinstance(mask, Blocks) else None,
        sees,
    )
    low, high = _bounds(
        (b, t, s),
        is_causal,
        query_offset,
        query_seq_lengths,
        key_value_seq_lengths,
        local_window_size,
    )
    dense = None if sees or isinstance(mask, Blocks) else mask
    call = Call(
        low,
        high,
        _pair(segment_ids, b, t, s),
        over("mask", dense, (b, n, t, s)),
        mask.over(b, n, t, s) if isinstance(mask, Blocks) else None,
        over("bias", bias, (b, n, t, s)),
        sinks_of(sinks, n),
        _words(dropout_key) if spec.dropout_rate else None,
    )
    if not query.size or not s or not value.size:
        out, logs = nothing(query, value, call)
    else:
        out, logs = serve(implementation, query, key, value, call, spec)
    out = out.reshape(*shape, value.shape[-1])
    return (out, logs.reshape(shape)) if return_residual else out


def serve(implementation, query, key, value, call, spec):
    """The results of the form that is named, or of the best that takes the call."""
    if implementation is not None:
        return _form(implementation)(query, key, value, call, spec)
    refusals = []
    for name in _order(query, key):
        try:
            return _form(name)(query, key, value, call, spec)
        except NotImplementedError as refusal:
            refusals.append(refusal)
    raise ExceptionGroup("attention: no implementation takes this call", refusals)


def _form(name) -> Callable[..., tuple[Array, Array]]:
    if callable(name):
        return name
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {name!r}; it must be None, a form or one of "
            f"{sorted(IMPLEMENTATIONS)}"
        )
    if (here := _platform()) not in IMPLEMENTATIONS[name]:
        raise NotImplementedError(
            f"{name} runs on {', '.join(IMPLEMENTATIONS[name])}; this is {here}"
        )
    try:
        module = importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        raise NotImplementedError(f"{name}: {error}") from error
    return getattr(module, name)


def _order(query, key):
    """The names to try, best first, for the device in use and these lengths."""
    names = [name for name, on in IMPLEMENTATIONS.items() if _platform() in on]
    if _platform() == "cpu" and max(query.shape[1], key.shape[1]) <= SHORT:
        names.reverse()
    return names


def _platform():
    """Where the call will run, as in `IMPLEMENTATIONS`: on the devices of the mesh in
    use, which need not be there to compile ahead of time, else on the default one.
    """
    device, described = jax.devices()[0], get_abstract_mesh().abstract_device
    if described is not None and described.platform != device.platform:
        return described.platform
    if device.platform != "gpu":
        return device.platform
    if "cuda" not in device.client.platform_version:
        return "rocm"
    generation = getattr(device, "compute_capability", "")
    return "cuda sm90" if str(generation).startswith("9.") else "cuda"


def _bounds(sizes, is_causal, offset, query_lengths, key_lengths, window):
    """The range of keys that position and lengths leave each row: low, high [b, t]."""
    b, t, s = sizes
    if offset is not None and not is_causal and window is None:
        raise ValueError(
            "query_offset moves the causal mask and the window: give is_causal=True or "
            "local_window_size too"
        )
    low = jnp.zeros((b, t), jnp.int32)
    high = jnp.full((b, t), s, jnp.int32)
    first = jnp.asarray(0 if offset is None else offset, jnp.int32)
    if first.shape not in ((), (1,), (b,)):
        raise ValueError(
            f"query_offset has shape {first.shape}; it must be one number or ({b},)"
        )
    place = first.reshape(-1, 1) + jnp.arange(t, dtype=jnp.int32)
    if is_causal:
        high = jnp.minimum(high, place + 1)
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        low = jnp.maximum(low, place - left)
        high = jnp.minimum(high, place + right + 1)
    if key_lengths is not None:
        high = jnp.minimum(high, _lengths("key_value", key_lengths, b)[:, None])
    if query_lengths is not None:
        lengths = _lengths("query", query_lengths, b)[:, None]
        high = jnp.where(jnp.arange(t) < lengths, high, 0)
    return jnp.minimum(low, s), jnp.clip(high, 0, s)


def _lengths(name, lengths, b):
    lengths = jnp.asarray(lengths)
    if lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"{name}_seq_lengths is {lengths.dtype}{lengths.shape}; it must be "
            f"integers ({b},), one for each row of the batch"
        )
    return lengths.astype(jnp.int32)


def over(name, x, sizes):
    """A mask or bias with four axes, each of them 1 or the size of the scores'."""
    if x is None:
        return None
    x = jnp.asarray(x)
    wanted = bool if name == "mask" else jnp.floating
    if not jnp.issubdtype(x.dtype, wanted):
        raise ValueError(
            f"{name} is {x.dtype}; a mask is bool (True where a key is seen), a bias "
            "is floating (added to the scores)"
        )
    full = (1,) * (4 - x.ndim) + x.shape
    if len(full) != 4 or any(
        have not in (1, size) for have, size in zip(full, sizes, strict=True)
    ):
        raise ValueError(
            f"{name} has shape {x.shape}; it must broadcast to [b, n, t, s] = {sizes}"
        )
    return x.reshape(full)


def _pair(segment_ids, b, t, s):
    if segment_ids is None:
        return None
    own, theirs = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
    pair = jnp.asarray(own), jnp.asarray(theirs)
    if [ids.shape for ids in pair] != [(b, t), (b, s)]:
        raise ValueError(
            f"segment_ids has shapes {[ids.shape for ids in pair]}; they must be "
            f"{[(b, t), (b, s)]}, given as a pair unless query and key are as long"
        )
    return pair


def sinks_of(sinks, n):
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    if sinks.shape != (n,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks is {sinks.dtype}{sinks.shape}; it must be floating ({n},), one "
            "score for each head"
        )
    return sinks


def positive(name, number):
    if not number > 0:
        raise ValueError(f"{name} is {number}; it must be positive, or None")
    return float(number)


def _rate(rate, key):
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate is {rate}; it must lie in [0, 1)")
    if rate and key is None:
        raise ValueError(f"dropout_rate is {rate}: give dropout_key too")
    return float(rate)


def _words(key):
    """Two 32-bit words of a key of any kind."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(key)
    else:
        words = jnp.asarray(key)
    return words if words.shape == (2,) else jax.random.bits(key, (2,), jnp.uint32)


def nothing(query, value, call):
    """No query asks or no key is there: zeros, and the sinks' own logarithms."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logs = jnp.full(query.shape[:3], -jnp.inf, wide)
    if call.sinks is not None:
        logs = jnp.maximum(logs, call.sinks.astype(wide))
    return jnp.zeros((*query.shape[:3], value.shape[-1]), query.dtype), logs


def check_operands(query, key, value):
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"
    if (
        not query.ndim == key.ndim == value.ndim == 4
        or key.shape[:3] != value.shape[:3]
    ):
        raise ValueError(
            f"{shapes} must be [b, t, n, h], [b, s, k, h] and [b, s, k, v], all with "
            "or all without b"
        )
    (b, _, n, h), (key_b, _, k, key_h) = query.shape, key.shape
    if (b, h) != (key_b, key_h) or not k or n % k:
        raise ValueError(
            f"{shapes} must have the same batch and head width, and the query's heads "
            "must be a multiple of the key's"
        )
    dtypes = query.dtype, key.dtype, value.dtype
    if len(set(dtypes)) > 1 or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(
            f"query, key and value are {', '.join(map(str, dtypes))}; they must have "
            "one floating dtype: cast them first"
        )
