"""Batches of text: a shuffled stream to train on, an exact pass to evaluate on.

>>> corpus = load_corpus()  # or a file, or a folder
>>> stream = batches(corpus, "train", batch_size=32, seq_len=256, seed=0)
>>> next(stream)["targets"].shape
(32, 256)
"""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Bool, Int32, Integer

from .corpus import SPLITS, Corpus, load_corpus

__all__ = ["SPLITS", "Corpus", "batches", "load_corpus", "windows"]


def batches(
    corpus: Corpus,
    split: str,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    start: int = 0,
) -> grain.DatasetIterator:
    """Shuffled windows of a split for ever; one batch is one training step.

    Yields {"tokens", "targets"}, int32 [b, t], where targets are tokens moved by one.
    Windows of seq_len + 1 tokens lie at stride seq_len; an epoch shows each once, the
    next epoch in a new order; fewer than seq_len tokens at the end of the split are
    left out. Two threads keep eight batches ready.

    batch_size counts the rows of the global batch. shard = (index, count) yields rows
    [index * b, (index + 1) * b) of it, b = batch_size / count, so the global batch does
    not depend on count. start = n, or `set_state({"next_index": n})`, goes on with the
    batch of step n, on any count; `get_state()["next_index"]` is the position.

    >>> corpus = load_corpus()
    >>> run = dict(batch_size=8, seq_len=16, seed=0)
    >>> stream = batches(corpus, "train", **run)
    >>> next(stream)["tokens"].shape, stream.get_state()
    ((8, 16), {'next_index': 1})
    >>> half = batches(corpus, "train", **run, shard=(1, 2), start=1)
    >>> bool((next(half)["targets"] == next(stream)["targets"][4:]).all())
    True

    Raises: ValueError for a batch that does not divide, a split shorter than a window,
    and numbers out of range.
    """
    tokens = _tokens(corpus, split)
    _at_least(1, batch_size=batch_size, seq_len=seq_len)
    _at_least(0, seed=seed, start=start)
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard is {shard}; allowed is (index, count), index < count")
    if batch_size % count:
        raise ValueError(
            f"batch_size is {batch_size} over {count} shards; allowed is a multiple of "
            f"{count}, as every shard takes the same number of rows"
        )
    if seq_len + 1 > len(tokens):
        raise ValueError(
            f"seq_len is {seq_len}, and split '{split}' has {len(tokens)} tokens; "
            f"allowed is at most {len(tokens) - 1}"
        )
    offsets = np.arange(seq_len + 1)

    def gather(indices):  # of windows: only integers go through grain, row by row
        at = np.asarray(indices)[:, None] * seq_len + offsets
        rows = tokens[at].astype(np.int32)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    # The seed goes through `seed`, which hashes it: given to `shuffle`, the second
    # epoch of seed 0 would be the first of seed 1. Slicing after `batch` deals out
    # whole runs of rows, which keeps the order of rows in the global batch.
    indices = grain.MapDataset.range((len(tokens) - 1) // seq_len)
    endless = indices.seed(seed).shuffle().repeat()
    dealt = endless.batch(batch_size // count, drop_remainder=True, batch_fn=gather)
    ready = dealt[index::count].to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    )
    stream = iter(ready)
    stream.set_state({"next_index": start})
    return stream


def windows(
    corpus: Corpus,
    split: str,
    seq_len: int,
    *,
    batch_size: int,
    limit: int | None = None,
) -> Iterator[dict[str, Int32[np.ndarray, "b t"] | Bool[np.ndarray, "b t"]]]:
    """Each token of a split as a target exactly once (but the first), in order.

    Yields {"tokens", "targets", "mask"}, [b, t], all batches of one shape. The mask is
    False where the last window or the last batch is filled up with zeros: the sum of
    mask over the pass is len(split) - 1. A window sees nothing before its first token.
    limit: stop after that many windows of the beginning.

    >>> corpus = load_corpus()
    >>> passed = windows(corpus, "validation", 256, batch_size=64)
    >>> scored = sum(int(batch["mask"].sum()) for batch in passed)
    >>> scored == len(corpus.splits["validation"]) - 1
    True

    Raises: ValueError for an unknown split, one of less than two tokens, and numbers
    below 1; at the call, before the first batch.
    """
    tokens = _tokens(corpus, split)
    _at_least(1, seq_len=seq_len, batch_size=batch_size)
    if limit is not None:
        _at_least(1, limit=limit)
    targets = len(tokens) - 1
    if limit is not None:
        targets = min(targets, limit * seq_len)
    return _windows(tokens, targets, seq_len, batch_size)


def _windows(tokens, targets: int, length: int, rows: int):
    offsets = np.arange(rows * length).reshape(rows, length)
    for first in range(0, targets, rows * length):
        mask = first + offsets < targets
        at = np.where(mask, first + offsets, 0)
        yield {
            "tokens": np.where(mask, tokens[at], 0).astype(np.int32),
            "targets": np.where(mask, tokens[at + 1], 0).astype(np.int32),
            "mask": mask,
        }


def _tokens(corpus: Corpus, split: str) -> Integer[np.ndarray, "n"]:
    if split not in corpus.splits:
        raise ValueError(f"split is '{split}'; allowed are {', '.join(corpus.splits)}")
    if len(corpus.splits[split]) < 2:
        raise ValueError(
            f"split is '{split}', which has {len(corpus.splits[split])} tokens; "
            "allowed is a split of at least 2, so that there is one to predict"
        )
    return corpus.splits[split]


def _at_least(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name} is {value}; allowed is {least} or more")
