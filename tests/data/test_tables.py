"""Regression sets: the files' published sizes, splits that are disjoint and honest."""

import numpy as np
import pytest
from narrows.data.tables import TABLES, Table, friedman, load_table, split

SIZES = {  # rows and features; beijing: 41,757 labels, housing: 20,640 less the capped
    "california_housing": (19648, 8),
    "bike_sharing": (17379, 12),
    "appliances_energy": (19735, 25),
    "beijing_pm25": (41757, 14),
    "yearprediction_subset": (6224, 12),
}


@pytest.mark.parametrize("name", TABLES)
def test_files_have_their_published_sizes(name, shared_data):
    table = load_table(shared_data, name)
    assert table.x.shape == SIZES[name]
    assert table.y.shape == SIZES[name][:1]
    assert np.all(np.isfinite(table.x))
    assert np.all(np.isfinite(table.y))
    assert table.y.std() > 0


def test_housing_is_scikit_learn_s_with_its_capped_blocks_left_out(shared_data):
    table = load_table(shared_data, "california_housing")
    assert np.exp(table.y).max() < 5
    np.testing.assert_allclose(np.exp(table.y[0]), 4.526, rtol=1e-6)  # its first row
    np.testing.assert_allclose(table.x[0, :4], [8.3252, 41, 6.984127, 1.02381], 1e-5)


def planted(n=100):
    rng = np.random.default_rng(0)
    index = np.arange(n)
    x = np.stack([index, 3 * rng.normal(size=n) + 7, np.ones(n)], 1)
    return Table(x, 5 * rng.normal(size=n) + 2, index % 4 == 0)


def rows_in(part, table, train):
    """Which rows of the planted table a part holds, from the standardised index."""
    index = table.x[:, 0]
    raw = part.x[:, 0] * index[train].std() + index[train].mean()
    return set(np.round(raw).astype(int).tolist())


@pytest.mark.parametrize(
    ("official", "sizes"), [(False, (64, 16, 20)), (True, (60, 15, 25))]
)
def test_parts_are_disjoint_and_scaled_by_the_training_rows_alone(official, sizes):
    table = planted()
    parts = split(table, seed=3, official=official)
    assert tuple(len(p.y) for p in parts[:3]) == sizes
    x, y = parts.train
    np.testing.assert_allclose(x[:, :2].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(x[:, :2].std(0), 1, atol=1e-6)
    assert np.all(x[:, 2] == 0)  # a constant column stays finite
    np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=1e-6)
    order = np.random.default_rng(3).permutation(100)
    left = order[~np.isin(order, np.arange(0, 100, 4))] if official else order[20:]
    train = left[len(left) // 5 :]
    found = [rows_in(p, table, train) for p in parts[:3]]
    assert set.union(*found) == set(range(100))
    assert sum(map(len, found)) == 100
    if official:
        assert found[2] == set(range(0, 100, 4))
    np.testing.assert_allclose(parts.unit, table.y[train].std(), rtol=1e-12)


def test_fewer_rows_are_of_the_same_split():
    table = planted()
    few, all_of_them = split(table, seed=1, rows=20), split(table, seed=1)
    assert [len(p.y) for p in few[:3]] == [20, 5, 20]
    again = split(table, seed=1, rows=20)
    assert np.array_equal(few.train.x, again.train.x)
    assert not np.array_equal(few.train.y[:20], split(table, seed=2).train.y[:20])
    a, b = few.test.y * few.unit, all_of_them.test.y * all_of_them.unit
    np.testing.assert_allclose(np.diff(a[:, 0]), np.diff(b[:, 0]), rtol=1e-4, atol=1e-5)


def test_friedman_has_its_function_and_its_tails():
    clean, plain = (friedman(4000, seed=0, clean=c) for c in (True, False))
    assert np.array_equal(clean.x, plain.x)
    assert abs(clean.y.std() - 1) < 0.03
    assert abs((plain.y - clean.y).std() - 0.1) < 0.01
    shift = friedman(4000, seed=0, tail="outliers").y - plain.y
    assert abs((shift > 0).mean() - 0.1) < 0.02
    assert abs(shift[shift > 0].mean() - 8) < 1
    heavy = np.abs(friedman(4000, seed=0, tail="student").y - plain.y)
    assert np.median(heavy) < 0.5 < 5 < heavy.max()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load_table(".", "boston"), "name: 'boston', but allowed are calif"),
        (lambda: split(Table(*planted()[:2]), seed=0, official=True), "official: the"),
        (lambda: split(planted(), seed=0, rows=3), "rows: 3"),
        (lambda: friedman(3, seed=0, tail="cauchy"), "tail: 'cauchy'"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
