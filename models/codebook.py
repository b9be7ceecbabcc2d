"""A vector-quantised waist: each position passes as one of k codes.

    e = unit(W_in norm(x)),  c = argmin_j |e - C_j|^2,  z = W_out C_c (straight-through)

(van den Oord et al. 2017, arXiv:1711.00937, Eq. 1 to 3; codes in a narrow space as in
Yu et al. 2022, arXiv:2110.04627, Sec. 3.2). Codes follow the exponential average of
what they receive (Appendix A.1); a code that receives too little is moved beside one
that receives much, split as in Linde, Buzo and Gray 1980. Splitting needs only sums, so
the codebook is the same on any number of devices and microbatches.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .bottleneck import Waist
from .quantize import losses, traffic
from .quantize.layer import Memory, unit_square
from .quantize.search import nearest
from .quantize.updates import CodeState, CodeSums, code_sums, ema, follow, revive
from .quantize.vq import nearest_code


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
        self.average = Memory(start)  # of what each code received: the code itself
        self.weight = Memory(jnp.zeros(codes, jnp.float32))  # average count
        self.spread = Memory(jnp.ones((), jnp.float32))  # mean squared distance
        self.counts = Memory(jnp.zeros((window, codes), jnp.float32))
        self.steps = Memory(jnp.zeros((), jnp.int32))  # updates that learned

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
        found = nearest_code(e, self.average[...])
        keep = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
        bits = -jnp.log2(self.frequencies())[found.index] * keep
        k = self.weight[...].size
        return Waist(
            self.outward(found.z).astype(x.dtype),
            losses.mean(found.commitment, keep),
            bits,
            code_sums(e, found.index, found.commitment, keep, k),
            codes=found.index,
        )

    def frequencies(self) -> Float[Array, " k"]:
        """Share of each code in the window, half a count added: never 0, sums to 1."""
        return traffic.frequencies(self._traffic(), [self.weight[...].size])

    def update(self, stats: CodeSums) -> dict[str, jax.Array]:
        """Move the codes, revive the starved, count the window. Call once a step."""
        old = CodeState(
            self.average[...],
            self.weight[...],
            self.spread[...],
            self.steps[...],
            inner=((), ()),
        )
        new, said = follow(old, stats, (ema(self.decay), revive(self.revive)))
        window = traffic.record(self._traffic(), stats.count)
        self.average[...], self.weight[...] = new.codes, new.weight
        self.spread[...], self.steps[...] = new.spread, new.steps
        self.counts[...] = window.counts
        return self.report() | {"waist_revived": said["revived"]}

    def report(self) -> dict[str, jax.Array]:
        """Of the window: share of codes used, entropy in bits, perplexity in codes."""
        return traffic.report(self._traffic(), [self.weight[...].size])

    def _traffic(self) -> traffic.Traffic:
        return traffic.Traffic(self.counts[...], self.steps[...])

    def _inward(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        """To unit mean square, or the commitment loss would shrink all to one point."""
        return unit_square(self.inward(self.norm(x.astype(jnp.float32))))
