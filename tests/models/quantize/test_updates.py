"""Rules on sums: each against the definition it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.models.quantize import losses
from narrows.models.quantize.search import nearest, unit
from narrows.models.quantize.updates import (
    CodeSums,
    code_state,
    code_sums,
    ema,
    follow,
    gradient,
    kmeans,
    revive,
    sphere,
)

RNG = np.random.default_rng(0)
K, WIDTH = 6, 3
X = jnp.asarray(RNG.normal(size=(40, WIDTH)), jnp.float32)
CODES = jnp.asarray(RNG.normal(size=(K, WIDTH)), jnp.float32)
ONES = jnp.ones(len(X))


def sums_of(codes, x=X, keep=ONES):
    index = nearest(x, codes)
    square = jnp.sum((x - codes[index]) ** 2, -1)
    return code_sums(x, index, square, keep, len(codes)), index


def step(rules, sums, codes=CODES):
    return follow(code_state(codes, rules), sums, rules)


def test_sums_are_those_of_a_loop():
    keep = jnp.asarray(RNG.random(40) < 0.5, jnp.float32)
    sums, index = sums_of(CODES, keep=keep)
    for k in range(K):
        mine = (np.asarray(index) == k) & (np.asarray(keep) > 0)
        assert sums.count[k] == mine.sum()
        np.testing.assert_allclose(sums.total[k], np.asarray(X)[mine].sum(0), rtol=1e-5)


def test_no_decay_is_a_step_of_lloyd():
    sums, index = sums_of(CODES)
    new, _ = step((ema(0.0),), sums)
    for k in range(K):
        mine = np.asarray(X)[np.asarray(index) == k]
        expected = mine.mean(0) if len(mine) else CODES[k]
        np.testing.assert_allclose(new.codes[k], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_codebook_loss():
    sums, index = sums_of(CODES)
    rules = (gradient(optax.sgd(0.3)),)
    slope = jax.grad(lambda c: losses.codebook(X, c[index]).mean())(CODES)
    np.testing.assert_allclose(
        step(rules, sums)[0].codes, CODES - 0.3 * slope, rtol=1e-5, atol=1e-6
    )


def test_a_penalty_is_descended_as_well():
    sums, index = sums_of(CODES)
    rules = (gradient(optax.sgd(0.3), penalty=losses.orthogonality),)
    slope = jax.grad(
        lambda c: losses.codebook(X, c[index]).mean() + losses.orthogonality(c)
    )(CODES)
    np.testing.assert_allclose(
        step(rules, sums)[0].codes, CODES - 0.3 * slope, rtol=1e-5, atol=1e-6
    )


def test_codes_return_to_the_sphere():
    sums, _ = sums_of(CODES)
    new, _ = step((ema(0.5), sphere()), sums)
    np.testing.assert_allclose(jnp.linalg.norm(new.codes, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("learn", [ema(0.9), gradient(optax.adam(0.1))])
def test_a_step_of_nothing_changes_nothing(learn):
    rules = (learn, revive(), sphere())
    before, _ = step(rules, sums_of(CODES)[0])
    empty = CodeSums(jnp.zeros(K), jnp.zeros((K, WIDTH)), jnp.zeros(()))
    after, said = follow(before, empty, rules)
    assert said["revived"] == 0
    for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert jnp.array_equal(a, b)


@pytest.mark.parametrize("learn", [ema(0.9), gradient(optax.sgd(0.1))])
def test_dead_codes_are_brought_to_use_by_any_rule(learn):
    """All codes but one start far away; without revival they stay there."""
    used = {}
    for name, rules in (("revived", (learn, revive())), ("left", (learn,))):

        def learn_once(state, _, rules=rules):
            return follow(state, sums_of(state.codes)[0], rules)

        state = code_state(CODES.at[1:].add(50.0), rules)
        state, _ = jax.lax.scan(learn_once, state, length=40)
        used[name] = len(np.unique(nearest(X, state.codes)))
    assert used == {"revived": K, "left": 1}


def test_kmeans_finds_the_centres_and_skips_the_masked():
    """Three clusters far apart, and a fourth under the mask."""
    centres = np.array([[0.0, 0, 9], [0, 9, 0], [9, 0, 0], [99, 99, 99]])
    x = np.repeat(centres, 10, 0) + 0.01 * RNG.normal(size=(40, 3))
    mask = np.arange(40) < 30
    x[mask.argmin()] = np.nan
    for metric in ("euclidean", "cosine"):
        found = kmeans(jax.random.key(0), jnp.asarray(x), 3, mask=mask, metric=metric)
        wanted = unit(jnp.asarray(centres[:3])) if metric == "cosine" else centres[:3]
        order = np.lexsort(np.round(np.asarray(found.codes), 1).T[::-1])
        np.testing.assert_allclose(found.codes[order], wanted, atol=0.02)
        assert found.weight.sum() == 30


def test_kmeans_of_fewer_rows_than_codes_is_finite():
    found = kmeans(jax.random.key(0), X[:4], K, iterations=3)
    assert jnp.all(jnp.isfinite(found.codes))
    assert nearest(X[:4], found.codes).shape == (4,)
