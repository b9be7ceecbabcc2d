"""Post-hoc bottlenecks: banks, the sparse head, edits and the residual."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data import concepts as world_of
from narrows.models.concepts import activation, contract, post_hoc
from narrows.models.concepts.fit import fit
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

WORLD = world_of.make_world(0, concepts=5, classes=3, width=16, noise=0.6)
BANKED, ROWS, HELD = (
    world_of.draw(WORLD, n, s) for n, s in ((300, 1), (600, 2), (600, 3))
)


@pytest.fixture(scope="module")
def bank():
    return activation.bank_from_examples(WORLD.names, BANKED.x, BANKED.concepts)


@pytest.fixture(scope="module")
def model(bank):
    return post_hoc.post_hoc(bank, ROWS.x, ROWS.labels, strength=0.01)


def test_vectors_are_those_of_linear_machines_on_known_rows(bank):
    known = world_of.hide(BANKED.concepts, 0.3, 0)
    unknown = np.where(known, BANKED.concepts, 99)
    found = activation.bank_from_examples(WORLD.names, BANKED.x, unknown, known)
    for j in range(5):
        rows = known[:, j]
        machine = LinearSVC(
            C=0.1,
            loss="hinge",
            class_weight="balanced",
            max_iter=50_000,
            random_state=3,
        ).fit(BANKED.x[rows], BANKED.concepts[rows, j])
        a, b = machine.coef_[0], np.asarray(found.directions[j])
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_the_projection_is_a_signed_distance(bank):
    x = ROWS.x[:50]
    c, b = np.asarray(bank.directions, np.float64), np.asarray(bank.intercepts)
    expected = [
        [(c[m] @ row + b[m]) / np.sqrt((c[m] ** 2).sum()) for m in range(5)]
        for row in x
    ]
    np.testing.assert_allclose(activation.project(bank, x), expected, atol=1e-5)
    scaled = bank._replace(
        directions=7 * bank.directions, intercepts=7 * bank.intercepts
    )
    np.testing.assert_allclose(activation.project(scaled, x), expected, atol=1e-5)


def test_vectors_are_faithful_and_random_ones_are_not(bank):
    said = activation.faithfulness(bank, HELD.x, HELD.concepts)
    assert min(said.values()) > 0.9
    drawn = [activation.random_bank(bank, s) for s in range(20)]
    chance = [activation.faithfulness(r, HELD.x, HELD.concepts) for r in drawn]
    assert abs(np.mean([list(c.values()) for c in chance]) - 0.5) < 0.06


def test_the_head_is_the_library_s_own(bank, model):
    """On standardised projections, with its weights written for plain ones."""
    p = np.asarray(activation.project(bank, ROWS.x), np.float64)
    z = (p - p.mean(0)) / p.std(0)
    own = LogisticRegression(
        C=1 / (600 * 0.01 * 1.01),
        l1_ratio=0.99 / 1.01,
        solver="saga",
        max_iter=20_000,
        tol=1e-8,
    ).fit(z, ROWS.labels)
    logits = np.asarray(model(ROWS.x).classes)
    logits = logits - logits.mean(1, keepdims=True)
    expected = own.decision_function(z)
    expected -= expected.mean(1, keepdims=True)
    np.testing.assert_allclose(logits, expected, atol=5e-3)


def test_the_head_meets_the_conditions_of_its_optimum(bank):
    """|gradient| <= strength alpha at a zero, and equal to it, with sign, elsewhere."""
    strength, alpha = 0.03, 0.9
    fitted = post_hoc.post_hoc(
        bank,
        ROWS.x,
        ROWS.labels,
        strength=strength,
        alpha=alpha,
    )
    p = np.asarray(activation.project(bank, ROWS.x), np.float64)
    z, scale = (p - p.mean(0)) / p.std(0), p.std(0)
    w = np.asarray(fitted.weight, np.float64) * scale
    logits = np.asarray(fitted(ROWS.x).classes, np.float64)
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    gradient = (q - np.eye(3)[ROWS.labels]).T @ z / len(z)
    gradient += 2 * strength * (1 - alpha) * w
    zero = w == 0
    assert 0 < zero.sum() < w.size
    assert np.all(np.abs(gradient[zero]) <= strength * alpha + 1e-4)
    np.testing.assert_allclose(
        gradient[~zero], -strength * alpha * np.sign(w[~zero]), atol=1e-4
    )


def test_a_strong_penalty_leaves_the_priors(bank):
    fitted = post_hoc.post_hoc(bank, ROWS.x, ROWS.labels, strength=10.0)
    assert jnp.all(fitted.weight == 0)
    np.testing.assert_allclose(
        jax.nn.softmax(fitted.bias), np.bincount(ROWS.labels) / 600, atol=1e-3
    )


def test_two_classes_have_two_logits(bank):
    fitted = post_hoc.post_hoc(bank, ROWS.x, ROWS.labels == 0)
    assert fitted(HELD.x).classes.shape == (600, 2)
    hit = np.argmax(fitted(HELD.x).classes, -1) == (HELD.labels == 0)
    assert hit.mean() > max(np.mean(HELD.labels == 0), np.mean(HELD.labels != 0))


def test_without_a_residual_the_hybrid_is_its_base(model):
    a, b = post_hoc.Hybrid(model)(jnp.asarray(HELD.x)), model(HELD.x)
    for one, two in zip(a, b, strict=True):
        assert jnp.array_equal(one, two)
    assert post_hoc.residual_share(post_hoc.Hybrid(model), HELD.x) == 0


def test_the_residual_learns_what_the_bank_misses_and_leaves_the_head(bank):
    """Of a bank of one concept; the head keeps its weights bit for bit."""
    one = activation.Bank(
        bank.names[:1], bank.directions[:1], bank.intercepts[:1], bank.levels[:, :1]
    )
    base = post_hoc.post_hoc(one, ROWS.x, ROWS.labels)
    full, _ = fit(
        post_hoc.Hybrid(base),
        post_hoc.hybrid_losses,
        ROWS.x,
        contract.make_labels(np.zeros((600, 1)), ROWS.labels),
        key=jax.random.key(0),
        weights=post_hoc.WEIGHTS,
        steps=200,
    )
    held = contract.make_labels(np.zeros((600, 1)), HELD.labels)
    x = jnp.asarray(HELD.x, jnp.float32)
    gain = contract.accuracy(full(x), held)["classes"]
    gain -= contract.accuracy(base(x), held)["classes"]
    assert gain > 0.05
    assert jnp.array_equal(full.base.weight, base.weight)
    assert 0 < post_hoc.residual_share(full, x) < 1


def test_edits_are_by_name_and_keep_the_rest(model):
    cut = post_hoc.prune(model, {1: ["beak", "tail"]})
    assert jnp.all(cut.weight[1, jnp.asarray([1, 4])] == 0)
    kept = np.ones((3, 5), bool)
    kept[1, [1, 4]] = False
    np.testing.assert_array_equal(cut.weight[kept], model.weight[kept])
    scaled = post_hoc.prune(model, {1: ["beak", "tail"]}, normalise=True)
    np.testing.assert_allclose(
        np.abs(scaled.weight).sum(1), np.abs(model.weight).sum(1), rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"\['fin'\], but allowed are wing"):
        post_hoc.prune(model, {1: ["fin"]})
    with pytest.raises(ValueError, match="class: 3, but allowed are 0 to 2"):
        post_hoc.prune(model, {3: ["wing"]})


def test_a_head_fitted_anew_keeps_its_bank(model):
    """And is what the rows it was given alone would have made."""
    other = post_hoc.refit(model, HELD.x, HELD.labels, strength=0.01)
    fresh = post_hoc.post_hoc(model.bank, HELD.x, HELD.labels, strength=0.01)
    assert jnp.array_equal(other.weight, fresh.weight)
    assert jnp.array_equal(other.directions, model.directions)
    assert not jnp.array_equal(other.weight, model.weight)


def test_an_intervention_sets_a_projection(model):
    truth = jnp.asarray(HELD.concepts, jnp.float32)
    out = model(HELD.x, truth, jnp.ones(truth.shape, bool))
    p = model.levels[0] + (model.levels[1] - model.levels[0]) * truth
    np.testing.assert_allclose(out.classes, model.head(p), rtol=1e-5, atol=1e-5)
    assert jnp.array_equal(out.concepts, truth)


def test_text_has_no_levels_to_set():
    text = np.random.default_rng(0).normal(size=(5, 16))
    bank = activation.bank_from_text(WORLD.names, text)
    np.testing.assert_allclose(jnp.linalg.norm(bank.directions, axis=1), 1, rtol=1e-6)
    fitted = post_hoc.post_hoc(bank, ROWS.x, ROWS.labels)
    with pytest.raises(ValueError, match="without labelled examples"):
        fitted(ROWS.x, jnp.ones((600, 5)), jnp.ones((600, 5), bool))
    with pytest.raises(ValueError, match="embeddings: shape"):
        activation.bank_from_text(WORLD.names, text[:3])
    with pytest.raises(ValueError, match="'wing' has 0 positive rows"):
        activation.bank_from_examples(WORLD.names, BANKED.x, 0 * BANKED.concepts)


def test_greedy_pruning_drops_what_costs_most_and_stops(bank, model):
    """Against every single removal, tried one by one."""

    def accuracy(head):
        return float((head(HELD.x).classes.argmax(-1) == HELD.labels).mean())

    # A weight that only harms: class 0 shouts when the first concept is there.
    spoilt = dataclasses.replace(model, weight=model.weight.at[0, 0].set(9.0))
    once = post_hoc.greedy_prune(spoilt, HELD.x, HELD.labels, count=1)
    singles = [
        accuracy(dataclasses.replace(spoilt, weight=spoilt.weight.at[c, k].set(0.0)))
        for c in range(3)
        for k in range(5)
    ]
    assert accuracy(once) == pytest.approx(max(singles), abs=1e-6)
    assert accuracy(once) > accuracy(spoilt)
    many = post_hoc.greedy_prune(spoilt, HELD.x, HELD.labels, count=40)
    again = post_hoc.greedy_prune(many, HELD.x, HELD.labels, count=1)
    assert jnp.array_equal(many.weight, again.weight)  # nothing is left to gain
    assert accuracy(many) >= accuracy(once)
    with pytest.raises(ValueError, match="count: -1"):
        post_hoc.greedy_prune(model, HELD.x, HELD.labels, count=-1)
