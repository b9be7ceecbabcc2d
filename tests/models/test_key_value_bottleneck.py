"""What one sample teaches stays in its own cells; the toy of the paper's Figure 2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.models.key_value_bottleneck import (
    average_keys,
    chunks,
    empty,
    fetch,
    find,
    heads,
    learn,
    learn_at,
    linear,
    mean_keys,
    projections,
    vote,
)

CENTRES = [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)]
CENTRES += [(0.75, 0.5), (0.5, 0.75), (0.25, 0.5), (0.5, 0.25)]
ONE_BOOK = jnp.eye(2)[None]  # the unit square itself


def square(seed):
    """100 points of each of 8 classes: task t holds the classes t and t + 4."""
    rng = np.random.default_rng(seed)
    x = np.asarray(CENTRES)[:, None] + 0.035 * rng.normal(size=(8, 100, 2))
    return jnp.asarray(x, jnp.float32), jnp.repeat(jnp.arange(8)[:, None], 100, 1)


@functools.cache
def a_memory(books=3, k=16, classes=4):
    places = projections(jax.random.key(0), 6, books=books, width=4)
    features = jax.random.normal(jax.random.key(1), (128, 6))
    keys = average_keys(
        jax.random.key(2), heads(places, features), k, batch=32, passes=3
    )
    return empty(places, keys, classes), features


def test_columns_of_projections_have_length_one():
    drawn = projections(jax.random.key(0), 6, books=3, width=4)
    np.testing.assert_allclose(jnp.linalg.norm(drawn, axis=1), 1, rtol=1e-6)


def test_found_cells_are_the_nearest_and_later_the_nearest_written():
    memory, features = a_memory()
    x = heads(memory.projections, features)
    away = jnp.sum((x[:, :, None] - memory.keys) ** 2, -1)
    found = find(memory, features, written=False)
    assert jnp.array_equal(found[..., 0], away.argmin(-1))
    memory, _ = learn(memory, features[:5], jnp.arange(5) % 4, rate=0.1)
    away = jnp.where(memory.hits > 0, away, jnp.inf)
    assert jnp.array_equal(find(memory, features)[..., 0], away.argmin(-1))
    assert memory.hits.sum() == 5 * 3


def test_several_cells_are_the_nearest_and_their_values_are_added():
    memory, features = a_memory()
    memory, _ = learn(memory, features, jnp.arange(128) % 4, rate=0.1, top=2)
    assert memory.hits.sum() == 128 * 3 * 2
    x = heads(memory.projections, features)
    away = jnp.sum((x[:, :, None] - memory.keys) ** 2, -1)
    away = jnp.where(memory.hits > 0, away, jnp.inf)
    nearest = jnp.argsort(away, axis=-1)[..., :3]
    assert jnp.array_equal(find(memory, features, top=3), nearest)
    added = sum(memory.values[jnp.arange(3), nearest[..., j]] for j in range(3))
    np.testing.assert_allclose(fetch(memory, features, top=3), added, atol=1e-6)
    with pytest.raises(ValueError, match="top: 17, but must be from 1 to the 16 keys"):
        find(memory, features, top=17)


def test_positions_of_a_sample_vote_together():
    memory, features = a_memory()
    maps, labels = features.reshape(32, 4, 6), jnp.arange(32) % 4
    new, _ = learn(memory, maps, labels, rate=0.1)
    assert new.hits.sum() == 128 * 3
    fetched = fetch(new, maps)
    assert fetched.shape == (32, 4, 3, 4)
    np.testing.assert_allclose(vote(fetched), fetched.mean((1, 2)), rtol=1e-6)
    alone = fetch(new, features).reshape(fetched.shape)
    assert jnp.array_equal(fetched, alone)


def test_a_step_is_gradient_descent_on_the_whole_table():
    """Against plain differentiation of the summed, smoothed loss in every value."""
    memory, features = a_memory()
    labels = jnp.arange(128) % 4
    memory, _ = learn(memory, features, labels, rate=0.2)
    index = find(memory, features, written=False)[..., 0]
    kernel = jax.random.normal(jax.random.key(8), (12, 4))
    for decode in (vote, linear(kernel), linear(kernel, jnp.arange(4.0))):

        def total(values, decode=decode):
            chance = jax.nn.log_softmax(decode(values[jnp.arange(3), index]))
            goal = 0.9 * jax.nn.one_hot(labels, 4) + 0.1 / 4
            return -jnp.sum(goal * chance)

        loss, slope = jax.value_and_grad(total)(memory.values)
        new, said = learn(
            memory, features, labels, rate=0.2, smoothing=0.1, decode=decode
        )
        np.testing.assert_allclose(said, loss, rtol=1e-5)
        np.testing.assert_allclose(new.values, memory.values - 0.2 * slope, atol=1e-5)


def test_cells_found_once_teach_the_same():
    memory, features = a_memory()
    index, labels = find(memory, features, written=False), jnp.arange(128) % 4
    one, _ = learn(memory, features, labels, rate=0.1)
    two, _ = learn_at(memory, index, labels, rate=0.1)
    assert jnp.array_equal(one.values, two.values)
    assert jnp.array_equal(one.hits, two.hits)


def test_chunks_are_the_parts_of_a_feature():
    x = jax.random.normal(jax.random.key(0), (5, 6))
    assert jnp.array_equal(heads(chunks(6, books=3), x), x.reshape(5, 3, 2))
    with pytest.raises(ValueError, match="books: 4, but they must divide the 6"):
        chunks(6, books=4)


def test_mean_keys_are_where_lloyd_rests():
    """Each key is the mean of what is nearest to it, in every book."""
    away = 10 * jnp.arange(4.0)[:, None, None]
    x = (away + jax.random.normal(jax.random.key(0), (4, 32, 2))).reshape(64, 2, 2)
    keys = mean_keys(jax.random.key(1), x, 4)
    for book in range(2):
        cell = jnp.sum((x[:, book, None] - keys[book]) ** 2, -1).argmin(-1)
        assert len(set(cell.tolist())) == 4
        for j in range(4):
            np.testing.assert_allclose(
                keys[book, j], x[cell == j, book].mean(0), rtol=1e-4
            )


def test_decay_zero_is_a_step_of_lloyd():
    x = jax.random.normal(jax.random.key(3), (64, 1, 2))
    keys = [
        average_keys(jax.random.key(4), x, 4, batch=64, passes=n, decay=0.0)[0]
        for n in (1, 2)
    ]
    cell = jnp.sum((x - keys[0]) ** 2, -1).argmin(-1)
    for j in range(4):
        np.testing.assert_allclose(
            keys[1][j], x[cell == j, 0].mean(0), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("decode", [vote, lambda v: v.reshape(len(v), -1)[:, ::3]])
def test_only_cells_that_were_hit_change(decode):
    memory, features = a_memory()
    memory, _ = learn(memory, features[:60], jnp.arange(60) % 4, rate=0.3)
    index = np.asarray(find(memory, features[60:64], written=False))[..., 0]
    new, _ = learn(memory, features[60:64], jnp.arange(4), rate=0.3, decode=decode)
    hit = np.zeros(memory.hits.shape, bool)
    hit[np.arange(3), index] = True
    assert np.array_equal(new.values[~hit], memory.values[~hit])
    assert not np.array_equal(new.values[hit], memory.values[hit])
    assert np.array_equal(new.keys, memory.keys)


def test_any_order_that_keeps_each_cells_own_leaves_the_same_memory():
    memory, features = a_memory(books=1)
    labels = jax.random.randint(jax.random.key(5), (len(features),), 0, 4)
    cells = find(memory, features, written=False)[:, 0, 0]
    by_cell = jnp.argsort(cells, stable=True)

    def run(order):
        def step(memory, i):
            return learn(memory, features[i][None], labels[i][None], rate=0.3)

        return jax.lax.scan(step, memory, order)[0]

    one, other = run(jnp.arange(len(features))), run(by_cell)
    assert not jnp.array_equal(by_cell, jnp.arange(len(features)))
    assert jnp.array_equal(one.values, other.values)
    within = by_cell.at[:2].set(by_cell[:2][::-1])  # an order no cell keeps
    assert cells[by_cell[0]] == cells[by_cell[1]]
    assert labels[by_cell[0]] != labels[by_cell[1]]
    assert not jnp.array_equal(run(within).values, one.values)


@pytest.mark.parametrize("seed", range(3))
def test_toy_remembers_every_task_where_a_network_keeps_the_last(seed):
    """Paper's Figure 2: at least 0.99 over all classes beside one quarter."""
    x, y = square(seed)
    plane = jax.random.uniform(jax.random.key(seed), (4000, 1, 2))
    keys = average_keys(jax.random.key(seed + 9), plane, 400)
    memory, network = empty(ONE_BOOK, keys, 8), perceptron(seed)
    tx = optax.adam(1e-3)

    @jax.jit
    def task(memory, network, x, y):
        def step(held, _):
            memory, network, moments = held
            memory, _ = learn(memory, x, y, rate=0.3)
            slope = jax.grad(lambda net: cross_entropy(net, x, y))(network)
            move, moments = tx.update(slope, moments)
            return (memory, optax.apply_updates(network, move), moments), None

        start = memory, network, tx.init(network)
        return jax.lax.scan(step, start, length=1000)[0][:2]

    for t in range(4):
        pair = jnp.array([t, t + 4])
        memory, network = task(
            memory, network, x[pair].reshape(-1, 2), y[pair].reshape(-1)
        )
    test, truth = (a.reshape(-1, *a.shape[2:]) for a in square(seed + 100))
    assert (vote(fetch(memory, test)).argmax(-1) == truth).mean() >= 0.99
    assert abs((forward(network, test).argmax(-1) == truth).mean() - 0.25) <= 0.01


def test_too_large_a_batch_is_refused():
    with pytest.raises(ValueError, match="batch: 9"):
        average_keys(jax.random.key(0), jnp.zeros((8, 1, 2)), 4, batch=9)


def perceptron(seed):
    one, two = jax.random.split(jax.random.key(seed))
    return [jax.random.normal(one, (3, 32)), jax.random.normal(two, (33, 8)) / 6]


def forward(network, x):
    for i, w in enumerate(network):
        x = (x if i == 0 else jax.nn.relu(x)) @ w[:-1] + w[-1]
    return x


def cross_entropy(network, x, y):
    logits = forward(network, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
