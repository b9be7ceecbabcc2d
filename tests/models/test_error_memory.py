"""What is read is the average of what was written near; nothing is read too early."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.error_memory import (
    compensate,
    exact,
    hashes,
    replay,
    size_in_bytes,
    sketch,
    strengths,
)

WIDTH = 5
FORMS = {
    "exact": functools.partial(
        exact, WIDTH, capacity=32, neighbours=4, temperature=2.0, shrink=1.0
    ),
    "sketch": functools.partial(
        sketch, jax.random.key(0), WIDTH, tables=6, bits=3, shrink=0.5
    ),
}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(params=FORMS)
def memory(request):
    return FORMS[request.param]()


def pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(n, WIDTH)), jnp.float32),
        jnp.asarray(rng.normal(size=(n, 2)), jnp.float32),
    )


def test_an_empty_memory_corrects_nothing(memory):
    keys, _ = pairs(7)
    assert jnp.array_equal(memory.read(memory.init(2), keys), jnp.zeros((7, 2)))


def test_a_batch_is_its_samples_one_after_another(memory):
    """In the sketch without decay, which counts calls of write."""
    keys, values = pairs(50)
    whole = memory.write(memory.init(2), keys, values)
    one = memory.init(2)
    write = jax.jit(memory.write)
    for key, value in zip(keys, values, strict=True):
        one = write(one, key[None], value[None])
    for a, b in zip(*map(jax.tree.leaves, (whole, one)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_masked_rows_leave_no_trace(memory):
    keys, values = pairs(20)
    keep = jnp.arange(20) % 3 > 0
    poisoned = jnp.where(keep[:, None], values, jnp.nan)
    one = memory.write(memory.init(2), keys, poisoned, keep)
    two = memory.write(memory.init(2), keys[keep], values[keep])
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_keys_of_two_encoders_never_meet(memory):
    keys, values = pairs(20)
    state = memory.write(memory.init(2), keys, values, version=3)
    assert jnp.any(memory.read(state, keys, version=3) != 0)
    assert not jnp.any(memory.read(state, keys, version=4) != 0)
    again = memory.write(state, keys[:2], values[:2], version=4)
    fresh = memory.write(memory.init(2), keys[:2], values[:2], version=4)
    read = [memory.read(s, keys, version=4) for s in (again, fresh)]
    np.testing.assert_allclose(*read, rtol=1e-6)


def test_the_state_does_not_grow(memory):
    keys, values = pairs(200)
    state = memory.write(memory.init(2), keys, values)
    assert size_in_bytes(state) == size_in_bytes(memory.init(2))


def test_one_bucket_is_the_running_mean_error():
    memory = sketch(jax.random.key(1), WIDTH, tables=3, bits=0)
    keys, values = pairs(40)
    state = memory.write(memory.init(2), keys, values)
    np.testing.assert_allclose(
        memory.read(state, keys[:1])[0], values.mean(0), rtol=1e-5, atol=1e-6
    )


def test_decay_weighs_the_past_by_its_age():
    memory = sketch(jax.random.key(1), WIDTH, tables=1, bits=0, decay=0.5)
    state = memory.init(1)
    for value in (4.0, 2.0, 1.0):
        state = memory.write(state, jnp.ones((1, WIDTH)), jnp.full((1, 1), value))
    expected = (1 * 1 + 2 * 0.5 + 4 * 0.25) / 1.75
    got = memory.read(state, jnp.ones((1, WIDTH)))
    assert got[0, 0] == pytest.approx(expected, rel=1e-6)


def test_exact_reads_are_those_of_a_plain_search():
    """float64, over the newest `capacity` pairs, written across the ring's end."""
    memory = FORMS["exact"]()
    keys, values = pairs(45)
    state = memory.init(2)
    for i in range(0, 45, 9):
        state = memory.write(state, keys[i : i + 9], values[i : i + 9])
    queries, _ = pairs(6, seed=1)
    got = memory.read(state, queries)
    near, kept = np.asarray(keys[-32:], float), np.asarray(values[-32:], float)
    for query, found in zip(np.asarray(queries, float), got, strict=True):
        square = ((near - query) ** 2).sum(1)
        best = np.argsort(square)[:4]
        a = np.exp(-square[best] / 2)
        expected = (a / a.sum()) @ kept[best] * 4 / 5
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_sketch_reads_are_those_of_plain_tables():
    memory = FORMS["sketch"]()
    keys, values = pairs(60)
    state = memory.write(memory.init(2), keys, values)
    bucket = np.asarray(hashes(state.planes, keys))
    got = memory.read(state, keys[:5])
    for i in range(5):
        means = []
        for table in range(6):
            same = bucket[:, table] == bucket[i, table]
            means.append(np.asarray(values, float)[same].sum(0) / (same.sum() + 0.5))
        np.testing.assert_allclose(got[i], np.mean(means, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0])
