"""Streams of samples: shuffled for ever, or class by class.

A class-incremental stream shows a labelled set as tasks of a few classes, one by one:

    train = load_images(folder, "fashion_mnist", "train")
    tasks = class_incremental(train.labels, per_task=2, seed=0)      # rows of each task
    rows = minibatches(tasks, batch_size=50, epochs=5, seed=0)       # [steps, 50]

A learner sees `train.images[rows[0]]`, then those of rows[1], and so on; it is measured
over all classes. The same samples in any order are `minibatches([all rows], ...)`.
"""

import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int, Shaped


def class_incremental(
    labels: Int[np.ndarray, " n"], *, per_task: int = 2, seed: int | None = None
) -> list[Int[np.ndarray, " m"]]:
    """The rows of each task, ascending; every row is in exactly one task.

    Classes come in the order of their numbers, or in one drawn by `seed`.

    Raises: ValueError where the classes do not divide into tasks of `per_task`.

    >>> [rows.tolist() for rows in class_incremental(np.array([0, 3, 1, 2, 0]))]
    [[0, 2, 4], [1, 3]]
    """
    classes = np.unique(labels)
    if per_task < 1 or len(classes) % per_task:
        raise ValueError(
            f"per_task: {per_task}, but it must divide the {len(classes)} classes"
        )
    if seed is not None:
        classes = np.random.default_rng([seed, 0]).permutation(classes)
    return [
        np.flatnonzero(np.isin(labels, group))
        for group in classes.reshape(-1, per_task)
    ]


def minibatches(
    tasks: Sequence[Int[np.ndarray, " m"]], *, batch_size: int, epochs: int, seed: int
) -> Int[np.ndarray, "steps batch_size"]:
    """Every task's rows `epochs` times over, shuffled anew, before the next task's.

    The rows of an epoch that fill no whole batch are left out of it.

    Raises: ValueError where a task has fewer rows than a batch.
    """
    if batch_size < 1 or epochs < 1:
        raise ValueError(
            f"batch_size={batch_size}, epochs={epochs}: both must be at least 1"
        )
    rng = np.random.default_rng([seed, 1])
    found = []
    for rows in tasks:
        whole = len(rows) // batch_size * batch_size
        if not whole:
            raise ValueError(
                f"batch_size: {batch_size}, but a task has only {len(rows)} rows"
            )
        found += [rng.permutation(rows)[:whole] for _ in range(epochs)]
    return np.concatenate(found).reshape(-1, batch_size)


def halves(
    labels: Int[np.ndarray, " n"], *, seed: int
) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """Two disjoint sets of rows that hold half of every class each, ascending.

    Of an odd number the second gets one more.
    """
    rng, first = np.random.default_rng([seed, 2]), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        first[rng.permutation(rows)[: len(rows) // 2]] = True
    return np.flatnonzero(first), np.flatnonzero(~first)


def shuffled(
    images: Shaped[np.ndarray, "n ..."],
    *,
    batch_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    start: int = 0,
) -> Iterator[dict[str, Shaped[np.ndarray, "b ..."]]]:
    """{"images"}, for ever; an epoch shows each row once, the next in a new order.

    batch_size counts the rows of the global batch, of which shard = (index, count)
    gives the index-th part; `start` goes on with the batch of that step.

    Raises: ValueError for a batch that does not divide or is larger than the set.
    """
    index, count = shard
    if not 0 < batch_size <= len(images) or batch_size % count:
        raise ValueError(
            f"batch_size: {batch_size}, but it must be a multiple of {count} and at "
            f"most the {len(images)} rows"
        )
    # The seed goes through `seed`, which hashes it: epochs of two seeds never agree.
    rows = grain.MapDataset.range(len(images)).seed(seed).shuffle().repeat()
    dealt = rows.batch(batch_size // count, drop_remainder=True)[index::count]

    def batches():
        for step in itertools.count(start):
            yield {"images": images[dealt[step]]}

    return batches()
