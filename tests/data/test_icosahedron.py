"""The symmetric rule: the solid behind it, its symmetry, and its two definitions."""

import itertools

import numpy as np
import pytest
from narrows.data import icosahedron as ico
from narrows.ib.blahut_arimoto import information


def adjacency():
    a = np.zeros((12, 12), bool)
    for i, j in ico.ADJACENT:
        a[i, j] = a[j, i] = True
    return a


def test_the_edges_are_those_of_an_icosahedron():
    """Every vertex has five neighbours in a ring, and one vertex at distance three."""
    a = adjacency()
    assert a.sum() == 60
    for v in range(12):
        around = np.flatnonzero(a[v])
        assert len(around) == 5
        assert (a[np.ix_(around, around)].sum(1) == 2).all()
    two = (a @ a) | a | np.eye(12, dtype=bool)
    pairs = {(i, j) for i, j in itertools.combinations(range(12), 2) if not two[i, j]}
    assert pairs == set(ico.ANTIPODAL)


def symmetries(a):
    """All relabellings that keep the edges, by extending partial ones."""

    def extend(image):
        v = len(image)
        if v == 12:
            yield image
            return
        for w in set(range(12)) - set(image):
            if all(a[v, u] == a[w, image[u]] for u in range(v)):
                yield from extend([*image, w])

    yield from extend([])


def test_labels_do_not_change_under_the_120_symmetries():
    rule = ico.symmetric_rule()
    assert rule.y.sum() == 2118
    found = list(symmetries(adjacency()))
    assert len(found) == 120
    powers = 2 ** np.arange(11, -1, -1)
    for image in found[:: len(found) // 8]:
        moved = (rule.x[:, image] @ powers).astype(int)  # the row of the turned pattern
        assert (rule.y[moved] == rule.y).all()


def test_the_rule_is_a_threshold_of_the_power_spectrum():
    rule, f = ico.symmetric_rule(), ico.power(ico.patterns())
    assert ((f > ico.THRESHOLD) == rule.y).all()
    assert np.abs(f - ico.THRESHOLD).min() == pytest.approx(0.0625, abs=1e-9)


def test_the_soft_rule_tends_to_the_hard_one():
    rule = ico.symmetric_rule()
    assert np.abs(ico.soft_rule(1e4)[:, 1] - rule.y).max() < 1e-6
    bits = information(ico.soft_rule(66.1) / 4096) / np.log(2)
    assert bits == pytest.approx(0.99, abs=1e-4)
    with pytest.raises(ValueError, match="gamma"):
        ico.soft_rule(0.0)
