"""Neighbours against sorting, and the estimators of labels and of a third variable."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.ib import tasks
from narrows.ib.estimators.conditional import chain_rule, conditional_ksg
from narrows.ib.estimators.gaussian import gaussian
from narrows.ib.estimators.kozachenko_leonenko import (
    kl_label_information,
    neighbour_weights,
)
from narrows.ib.estimators.neighbours import nearest
from scipy.special import digamma

KEY = jax.random.key(0)


@pytest.mark.parametrize("k", [1, 4, 17])
def test_the_nearest_are_those_of_a_sort(k):
    """Ties and infinite distances among them, lengths that no group divides."""
    for n in (k, 50, 601, 2000):
        values = np.random.default_rng(n).integers(0, 300, size=(5, n)).astype("f")
        values[:, ::7] = np.inf
        found = jax.vmap(lambda row: nearest(row, k))(jnp.asarray(values))
        assert np.array_equal(found, np.sort(values, 1)[:, :k])


def test_information_of_labels_is_a_difference_of_entropies():
    x = np.asarray(jax.random.normal(KEY, (90, 2)), np.float64)
    y = np.arange(90) % 3
    x[:, 0] += y
    found = kl_label_information(jnp.asarray(x, jnp.float32), jnp.asarray(y), k=8)
    white = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    used = neighbour_weights(2, 8)

    def entropy(rows):
        gaps = np.sort(np.linalg.norm(rows[:, None] - rows, axis=-1), 1)[:, 1:9]
        logs = 2 * np.log(gaps) - digamma(np.arange(1, 9)) + np.log(len(rows) - 1)
        return (logs @ used).mean()

    wanted = entropy(white) - np.mean([entropy(white[y == c]) for c in range(3)])
    assert float(found.value) == pytest.approx(wanted, abs=1e-4)


def test_information_of_labels_is_near_the_truth():
    """Three normal laws two deviations apart; the truth by quadrature."""
    s = np.linspace(-6, 10, 20001)
    laws = np.exp(-((s - np.array([[0], [2], [4]])) ** 2) / 2) / math.sqrt(2 * math.pi)
    mixture = laws.mean(0)
    truth = float((laws * np.log(laws / mixture)).mean(0).sum() * (s[1] - s[0]))
    y = jnp.arange(900) % 3
    x = 2.0 * y[:, None] + jax.random.normal(KEY, (900, 1))
    found = kl_label_information(x, y)
    assert abs(found.value - truth) < 3 * found.standard_error + 0.02
    few = kl_label_information(x, jnp.arange(900))
    assert not few.converged  # labels of one row


def reference_conditional(x, y, z, k):
    parts = [(a - a.mean(0)) / a.std(0) for a in (x, y, z)]
    total = 0.0
    for i in range(len(x)):
        dx, dy, dz = (np.delete(np.abs(a - a[i]).max(1), i) for a in parts)
        xz, yz = np.maximum(dx, dz), np.maximum(dy, dz)
        radius = np.sort(np.maximum(xz, yz))[k - 1]
        inside = [(d < radius).sum() + 1 for d in (xz, yz, dz)]
        total += digamma(inside[0]) + digamma(inside[1]) - digamma(inside[2])
    return digamma(k) - total / len(x)


def test_conditional_neighbours_are_those_of_a_loop():
    x, y, z = tasks.conditional_gaussian(2, 1.0).sample(KEY, 120)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (x, y, z)]
        found = conditional_ksg(*map(jnp.asarray, wide), k=3, block=50)
    wanted = reference_conditional(*wide, 3)
    assert float(found.value) == pytest.approx(wanted, abs=1e-12)


def test_what_z_explains_is_not_counted():
    """x and y share z alone: dependent, but not given z; and the known information."""
    x, y, z = tasks.conditional_gaussian(1, 0.0).sample(KEY, 800)
    assert gaussian(x, y).value > 0.1
    assert abs(conditional_ksg(x, y, z).value) < 0.06

    def normal(key, a, b):
        return gaussian(a, b)

    for information in (0.0, 1.0):
        triple = tasks.conditional_gaussian(1, information).sample(KEY, 800)
        found = chain_rule(normal, KEY, *triple)
        assert abs(found.value - information) < 3 * found.standard_error
        assert found.converged


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: kl_label_information(x, jnp.zeros(3, int)), "labels"),
        (lambda x: kl_label_information(x, jnp.zeros(20, int), k=20), "k: 20"),
        (lambda x: conditional_ksg(x, x[:4], x), "y: 4"),
        (lambda x: conditional_ksg(x, x, x[:4]), "y: 4"),
        (lambda x: conditional_ksg(x, x, x, k=10), "k: 20"),
        (lambda x: tasks.conditional_gaussian(1, -1.0), "information"),
        (lambda x: tasks.mixture(1, correlation=1.0), "correlation"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call(jnp.ones((20, 2)))
