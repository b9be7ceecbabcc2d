"""Concepts found from likenesses alone, as if a joint model had given them."""

import numpy as np
import pytest
from narrows.data import concepts as world_of
from narrows.models.concepts import activation, label_free

WORLD = world_of.make_world(0, concepts=4, classes=3, width=16, coupling=0.3, noise=0.3)
ROWS, HELD = world_of.draw(WORLD, 800, 1), world_of.draw(WORLD, 400, 2)
RNG = np.random.default_rng(0)


def likeness(rows, noise=0.1):
    """What a joint model might say: higher with the concept, in its own units."""
    said = 0.2 + 0.05 * (rows.concepts + noise * RNG.normal(size=rows.concepts.shape))
    return np.concatenate([said, RNG.normal(size=(len(said), 1))], 1)


@pytest.fixture(scope="module")
def found():
    names = (*WORLD.names, "nothing")
    return label_free.bank_from_similarity(names, ROWS.x, likeness(ROWS), steps=200)


def test_what_is_in_the_features_is_found_and_the_rest_leaves(found):
    assert found.bank.names == WORLD.names
    assert (
        found.similarity["nothing"]
        < 0.45
        <= min(found.similarity[name] for name in WORLD.names)
    )
    faithful = activation.faithfulness(found.bank, HELD.x, HELD.concepts)
    assert min(faithful.values()) > 0.9
    mean = np.asarray(activation.project(found.bank, ROWS.x)).mean(0)
    np.testing.assert_allclose(mean, 0, atol=0.1)


def test_similarity_is_the_cosine_of_cubes():
    a, b = RNG.normal(size=(2, 50, 3))
    for j, said in enumerate(np.asarray(label_free.similarity(a, b))):
        p, q = a[:, j], b[:, j]
        p, q = ((p - p.mean()) / p.std()) ** 3, ((q - q.mean()) / q.std()) ** 3
        expected = p @ q / np.linalg.norm(p) / np.linalg.norm(q)
        np.testing.assert_allclose(said, expected, rtol=1e-4)
    np.testing.assert_allclose(label_free.similarity(a, 3 * a + 1), 1, rtol=1e-5)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"likeness: shape \(10, 2\), but 10 rows of"):
        label_free.bank_from_similarity(("a",), np.ones((10, 3)), np.ones((10, 2)))
    with pytest.raises(ValueError, match=r"held_out: 0.1 of 10 rows"):
        label_free.bank_from_similarity(
            ("a",), np.ones((10, 3)), np.ones((10, 1)), held_out=0.1
        )
    x, noise = RNG.normal(size=(60, 4)), RNG.normal(size=(60, 1))
    with pytest.raises(ValueError, match=r"no concept reaches least=0\.9"):
        label_free.bank_from_similarity(("a",), x, noise, least=0.9, steps=5)
