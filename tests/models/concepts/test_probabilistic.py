"""Points between anchors: expectations, what is set, and how sure a row leaves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.data import concepts as world_of
from narrows.models.concepts import contract
from narrows.models.concepts.fit import fit
from narrows.models.concepts.probabilistic import (
    WEIGHTS,
    ProbabilisticBottleneck,
    losses,
)

WORLD = world_of.make_world(0, concepts=3, classes=3, width=12, noise=(0.2, 3.0, 0.2))
ROWS, HELD = world_of.draw(WORLD, 1500, 1), world_of.draw(WORLD, 500, 2)
X = jnp.asarray(HELD.x, jnp.float32)


@pytest.fixture(scope="module")
def model():
    fresh = ProbabilisticBottleneck(12, WORLD.names, 3, rngs=nnx.Rngs(0))
    labels = contract.make_labels(ROWS.concepts, ROWS.labels)
    key = jax.random.key(0)
    options = {"weights": WEIGHTS, "steps": 200}
    return fit(fresh, losses(), ROWS.x, labels, key=key, **options)[0]


def test_it_learns(model):
    labels = contract.make_labels(HELD.concepts, HELD.labels)
    said = contract.accuracy(model(X), labels)
    assert said["classes"] > world_of.best_accuracy(WORLD) - 0.1
    right = np.mean((model(X).concepts > 0.5) == (HELD.concepts > 0.5), 0)
    assert right[0] > 0.95
    assert right[2] > 0.95


def test_probabilities_are_means_over_its_own_draws(model):
    """One at a time, in float64, with the draws that every call makes."""
    mu, variance = (np.asarray(a[4], np.float64) for a in model.normals(X[:5]))
    noise = jax.random.normal(jax.random.key(0), (16, 1, 3, 8))[:, 0]
    a, b = np.exp(np.asarray(model.log_scales[...], np.float64))
    anchors = np.asarray(model.anchors[...], np.float64)
    kernel, bias = (np.asarray(v[...]) for v in (model.head.kernel, model.head.bias))
    points = np.asarray(model.class_points[...], np.float64)
    concepts, classes = np.zeros(3), np.zeros(3)
    for draw in np.asarray(noise, np.float64):
        z = mu + np.exp(0.5 * variance) * draw
        far = np.linalg.norm(z - anchors, axis=-1)
        concepts += 1 / (1 + np.exp(-a * (far[0] - far[1]))) / 16
        h = z.reshape(-1) @ kernel + bias
        scores = np.exp(-b * np.linalg.norm(h - points, axis=-1))
        classes += scores / scores.sum() / 16
    out = model(X[:5])
    np.testing.assert_allclose(out.concepts[4], concepts, atol=1e-4)
    np.testing.assert_allclose(jnp.exp(out.classes[4]), classes, atol=1e-4)


def test_all_concepts_set_leave_x_no_way(model):
    """Anchors alone decide: equal truths give equal classes, whatever the row."""
    truth = jnp.asarray(HELD.concepts, jnp.float32)
    out = model(X, truth, jnp.ones(truth.shape, bool)).classes
    pattern = HELD.concepts @ [4, 2, 1]
    for code in np.unique(pattern):
        same = np.asarray(out)[pattern == code]
        np.testing.assert_allclose(same, np.broadcast_to(same[:1], same.shape), 1e-4)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="draws: 0, but it must be at least 1"):
        ProbabilisticBottleneck(4, ("a",), 2, draws=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="random_truth: 1, but must be"):
        losses(1)
