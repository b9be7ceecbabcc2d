"""The audit finds planted ways around concepts, and none where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data import concepts as world_of
from narrows.models.concepts import audit, contract, leakage
from narrows.models.concepts.contract import Prediction

WORLD = world_of.make_world(0, concepts=4, classes=3, width=12)
ROWS = world_of.draw(WORLD, 4000, 1)
LABELS = contract.make_labels(ROWS.concepts, ROWS.labels)
RNG = np.random.default_rng(0)
TABLE = jnp.log(jnp.asarray(WORLD.joint, jnp.float32))


def classify(x, truth=None, mask=None, *, bypass):
    """x holds concepts and the class as one-hot: the exact head, and a way around."""
    concepts = contract.intervene(x[..., :4], truth, mask)
    bits = jnp.round(concepts).astype(jnp.int32) @ jnp.asarray([8, 4, 2, 1])
    classes = TABLE[bits] + bypass * x[..., 4:]
    return Prediction(concepts, classes, contract.log_odds(concepts))


X = jnp.asarray(np.concatenate([ROWS.concepts, np.eye(3)[ROWS.labels]], 1), jnp.float32)


def with_bypass(amount):
    def model(x, truth=None, mask=None):
        return classify(x, truth, mask, bypass=amount)

    return model


def test_a_bottleneck_falls_to_chance_without_its_concepts():
    said = audit.relied(with_bypass(0.0), X, LABELS, key=jax.random.key(0))
    best = np.argmax(WORLD.joint, 1)
    np.testing.assert_allclose(
        said.true, np.mean(best[ROWS.concepts @ [8, 4, 2, 1]] == ROWS.labels), rtol=1e-5
    )
    assert said.own == said.true
    assert said.shuffled < 1 / 3 + 0.04
    assert said.removed < 1 / 3 + 0.04
    np.testing.assert_allclose(said.chance, np.bincount(ROWS.labels).max() / 4000)


def test_a_way_around_shows():
    said = audit.relied(with_bypass(50.0), X, LABELS, key=jax.random.key(0))
    assert said.removed == said.shuffled == said.true == 1.0


def by_probe(passed):
    return leakage.leakage(passed, LABELS)


def by_neighbours(passed):
    return leakage.measured_leakage(passed, LABELS, key=jax.random.key(0))


OPINIONS = pytest.mark.parametrize("opinion", [by_probe, by_neighbours])


@OPINIONS
def test_no_leak_reads_below_two_hundredths_of_a_bit_a_concept(opinion):
    """Concepts with noise of their own, however soft, tell nothing beyond concepts."""
    passed = 2.0 * ROWS.concepts - 1 + RNG.normal(size=ROWS.concepts.shape)
    said = opinion(jnp.asarray(passed))
    assert abs(said.per_concept) < 0.02
    assert said.bits < 3 * said.error + 0.01
    hard = opinion(jnp.asarray(ROWS.concepts))
    assert abs(hard.per_concept) < 0.02


@OPINIONS
def test_a_planted_leak_is_found_at_its_size(opinion):
    """The whole class passes: I(Y; passed | c) is H(Y | c), known from the world."""
    passed = np.concatenate([ROWS.concepts, 9.0 * np.eye(3)[ROWS.labels]], 1)
    said = opinion(jnp.asarray(passed))
    given = WORLD.joint / WORLD.joint.sum(1, keepdims=True)
    entropy = -np.sum(WORLD.joint * np.log2(given))
    assert abs(said.bits - entropy) < 3 * said.error + 0.05
    small = np.concatenate([ROWS.concepts, np.eye(3)[ROWS.labels]], 1)
    small[:, 4:] += RNG.normal(size=(4000, 3))
    found = opinion(small)
    assert 5 * found.error < found.bits < said.bits


def test_too_few_rows_of_any_pattern_are_refused():
    few = jax.tree.map(lambda leaf: leaf[:40], LABELS)
    with pytest.raises(ValueError, match="no pattern of concepts has 64 of the 20"):
        leakage.measured_leakage(X[:40], few, key=jax.random.key(0))


def test_rows_with_an_unknown_concept_are_left_out():
    known = world_of.hide(ROWS.concepts, 0.1, 2)
    some = contract.make_labels(ROWS.concepts, ROWS.labels, known)
    poisoned = some._replace(concepts=jnp.where(some.known, some.concepts, jnp.nan))
    one, two = (
        audit.audit(with_bypass(1.0), X, of, key=jax.random.key(0), reference=1.0)
        for of in (some, poisoned)
    )
    assert one == two
    assert all(np.isfinite(value) for value in one.values())
    none = contract.make_labels(ROWS.concepts, ROWS.labels, np.zeros_like(known))
    with pytest.raises(ValueError, match="no row knows all concepts"):
        leakage.leakage(X, none)


def test_completeness_needs_something_to_complete():
    assert audit.completeness(0.9, 0.9, 0.5) == 1.0
    assert audit.completeness(0.5, 0.9, 0.5) == 0.0
    with pytest.raises(ValueError, match=r"reference: 0.3, but must be above chance"):
        audit.completeness(0.5, 0.3, 0.5)
    x, y = np.asarray(X), ROWS.labels
    assert audit.reference_accuracy(x[:500], y[:500], x[500:], y[500:]) == 1.0
