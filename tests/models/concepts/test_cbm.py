"""Concept bottlenecks: masks, interventions and names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.data import concepts as world_of
from narrows.models.concepts import cbm, contract
from narrows.models.concepts.fit import fit

WORLD = world_of.make_world(0, concepts=4, classes=3, width=12)
ROWS = world_of.draw(WORLD, 512, 1)
KNOWN = world_of.hide(ROWS.concepts, 0.2, 2)
MASK = np.random.default_rng(3).random(512) < 0.9
LABELS = contract.make_labels(ROWS.concepts, ROWS.labels, KNOWN, MASK)
X = jnp.asarray(ROWS.x, jnp.float32)


def model():
    return cbm.ConceptBottleneck(12, WORLD.names, 3, hidden=16, rngs=nnx.Rngs(0))


def trained(regime, x=X, labels=LABELS):
    return fit(
        model(),
        cbm.losses(regime),
        x,
        labels,
        key=jax.random.key(0),
        weights=cbm.WEIGHTS,
        steps=60,
        batch=64,
        learning_rate=0.02,
    )[0]


@pytest.fixture(scope="module", params=cbm.REGIMES)
def regime(request):
    return request.param


@pytest.fixture(scope="module")
def fitted(regime):
    return trained(regime)


def test_what_is_masked_changes_nothing(regime, fitted):
    """Neither a missing label, nor a masked row, whatever lies there."""
    poisoned = contract.Labels(
        jnp.where(LABELS.known & LABELS.mask[:, None], LABELS.concepts, jnp.nan),
        LABELS.known,
        jnp.where(LABELS.mask, LABELS.classes, -7),
        LABELS.mask,
    )
    again = trained(regime, jnp.where(LABELS.mask[:, None], X, jnp.nan), poisoned)
    for a, b in zip(
        *map(jax.tree.leaves, map(nnx.state, (fitted, again))), strict=True
    ):
        assert jnp.array_equal(a, b)


def test_it_learns(fitted):
    said = contract.accuracy(
        fitted(X), contract.make_labels(ROWS.concepts, ROWS.labels)
    )
    assert said["concepts"] > 0.9
    assert said["classes"] > world_of.best_accuracy(WORLD) - 0.1


def test_the_truth_of_all_is_the_accuracy_of_true_concepts(fitted):
    truth = jnp.asarray(ROWS.concepts, jnp.float32)
    out = fitted(X, truth, jnp.ones(truth.shape, bool))
    assert jnp.array_equal(out.concepts, truth)
    np.testing.assert_allclose(out.classes, fitted.head(truth), rtol=1e-6)


def test_the_order_of_interventions_is_irrelevant():
    rng = np.random.default_rng(0)
    c, truth = jnp.asarray(rng.random((2, 9, 5)), jnp.float32)
    one, two = jnp.asarray(rng.random((2, 9, 5)) < 0.5)
    step = contract.intervene
    assert jnp.array_equal(
        step(step(c, truth, one), truth, two), step(step(c, truth, two), truth, one)
    )
    assert jnp.array_equal(
        step(step(c, truth, one), truth, two), step(c, truth, one | two)
    )


def test_only_a_joint_model_sends_the_class_loss_to_its_concepts():
    for regime in cbm.REGIMES:
        gradient = nnx.grad(
            lambda m, r=regime: cbm.losses(r)(m, X, LABELS, None)["classes"]
        )(model())
        moved = any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient["encoder"]))
        assert moved == (regime == "joint")


def test_concepts_are_addressed_by_name():
    truth, mask = contract.named_truth(WORLD.names, 512, {"crest": 1})
    out, before = model()(X, jnp.asarray(truth), jnp.asarray(mask)), model()(X)
    assert jnp.all(out.concepts[:, 2] == 1)
    kept = jnp.asarray([0, 1, 3])
    assert jnp.array_equal(out.concepts[:, kept], before.concepts[:, kept])
    with pytest.raises(ValueError, match=r"\['fin'\], but allowed are wing, beak"):
        contract.named_truth(WORLD.names, 512, {"fin": 1})


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"names: \['a'\], but"):
        contract.checked_names(("a", "a"))
    with pytest.raises(ValueError, match="regime: 'both', but allowed"):
        cbm.losses("both")
    with pytest.raises(ValueError, match="is known, but allowed are 0 and 1"):
        contract.make_labels([[0.5]], [0])
    with pytest.raises(ValueError, match="truth and mask"):
        contract.intervene(X, X, None)
    with pytest.raises(ValueError, match="but the losses are"):
        fit(
            model(),
            cbm.losses("joint"),
            X,
            LABELS,
            key=jax.random.key(0),
            weights={"classes": 1.0},
        )
