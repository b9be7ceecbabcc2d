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

from . import contract
from .contract import ConceptModel, Labels


class Relied(NamedTuple):
    """Shares of right classes, of rows whose every concept is known."""

    own: float  # with the concepts that the model predicts
    true: float  # all concepts set to the truth
    shuffled: float  # all set to another row's truth: near chance in a bottleneck
    removed: float  # all set to the likelier value of each: what passes by
    chance: float  # always the commonest class


class Leak(NamedTuple):
    """What passes past the true concepts, in bits of the class a row."""

    bits: float  # I(Y; passed | c) that a probe finds on rows held out; a lower bound
    error: float  # standard error over those rows
    per_concept: float


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
    rows, x, truth, y = _whole(x, labels)
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


def leakage(passed: Float[Array, "n p"], labels: Labels, *, seed: int = 0) -> Leak:
    """What a probe reads of the class from `passed` that true concepts do not tell.

        bits = H(Y | c) - H(Y | c, passed),  both as held-out cross-entropies

    The first probe sees which of the patterns of true concepts a row has, which is all
    that concepts can tell; the second sees `passed` too. passed: what the model's head
    gets, as probabilities, log odds or embeddings. Half of the rows, by `seed`, teach
    the probes and the other half tests them; rows with an unknown concept are left out.
    Negative bits are the noise of a probe that has more to fit.
    """
    _, passed, truth, y = _whole(passed, labels)
    passed, y = np.asarray(passed, np.float64), np.asarray(y)
    _, pattern = np.unique(np.asarray(truth), axis=0, return_inverse=True)
    pattern = np.eye(pattern.max() + 1)[pattern.reshape(-1)]
    # Within a pattern only what differs from its own mean can tell of the class.
    order = np.random.default_rng(seed).permutation(len(y))
    learn, test = np.array_split(order, 2)
    count = np.maximum(pattern[learn].sum(0), 1)[:, None]
    rest = passed - pattern @ (pattern[learn].T @ passed[learn] / count)
    rest = rest / np.maximum(rest[learn].std(0), 1e-9)
    nats = []
    for seen in (pattern, np.concatenate([pattern, rest], 1)):
        probe = LogisticRegression(C=1.0, max_iter=2000).fit(seen[learn], y[learn])
        column = np.searchsorted(probe.classes_, y[test])
        column = np.minimum(column, len(probe.classes_) - 1)
        met = probe.classes_[column] == y[test]
        q = probe.predict_proba(seen[test])[np.arange(len(test)), column]
        nats.append(-np.log(np.where(met, np.maximum(q, 1e-12), 1e-12)))
    gain = (nats[0] - nats[1]) / np.log(2)
    bits = float(gain.mean())
    error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
    return Leak(bits, error, bits / labels.concepts.shape[-1])


def audit(
    model: ConceptModel,
    x: Float[Array, "n d"],
    labels: Labels,
    *,
    key: Key[Array, ""],
    reference: float,
) -> dict[str, float]:
    """One row of the table: `relied`, completeness and leakage of the log odds.

    reference: accuracy of a model that sees all features, as `reference_accuracy`.
    """
    said = relied(model, x, labels, key=key)
    kept = jnp.where(labels.mask[:, None], jnp.asarray(x, jnp.float32), 0.0)
    leak = leakage(model(kept).concept_logits, labels)
    return said._asdict() | {
        "completeness": completeness(said.own, reference, said.chance),
        "leak_bits": leak.bits,
        "leak_error": leak.error,
        "leak_per_concept": leak.per_concept,
    }


def _whole(x, labels: Labels):
    """Count, x, concepts and classes of the rows whose every concept is known."""
    keep = np.asarray(contract.whole(labels))
    if not keep.any():
        raise ValueError("labels: no row knows all concepts, but the audit needs some")
    return (
        int(keep.sum()),
        jnp.asarray(np.asarray(x)[keep], jnp.float32),
        jnp.asarray(np.asarray(labels.concepts)[keep], jnp.float32),
        jnp.asarray(np.asarray(labels.classes)[keep]),
    )
