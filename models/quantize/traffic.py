"""What passes: how often each code was chosen over a window of steps, in bits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Traffic(NamedTuple):
    """Of q indices, their codes side by side: k = the sum of all sizes."""

    counts: Float[Array, "w k"]  # of the last w steps
    steps: Int[Array, ""]  # that were counted


def quiet(window: int, sizes: Sequence[int]) -> Traffic:
    counts = jnp.zeros((window, sum(sizes)), jnp.float32)
    return Traffic(counts, jnp.zeros((), jnp.int32))


def count(
    indices: Int[Array, "*b q"], keep: Float[Array, "*b"], sizes: Sequence[int]
) -> Float[Array, " k"]:
    """How often each code was chosen at the positions kept."""
    starts = _starts(sizes)
    flat = (indices + starts).reshape(-1)
    return jax.ops.segment_sum(
        jnp.repeat(keep.reshape(-1), len(starts)), flat, sum(sizes)
    )


def record(traffic: Traffic, counts: Float[Array, " k"]) -> Traffic:
    """The oldest step gives way to new counts; counts of nothing change nothing."""
    window = traffic.counts.at[traffic.steps % len(traffic.counts)].set(counts)
    new = Traffic(window, traffic.steps + 1)
    arrived = counts.sum() > 0
    return jax.tree.map(lambda a, b: jnp.where(arrived, a, b), new, traffic)


def frequencies(traffic: Traffic, sizes: Sequence[int]) -> Float[Array, " k"]:
    """Share of each code in the window, half a count added; 1 for each index."""
    counts = traffic.counts.sum(0) + 0.5
    totals = [part.sum() for part in jnp.split(counts, _starts(sizes)[1:])]
    return counts / jnp.repeat(
        jnp.stack(totals), np.array(sizes), total_repeat_length=sum(sizes)
    )


def bits(
    traffic: Traffic,
    indices: Int[Array, "*b q"],
    keep: Float[Array, "*b"],
    sizes: Sequence[int],
) -> Float[Array, "*b"]:
    """-log2 of the chosen codes' frequencies, added over the indices of a position.

    Their mean is the empirical entropy of the codes when traffic is stationary, where
    several indices count as independent: an upper bound. Those of a rare code may
    exceed the capacity.
    """
    cost = -jnp.log2(frequencies(traffic, sizes))
    return cost[indices + _starts(sizes)].sum(-1) * keep


def report(traffic: Traffic, sizes: Sequence[int]) -> dict[str, jax.Array]:
    """Of the window: share of codes used, entropy in bits, perplexity in codes.

    The entropy is added over indices, the perplexity is of one index on average.
    """
    counts = traffic.counts.sum(0)
    seen = jnp.maximum(counts.sum() / len(sizes), 1.0)
    share = counts / seen
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share)) / math.log(2)
    return {
        "waist_usage": jnp.mean(counts > 0, dtype=jnp.float32),
        "waist_entropy": entropy,
        "waist_perplexity": 2.0 ** (entropy / len(sizes)),
    }


def _starts(sizes: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *sizes[:-1]]).astype(np.int32)
