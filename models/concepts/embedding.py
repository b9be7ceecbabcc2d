"""Concept embedding models (Espinosa Zarlenga et al. 2022, arXiv:2209.09056).

    v_k^+ = relu(W_k^+ h), v_k^- = relu(W_k^- h),  p_k = sigmoid(s . [v_k^+; v_k^-] + b)
    y = f([.. p_k v_k^+ + (1 - p_k) v_k^- ..])

(Sec. 3.1.) A concept passes as a mixture of two vectors that know x, so that it holds
more than a bit: `audit` says how much more. In training a concept is set to the truth
with chance `random_truth` (RandInt, Sec. 3.2), and the model learns to be corrected.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from . import contract
from .contract import Labels, Prediction

WEIGHTS = {"concepts": 1.0, "classes": 1.0}


class ConceptEmbedding(nnx.Module):
    """`size` numbers for each side of a concept; the scorer is shared by all concepts.

    >>> model = ConceptEmbedding(8, ("wing", "beak"), 3, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((5, 8))).concepts.shape
    (5, 2)
    """

    def __init__(
        self,
        width: int,
        names: Sequence[str],
        classes: int,
        *,
        hidden: int = 64,
        size: int = 8,
        rngs: nnx.Rngs,
    ):
        self.names, self.size = contract.checked_names(names), size
        k = len(self.names)
        self.inward = nnx.Linear(width, hidden, rngs=rngs)
        self.sides = nnx.Linear(hidden, 2 * k * size, rngs=rngs)
        self.scorer = nnx.Linear(2 * size, 1, rngs=rngs)
        self.head = nnx.Linear(k * size, classes, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*b d"],
        truth: Float[Array, "*b k"] | None = None,
        mask: Bool[Array, "*b k"] | None = None,
    ) -> Prediction:
        logits, sides = self.read(x)
        concepts = contract.intervene(jax.nn.sigmoid(logits), truth, mask)
        return Prediction(concepts, self.head(self.passed(concepts, sides)), logits)

    def read(self, x: Float[Array, "*b d"]):
        """Log odds [*b, k], and the two vectors [*b, k, 2, size], without and with."""
        h = jax.nn.relu(self.inward(x.astype(jnp.float32)))
        sides = jax.nn.relu(self.sides(h))
        sides = sides.reshape(*x.shape[:-1], len(self.names), 2, self.size)
        both = sides.reshape(*sides.shape[:-2], 2 * self.size)
        return self.scorer(both)[..., 0], sides

    def passed(self, concepts: Float[Array, "*b k"], sides) -> Float[Array, "*b e"]:
        """What the head gets: each concept's mixture, side by side."""
        p = concepts[..., None]
        mixed = (1 - p) * sides[..., 0, :] + p * sides[..., 1, :]
        return mixed.reshape(*mixed.shape[:-2], -1)


def losses(random_truth: float = 0.25):
    """The named losses for `fit`; only a known concept is ever set to its truth."""
    if not 0 <= random_truth < 1:
        raise ValueError(f"random_truth: {random_truth}, but must be in [0, 1)")

    def named(model: ConceptEmbedding, x, labels: Labels, key) -> dict[str, Array]:
        known = labels.known & labels.mask[..., None]
        truth = jnp.where(known, labels.concepts, 0.0)
        said = model(
            x, truth, known & jax.random.bernoulli(key, random_truth, known.shape)
        )
        return {
            "concepts": contract.concept_loss(said.concept_logits, labels),
            "classes": contract.class_loss(said.classes, labels),
        }

    return named
