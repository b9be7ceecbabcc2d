"""Sequence parallelism by exchanging positions for heads, and by projecting the length.

Two comparisons for `ring_attention`: `all_to_all_attention` (Jacobs et al. 2023,
"DeepSpeed Ulysses", arXiv:2309.14509, Section 3.1) is exact; `linformer_attention` (Li
et al. 2021, arXiv:2105.13120, Section 3.3) is the sparse variant of the ring's paper.
Both run inside `jax.shard_map` over the axis that positions lie over.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .sequence import Order, arrange, ascend, check_order


def all_to_all_attention(
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
    """Attention over whole sequences with n / N of the heads on each of N devices.

    An all-to-all brings [b t n h] to [b L n/N h], another one the output back. Each
    device sends (N - 1) / N of its chunk for every one of q, k, v and out, forward and
    backward alike, whatever N; so no more than k devices can share a sequence.
    Arguments as in `ring_attention`; segment ids are gathered.

    Raises ValueError where N does not divide the heads of query or of key and value.
    """
    parts = lax.axis_size(axis_name)
    check_order(order, parts * query.shape[1], parts)
    for name, heads in (("query", query.shape[2]), ("key", key.shape[2])):
        if heads % parts:
            most = math.gcd(query.shape[2], key.shape[2])
            fits = [n for n in range(1, most + 1) if most % n == 0]
            raise ValueError(
                f"{name}: {heads} heads do not divide over {axis_name}={parts}; all-to-"
                f"all takes {axis_name} from {fits}, a ring takes any"
            )

    def to_heads(x):
        whole = lax.all_to_all(x, axis_name, 2, 1, tiled=True)
        return ascend(whole, order, parts)

    ids = None
    if segment_ids is not None:
        ids = lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
        ids = ascend(ids, order, parts)
    out, _ = block(
        to_heads(query),
        to_heads(key),
        to_heads(value),
        is_causal=is_causal,
        segment_ids=None if ids is None else (ids, ids),
    )
    out = arrange(out, order, parts)
    return lax.all_to_all(out, axis_name, 1, 2, tiled=True)


def linformer_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k v"],
    key_projection: Float[Array, "t r"],
    value_projection: Float[Array, "t r"],
    *,
    axis_name: str,
    block: Callable,
    mask: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b t n v"]:
    """Attention to r sums of keys and values over the whole sequence.

        K' = sum_n E_n^T K_n,    V' = sum_n F_n^T V_n,    out = softmax(q K'^T) V'

    E_n and F_n are this device's rows of the projections [L, r] (Wang et al. 2020,
    arXiv:2006.04768, Eq. 7). Nothing is quadratic in the length; two psums of r rows
    are all that travels. Not causal: each sum is over all positions that `mask` leaves.
    """
    if mask is not None:
        keep = mask[:, :, None, None]
        key, value = jnp.where(keep, key, 0), jnp.where(keep, value, 0)

    def project(weights, x):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        sums = jnp.einsum(
            "tr,btkh->brkh", weights.astype(x.dtype), x, preferred_element_type=wide
        )
        return lax.psum(sums, axis_name).astype(x.dtype)

    keys, values = project(key_projection, key), project(value_projection, value)
    return block(query, keys, values, is_causal=False, segment_ids=None)[0]
