"""The world of concepts draws from the probabilities that it states."""

import numpy as np
import pytest
from narrows.data import concepts


def test_draws_follow_the_joint():
    """Each of 24 cells within 4.5 standard errors."""
    world = concepts.make_world(0, concepts=3, classes=3, width=8)
    rows = concepts.draw(world, 40_000, 1)
    cell = rows.concepts @ [4, 2, 1] * 3 + rows.labels
    share = np.bincount(cell, minlength=24) / 40_000
    p = world.joint.reshape(-1)
    assert np.all(np.abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / 40_000) + 1e-9)
    np.testing.assert_allclose(world.joint.sum(0), 1 / 3)


def test_concepts_lie_along_their_directions():
    world = concepts.make_world(0, concepts=3, classes=2, width=8, noise=0.0)
    rows = concepts.draw(world, 50, 1)
    np.testing.assert_allclose(
        rows.x @ world.concept_map.T, 2.0 * rows.concepts - 1, atol=1e-9
    )


def test_without_coupling_neighbours_are_independent_given_the_class():
    for coupling, least in ((0.0, 0.0), (1.0, 0.05)):
        world = concepts.make_world(
            0, concepts=2, classes=2, width=4, coupling=coupling
        )
        p = world.joint[:, 0] / world.joint[:, 0].sum()
        gap = abs(p[3] - (p[2] + p[3]) * (p[1] + p[3]))
        assert gap >= least
        assert coupling or gap < 1e-12


def test_the_label_has_a_corner_of_its_own_only_where_it_leaks():
    plain, leaky = (
        concepts.make_world(0, concepts=3, classes=3, width=8, direct=d)
        for d in (0.0, 2.0)
    )
    rows = concepts.draw(leaky, 200, 1)
    assert np.all(np.argmax(rows.x @ leaky.class_map.T, 1) == rows.labels)
    rows = concepts.draw(plain, 200, 1)
    assert np.mean(np.argmax(rows.x @ plain.class_map.T, 1) == rows.labels) < 0.6


def test_unlinked_concepts_are_independent_coins():
    world = concepts.unlinked(concepts.make_world(0, concepts=3, classes=3), 1)
    np.testing.assert_allclose(world.joint.sum(1), 1 / 8)
    assert world.joint.max(1).min() * 8 > 0.4  # and tell of the class


def test_the_posterior_is_that_of_a_plain_sum():
    world = concepts.make_world(0, concepts=3, classes=2, width=8, noise=(0.5, 1.0, 2))
    x = concepts.draw(world, 4, 1).x
    for row, said in zip(x, concepts.posterior(world, x), strict=True):
        z = world.concept_map @ row
        p = np.zeros((8, 2))
        for i, c in enumerate(concepts.patterns(3)):
            far = ((z - (2 * c - 1)) / world.noise) ** 2
            p[i] = world.joint[i] * np.exp(-far.sum() / 2)
        np.testing.assert_allclose(said, p / p.sum(), rtol=1e-9)
    with pytest.raises(ValueError, match="direct is 1"):
        concepts.posterior(world._replace(direct=1), x)


def test_it_is_its_seed():
    world = concepts.make_world(0)
    one, two = concepts.draw(world, 9, 3), concepts.draw(concepts.make_world(0), 9, 3)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.x, concepts.draw(world, 9, 4).x)
    hidden = concepts.hide(one.concepts, 0.5, 0)
    np.testing.assert_array_equal(hidden, concepts.hide(one.concepts, 0.5, 0))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="concepts: 9, but must be from 1 to 8"):
        concepts.make_world(concepts=9)
    with pytest.raises(ValueError, match="need 10 directions"):
        concepts.make_world(width=9)
    with pytest.raises(ValueError, match="classes: 1"):
        concepts.make_world(classes=1)
    with pytest.raises(ValueError, match=r"share: 1.0, but must be in \[0, 1\)"):
        concepts.hide(np.zeros((2, 2), int), 1.0, 0)
