"""Learners of a stream against plain loops; what a seed draws in a comparison."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.models import key_value_bottleneck as kv
from narrows.scripts import class_incremental, learners
from narrows.scripts.reproductions import key_value_bottleneck as reproduction

X = jax.random.normal(jax.random.key(0), (40, 3))
Y = (X[:, 0] > 0).astype(jnp.int32)
SAMPLES = learners.Samples(X, Y, X[:7])
ROWS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 11, 4)))


def test_a_memory_learns_as_by_plain_steps_on_its_features():
    shape = {"books": 2, "pairs": 8, "width": 2, "classes": 2}
    held = learners.remember(
        jax.random.key(1), SAMPLES._replace(features=X), jnp.tile(X, (13, 1)), **shape
    )
    memory = held.memory
    for batch in ROWS.reshape(-1, 4):
        memory, _ = kv.learn(memory, X[batch], Y[batch], rate=0.5)
    votes = learners.key_value(held, SAMPLES, 0.5, ROWS)
    for got, written in zip(votes, (True, False), strict=True):
        wanted = kv.vote(kv.fetch(memory, X[:7], written=written))
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_ewc_pays_for_leaving_what_mattered_to_earlier_tasks():
    """A linear probe against the definition, with Fisher's sums over single rows."""
    rate, penalty = 0.1, 3.0

    def nats(w, rows):
        chance = jax.nn.log_softmax(X[rows] @ w[:3] + w[3])
        return -jnp.mean(jnp.take_along_axis(chance, Y[rows][:, None], 1))

    tx, w = optax.adam(rate), jnp.zeros((4, 2))
    state, fisher, centre = tx.init(w), jnp.zeros((4, 2)), w

    @jax.jit
    def step(w, state, fisher, centre, rows):
        slope = jax.grad(nats)(w, rows) + penalty * fisher * (w - centre)
        move, state = tx.update(slope, state)
        return w + move, state

    for task in ROWS:
        for rows in task:
            w, state = step(w, state, fisher, centre, rows)
        single = task[::10].reshape(-1, 1)
        squares = [jax.grad(nats)(w, row) ** 2 for row in single]
        fisher, centre = fisher + sum(squares) / len(squares), w
    key = jax.random.key(2)
    got = learners.probe(SAMPLES, rate, ROWS, key, classes=2, penalty=jnp.float32(3.0))
    np.testing.assert_allclose(got, X[:7] @ w[:3] + w[3], rtol=1e-4, atol=1e-5)
    free = learners.probe(SAMPLES, rate, ROWS, key, classes=2)
    none = learners.probe(SAMPLES, rate, ROWS, key, classes=2, penalty=jnp.float32(0))
    np.testing.assert_allclose(free, none, atol=1e-5)
    assert not np.allclose(free, got, atol=1e-3)


def test_a_draw_keeps_rows_apart_and_shows_the_same_samples_in_both_orders():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 60).astype(np.int32)
    pool = np.stack([np.arange(600.0), labels], 1).astype(np.float32)
    bed = class_incremental.Bed(pool, labels, -pool[::3], labels[::3], pool)
    drawn = class_incremental.draw(bed, "quick", 1)
    used = set(np.asarray(drawn.samples.features[:, 0]).tolist())
    cut = len(drawn.checked)
    checked = set(np.asarray(drawn.samples.held_out[:cut, 0]).tolist())
    assert not used & checked
    assert len(used | checked) == 600
    assert np.array_equal(drawn.samples.features[:, 1], drawn.samples.labels)
    assert np.array_equal(drawn.samples.held_out[:cut, 1], drawn.checked)
    assert drawn.stream.shape == drawn.shuffled.shape
    classes = [set(np.asarray(drawn.samples.labels)[t].flat) for t in drawn.stream]
    assert [len(group) for group in classes] == [2] * 5
    assert len(set.union(*classes)) == 10
    logits = jax.nn.one_hot(rng.permutation(np.r_[drawn.checked, drawn.truth]), 10)
    right = np.concatenate([drawn.checked, drawn.truth]) == logits.argmax(-1)
    found = class_incremental.points(drawn, logits)
    assert found[0] == pytest.approx(100 * right[:cut].mean())
    assert found[1] == pytest.approx(100 * right[cut:].mean())


def test_a_comparison_has_every_row_that_its_claims_ask_for(monkeypatch):
    """On far classes a memory keeps all of what a probe by Adam forgets."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 60).astype(np.int32)
    centres = 4 * rng.normal(size=(10, 6))
    pool, test = (
        (centres[labels] + rng.normal(size=(600, 6))).astype(np.float32)
        for _ in range(2)
    )
    bed = class_incremental.Bed(pool, labels, test, labels, pool)
    monkeypatch.setattr(reproduction, "bed", lambda name, scale: bed)
    for name, value in (("MEMORY_RATES", (1.0, 3.0)), ("PROBE_RATES", (0.01, 0.1))):
        monkeypatch.setattr(reproduction, name, value)
    monkeypatch.setattr(reproduction, "PENALTIES", (1.0,))
    for name, value in (("BOOKS", 8), ("PAIRS", 64), ("WIDTH", 4)):
        monkeypatch.setattr(class_incremental, name, value)
    found = {0: list(reproduction.fashion("quick", 0))}
    for claim in reproduction.CLAIMS:
        if claim.measure is reproduction.fashion:
            assert claim.criterion.verdict(found).n == 1
    value = {(row.metric, row.arm): row.value for row in found[0]}
    assert value["points", "method"] > 80
    assert value["points", "method"] > value["points", "MLP probe"] + 15
    less = value["points, method less 25", "method"]
    assert less == value["points", "method"] - 25
    assert value["shuffled points", "linear probe"] > 80
