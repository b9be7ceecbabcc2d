"""Bounds hold over draws and shrink as they say; posteriors equal dense Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.ib.bounds import code_bound, combined, given_label, order
from narrows.ib.swag import (
    LEAST,
    Posterior,
    collected,
    log_density,
    no_moments,
    parameter_information,
    posterior,
    sample,
)
from scipy import stats

INPUTS, CODES, LABELS = 48, 16, 3


def world(seed):
    """p(x, y) over 48 inputs and 3 labels, a code of 16 values, and p(z, y)."""
    rng = np.random.default_rng(seed)
    joint = rng.dirichlet(np.full(INPUTS * LABELS, 0.3)).reshape(INPUTS, LABELS)
    code = rng.integers(0, CODES, INPUTS)
    return joint, code, np.stack([joint[code == z].sum(0) for z in range(CODES)])


def entropy(p):
    return -(p[p > 0] * np.log(p[p > 0])).sum()


def test_what_is_kept_beyond_the_label_is_a_difference_of_informations():
    """I(X;Z|Y) = I(X;Z) - I(Z;Y), for Y - X - Z is Markov; by enumeration."""
    joint, code, small = world(0)
    found = 0.0
    for y in range(LABELS):  # I(X;Z|Y=y) from the three-way table itself
        table = np.zeros((INPUTS, CODES))
        table[np.arange(INPUTS), code] = joint[:, y]
        share = table.sum()
        table /= share
        rows, columns = table.sum(1), table.sum(0)
        found += share * (entropy(rows) + entropy(columns) - entropy(table))
    whole = entropy(small.sum(1))  # I(X;Z) = H(Z)
    label = whole + entropy(small.sum(0)) - entropy(small)  # I(Z;Y)
    np.testing.assert_allclose(given_label(small), found, rtol=1e-10)
    np.testing.assert_allclose(given_label(small), whole - label, rtol=1e-10)


def gaps(small, n, draws, rng):
    """True less observed error of the decoder that is best on the n pairs."""
    flat = small.ravel()
    for _ in range(draws):
        seen = rng.multinomial(n, flat).reshape(small.shape) / n
        wrong = np.ones(small.shape)
        wrong[np.arange(CODES), seen.argmax(1)] = 0
        yield (wrong * (small - seen)).sum()


@pytest.mark.parametrize("n", [100, 2000])
def test_the_bound_is_above_the_gap_in_every_draw(n):
    rng = np.random.default_rng(n)
    small = world(1)[2]
    bound = code_bound(small, n, delta=0.05)
    found = np.array(list(gaps(small, n, 200, rng)))
    assert found.max() > 0.1 * n**-0.5  # the decoder overfits
    assert np.all(found <= bound.value)
    assert bound.value < 1 or n < 2000  # and the bound says something


def test_it_shrinks_like_one_over_root_n_and_grows_with_information():
    small = world(2)[2]
    sizes = 2.0 ** np.arange(12, 20)
    values = [code_bound(small, int(n)).value for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(values), 1)[0]
    assert -0.55 < slope < -0.45
    coarse = small.reshape(CODES // 4, 4, LABELS).sum(1)
    assert given_label(coarse) < given_label(small)
    assert code_bound(coarse, 4096).value < code_bound(small, 4096).value
    among = code_bound(small, 4096, chosen_among=np.log(100))
    assert among.value > code_bound(small, 4096).value
    assert code_bound(small, 4096, highest=2.0).value == pytest.approx(
        2 * code_bound(small, 4096).value
    )


def test_rare_cells_are_left_out_where_that_is_cheaper():
    """A long tail of codes costs its probability, not the root of its cells."""
    tail = np.full(10_000, 1e-6)
    joint = np.concatenate([[0.99], tail])[:, None]
    bound = code_bound(joint, 1000)
    assert bound.atypical == pytest.approx(0.01)
    assert bound.value < 0.2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: given_label(np.ones((2, 2))), "joint: shape"),
        (lambda: code_bound(np.eye(2) / 2, 0), "n=0"),
        (lambda: code_bound(np.eye(2) / 2, 9, delta=1.0), "delta=1.0"),
        (lambda: combined(np.ones(2), np.zeros(2)), "parameters: mean 0"),
        (lambda: parameter_information(jax.random.key(0), [], bound="x"), "bound: 'x'"),
        (
            lambda: posterior(no_moments(jnp.ones(2)), jnp.ones((1, 2))),
            "deviations: 1",
        ),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_terms_are_brought_to_one_scale_and_ranked_by_the_root():
    a, b = np.array([1.0, 3.0]), np.array([100.0, 300.0])
    np.testing.assert_allclose(combined(a, b), 2 * a)
    np.testing.assert_allclose(order(a, 4.0, b), np.sqrt((a + b + 1) / 4))


def path(seed, count=40, d=20):
    """Snapshots of 20 parameters, correlated."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / d**0.5
    return (rng.normal(size=(count, d)) @ mix + rng.normal(size=d)).astype(np.float32)


def fitted(snapshots, rank=10):
    moments, deviations = no_moments(jnp.asarray(snapshots[0])), []
    for snapshot in snapshots:
        moments = collected(moments, jnp.asarray(snapshot))
        deviations.append(jnp.asarray(snapshot) - moments.first)
    return posterior(moments, jnp.stack(deviations[-rank:]))


def test_the_posterior_is_the_dense_gaussian():
    """Moments over all snapshots, deviations of the last ten, density by inversion."""
    snapshots = path(0).astype(np.float64)
    of = fitted(path(0))
    running = np.cumsum(snapshots, 0) / np.arange(1, 41)[:, None]
    late = (snapshots - running)[-10:]
    cov = np.diag(snapshots.var(0) + LEAST) + late.T @ late / 9
    theta = snapshots[3]
    dense = stats.multivariate_normal(snapshots.mean(0), cov).logpdf(theta)
    found = log_density(jnp.asarray(theta, jnp.float32), of)
    np.testing.assert_allclose(found, dense, rtol=1e-4)
    draws = jax.vmap(lambda k: sample(k, of))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(np.cov(np.asarray(draws).T), cov, atol=0.15)


def test_parameters_say_which_set_they_learned_up_to_the_number_of_sets():
    key = jax.random.key(1)
    tensors = [
        jax.tree.map(
            lambda *a: jnp.stack(a), *(fitted(path(10 * t + s)) for s in range(3))
        )
        for t in range(2)
    ]
    apart = parameter_information(key, tensors)
    np.testing.assert_allclose(apart, np.log(3), atol=1e-3)  # far apart: all is said
    above = parameter_information(key, tensors, bound="jensen")
    assert np.all(above > apart)
    same = [jax.tree.map(lambda a: jnp.stack([a[0]] * 3), t) for t in tensors]
    np.testing.assert_allclose(parameter_information(key, same), 0, atol=1e-4)


def test_jensen_s_form_of_two_normal_laws_is_half_their_divergence():
    """N(0, 1) and N(1, 1): mean_j log p differs from log p_i by KL / 2 = 1/4."""
    of = Posterior(jnp.array([[0.0], [1.0]]), jnp.ones((2, 1)), jnp.zeros((2, 2, 1)))
    found = parameter_information(jax.random.key(0), [of], bound="jensen", draws=20_000)
    np.testing.assert_allclose(found, 0.25, atol=0.02)
