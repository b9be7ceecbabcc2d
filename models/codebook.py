"""A vector-quantised waist: each position passes as one of k codes.

    e = unit(W_in norm(x)),  c = argmin_j |e - C_j|^2,  z = W_out C_c (straight-through)

(van den Oord et al. 2017, arXiv:1711.00937, Eq. 1 to 3; codes in a narrow space as in
Yu et al. 2022, arXiv:2110.04627, Sec. 3.2). Codes follow the exponential average of
what they receive (Appendix A.1); a code that receives too little is moved beside one
that receives much, split as in Linde, Buzo and Gray 1980. Splitting needs only sums, so
the codebook is the same on any number of devices and microbatches.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .bottleneck import Waist


class CodeSums(NamedTuple):
    """Sums over the positions that chose each code, float32."""

    count: Float[Array, " k"]
    total: Float[Array, "k e"]
    square: Float[Array, ""]  # of the distances to the chosen codes, over all positions


def nearest(e: Float[Array, "*b e"], codes: Float[Array, "k e"]) -> Int[Array, "*b"]:
    """Index of the nearest code; distances are float32 always, ties go to the first.

    |e - C_j|^2 is compared as |C_j|^2 / 2 - e C_j, which orders the codes alike.
    """
    e, codes = e.astype(jnp.float32), codes.astype(jnp.float32)
    dots = jnp.einsum("...e,ke->...k", e, codes, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(0.5 * jnp.sum(codes**2, -1) - dots, axis=-1).astype(jnp.int32)


class CodeState(nnx.Variable):
    """Learned from sums instead of gradients."""


class Codebook(nnx.Module):
    """A waist of `codes` codes of `code_width` numbers: log2(codes) bits a position.

    decay: of the averages a code follows, per optimizer step.
    window: optimizer steps over which usage and code frequencies are counted.
    revive: a code whose average count falls below this share of the mean count is split
        off from one of the fullest; 0 never revives.
    """

    def __init__(
        self,
        width: int,
        *,
        codes: int = 1024,
        code_width: int = 16,
        decay: float = 0.95,
        window: int = 32,
        revive: float = 0.05,
        rngs: nnx.Rngs,
    ):
        if codes < 2 or code_width < 1 or window < 1:
            raise ValueError(
                f"codebook: codes={codes}, code_width={code_width}, window={window}, "
                "but it needs at least 2 codes, a width of 1 and a window of 1 step"
            )
        self.decay, self.revive = decay, revive
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.inward = nnx.Linear(width, code_width, use_bias=False, rngs=rngs)
        self.outward = nnx.Linear(code_width, width, use_bias=False, rngs=rngs)
        start = jax.random.normal(rngs.params(), (codes, code_width), jnp.float32)
        self.average = CodeState(start)  # of what each code received: the code itself
        self.weight = CodeState(jnp.zeros(codes, jnp.float32))  # average count
        self.spread = CodeState(jnp.ones((), jnp.float32))  # mean squared distance
        self.counts = CodeState(jnp.zeros((window, codes), jnp.float32))
        self.steps = CodeState(jnp.zeros((), jnp.int32))  # updates that learned

    @property
    def capacity(self) -> float:
        """Bits of a code's index, which mean bits over the window cannot exceed."""
        return math.log2(self.weight[...].size)

    def encode(self, x: Float[Array, "*b d"]) -> Int[Array, "*b"]:
        return nearest(self._inward(x), self.average[...])

    def decode(self, codes: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        return self.outward(self.average[...][codes])

    def __call__(
        self, x: Float[Array, "*b d"], mask: Bool[Array, "*b"] | None = None
    ) -> Waist:
        """bits are -log2 of the chosen code's frequency in the window.

        Their mean is the empirical entropy of the codes when traffic is stationary;
        those of a rare code may exceed the capacity. z holds the code and nothing else.
        """
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)  # not even a NaN there goes further
        e = self._inward(x)
        table = jax.lax.stop_gradient(self.average[...])
        codes = nearest(jax.lax.stop_gradient(e), table)
        chosen = table[codes]
        z = self.outward(chosen + (e - jax.lax.stop_gradient(e))).astype(x.dtype)
        keep = jnp.ones(codes.shape) if mask is None else mask
        keep = keep.astype(jnp.float32)
        square = jnp.sum((e - chosen) ** 2, -1)
        loss = jnp.sum(square * keep) / jnp.maximum(keep.sum(), 1.0)
        bits = -jnp.log2(self.frequencies())[codes] * keep
        stats = jax.lax.stop_gradient(_sums(e, codes, square, keep, len(table)))
        return Waist(z, loss, bits, stats, codes=codes)

    def frequencies(self) -> Float[Array, " k"]:
        """Share of each code in the window, half a count added: never 0, sums to 1."""
        counts = self.counts[...].sum(0) + 0.5
        return counts / counts.sum()

    def update(self, stats: CodeSums) -> dict[str, jax.Array]:
        """Move the codes, revive the starved, count the window. Call once a step."""
        count, total, square = stats
        seen = count.sum()
        keep = self.decay
        weight = keep * self.weight[...] + (1 - keep) * count
        off = total - count[:, None] * self.average[...]  # 0 where nothing came
        share = (1 - keep) / jnp.where(weight > 0, weight, 1.0)
        average = self.average[...] + share[:, None] * off
        spread = keep * self.spread[...] + (1 - keep) * square / jnp.maximum(seen, 1.0)
        steps = self.steps[...]
        average, weight, revived = _split(
            average, weight, spread, self.revive * weight.mean(), steps
        )
        arrived = seen > 0  # a step of masked positions alone teaches nothing
        window = self.counts[...].at[steps % len(self.counts[...])].set(count)
        for state, new in (
            (self.average, average),
            (self.weight, weight),
            (self.spread, spread),
            (self.counts, window),
            (self.steps, steps + 1),
        ):
            state[...] = jnp.where(arrived, new, state[...])
        return self.report() | {"waist_revived": jnp.where(arrived, revived, 0.0)}

    def report(self) -> dict[str, jax.Array]:
        """Of the window: share of codes used, entropy in bits, perplexity in codes."""
        counts = self.counts[...].sum(0)
        share = counts / jnp.maximum(counts.sum(), 1.0)
        entropy = -jnp.sum(jax.scipy.special.xlogy(share, share)) / math.log(2)
        return {
            "waist_usage": jnp.mean(counts > 0, dtype=jnp.float32),
            "waist_entropy": entropy,
            "waist_perplexity": 2.0**entropy,
        }

    def _inward(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """To unit mean square, or the commitment loss would shrink all to one point."""
        e = self.inward(self.norm(x.astype(jnp.float32)))
        return e * jax.lax.rsqrt(jnp.mean(e**2, -1, keepdims=True) + 1e-6)


def _sums(e, codes, square, keep, k: int) -> CodeSums:
    flat, e = codes.reshape(-1), e.reshape(-1, e.shape[-1])
    keep = keep.reshape(-1)
    return CodeSums(
        count=jax.ops.segment_sum(keep, flat, k),
        total=jax.ops.segment_sum(e * keep[:, None], flat, k),
        square=jnp.sum(square.reshape(-1) * keep),
    )


def _split(average, weight, spread, floor, steps):
    """Give the j-th code below `floor` half of the j-th fullest code, a little aside.

    Aside is a tenth of the mean distance to a code, in a random direction: a plane
    close to the donor halves what it receives, where one at full distance would, in
    many dimensions, cut off almost nothing.
    """
    k, width = average.shape
    starved = weight < floor
    rank = jnp.cumsum(starved) - 1  # the j-th starved code ...
    fullest = jnp.argsort(-weight, stable=True)
    donor = fullest[jnp.clip(rank, 0, k - 1)]  # ... takes from the j-th fullest
    starved &= weight[donor] > 2 * floor  # and only from one that can spare half
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), steps), (k, width))
    aside = 0.1 * jnp.sqrt(spread / width) * noise
    taken = jnp.zeros(k, bool).at[jnp.where(starved, donor, k)].set(True, mode="drop")
    average = jnp.where(starved[:, None], average[donor] + aside, average)
    shared = jnp.where(starved, weight[donor] / 2, jnp.where(taken, weight / 2, weight))
    return average, shared, starved.sum().astype(jnp.float32)
