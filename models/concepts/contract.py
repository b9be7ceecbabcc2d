"""What every concept model takes and gives."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int


class Prediction(NamedTuple):
    """What a concept model says of its rows."""

    concepts: Float[Array, "*b k"]  # p(c = 1), in [0, 1]; the truth where intervened
    classes: Float[Array, "*b m"]  # logits
    concept_logits: Float[Array, "*b k"]  # before any intervention


class Labels(NamedTuple):
    """A batch's truth, as far as it is known."""

    concepts: Float[Array, "*b k"]  # 0 or 1; anything, even NaN, where not known
    known: Bool[Array, "*b k"]
    classes: Int[Array, "*b"]  # in [0, m); anything where the row is masked
    mask: Bool[Array, "*b"]  # rows that count


class ConceptModel(Protocol):
    """Called on rows, with concepts that a person knows better."""

    names: tuple[str, ...]

    def __call__(
        self,
        x: Float[Array, "*b d"],
        truth: Float[Array, "*b k"] | None = None,
        mask: Bool[Array, "*b k"] | None = None,
    ) -> Prediction: ...


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of concepts as a tuple: at least one, none twice."""
    names = tuple(names)
    if not names or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names: {twice or 'none'}, but each concept needs its own")
    return names


def columns(names: Sequence[str], chosen: Sequence[str] | str) -> list[int]:
    """Where concepts stand, by name.

    Raises ValueError for a name that no concept has.

    >>> columns(("wing", "beak"), "beak")
    [1]
    """
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    wrong = [name for name in chosen if name not in names]
    if wrong:
        raise ValueError(f"concept: {wrong}, but allowed are {', '.join(names)}")
    return [list(names).index(name) for name in chosen]


def named_truth(names: Sequence[str], rows: int, values: dict[str, object]):
    """truth and mask [rows, k] that set concepts by name, each to one or `rows` values.

    >>> truth, mask = named_truth(("wing", "beak"), 2, {"beak": 1})
    >>> mask.tolist()
    [[False, True], [False, True]]
    """
    truth = np.zeros((rows, len(names)), np.float32)
    mask = np.zeros((rows, len(names)), bool)
    for column, value in zip(
        columns(names, list(values)), values.values(), strict=True
    ):
        truth[:, column], mask[:, column] = value, True
    return truth, mask


def make_labels(concepts, classes, known=None, mask=None) -> Labels:
    """Labels of n rows; all that is not said to be missing counts as known.

    Raises ValueError where a known concept is neither 0 nor 1.
    """
    concepts, classes = np.asarray(concepts, np.float32), np.asarray(classes)
    known = np.ones(concepts.shape, bool) if known is None else np.asarray(known, bool)
    mask = np.ones(classes.shape, bool) if mask is None else np.asarray(mask, bool)
    used = concepts[known & mask[:, None]]
    if not np.isin(used, (0, 1)).all():
        wrong = used[~np.isin(used, (0, 1))][0]
        raise ValueError(f"concepts: {wrong} is known, but allowed are 0 and 1")
    return Labels(
        jnp.asarray(concepts),
        jnp.asarray(known),
        jnp.asarray(classes, jnp.int32),
        jnp.asarray(mask),
    )


def intervene(
    concepts: Float[Array, "*b k"],
    truth: Float[Array, "*b k"] | None,
    mask: Bool[Array, "*b k"] | None,
) -> Float[Array, "*b k"]:
    """The truth where the mask is 1, the concepts elsewhere; neither given: as it was.

    Raises ValueError where one is given without the other.
    """
    if (truth is None) != (mask is None):
        raise ValueError("truth and mask: one without the other, but they go together")
    if truth is None or mask is None:
        return concepts
    return jnp.where(mask, truth.astype(concepts.dtype), concepts)


def mean(values: Float[Array, "*b"], keep: Bool[Array, "*b"]) -> Float[Array, ""]:
    """Over what is kept; 0 where nothing is, and without regard to what lies there."""
    total = jnp.sum(jnp.where(keep, values, 0.0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(keep, dtype=jnp.float32), 1.0)


def concept_loss(logits: Float[Array, "*b k"], labels: Labels) -> Float[Array, ""]:
    """Binary cross-entropy in nats, mean over the known concepts of unmasked rows."""
    known = labels.known & labels.mask[..., None]
    target = jnp.where(known, labels.concepts, 0.0)
    return mean(optax.sigmoid_binary_cross_entropy(logits, target), known)


def class_loss(
    logits: Float[Array, "*b m"], labels: Labels, keep: Bool[Array, "*b"] | None = None
) -> Float[Array, ""]:
    """Cross-entropy in nats, mean over the rows kept; default the unmasked ones."""
    keep = labels.mask if keep is None else keep & labels.mask
    target = jnp.where(keep, labels.classes, 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return mean(nats, keep)


def whole(labels: Labels) -> Bool[Array, "*b"]:
    """Rows whose every concept is known: only they teach a head of true concepts."""
    return labels.mask & jnp.all(labels.known, -1)


def log_odds(p: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """Of probabilities, finite at 0 and 1."""
    p = jnp.clip(p, 1e-6, 1 - 1e-6)
    return jnp.log(p) - jnp.log1p(-p)


def accuracy(prediction: Prediction, labels: Labels) -> dict[str, jax.Array]:
    """Shares of right classes, right known concepts, and rows with all right."""
    known = labels.known & labels.mask[..., None]
    right = (prediction.concepts > 0.5) == (labels.concepts > 0.5)
    hit = jnp.argmax(prediction.classes, -1) == labels.classes
    return {
        "classes": mean(hit, labels.mask),
        "concepts": mean(right, known),
        "all_concepts": mean(jnp.all(right | ~known, -1), labels.mask),
    }
