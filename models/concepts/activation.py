"""Banks of concept vectors in the space of a frozen backbone's features.

    p_m(x) = (c_m . f(x) + b_m) / |c_m|

the signed distance of a row to a concept's hyperplane (Yuksekgonul et al. 2023,
arXiv:2205.15480, Sec. 2). c_m is the normal of a linear SVM that tells rows with the
concept from rows without (a concept activation vector, Kim et al. 2018,
arXiv:1711.11279), or the embedding of the concept's name by a joint model of images and
text, with b_m = 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from sklearn.metrics import roc_auc_score
from sklearn.svm import LinearSVC

from . import contract


class Bank(NamedTuple):
    """Concept vectors of any length; `levels` is None where no example was labelled."""

    names: tuple[str, ...]
    directions: Float[Array, "k d"]
    intercepts: Float[Array, " k"]
    levels: Float[Array, "2 k"] | None  # mean projection without, with the concept


def project(bank: Bank, x: Float[Array | np.ndarray, "*b d"]) -> Float[Array, "*b k"]:
    """Signed distances to the concepts' hyperplanes, float32."""
    lengths = jnp.linalg.norm(bank.directions, axis=-1)
    x = jnp.asarray(x, jnp.float32)
    return (x @ bank.directions.T + bank.intercepts) / lengths


def bank_from_examples(
    names: Sequence[str], x, concepts, known=None, *, c: float = 0.1
) -> Bank:
    """A linear SVM (hinge loss) for each concept, on the rows that know it.

    x: [n, d] features; concepts: [n, k] of 0 and 1, anything where `known` is 0.
    c: the SVM's inverse regularisation; classes weigh alike however rare one is.
    Raises ValueError for a concept of which no positive or no negative row is known.
    """
    names = contract.checked_names(names)
    x, concepts = np.asarray(x, np.float64), np.asarray(concepts)
    known = np.ones(concepts.shape, bool) if known is None else np.asarray(known, bool)
    if concepts.shape != (len(x), len(names)):
        raise ValueError(
            f"concepts: shape {concepts.shape}, but {len(x)} rows of {len(names)} "
            "names are needed"
        )
    directions, intercepts, levels = [], [], []
    for name, column, rows in zip(names, concepts.T, known.T, strict=True):
        there = column[rows] > 0.5
        if there.all() or not there.any():
            raise ValueError(
                f"concepts: {name!r} has {there.sum()} positive rows of {len(there)} "
                "known, but both kinds are needed"
            )
        machine = LinearSVC(
            C=c, loss="hinge", class_weight="balanced", max_iter=20_000, random_state=0
        ).fit(x[rows], there)
        length = np.linalg.norm(machine.coef_)
        margin = machine.decision_function(x[rows]) / length
        directions.append(machine.coef_[0])
        intercepts.append(machine.intercept_[0])
        levels.append((margin[~there].mean(), margin[there].mean()))
    return _bank(names, directions, intercepts, np.transpose(levels))


def bank_from_text(names: Sequence[str], embeddings) -> Bank:
    """The names' embeddings [k, d] at unit length; no intercepts, no levels."""
    names = contract.checked_names(names)
    embeddings = np.asarray(embeddings, np.float64)
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    if embeddings.ndim != 2 or len(embeddings) != len(names) or not (lengths > 0).all():
        raise ValueError(
            f"embeddings: shape {embeddings.shape}, but one row for each of "
            f"{len(names)} names is needed, none of them 0"
        )
    return _bank(names, embeddings / lengths, np.zeros(len(names)), None)


def random_bank(bank: Bank, seed: int) -> Bank:
    """Random directions under the same names: the control of any claim about a bank.

    Where a bank is as wide as its space, random directions are as accurate: accuracy
    does not prove meaning.
    """
    drawn = np.random.default_rng(seed).normal(size=bank.directions.shape)
    return _bank(bank.names, drawn, np.zeros(len(bank.names)), None)


def faithfulness(bank: Bank, x, concepts, known=None) -> dict[str, float]:
    """AUC of each projection for its own concept, by name; 0.5 says nothing.

    Give rows that made no part of the bank. NaN where one kind of row is missing.
    """
    concepts = np.asarray(concepts)
    known = np.ones(concepts.shape, bool) if known is None else np.asarray(known, bool)
    p = np.asarray(project(bank, x))
    said = {}
    for j, name in enumerate(bank.names):
        there, score = concepts[known[:, j], j] > 0.5, p[known[:, j], j]
        both = there.any() and not there.all()
        said[name] = float(roc_auc_score(there, score)) if both else float("nan")
    return said


def _bank(names, directions, intercepts, levels) -> Bank:
    return Bank(
        names,
        jnp.asarray(np.asarray(directions), jnp.float32),
        jnp.asarray(np.asarray(intercepts), jnp.float32),
        None if levels is None else jnp.asarray(levels, jnp.float32),
    )
