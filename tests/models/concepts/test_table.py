"""Laws of every concept model in the table, trained or not, and of the waist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.data import concepts as world_of
from narrows.models.concepts import contract, table
from narrows.models.concepts.fit import fit
from narrows.models.concepts.waist import ConceptWaist

WORLD = world_of.make_world(0, concepts=4, classes=3, width=12)
ROWS = world_of.draw(WORLD, 40, 1)
X, TRUTH = jnp.asarray(ROWS.x, jnp.float32), jnp.asarray(ROWS.concepts, jnp.float32)
KNOWN = jnp.asarray(world_of.hide(ROWS.concepts, 0.3, 2))
LABELS = contract.make_labels(ROWS.concepts, ROWS.labels, KNOWN, np.arange(40) % 5 > 0)


@pytest.fixture(scope="module", params=table.METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def model(method):
    return table.make_concept_model(method, 12, WORLD.names, 3, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def send(model, quick_jit):
    return quick_jit(lambda x, truth, mask: model(x, truth, mask))


def test_shapes_and_what_is_set(model, send):
    assert model.names == WORLD.names
    out = send(X, TRUTH, KNOWN)
    shapes = [leaf.shape for leaf in out]
    assert shapes == [(40, 4), (40, 3), (40, 4)]
    assert all(leaf.dtype == jnp.float32 for leaf in out)
    assert jnp.array_equal(out.concepts[KNOWN], TRUTH[KNOWN])
    assert jnp.all((out.concepts >= 0) & (out.concepts <= 1))


def test_the_truth_counts_only_where_it_is_set(send):
    poisoned = jnp.where(KNOWN, TRUTH, jnp.nan)
    one, two = send(X, TRUTH, KNOWN), send(X, poisoned, KNOWN)
    for a, b in zip(one, two, strict=True):
        assert jnp.array_equal(a, b)
    nothing = send(X, TRUTH, jnp.zeros_like(KNOWN))
    for a, b in zip(nothing, send(X, 1 - TRUTH, jnp.zeros_like(KNOWN)), strict=True):
        assert jnp.array_equal(a, b)


def test_rows_do_not_touch(send):
    out = send(X, TRUTH, KNOWN)
    order = np.random.default_rng(0).permutation(40)
    mixed = send(X[order], TRUTH[order], KNOWN[order])
    for a, b in zip(out, mixed, strict=True):
        np.testing.assert_allclose(a[order], b, rtol=1e-4, atol=1e-5)


def test_masked_labels_change_no_loss_and_no_gradient(method, model, quick_jit):
    known = KNOWN & LABELS.mask[:, None]
    poisoned = LABELS._replace(
        concepts=jnp.where(known, LABELS.concepts, jnp.nan),
        classes=jnp.where(LABELS.mask, LABELS.classes, -9),
    )
    losses, weights = table.METHODS[method].losses, table.METHODS[method].weights
    graph, state = nnx.split(model)

    @quick_jit
    def said(state, labels):
        def total(state):
            parts = losses(nnx.merge(graph, state), X, labels, jax.random.key(0))
            return sum(parts.values()), parts

        return jax.grad(total, has_aux=True)(state)

    one, two = said(state, LABELS), said(state, poisoned)
    assert set(one[1]) == set(weights)
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        assert jnp.all(jnp.isfinite(a))
        assert jnp.array_equal(a, b)


def test_an_embedding_learns():
    rows, held = world_of.draw(WORLD, 1000, 3), world_of.draw(WORLD, 500, 4)
    way = table.METHODS["embedding"]
    made, _ = fit(
        table.make_concept_model("embedding", 12, WORLD.names, 3, rngs=nnx.Rngs(0)),
        way.losses,
        rows.x,
        contract.make_labels(rows.concepts, rows.labels),
        key=jax.random.key(0),
        weights=way.weights,
        steps=100,
    )
    labels = contract.make_labels(held.concepts, held.labels)
    said = contract.accuracy(made(jnp.asarray(held.x, jnp.float32)), labels)
    assert said["concepts"] > 0.9
    assert said["classes"] > world_of.best_accuracy(WORLD) - 0.1


def test_an_unknown_model_lists_the_known():
    with pytest.raises(
        ValueError, match="model: 'oracle', but allowed are independent"
    ):
        table.make_concept_model("oracle", 4, ("a",), 2, rngs=nnx.Rngs(0))


def test_a_waist_passes_its_bits_and_nothing_else():
    """z is a function of the codes; a concept set by hand is the one that passes."""
    layer = ConceptWaist(12, names=WORLD.names, rngs=nnx.Rngs(0))
    out = layer(X)
    np.testing.assert_allclose(
        out.z, layer.outward(out.codes.astype(jnp.float32)), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(out.bits, 4.0)  # before any traffic: a bit each
    fixed = layer(X, truth=TRUTH, known=KNOWN)
    assert jnp.array_equal(fixed.codes[KNOWN] > 0, TRUTH[KNOWN] > 0)
    assert jnp.array_equal(fixed.codes[~KNOWN], out.codes[~KNOWN])
    for _ in range(40):
        said = layer.update(layer(X).stats)
    p = np.asarray(out.codes).mean(0)
    p = p[(p > 0) & (p < 1)]
    entropy = -np.sum(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    np.testing.assert_allclose(said["waist_entropy"], entropy, rtol=1e-4)
    np.testing.assert_allclose(layer(X).bits.mean(), entropy, atol=0.05)
