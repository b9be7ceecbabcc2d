"""Is it a bottleneck? The same questions to every concept model.

A class that is as well predicted when the concepts are shuffled, or removed, was never
predicted from them; and soft concepts can carry what no concept means.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from sklearn.linear_model import LogisticRegression

from .contract import ConceptModel, Labels
from .leakage import leakage, measured_leakage, whole_rows


class Relied(NamedTuple):
    """Shares of right classes, of rows whose every concept is known."""

    own: float  # with the concepts that the model predicts
    true: float  # all concepts set to the truth
    shuffled: float  # all set to another row's truth: near chance in a bottleneck
    removed: float  # all set to the likelier value of each: what passes by
    chance: float  # always the commonest class


def relied(
    model: ConceptModel,
    x: Float[Array, "n d"],
    labels: Labels,
    *,
    key: Key[Array, ""],
) -> Relied:
    """Accuracy with the model's own, the true, shuffled and removed concepts.

    Concepts are set as by a person, so that a residual, an embedding or any other way
    around them shows: `removed` and `shuffled` above chance is what it carries.
    """
    rows, x, truth, y = whole_rows(x, labels)
    everything = jnp.ones(truth.shape, bool)
    other = truth[jax.random.permutation(key, len(truth))]
    usual = jnp.broadcast_to(jnp.round(truth.mean(0)), truth.shape)

    @jax.jit
    def right(concepts):
        return jnp.mean(jnp.argmax(model(x, concepts, everything).classes, -1) == y)

    own = jnp.mean(jnp.argmax(model(x).classes, -1) == y)
    chance = np.bincount(np.asarray(y)).max() / rows
    said = [own, right(truth), right(other), right(usual), chance]
    return Relied(*map(float, said))


def completeness(accuracy: float, reference: float, chance: float) -> float:
    """(accuracy - chance) / (reference - chance) (Yeh et al. 2020, arXiv:1910.07969).

    reference: of a model that sees all features. 1: the concepts suffice.
    Raises ValueError where the reference is no better than chance.

    >>> completeness(0.75, 0.875, 0.25)
    0.8
    """
    if reference <= chance:
        raise ValueError(
            f"reference: {reference}, but must be above chance, {chance}: there is "
            "nothing to be complete about"
        )
    return (accuracy - chance) / (reference - chance)


def reference_accuracy(x, classes, held_x, held_classes) -> float:
    """Of a logistic regression on all features, on rows held out."""
    probe = LogisticRegression(max_iter=1000).fit(np.asarray(x), np.asarray(classes))
    return float(probe.score(np.asarray(held_x), np.asarray(held_classes)))


def audit(
    model: ConceptModel,
    x: Float[Array, "n d"],
    labels: Labels,
    *,
    key: Key[Array, ""],
    reference: float,
) -> dict[str, float]:
    """One row of the table: `relied`, completeness and both leakages of the log odds.

    reference: accuracy of a model that sees all features, as `reference_accuracy`.
    """
    said = relied(model, x, labels, key=key)
    kept = jnp.where(labels.mask[:, None], jnp.asarray(x, jnp.float32), 0.0)
    passed = model(kept).concept_logits
    leak, other = leakage(passed, labels), measured_leakage(passed, labels, key=key)
    return said._asdict() | {
        "completeness": completeness(said.own, reference, said.chance),
        "leak_bits": leak.bits,
        "leak_error": leak.error,
        "leak_per_concept": leak.per_concept,
        "leak_bits_by_neighbours": other.bits,
        "leak_error_by_neighbours": other.error,
    }
