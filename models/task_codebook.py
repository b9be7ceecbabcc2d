"""A task-conditioned codebook: a mixture of few codes passes (arXiv:2311.04193).

    q = softmax(W relu(x) + b),  h = dropout(q) C,  z = U h + u

(Sec. 3.2.) The task is known to x: its embedding is a part of it. The dropout of whole
codes keeps the mixture from collapsing onto few; q is scaled by 1 / (1 - p) and not
brought back to a sum of 1. There is no loss of its own and no way around: any batch of
z - u has the rank of the codes' width at most.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from .bottleneck import Waist
from .quantize import traffic
from .quantize.layer import Memory


class Mixed(NamedTuple):
    """Sums over unmasked positions."""

    weight: Float[Array, " k"]  # of q
    nats: Float[Array, ""]  # of the entropy of q


def softmax(logits: Float[Array, "*b k"], top: int, keys) -> Float[Array, "*b k"]:
    """The simplex: at least 0, with a sum of 1."""
    del top, keys
    return jax.nn.softmax(logits)


def top_k(logits: Float[Array, "*b k"], top: int, keys) -> Float[Array, "*b k"]:
    """The softmax of all with its `top` largest kept, not brought to a sum of 1."""
    del keys
    q = jax.nn.softmax(logits)
    index = jax.lax.top_k(q, top)[1]
    return q * jax.nn.one_hot(index, q.shape[-1]).sum(-2)


def gumbel(
    logits: Float[Array, "*b k"], top: int, keys: Key[Array, "*b"] | None
) -> Float[Array, "*b k"]:
    """One code, drawn where there are keys, else the likeliest; soft gradient."""
    del top
    if keys is not None:
        logits += _each(keys, lambda key: jax.random.gumbel(key, logits.shape[-1:]))
    soft = jax.nn.softmax(logits)
    hard = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
    return hard + (soft - jax.lax.stop_gradient(soft))


SELECT: dict[str, Callable] = {"softmax": softmax, "top_k": top_k, "gumbel": gumbel}


class TaskCodebook(nnx.Module):
    """A waist that mixes `codes` codes of `code_width` numbers.

    select: how logits become weights, a name in SELECT; `top` codes pass by "top_k".
    dropout: chance that a code is left out at a position. Drawn only where the caller
        gives keys, one for each position: an update that must see what an earlier pass
        saw gives the same keys.
    window: optimizer steps over which usage is counted.
    """

    draws = True  # takes keys

    def __init__(
        self,
        width: int,
        *,
        codes: int = 256,
        code_width: int = 10,
        select: str = "softmax",
        top: int = 16,
        dropout: float = 0.1,
        window: int = 32,
        rngs: nnx.Rngs,
    ):
        if codes < 2 or code_width < 1 or window < 1:
            raise ValueError(
                f"task_codebook: codes={codes}, code_width={code_width}, "
                f"window={window}, but it needs at least 2 codes, a width of 1 and a "
                "window of 1 step"
            )
        if select not in SELECT:
            raise ValueError(f"select: {select!r}, but allowed are {', '.join(SELECT)}")
        if not 0 < top <= codes and select == "top_k":
            raise ValueError(f"top: {top}, but must be from 1 to the {codes} codes")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout}, but must be in [0, 1)")
        self.select, self.top, self.dropout = select, top, dropout
        self.indexer = nnx.Linear(width, codes, rngs=rngs)
        drawn = jax.random.normal(rngs.params(), (codes, code_width), jnp.float32)
        self.codes = nnx.Param(drawn)
        self.outward = nnx.Linear(code_width, width, rngs=rngs)
        # The last column counts nats: entropy of q, summed over positions.
        self.traffic = Memory(traffic.quiet(window, (codes, 1)))

    @property
    def capacity(self) -> float:
        """Bits at a position: of an index, or of the floats of a mixture."""
        codes, width = self.codes.shape
        return math.log2(codes) if self.select == "gumbel" else 32.0 * width

    def weights(self, x: Float[Array, "*b d"], keys=None) -> Float[Array, "*b k"]:
        """q without dropout, float32."""
        logits = self.indexer(jax.nn.relu(x.astype(jnp.float32)))
        return SELECT[self.select](logits, self.top, keys)

    def __call__(
        self,
        x: Float[Array, "*b d"],
        mask: Bool[Array, "*b"] | None = None,
        *,
        keys: Key[Array, "*b"] | None = None,
    ) -> Waist:
        """assignments are q without dropout; the loss is 0.

        bits of "gumbel" are -log2 of the chosen code's frequency in the window. A
        mixture is `code_width` floats, and its bits are theirs; what a code drawn from
        q would tell is reported by `update`.
        """
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)  # not even a NaN there goes further
        drawing, dropping = (
            (None, None)
            if keys is None
            else (
                _each(keys, lambda key, i=i: jax.random.fold_in(key, i)) for i in (0, 1)
            )
        )
        q = self.weights(x, drawing)
        passed = q
        if dropping is not None and self.dropout > 0:
            keep = 1 - self.dropout
            chosen = _each(
                dropping, lambda k: jax.random.bernoulli(k, keep, q.shape[-1:])
            )
            passed = jnp.where(chosen, q / keep, 0)
        z = self.outward(passed @ self.codes[...])
        kept = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
        bits = jnp.full(x.shape[:-1], self.capacity, jnp.float32)
        if self.select == "gumbel":
            count = self.traffic.get_value().counts[:, :-1].sum(0) + 0.5
            bits = -jnp.log2(count / count.sum())[jnp.argmax(q, -1)]
        nats = -jnp.sum(jax.scipy.special.xlogy(q, jnp.maximum(q, 1e-30)), -1)
        sums = Mixed(jnp.einsum("...k,...->k", q, kept), jnp.sum(nats * kept))
        return Waist(
            z.astype(x.dtype),
            jnp.zeros((), jnp.float32),
            bits * kept,
            jax.lax.stop_gradient(sums),
            assignments=q,
        )

    def update(self, stats: Mixed) -> dict[str, jax.Array]:
        """Count the window. Call once a step."""
        row = jnp.append(stats.weight, stats.nats)
        self.traffic.set_value(traffic.record(self.traffic.get_value(), row))
        return self.report()

    def report(self) -> dict[str, jax.Array]:
        """Of the window, p being the mean of q:

        entropy of p in bits, perplexity, what a code drawn from q tells of its
        position (entropy of p - mean entropy of q) in bits, and usage, the share of
        codes with at least a tenth of the weight of all alike.
        """
        counts = self.traffic.get_value().counts.sum(0)
        weight, nats = counts[:-1], counts[-1]
        total = jnp.maximum(weight.sum(), 1e-6)
        share = weight / total
        entropy = -jnp.sum(jax.scipy.special.xlogy(share, share)) / math.log(2)
        return {
            "waist_usage": jnp.mean(share * share.size > 0.1, dtype=jnp.float32),
            "waist_entropy": entropy,
            "waist_perplexity": 2.0**entropy,
            "waist_told": entropy - nats / total / math.log(2),
        }


def _each(keys: Key[Array, "*b"], function: Callable) -> Array:
    """function(key) of every key, whatever axes they have."""
    flat = jax.vmap(function)(keys.reshape(-1))
    return flat.reshape(*keys.shape, *flat.shape[1:])
