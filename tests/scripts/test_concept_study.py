"""Several seeds at once are the same models as one after another; tasks by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from narrows.data import concepts as worlds
from narrows.models.concepts import contract, table
from narrows.models.concepts.fit import fit
from narrows.scripts import concept_study, concept_tasks, coupled_concepts

WAY = table.METHODS["joint"]
WORLD = worlds.make_world(0, concepts=3, classes=2, width=8)
DRAWS = [worlds.draw(WORLD, 60, seed) for seed in (1, 2)]


def make(rngs):
    return WAY.make(8, WORLD.names, 2, hidden=4, rngs=rngs)


def test_seeds_and_rates_train_as_if_alone():
    x, labels = concept_study.labelled(DRAWS)
    trained = concept_study.fit_seeds(
        *(make, WAY.losses, x, labels),
        seeds=(3, 4),
        rates=(1e-2, 1e-1),
        weights=WAY.weights,
        steps=5,
        batch=16,
    )
    born, taught = jax.random.split(jax.random.key(4))
    alone, _ = fit(
        *(make(nnx.Rngs(born)), WAY.losses, x[1]),
        jax.tree.map(lambda leaf: leaf[1], labels),
        key=taught,
        weights=WAY.weights,
        steps=5,
        batch=16,
        learning_rate=optax.cosine_decay_schedule(1e-1, 5),
    )
    said = trained[1].one(1)(x[1]).classes
    np.testing.assert_allclose(said, alone(x[1]).classes, rtol=1e-4, atol=1e-5)
    asks = concept_study.asking(lambda model, x: model(x).classes)
    np.testing.assert_allclose(asks(trained[1], x)[1], said, rtol=1e-4, atol=1e-5)
    scores = [np.array([0.1, 0.9]), np.array([0.8, 0.2])]
    best = concept_study.best_of(trained, scores)
    for seed, rate in ((0, 1), (1, 0)):
        for a, b in zip(
            *(jax.tree.leaves(t.state) for t in (best, trained[rate])), strict=True
        ):
            assert jnp.array_equal(a[seed], b[seed])


def test_gains_are_those_of_plain_counts():
    """A model that copies a corrected concept to its right neighbour."""

    def model(x, truth=None, mask=None):
        concepts = contract.intervene(x, truth, mask)
        if truth is not None:
            copied = jnp.where(mask[:, :-1], truth[:, :-1], concepts[:, 1:])
            concepts = jnp.concatenate([concepts[:, :1], copied], 1)
        return contract.Prediction(concepts, jnp.zeros((len(x), 2)), concepts)

    model.names = WORLD.names  # type: ignore[attr-defined]
    labels = contract.make_labels([[1, 1, 0], [0, 0, 0]], [0, 1])
    near = np.eye(3, k=1, dtype=bool)
    seen = jnp.zeros((2, 3))
    said = concept_study.corrected(model, 1.0, seen, labels, jnp.asarray(near))
    # Of pairs (0, 1) and (1, 2): half of the rows gain, then half of them lose.
    np.testing.assert_allclose(said["gain of neighbours"], 0.0, atol=1e-6)
    near[1] = False
    said = concept_study.corrected(model, 1.0, seen, labels, jnp.asarray(near))
    np.testing.assert_allclose(said["gain of neighbours"], 0.5, atol=1e-6)


def test_the_likeliest_seen_pattern_is_chosen():
    setting = coupled_concepts.rendered("classes", 0)
    sure = 9.0 * (2 * setting.parts[2].concepts - 1)
    assert coupled_concepts.known_patterns(sure, setting) == 1.0
    assert coupled_concepts.known_patterns(-sure, setting) < 0.3


def test_parts_of_a_task_are_apart_and_its_seed_decides():
    sizes = concept_tasks.Sizes(100, 40, 60)
    for name in ("world", "digits"):
        one, two, other = (
            concept_tasks.make_task(name, None, sizes, seed=seed) for seed in (0, 0, 1)
        )
        assert [len(part.x) for part in one[2:]] == [100, 40, 60]
        assert one.learn.concepts.shape == (100, len(one.names))
        assert one.learn.labels.max() < one.classes
        np.testing.assert_array_equal(one.test.x, two.test.x)
        assert not np.array_equal(one.learn.x, other.learn.x)
        rows = [{row.tobytes() for row in part.x} for part in one[2:]]
        assert not rows[0] & rows[2]
    with pytest.raises(ValueError, match="task: 'fish', but allowed are world"):
        concept_tasks.make_task("fish", None, sizes, seed=0)
    with pytest.raises(ValueError, match="digits has 1797 rows"):
        concept_tasks.make_task("digits", None, sizes._replace(learn=1800), seed=0)
