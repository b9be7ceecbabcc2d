"""Streams lose nothing, mix nothing, and are drawn by their seed alone."""

import numpy as np
import pytest
from narrows.data.streams import class_incremental, halves, minibatches, shuffled

LABELS = np.random.default_rng(0).integers(0, 6, 120)


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_tasks_cut_the_classes_and_every_row_is_in_one(seed):
    tasks = class_incremental(LABELS, per_task=2, seed=seed)
    assert np.array_equal(np.sort(np.concatenate(tasks)), np.arange(120))
    classes = [set(LABELS[rows].tolist()) for rows in tasks]
    assert [len(group) for group in classes] == [2, 2, 2]
    assert set.union(*classes) == set(range(6))
    if seed is None:
        assert classes == [{0, 1}, {2, 3}, {4, 5}]


def test_the_order_of_classes_is_that_of_the_seed():
    def first(seed):
        return tuple(class_incremental(LABELS, per_task=1, seed=seed)[0])

    assert first(3) == first(3)
    assert len({first(seed) for seed in range(20)}) == 6


def test_batches_show_each_task_whole_before_the_next():
    tasks = class_incremental(LABELS, per_task=2, seed=1)
    rows = minibatches(tasks, batch_size=10, epochs=3, seed=0)
    lengths = [3 * (len(task) // 10) for task in tasks]
    assert len(rows) == sum(lengths)
    starts = np.cumsum([0, *lengths])
    for task, start, end in zip(tasks, starts, starts[1:], strict=False):
        seen, counts = np.unique(rows[start:end], return_counts=True)
        assert set(seen) <= set(task)
        assert counts.max() <= 3  # once an epoch at most
        epoch = rows[start : start + len(task) // 10].reshape(-1)
        assert len(set(epoch)) == len(epoch)
    again = minibatches(tasks, batch_size=10, epochs=3, seed=0)
    other = minibatches(tasks, batch_size=10, epochs=3, seed=1)
    assert np.array_equal(rows, again)
    assert not np.array_equal(rows, other)


def test_halves_share_no_row_and_have_the_same_classes():
    one, two = halves(LABELS, seed=0)
    assert np.array_equal(np.sort(np.concatenate([one, two])), np.arange(120))
    difference = np.bincount(LABELS[two]) - np.bincount(LABELS[one])
    assert set(difference.tolist()) <= {0, 1}


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="per_task: 4, but it must divide the 6"):
        class_incremental(LABELS, per_task=4)
    with pytest.raises(ValueError, match="batch_size: 90, but a task has only"):
        minibatches([np.arange(80)], batch_size=90, epochs=1, seed=0)
    with pytest.raises(ValueError, match="epochs=0: both must be at least 1"):
        minibatches([np.arange(80)], batch_size=9, epochs=0, seed=0)


def test_a_shuffled_stream_goes_on_where_it_stopped_on_any_share_of_it():
    rows = np.arange(40)

    def take(count, **options):
        stream = shuffled(rows, batch_size=8, seed=3, **options)
        return np.stack([next(stream)["images"] for _ in range(count)])

    whole = take(12)
    for epoch in range(2):
        seen = whole[5 * epoch : 5 * (epoch + 1)]
        assert sorted(seen.reshape(-1)) == list(range(40))
    assert not np.array_equal(whole[:5], whole[5:10])
    assert np.array_equal(take(4, start=7), whole[7:11])
    parts = [take(12, shard=(i, 2)) for i in range(2)]
    assert np.array_equal(np.concatenate(parts, 1), whole)
    for size in (41, 9):
        with pytest.raises(ValueError, match=f"batch_size: {size}, but it must be a"):
            shuffled(rows, batch_size=size, seed=0, shard=(0, 2))