def test_signs_agree_as_often_as_the_angle_says(angle):
    """1 - angle / pi for a bit, to 3 standard deviations of 100,000 planes."""
    draws = 100_000
    memory = sketch(jax.random.key(2), 2, tables=draws, bits=1)
    keys = jnp.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    one, two = hashes(memory.init(1).planes, keys)
    p = 1 - angle / np.pi
    spread = (p * (1 - p) / draws) ** 0.5
    assert abs(float((one == two).mean()) - p) <= 3 * spread


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_label_is_never_read_before_it_is_known(form, delay):
    """Other labels from batch 6 on change nothing up to batch 6 + delay - 1."""
    memory = FORMS[form]()
    keys, values = (x.reshape(12, 5, -1) for x in pairs(60))
    other = values.at[6:].set(jnp.flip(values[6:], 1) + 1)
    run = jax.jit(lambda values: replay(memory, keys, values, delay=delay)[0])
    one, two = run(values), run(other)
    assert jnp.array_equal(one[: 6 + delay], two[: 6 + delay])
    assert jnp.all(jnp.any(one[6 + delay :] != two[6 + delay :], (1, 2)))


def test_replay_is_reading_and_writing_by_hand(memory):
    keys, values = (x.reshape(6, 10, -1) for x in pairs(60))
    found, state = replay(memory, keys, values, delay=2)
    now = memory.init(2)
    for t in range(6):
        np.testing.assert_allclose(
            found[t], memory.read(now, keys[t]), rtol=1e-5, atol=1e-6
        )
        if t >= 1:
            now = memory.write(now, keys[t - 1], values[t - 1])
    for a, b in zip(*map(jax.tree.leaves, (state, now)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_strength_is_chosen_by_what_was_known_then():
    rng = np.random.default_rng(3)
    p = jnp.asarray(rng.uniform(0.2, 0.8, (8, 6)))
    e = jnp.asarray(rng.normal(0, 0.2, (8, 6)))
    y = jnp.asarray(rng.integers(0, 2, (8, 6)))
    grid = jnp.array([0.0, 0.5, 1.0, 2.0])
    got = strengths(p, e, y, grid, decay=0.5, delay=2)
    seen = np.zeros(4)
    for t in range(8):
        assert got[t] == grid[seen.argmin()]
        if t >= 1:
            q = np.clip(p[t - 1] + np.asarray(grid)[:, None] * e[t - 1], 0, 1)
            q = np.clip(q, 1e-3, 1 - 1e-3)
            loss = -np.where(y[t - 1] > 0, np.log(q), np.log(1 - q)).mean(1)
            seen = 0.5 * seen + loss
    changed = strengths(p, e, y.at[5:].set(1 - y[5:]), grid, decay=0.5, delay=2)
    assert jnp.array_equal(got[:7], changed[:7])


def test_what_is_compensated_stays_a_probability():
    p = compensate(jnp.array([0.1, 0.5, 0.9]), jnp.array([-0.5, 0.1, 0.5]), 1.0)
    np.testing.assert_allclose(p, [0.0, 0.6, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FORMS["exact"](neighbours=33), "neighbours: 33"),
        (lambda: FORMS["sketch"](decay=1.5), "decay: 1.5"),
        (lambda: FORMS["sketch"](tables=0), "tables, bits: 0"),
        (
            lambda: replay(None, jnp.ones((3, 2, 1)), jnp.ones((3, 2, 1)), delay=0),
            "del",
        ),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
