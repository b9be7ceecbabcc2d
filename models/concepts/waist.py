"""Concepts inside another network: a position passes as k named bits.

    p = sigmoid(W_in norm(x)),  c = [p > 1/2] (straight-through to p),  z = W_out c

As the concept layer of Koh et al. 2020 (arXiv:2007.04612), but hard, so that what
passes is counted: log2 of a concept's two frequencies over a window of steps. Nothing
in the layer makes a bit mean its name. The trainer does, with `contract.concept_loss`
of the logits against whatever labels there are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ..bottleneck import Waist
from ..quantize import traffic
from ..quantize.layer import Memory
from . import contract


class ConceptWaist(nnx.Module):
    """A waist of named binary concepts, `width` numbers in and out.

    names: of the concepts; a number k stands for "concept_0" to "concept_{k-1}".
    window: optimizer steps over which frequencies are counted.

    >>> layer = ConceptWaist(8, names=("verb", "plural"), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((3, 8))).concepts.shape, layer.capacity
    ((3, 2), 2.0)
    """

    def __init__(
        self,
        width: int,
        *,
        names: Sequence[str] | int = 16,
        window: int = 32,
        rngs: nnx.Rngs,
    ):
        if isinstance(names, int):
            names = [f"concept_{i}" for i in range(names)]
        if window < 1:
            raise ValueError(f"window: {window} steps, but it must be at least 1")
        self.names = contract.checked_names(names)
        k = len(self.names)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.inward = nnx.Linear(width, k, rngs=rngs)
        self.outward = nnx.Linear(k, width, rngs=rngs)
        self.traffic = Memory(traffic.quiet(window, self._sizes()))

    def _sizes(self) -> list[int]:
        return [2] * len(self.names)

    @property
    def capacity(self) -> float:
        """Bits of all concepts of a position."""
        return float(len(self.names))

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Log odds of the concepts, float32; what concept labels teach."""
        return self.inward(self.norm(x.astype(jnp.float32)))

    def __call__(
        self,
        x: Float[Array, "*b d"],
        mask: Bool[Array, "*b"] | None = None,
        *,
        truth: Float[Array, "*b k"] | None = None,
        known: Bool[Array, "*b k"] | None = None,
    ) -> Waist:
        """concepts are those that pass, 0 or 1: the truth where `known` is 1.

        The loss is 0. bits are -log2 of each passed concept's frequency, added up as if
        concepts were independent: an upper bound of what a position tells.
        """
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)  # not even a NaN there goes further
        soft = jax.nn.sigmoid(self.logits(x))
        hard = (soft > 0.5).astype(jnp.float32)
        passed = contract.intervene(
            hard + (soft - jax.lax.stop_gradient(soft)), truth, known
        )
        keep = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
        codes = jax.lax.stop_gradient(passed > 0.5).astype(jnp.int32)
        seen = self.traffic.get_value()
        return Waist(
            self.outward(passed).astype(x.dtype),
            jnp.zeros((), jnp.float32),
            traffic.bits(seen, codes, keep, self._sizes()),
            traffic.count(codes, keep, self._sizes()),
            codes=codes,
            concepts=passed,
        )

    def update(self, stats: Float[Array, " c"]) -> dict[str, jax.Array]:
        """Count the window. Call once a step."""
        self.traffic.set_value(traffic.record(self.traffic.get_value(), stats))
        return self.report()

    def report(self) -> dict[str, jax.Array]:
        """Of the window: share of values used, entropy in bits of all concepts."""
        return traffic.report(self.traffic.get_value(), self._sizes())
