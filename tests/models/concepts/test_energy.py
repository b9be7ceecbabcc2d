"""One joint energy: its answers equal a plain enumeration and the world's own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.data import concepts as world_of
from narrows.models.concepts import cbm, contract, energy, queries
from narrows.models.concepts.fit import fit

WORLD = world_of.make_world(
    0, concepts=4, classes=3, width=12, coupling=1.0, noise=(0.5, 1.5, 1.5, 0.5)
)
ROWS, HELD = world_of.draw(WORLD, 2000, 1), world_of.draw(WORLD, 400, 2)
LABELS = contract.make_labels(ROWS.concepts, ROWS.labels)
X = jnp.asarray(HELD.x, jnp.float32)
TRUTH = jnp.asarray(HELD.concepts, jnp.float32)
BEAK = jnp.zeros(TRUTH.shape, bool).at[:, 1].set(True)


def fresh(**options):
    return energy.EnergyBottleneck(
        12, WORLD.names, 3, hidden=32, rngs=nnx.Rngs(0), **options
    )


@pytest.fixture(scope="module")
def model():
    return fit(
        fresh(),
        energy.losses(joint=True, dropout=0.0),
        ROWS.x,
        LABELS,
        key=jax.random.key(0),
        weights=energy.JOINT_WEIGHTS,
        steps=300,
    )[0]


def slow_energies(model, row):
    """E of each state, one at a time, in float64."""
    numbers = {
        name: np.asarray(getattr(model, name)[...], np.float64)
        for name in (
            *("class_embedding", "concept_embedding"),
            *("class_out", "concept_out", "global_out"),
        )
    }

    def linear(layer, x):
        kernel, bias = (
            np.asarray(v[...], np.float64) for v in (layer.kernel, layer.bias)
        )
        return x @ kernel + bias

    def gate(a, b, w):
        return np.maximum(a + a * b, 0) @ w

    v, u = numbers["concept_embedding"], numbers["class_embedding"]
    said = {}
    for c in itertools.product((0, 1), repeat=4):
        for y in range(3):
            unit = u[y] / np.linalg.norm(u[y])
            total = gate(linear(model.by_class, row), unit, numbers["class_out"])
            hidden = linear(model.by_concept, row)
            for k in range(4):
                own = v[c[k], k] / np.linalg.norm(v[c[k], k])
                total += gate(hidden, own, numbers["concept_out"][k])
            flat = np.concatenate([v[c[k], k] for k in range(4)])
            total += gate(linear(model.by_pattern, flat), unit, numbers["global_out"])
            said[(*c, y)] = total
    return said


def test_joint_and_marginals_equal_an_enumeration(model):
    for i in (0, 7):
        states = slow_energies(model, np.asarray(X[i], np.float64))
        weight = {s: np.exp(-e) for s, e in states.items()}
        whole = sum(weight.values())
        table = np.exp(queries.log_joint(model, X[i]))
        np.testing.assert_allclose(table.sum(), 1, rtol=1e-5)
        expected = [w / whole for w in weight.values()]  # in the same order
        np.testing.assert_allclose(table.reshape(-1), expected, atol=1e-5)
        out = model(X[i], TRUTH[i], BEAK[i])
        agree = {s: w for s, w in weight.items() if s[1] == int(TRUTH[i, 1])}
        for k in range(4):
            p = sum(w for s, w in agree.items() if s[k]) / sum(agree.values())
            np.testing.assert_allclose(out.concepts[k], p, atol=1e-5)
        for y in range(3):
            p = sum(w for s, w in agree.items() if s[4] == y) / sum(agree.values())
            np.testing.assert_allclose(np.exp(out.classes[y]), p, atol=1e-5)


def test_gradient_inference_finds_the_enumerated_optimum(model, quick_jit):
    found = quick_jit(lambda x: queries.infer(model, x))(X)
    every = model.joint_energy(X)
    best = every.reshape(len(X), -1).min(1)
    assert jnp.mean(found.energy < best + 1e-4) >= 0.95
    place = found.state @ jnp.asarray([8, 4, 2, 1])
    own = every[jnp.arange(len(X)), place, found.label]
    np.testing.assert_allclose(found.energy, own, rtol=1e-4, atol=1e-4)


def test_the_likeliest_pattern_is_right_as_a_whole_more_often(model, quick_jit):
    """It is the best of the enumerated patterns, and keeps what is set."""
    whole = nnx.clone(model)
    whole.inference = "map"
    out = quick_jit(lambda *of: whole(*of))(X[:30], TRUTH[:30], BEAK[:30])
    table = queries.clamp(queries.log_joint(model, X[:30]), TRUTH[:30], BEAK[:30])
    for i, p in enumerate(np.asarray(jnp.exp(table).sum(-1))):
        best = queries.patterns(4)[np.argmax(p)]
        np.testing.assert_array_equal(out.concepts[i], best)
        assert best[1] == TRUTH[i, 1]
    np.testing.assert_allclose(
        out.classes, model(X[:30], TRUTH[:30], BEAK[:30]).classes, atol=1e-5
    )


def test_gradient_inference_keeps_what_is_set(model, quick_jit):
    by_gradient = nnx.clone(model)
    by_gradient.inference = "gradient"
    out = quick_jit(lambda *of: by_gradient(*of))(X[:20], TRUTH[:20], BEAK[:20])
    assert jnp.array_equal(out.concepts[:, 1], TRUTH[:20, 1])
    np.testing.assert_allclose(jnp.exp(out.classes).sum(1), 1, rtol=1e-4)


def test_conditionals_are_those_of_the_world(model):
    """Within 0.05 where it is trained for the joint too; and sums of plain loops."""
    many = jnp.asarray(world_of.draw(WORLD, 8000, 3).x, jnp.float32)
    table = queries.population(model, many)
    np.testing.assert_allclose(table.sum(), 1, rtol=1e-5)
    asked = [({a: 1}, {b: 1}) for a, b in itertools.permutations(WORLD.names, 2)]
    asked += [({a: 1}, {"class": y}) for a in WORLD.names for y in range(3)]
    for event, given in asked:
        said = queries.conditional(table, WORLD.names, event, given)
        true = queries.conditional(jnp.asarray(WORLD.joint), WORLD.names, event, given)
        assert abs(said - true) < 0.05
        rest = {next(iter(event)): 0}
        other = queries.conditional(table, WORLD.names, rest, given)
        np.testing.assert_allclose(said + other, 1, rtol=1e-5)
    three = {"wing": 1, "crest": 0}
    said = queries.conditional(table, WORLD.names, three, {"class": 2, "beak": 1})
    p = np.asarray(table)
    states = list(itertools.product((0, 1), repeat=4))
    slow = sum(p[i, 2] for i, c in enumerate(states) if c[1] and c[0] and not c[2])
    slow /= sum(p[i, 2] for i, c in enumerate(states) if c[1])
    np.testing.assert_allclose(said, slow, rtol=1e-5)


def test_a_correction_moves_other_concepts_and_those_of_a_plain_bottleneck_stay(model):
    before, after = model(X), model(X, TRUTH, BEAK)
    right = [
        np.mean((out.concepts > 0.5) == (TRUTH > 0.5), axis=0)
        for out in (before, after)
    ]
    assert right[1][1] == 1.0
    assert right[1][2] > right[0][2]  # its coupled neighbour
    plain = cbm.ConceptBottleneck(12, WORLD.names, 3, rngs=nnx.Rngs(0))
    kept = jnp.asarray([0, 2, 3])
    assert jnp.array_equal(
        plain(X, TRUTH, BEAK).concepts[:, kept], plain(X).concepts[:, kept]
    )


def test_the_truth_of_all_leaves_the_class_alone(model):
    """p(y | x, c) of all concepts: E_class and E_global, for the concepts set."""
    out = model(X, TRUTH, jnp.ones(TRUTH.shape, bool))
    assert jnp.array_equal(out.concepts, TRUTH)
    energies = model.parts(X)[0] + model.global_energies(TRUTH)
    np.testing.assert_allclose(
        out.classes, jax.nn.log_softmax(-energies), rtol=1e-3, atol=1e-4
    )


def test_what_is_masked_changes_no_loss_and_no_gradient():
    known = jnp.asarray(world_of.hide(ROWS.concepts[:40], 0.3, 0))
    mask = jnp.arange(40) % 5 > 0
    concepts = jnp.asarray(ROWS.concepts[:40], jnp.float32)
    one = contract.Labels(concepts, known, jnp.asarray(ROWS.labels[:40]), mask)
    two = one._replace(
        concepts=jnp.where(known & mask[:, None], concepts, jnp.nan),
        classes=jnp.where(mask, one.classes, -9),
    )

    @nnx.jit
    def said(model, labels):
        def total(model):
            parts = energy.losses(joint=True)(
                model, jnp.asarray(ROWS.x[:40], jnp.float32), labels, jax.random.key(0)
            )
            return sum(parts.values()), parts

        return nnx.grad(total, has_aux=True)(model)

    made = fresh()
    for a, b in zip(
        *(jax.tree.leaves(said(made, of)) for of in (one, two)), strict=True
    ):
        assert jnp.all(jnp.isfinite(a))
        assert jnp.array_equal(a, b)


def test_wrong_input_is_refused():
    names = tuple(f"c{i}" for i in range(13))
    with pytest.raises(ValueError, match="takes at most 12 concepts, but 13 came"):
        energy.EnergyBottleneck(4, names, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="inference: 'guess', but allowed are exact"):
        fresh(inference="guess")
    table = jnp.asarray(WORLD.joint)
    with pytest.raises(ValueError, match=r"\['fin'\], but allowed are wing"):
        queries.conditional(table, WORLD.names, {"fin": 1})
    with pytest.raises(ValueError, match="class: 3, but allowed are 0 to 2"):
        queries.conditional(table, WORLD.names, {"class": 3})
    with pytest.raises(ValueError, match="stand in both"):
        queries.conditional(table, WORLD.names, {"wing": 1}, {"wing": 0})
    with pytest.raises(ValueError, match="flip: 1, but must be"):
        energy.losses(flip=1)
