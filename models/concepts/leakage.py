"""What passes a concept bottleneck beside the concepts, in bits of the class.

    I(Y; passed | c) = H(Y | c) - H(Y | c, passed)

with c the true concepts, so that a class which depends on concepts in any way at all is
no leak. Two opinions: a probe's cross-entropies on rows held out, and an estimator of
`ib/` within each pattern of concepts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Key
from sklearn.linear_model import LogisticRegression

from ...ib.estimators.table import make_estimator
from . import contract
from .contract import Labels

CHUNK = 64  # rows of one pattern in which information is estimated at once


class Leak(NamedTuple):
    """What passes past the true concepts, in bits of the class a row."""

    bits: float  # a lower bound, but for noise: what is not found may still be there
    error: float  # standard error
    per_concept: float


class Cut(NamedTuple):
    """Rows that know all concepts, in halves that teach and that test."""

    rest: Float[np.ndarray, "n p"]  # what passes, less its pattern's mean, unit spread
    code: np.ndarray  # [n], which pattern of true concepts a row has
    y: np.ndarray
    learn: np.ndarray  # indices
    test: np.ndarray


def leakage(passed: Float[ArrayLike, "n p"], labels: Labels, *, seed: int = 0) -> Leak:
    """What a probe reads of the class from `passed` that true concepts do not tell.

    Both entropies are cross-entropies of logistic regressions on rows held out: the
    first sees which of the patterns of true concepts a row has, which is all that
    concepts can tell; the second sees `passed` too. passed: what the model's head gets,
    as probabilities, log odds or embeddings. Half of the rows, by `seed`, teach the
    probes; rows with an unknown concept are left out. Negative bits are the noise of a
    probe that has more to fit. Raises ValueError where no row knows all concepts.
    """
    cut = _halves(passed, labels, seed)
    pattern = np.eye(cut.code.max() + 1)[cut.code]
    nats = []
    for seen in (pattern, np.concatenate([pattern, cut.rest], 1)):
        probe = _probe(seen, cut)
        column = np.searchsorted(probe.classes_, cut.y[cut.test])
        column = np.minimum(column, len(probe.classes_) - 1)
        met = probe.classes_[column] == cut.y[cut.test]
        q = probe.predict_proba(seen[cut.test])[np.arange(len(cut.test)), column]
        nats.append(-np.log(np.where(met, np.maximum(q, 1e-12), 1e-12)))
    return _leak((nats[0] - nats[1]) / np.log(2), labels)


def measured_leakage(
    passed: Float[ArrayLike, "n p"],
    labels: Labels,
    *,
    key: Key[jax.Array, ""],
    estimator: str = "mixed_ksg",
    seed: int = 0,
) -> Leak:
    """I(Y; scores of a probe | c) by an estimator of `ib/`, row by row of a pattern.

    Scores are the linear functions of `passed` that the second probe of `leakage` would
    add to its logits, of rows it did not learn from: a function of what passes, so that
    they tell no more than it. Each pattern's rows are cut into chunks of 64, all of one
    shape; the mean over chunks weighs patterns by their rows, and rows that fill no
    chunk are left out. Raises ValueError as `leakage`, for an unknown estimator, or
    where no pattern fills a chunk.
    """
    cut = _halves(passed, labels, seed)
    pattern = np.eye(cut.code.max() + 1)[cut.code]
    probe = _probe(np.concatenate([pattern, cut.rest], 1), cut)
    scores = cut.rest @ probe.coef_[:, pattern.shape[1] :].T
    chunks = [
        rows[: len(rows) // CHUNK * CHUNK].reshape(-1, CHUNK)
        for code in range(pattern.shape[1])
        for rows in [cut.test[cut.code[cut.test] == code]]
    ]
    chunks = np.concatenate(chunks)
    if not len(chunks):
        raise ValueError(
            f"labels: no pattern of concepts has {CHUNK} of the {len(cut.test)} rows "
            "that test, but the estimator needs as many: give more rows"
        )
    # A tiny noise parts equal scores: a leak of none has scores of 0 alone.
    noise = np.random.default_rng(seed).normal(size=scores.shape)
    scores = scores + 1e-6 * noise * np.maximum(scores.std(), 1.0)
    one_hot = np.eye(cut.y.max() + 1)[cut.y]
    of = make_estimator(estimator)

    @jax.jit
    def every(keys, x, y):
        return jax.lax.map(lambda a: of(*a).value, (keys, x, y))

    x, y = (jnp.asarray(a[chunks], jnp.float32) for a in (scores, one_hot))
    nats = np.asarray(every(jax.random.split(key, len(chunks)), x, y))
    return _leak(nats / np.log(2), labels)


def whole_rows(x, labels: Labels):
    """Count, x, concepts and classes of the rows whose every concept is known.

    Raises ValueError where there is none.
    """
    keep = np.asarray(contract.whole(labels))
    if not keep.any():
        raise ValueError("labels: no row knows all concepts, but the audit needs some")
    return (
        int(keep.sum()),
        jnp.asarray(np.asarray(x)[keep], jnp.float32),
        jnp.asarray(np.asarray(labels.concepts)[keep], jnp.float32),
        jnp.asarray(np.asarray(labels.classes)[keep]),
    )


def _halves(passed, labels: Labels, seed: int) -> Cut:
    _, passed, truth, y = whole_rows(passed, labels)
    passed, y = np.asarray(passed, np.float64), np.asarray(y)
    _, code = np.unique(np.asarray(truth), axis=0, return_inverse=True)
    code = code.reshape(-1)
    learn, test = np.array_split(np.random.default_rng(seed).permutation(len(y)), 2)
    pattern = np.eye(code.max() + 1)[code]
    # Within a pattern only what differs from its own mean can tell of the class.
    count = np.maximum(pattern[learn].sum(0), 1)[:, None]
    rest = passed - pattern @ (pattern[learn].T @ passed[learn] / count)
    rest = rest / np.maximum(rest[learn].std(0), 1e-9)
    return Cut(rest, code, y, learn, test)


def _probe(seen, cut: Cut) -> LogisticRegression:
    probe = LogisticRegression(C=1.0, max_iter=2000)
    return probe.fit(seen[cut.learn], cut.y[cut.learn])


def _leak(bits: np.ndarray, labels: Labels) -> Leak:
    mean = float(bits.mean())
    error = float(bits.std(ddof=1) / np.sqrt(len(bits)))
    return Leak(mean, error, mean / labels.concepts.shape[-1])
