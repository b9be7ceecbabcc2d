"""Streams from tables: nothing changes before the change, and then the region alone."""

import numpy as np
import pytest
from narrows.data.drift import BUCKETS, NAMES, Table, events, load_table


def table(n=4000):
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(n, 3))
    return Table(
        numbers,
        rng.integers(0, 9, (n, 2)).astype(np.int32),
        numbers[:, 0] + rng.normal(size=n),
    )


def test_streams_of_one_seed_are_equal_until_the_change():
    calm, region = (events(table(), drift, seed=3) for drift in ("none", "region"))
    assert region.change == 2000
    assert calm.change == 4000
    assert np.array_equal(calm.numbers, region.numbers)
    assert np.array_equal(calm.label[:2000], region.label[:2000])
    assert not region.drifted[:2000].any()
    apart = calm.label != region.label
    assert apart.any()
    assert not (apart & ~region.drifted).any()


def test_a_region_has_its_share_and_its_rates():
    stream = events(table(), "region", seed=1, region=0.2, quantile=0.9)
    late = stream.drifted[2000:]
    assert late.mean() == pytest.approx(0.4, abs=0.05)
    assert stream.label[:2000].mean() == pytest.approx(0.5, abs=0.01)
    assert stream.label[2000:].mean() == pytest.approx(0.5, abs=0.08)


def test_time_keeps_the_order():
    stream = events(table(), "time", seed=1)
    assert np.array_equal(stream.numbers, table().numbers)
    assert not stream.drifted.any()


@pytest.mark.parametrize(
    ("drift", "options", "said"),
    [
        ("sudden", {}, "drift: 'sudden'"),
        ("region", {"region": 0.6}, "region: 0.6"),
        ("none", {"change": 1.0}, "change: 1.0"),
    ],
)
def test_bad_arguments_are_named(drift, options, said):
    with pytest.raises(ValueError, match=said):
        events(table(), drift, seed=0, **options)


@pytest.mark.parametrize(("name", "rows"), [(NAMES[0], 41757), (NAMES[1], 17379)])
def test_real_tables(shared_data, name, rows):
    found = load_table(shared_data, name)
    assert len(found.target) == len(found.numbers) == len(found.categories) == rows
    assert np.isfinite(found.numbers).all()
    assert found.categories.min() >= 0
    assert found.categories.max() < BUCKETS
    assert all(len(np.unique(column)) > 3 for column in found.categories.T)


def test_an_unknown_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name: 'criteo'"):
        load_table(tmp_path, "criteo")
