"""The schedules of `io.py`, run tile by tile in a fast memory that counts.

Slow memory is a dictionary of arrays that only `Fast.load` and `Fast.store` touch.
Nothing is evicted unasked: a schedule says what it drops, and holding more than the
capacity is an error. Numpy on the host, float64: small sizes, exact counts.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from .io import ROW, Moved, Tile, Work

Place = tuple[slice, ...]


class Run(NamedTuple):
    out: Float[np.ndarray, "t h"]
    moved: Moved
    work: Work


class Fast:
    """A fast memory of `capacity` elements in front of `slow`, and what it counted."""

    def __init__(self, capacity: int, slow: dict[str, np.ndarray]):
        self.capacity, self.slow, self.peak = capacity, slow, 0
        self.held: dict[str, np.ndarray] = {}
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()
        self.rescaled = self.divided = self.updates = 0

    def __getitem__(self, slot: str) -> np.ndarray:
        return self.held[slot]

    def __setitem__(self, slot: str, value: np.ndarray) -> None:
        """Form a value in fast memory; it takes the place of the slot's old one."""
        self.held[slot] = value
        size = sum(x.size for x in self.held.values())
        if size > self.capacity:
            raise ValueError(
                f"capacity is {self.capacity}, but {slot} makes it {size} elements: "
                "use smaller tiles"
            )
        self.peak = max(self.peak, size)

    def load(self, operand: str, place: Place, slot: str | None = None) -> None:
        value = self.slow[operand][place].copy()
        self.reads[operand] += value.size
        self[slot or operand] = value

    def store(self, operand: str, place: Place, slot: str | None = None) -> None:
        value = self.held[slot or operand]
        self.writes[operand] += value.size
        self.slow[operand][place] = value

    def drop(self, *slots: str) -> None:
        for slot in slots:
            self.held.pop(slot, None)

    def run(self, saved: int) -> Run:
        moved = Moved(dict(self.reads), dict(self.writes), self.peak)
        work = Work(self.rescaled, self.divided, self.updates, saved)
        return Run(self.slow["out"], moved, work)


def _slow(query, key, value, statistics=1, **more) -> dict[str, np.ndarray]:
    """Slow memory before a run; outputs that no loop may read hold NaN."""
    arrays = {"query": query, "key": key, "value": value}
    slow = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    t = len(slow["query"])
    slow["out"] = np.full((t, slow["value"].shape[1]), np.nan)
    slow["statistics"] = np.full((statistics, t), np.nan)
    return slow | more


def _cut(length: int, block: int) -> Iterator[slice]:
    for start in range(0, length, block):
        yield slice(start, min(start + block, length))


