"""Questions to a person, on a model whose every answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.data import concepts as world_of
from narrows.models.concepts import cbm, contract, intervention

WORLD = world_of.make_world(0, concepts=4, classes=3, width=12)
ROWS = world_of.draw(WORLD, 200, 1)
X = jnp.asarray(ROWS.x, jnp.float32)
KNOWN = world_of.hide(ROWS.concepts, 0.1, 2)
LABELS = contract.make_labels(ROWS.concepts, ROWS.labels, KNOWN)
WHOLE = contract.make_labels(ROWS.concepts, ROWS.labels)


@pytest.fixture(scope="module")
def model():
    """An encoder of chance and the best head for true concepts."""
    made = cbm.ConceptBottleneck(12, WORLD.names, 3, head_hidden=16, rngs=nnx.Rngs(0))
    table = jnp.log(jnp.asarray(WORLD.joint))
    s = jnp.asarray(world_of.patterns(4))
    # Sixteen detectors of one pattern each: relu of 1 only at that pattern.
    made.head.inward.kernel[...] = (2.0 * s - 1).T.astype(jnp.float32)
    made.head.inward.bias[...] = 1.0 - s.sum(1).astype(jnp.float32)
    made.head.outward.kernel[...] = table.astype(jnp.float32)
    made.head.outward.bias[...] = jnp.zeros(3)
    return made


@pytest.mark.parametrize("policy", intervention.POLICIES)
def test_the_end_is_the_accuracy_of_true_concepts(model, policy):
    """Of the Bayes classifier here, whatever the order of questions."""
    said = intervention.curve(model, X, WHOLE, policy, key=jax.random.key(0))
    best = np.argmax(WORLD.joint, 1)[ROWS.concepts @ [8, 4, 2, 1]] == ROWS.labels
    np.testing.assert_allclose(said.classes[-1], best.mean(), atol=1e-6)
    np.testing.assert_allclose(said.asked, np.arange(5))
    assert jnp.isnan(said.others[-1])
    assert said.classes[-1] > said.classes[0]
    start = contract.accuracy(model(X), WHOLE)
    np.testing.assert_allclose(said.classes[0], start["classes"])
    np.testing.assert_allclose(said.others[0], start["concepts"])


def test_what_is_not_known_is_never_set(model):
    poisoned = LABELS._replace(
        concepts=jnp.where(LABELS.known, LABELS.concepts, jnp.nan)
    )
    one, two = (
        intervention.curve(model, X, of, "uncertainty", key=jax.random.key(0))
        for of in (LABELS, poisoned)
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(one.asked[-1], KNOWN.sum(1).mean(), rtol=1e-6)


def test_a_group_is_set_together(model):
    groups = [["wing", "stripe"], ["beak", "crest"]]
    said = intervention.curve(
        model, X, WHOLE, "random", key=jax.random.key(0), groups=groups
    )
    np.testing.assert_allclose(said.asked, [0, 2, 4])
    with pytest.raises(ValueError, match="each of wing, beak, crest, stripe must"):
        intervention.curve(
            model, X, WHOLE, "random", key=jax.random.key(0), groups=groups[:1]
        )
    with pytest.raises(ValueError, match="policy: 'oracle', but allowed are random"):
        intervention.curve(model, X, WHOLE, "oracle", key=jax.random.key(0))


def test_policies_score_what_they_say(model):
    out = model(X)
    nothing, truth = jnp.zeros(LABELS.known.shape, bool), WHOLE.concepts
    p = np.asarray(out.concepts, np.float64)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    key = jax.random.key(0)
    said = intervention.uncertainty(model, X, out, truth, nothing, key)
    np.testing.assert_allclose(said, entropy, rtol=1e-4)
    together = intervention.cooperative(model, X, out, truth, nothing, key)
    now = np.asarray(jax.nn.softmax(out.classes), np.float64)
    row, best = 5, int(np.argmax(now[5]))
    for i in range(4):
        expected = entropy[row, i]
        for value in (0.0, 1.0):
            c = p[row].copy()
            c[i] = value
            then = jax.nn.softmax(model.head(jnp.asarray(c, jnp.float32)))[best]
            chance = p[row, i] if value else 1 - p[row, i]
            expected += chance * abs(float(then) - now[row, best])
        np.testing.assert_allclose(together[row, i], expected, rtol=1e-3)
    slopes = intervention.gradient(model, X, out, truth, nothing, key)
    for i in range(4):
        ends = []
        for value in (0.0, 1.0):
            c = p[row].copy()
            c[i] = value
            ends.append(jax.nn.softmax(model.head(jnp.asarray(c, jnp.float32)))[best])
        np.testing.assert_allclose(slopes[row, i], abs(ends[1] - ends[0]), atol=1e-5)
