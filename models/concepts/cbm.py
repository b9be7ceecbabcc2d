"""Concept bottlenecks: x -> concepts -> class (Koh et al. 2020, arXiv:2007.04612).

    c = sigmoid(g(x)),  y = f(c)

(Sec. 3.) Three ways to train: *independent* teaches f on true concepts, *sequential* on
the predicted ones without a gradient to g, *joint* sends the gradient through. What
passes is the probability, so that an intervention is a 0 or a 1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from . import contract
from .contract import Labels, Prediction

REGIMES = ("independent", "sequential", "joint")
WEIGHTS = {"concepts": 1.0, "classes": 1.0}


class Perceptron(nnx.Module):
    """One hidden layer of ReLUs, or none where `hidden` is 0."""

    def __init__(self, width: int, out: int, *, hidden: int, rngs: nnx.Rngs):
        self.inward = nnx.Linear(width, hidden, rngs=rngs) if hidden else None
        self.outward = nnx.Linear(hidden or width, out, rngs=rngs)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b out"]:
        x = x.astype(jnp.float32)
        return self.outward(x if self.inward is None else jax.nn.relu(self.inward(x)))


class ConceptBottleneck(nnx.Module):
    """g of one hidden layer, f linear (or with `head_hidden` ReLUs between).

    >>> model = ConceptBottleneck(8, ("wing", "beak"), 3, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((5, 8))).classes.shape
    (5, 3)
    """

    def __init__(
        self,
        width: int,
        names: Sequence[str],
        classes: int,
        *,
        hidden: int = 64,
        head_hidden: int = 0,
        rngs: nnx.Rngs,
    ):
        self.names = contract.checked_names(names)
        k = len(self.names)
        self.encoder = Perceptron(width, k, hidden=hidden, rngs=rngs)
        self.head = Perceptron(k, classes, hidden=head_hidden, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*b d"],
        truth: Float[Array, "*b k"] | None = None,
        mask: Bool[Array, "*b k"] | None = None,
    ) -> Prediction:
        logits = self.encoder(x)
        concepts = contract.intervene(jax.nn.sigmoid(logits), truth, mask)
        return Prediction(concepts, self.head(concepts), logits)


def losses(regime: str):
    """The named losses of a regime, for `fit`.

    "independent" learns its head from rows whose every concept is known: a missing
    label is not replaced by a guess. The other two need no true concept for the head.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime: {regime!r}, but allowed are {', '.join(REGIMES)}")

    def named(model: ConceptBottleneck, x, labels: Labels, key) -> dict[str, Array]:
        del key
        logits = model.encoder(x)
        concepts, keep = jax.nn.sigmoid(logits), labels.mask
        if regime == "independent":
            keep = contract.whole(labels)
            concepts = jnp.where(keep[..., None], labels.concepts, 0.0)
        elif regime == "sequential":
            concepts = jax.lax.stop_gradient(concepts)
        return {
            "concepts": contract.concept_loss(logits, labels),
            "classes": contract.class_loss(model.head(concepts), labels, keep),
        }

    return named