def _all(table, t, s, tile):
    shape = -(-t // tile.block_q), -(-s // tile.block_k)
    return np.ones(shape, bool) if table is None else np.asarray(table, bool)


def _scores(fast: Fast, scale: float, mask, rows: slice, keys: slice) -> None:
    scores = scale * fast["query"] @ fast["key"].T
    if mask is not None:
        scores = np.where(mask[rows, keys], scores, -np.inf)
    fast["scores"] = scores


def _fold(fast: Fast) -> np.ndarray:
    """One online-softmax step; returns exp(old maximum - new maximum) per row.

    Rows of `statistics`: maximum, sum, and the same two while they are replaced. The
    scores become weights in place.
    """
    top, total = fast["statistics"][:2]
    new_top = np.maximum(top, fast["scores"].max(1))
    finite = np.where(np.isfinite(new_top), new_top, 0)  # a row that saw nothing yet
    fast["scores"] = np.exp(fast["scores"] - finite[:, None])
    shrink = np.exp(np.where(np.isfinite(top), top - finite, -np.inf))
    new_total = shrink * total + fast["scores"].sum(1)
    fast["statistics"] = np.stack([new_top, new_total, top, total])
    fast.updates += len(top)
    return shrink


def _fresh(rows: slice) -> np.ndarray:
    """Statistics of rows that have seen nothing."""
    statistics = np.zeros((ROW, rows.stop - rows.start))
    statistics[[0, 2]] = -np.inf
    return statistics


def _logsumexp(statistics: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return statistics[:1] + np.log(statistics[1:2])


def k_outer(
    query: Float[np.ndarray, "t h"],
    key: Float[np.ndarray, "s h"],
    value: Float[np.ndarray, "s h"],
    tile: Tile,
    capacity: int,
    *,
    visited: Bool[np.ndarray, "tiles_t tiles_s"] | None = None,
    mask: Bool[np.ndarray, "t s"] | None = None,
) -> Run:
    """FlashAttention (arXiv:2205.14135, Algorithm 1)."""
    (t, h), s = query.shape, len(key)
    slow = _slow(query, key, value, statistics=2)
    slow["out"][:], slow["statistics"][0], slow["statistics"][1] = 0, -np.inf, 0
    fast, visited = Fast(capacity, slow), _all(visited, t, s, tile)
    for j, keys in enumerate(_cut(s, tile.block_k)):
        if not visited[:, j].any():
            continue
        fast.load("key", (keys,))
        fast.load("value", (keys,))
        for i, rows in enumerate(_cut(t, tile.block_q)):
            if not visited[i, j]:
                continue
            fast.load("query", (rows,))
            fast.load("out", (rows,))
            fast.load("statistics", (slice(None), rows))
            fast["statistics"] = np.concatenate([fast["statistics"]] * 2)
            _scores(fast, h**-0.5, mask, rows, keys)
            shrink = _fold(fast)
            _, total, _, old = fast["statistics"]
            out = (old * shrink)[:, None] * fast["out"]
            out += fast["scores"] @ fast["value"]
            fast["out"] = out / np.where(total == 0, 1, total)[:, None]
            fast.rescaled += out.size
            fast.divided += out.size
            fast["statistics"] = fast["statistics"][:2]
            fast.store("out", (rows,))
            fast.store("statistics", (slice(None), rows))
            fast.drop("query", "out", "statistics", "scores")
        fast.drop("key", "value")
    return fast.run(saved=2)


def q_outer(
    query: Float[np.ndarray, "t h"],
    key: Float[np.ndarray, "s h"],
    value: Float[np.ndarray, "s h"],
    tile: Tile,
    capacity: int,
    *,
    visited: Bool[np.ndarray, "tiles_t tiles_s"] | None = None,
    mask: Bool[np.ndarray, "t s"] | None = None,
    reuse: bool = False,
) -> Run:
    """FlashAttention-2 (arXiv:2307.08691, Algorithm 1)."""
    (t, h), s = query.shape, len(key)
    fast = Fast(capacity, _slow(query, key, value))
    visited, last = _all(visited, t, s, tile), None
    for i, rows in enumerate(_cut(t, tile.block_q)):
        fast["statistics"] = _fresh(rows)
        fast["out"] = np.zeros((rows.stop - rows.start, h))
        if visited[i].any():
            fast.load("query", (rows,))
        for j, keys in enumerate(_cut(s, tile.block_k)):
            if not visited[i, j]:
                continue
            if not (reuse and last == j):
                fast.load("key", (keys,))
                fast.load("value", (keys,))
            last = j
            _scores(fast, h**-0.5, mask, rows, keys)
            shrink = _fold(fast)
            weighted = fast["scores"] @ fast["value"]
            fast["out"] = shrink[:, None] * fast["out"] + weighted
            fast.rescaled += weighted.size
            fast.drop("scores")
        total = fast["statistics"][1]
        fast["out"] = fast["out"] / np.where(total == 0, 1, total)[:, None]
        fast.divided += fast["out"].size
        fast.store("out", (rows,))
        fast["statistics"] = _logsumexp(fast["statistics"])
        fast.store("statistics", (slice(None), rows))
        fast.drop("query", "out", "statistics")
        if not reuse:
            fast.drop("key", "value")
    return fast.run(saved=1)


def standard(
    query: Float[np.ndarray, "t h"],
    key: Float[np.ndarray, "s h"],
    value: Float[np.ndarray, "s h"],
    tile: Tile,
    capacity: int,
) -> Run:
    """Scores, softmax and output, each from slow memory to slow memory."""
    (t, h), s = query.shape, len(key)
    slow = _slow(query, key, value)
    slow |= {"scores": np.full((t, s), np.nan), "weights": np.full((t, s), np.nan)}
    fast = Fast(capacity, slow)
    for rows in _cut(t, tile.block_q):
        fast.load("query", (rows,))
        for keys in _cut(s, tile.block_k):
            fast.load("key", (keys,))
            _scores(fast, h**-0.5, None, rows, keys)
            fast.store("scores", (rows, keys))
            fast.drop("key", "scores")
        fast.drop("query")
    chunks = list(_cut(s, min(tile.block_q, t) * min(tile.block_k, s)))
    for i in range(t):
        row = slice(i, i + 1)
        fast["statistics"] = _fresh(row)
        for keys in chunks:
            fast.load("scores", (row, keys))
            _fold(fast)
        top, total = fast["statistics"][:2]
        for keys in chunks:
            if len(chunks) > 1:
                fast.load("scores", (row, keys))
                fast["scores"] = np.exp(fast["scores"] - top)
            fast["scores"] = fast["scores"] / total
            fast.store("weights", (row, keys), "scores")
        fast.drop("scores", "statistics")
    for rows in _cut(t, tile.block_q):
        fast["out"] = np.zeros((rows.stop - rows.start, h))
        for keys in _cut(s, tile.block_k):
            fast.load("weights", (rows, keys))
            fast.load("value", (keys,))
            fast["out"] = fast["out"] + fast["weights"] @ fast["value"]
            fast.drop("weights", "value")
        fast.store("out", (rows,))
        fast.drop("out")
    return fast.run(saved=s)


def small(
    query: Float[np.ndarray, "t h"],
    key: Float[np.ndarray, "s h"],
    value: Float[np.ndarray, "s h"],
    tile: Tile,
    capacity: int,
) -> Run:
    """Both products by square tiles (arXiv:2402.07443, for capacity < h^2)."""
    (t, h), s = query.shape, len(key)
    slow = _slow(query, key, value) | {"scores": np.full((t, s), np.nan)}
    fast, width = Fast(capacity, slow), min(tile.block_k, h)
    for rows in _cut(t, tile.block_q):
        fast["statistics"] = _fresh(rows)
        for keys in _cut(s, tile.block_k):
            shape = rows.stop - rows.start, keys.stop - keys.start
            fast["scores"] = np.zeros(shape)
            for part in _cut(h, width):
                fast.load("query", (rows, part))
                fast.load("key", (keys, part))
                product = fast["query"] @ fast["key"].T
                fast["scores"] = fast["scores"] + h**-0.5 * product
                fast.drop("query", "key")
            fast.store("scores", (rows, keys))
            _fold(fast)
            fast.drop("scores")
        fast["statistics"] = _logsumexp(fast["statistics"])
        fast.store("statistics", (slice(None), rows))
        fast.drop("statistics")
    for rows in _cut(t, tile.block_q):
        fast.load("statistics", (slice(None), rows))
        for part in _cut(h, width):
            fast["out"] = np.zeros((rows.stop - rows.start, part.stop - part.start))
            for keys in _cut(s, tile.block_k):
                fast.load("scores", (rows, keys))
                weights = np.exp(fast["scores"] - fast["statistics"][0][:, None])
                fast["scores"] = weights
                fast.load("value", (keys, part))
                fast["out"] = fast["out"] + weights @ fast["value"]
                fast.drop("scores", "value")
            fast.store("out", (rows, part))
            fast.drop("out")
        fast.drop("statistics")
    return fast.run(saved=1)


def ideal(
    query: Float[np.ndarray, "t h"],
    key: Float[np.ndarray, "s h"],
    value: Float[np.ndarray, "s h"],
    capacity: int,
) -> Run:
    """All keys and values held, one row at a time."""
    (t, h), s = query.shape, len(key)
    fast = Fast(capacity, _slow(query, key, value))
    everything = slice(0, s)
    fast.load("key", (everything,))
    fast.load("value", (everything,))
    for row in _cut(t, 1):
        fast.load("query", (row,))
        _scores(fast, h**-0.5, None, row, everything)
        fast["scores"] = np.exp(fast["scores"] - fast["scores"].max())
        fast["scores"] = fast["scores"] / fast["scores"].sum()
        fast["out"] = fast["scores"] @ fast["value"]
        fast.store("out", (row,))
        fast.drop("query", "scores", "out")
    return fast.run(saved=0)
