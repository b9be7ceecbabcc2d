"""What attention moves between a slow and a fast memory: closed forms and bounds.

Model (Saha and Ye 2024, arXiv:2402.07443, after Hong and Kung): query [t, h], key and
value [s, h] start in slow memory and out [t, h] must end there; the fast memory holds
`capacity` elements, all operands together, and moving one element either way counts 1.
Computing on what is held is free. Everything counts elements of one head; `Moved.bytes`
weighs them. `two_level.py` runs the same loops and must count the same.

    standard   scores and weights through slow memory     Theta(t s + t s h / block)
    k_outer    FlashAttention (arXiv:2205.14135, Alg. 1)  Theta(t s h^2 / capacity)
    q_outer    FlashAttention-2 (arXiv:2307.08691, Alg. 1)  the same, about half of it
    small      arXiv:2402.07443, where capacity < h^2     Theta(t s h / sqrt(capacity))
    ideal      inputs and output once                     2 t h + 2 s h

With `visited`, a [tiles_t, tiles_s] table, the two Flash orders leave out the other
tiles: block-sparse attention, or causal attention without its upper half.
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

ROW = 4  # statistics held per row of a tile: maximum and sum, old and new


class Moved(NamedTuple):
    """Elements moved, by operand; a schedule of one head."""

    reads: dict[str, int]
    writes: dict[str, int]
    peak: int  # elements held at once, all operands together

    @property
    def elements(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    def bytes(self, widths: Mapping[str, int]) -> int:
        """Weighed by the bytes of an element of each operand."""
        return sum(
            widths[name] * count
            for part in (self.reads, self.writes)
            for name, count in part.items()
        )


class Work(NamedTuple):
    """Operations on accumulators that are no matrix product; a schedule of one head."""

    rescaled: int  # elements of out multiplied by exp(old maximum - new maximum)
    divided: int  # elements of out divided by the sum of their row
    updates: int  # of the statistics of one row
    saved: int  # numbers kept per row for the backward pass


class Tile(NamedTuple):
    block_q: int
    block_k: int


Table = Bool[np.ndarray, "tiles_t tiles_s"]


class _Seen(NamedTuple):
    """Lengths of the visited tiles."""

    rows: int  # rows of every visited tile, added up
    keys: int  # keys of every visited tile, added up
    any_rows: int  # rows of the row blocks with a visited tile
    any_keys: int
    peak: int


def _blocks(length: int, block: int) -> np.ndarray:
    """The lengths of the blocks: all equal but the last."""
    return np.minimum(block, length - np.arange(0, length, block))


def _seen(t, s, tile, visited, held) -> _Seen:
    """`held(rows, keys)` is what a visited tile needs in fast memory."""
    block_q, block_k = tile
    if visited is None:
        tiles_t, tiles_s = -(-t // block_q), -(-s // block_k)
        peak = held(min(t, block_q), min(s, block_k))
        return _Seen(tiles_s * t, tiles_t * s, t, s, peak)
    rows, keys = _blocks(t, block_q)[:, None], _blocks(s, block_k)
    visited = np.asarray(visited, bool)
    if visited.shape != (rows.size, keys.size):
        raise ValueError(
            f"visited has shape {visited.shape}; {t} rows and {s} keys in tiles of "
            f"{tuple(tile)} need {(rows.size, keys.size)}"
        )
    return _Seen(
        int((visited * rows).sum()),
        int((visited * keys).sum()),
        int((visited.any(1) * rows[:, 0]).sum()),
        int((visited.any(0) * keys).sum()),
        int(np.max(held(rows, keys), where=visited, initial=0)),
    )


def standard(t: int, s: int, h: int, tile: Tile) -> Moved:
    """Scores written, normalised, weights written, read again: three passes.

    A row that is longer than a tile's elements is read twice by the softmax.
    """
    block_q, block_k = min(tile.block_q, t), min(tile.block_k, s)
    tiles_t, chunk = -(-t // block_q), min(s, block_q * block_k)
    product = block_q * h + block_k * h + block_q * block_k
    return Moved(
        {
            "query": t * h,
            "key": tiles_t * s * h,
            "scores": t * s * (1 if chunk == s else 2),
            "weights": t * s,
            "value": tiles_t * s * h,
        },
        {"scores": t * s, "weights": t * s, "out": t * h},
        max(product, chunk + ROW),
    )


def k_outer(t: int, s: int, h: int, tile: Tile, visited: Table | None = None) -> Moved:
    """FlashAttention: every pass over a key block reads and writes the output.

    The output and the two statistics of a row start in slow memory as 0, -inf and 0.
    """

    def held(rows, keys):
        return 2 * keys * h + 2 * rows * h + rows * keys + ROW * rows

    seen = _seen(t, s, tile, visited, held)
    return Moved(
        {
            "query": seen.rows * h,
            "key": seen.any_keys * h,
            "value": seen.any_keys * h,
            "out": seen.rows * h,
            "statistics": 2 * seen.rows,
        },
        {"out": seen.rows * h, "statistics": 2 * seen.rows},
        seen.peak,
    )


def q_outer(
    t: int,
    s: int,
    h: int,
    tile: Tile,
    visited: Table | None = None,
    *,
    reuse: bool = False,
) -> Moved:
    """FlashAttention-2: the output of a row block stays until it is done.

    reuse: a key block that the row block before has left in place is not read again,
    as in a pipeline that compares block indices.
    """

    def held(rows, keys):
        return 2 * keys * h + 2 * rows * h + rows * keys + ROW * rows

    seen = _seen(t, s, tile, visited, held)
    keys = seen.keys - (_left_in_place(t, s, tile, visited) if reuse else 0)
    untouched = 0 if visited is None else min(t, tile.block_q) * (h + ROW)
    return Moved(
        {"query": seen.any_rows * h, "key": keys * h, "value": keys * h},
        {"out": t * h, "statistics": t},
        max(seen.peak, untouched),
    )


def _left_in_place(t, s, tile, visited) -> int:
    """Keys of the blocks with which a row block ends and the next begins."""
    keys = _blocks(s, tile.block_k)
    if visited is None:
        return (-(-t // tile.block_q) - 1) * s if keys.size == 1 else 0
    ends = [np.flatnonzero(row)[[0, -1]] for row in np.asarray(visited) if row.any()]
    return sum(
        int(keys[first])
        for (_, last), (first, _) in itertools.pairwise(ends)
        if first == last
    )


def small(t: int, s: int, h: int, tile: Tile) -> Moved:
    """Both products by square tiles; scores go through slow memory, weights do not.

    Tiles are block_q x block_k and as wide as block_k along h. The softmax statistics
    of a row block are gathered while its scores are formed.
    """
    block_q, block_k = min(tile.block_q, t), min(tile.block_k, s)
    width = min(tile.block_k, h)
    tiles_t, tiles_s, tiles_h = -(-t // block_q), -(-s // block_k), -(-h // width)
    product = block_q * width + block_k * width + block_q * block_k
    return Moved(
        {
            "query": tiles_s * t * h,
            "key": tiles_t * s * h,
            "scores": tiles_h * t * s,
            "statistics": t,
            "value": tiles_t * s * h,
        },
        {"scores": t * s, "statistics": t, "out": t * h},
        product + ROW * block_q,
    )


def ideal(t: int, s: int, h: int) -> Moved:
    """Keys and values stay in fast memory; one row at a time goes through."""
    return Moved(
        {"query": t * h, "key": s * h, "value": s * h},
        {"out": t * h},
        2 * s * h + 2 * h + s,
    )


def fit(
    schedule: str, t: int, s: int, h: int, capacity: int, *, inner: int | None = None
) -> Tile:
    """The tile that moves least among those that fit, for k_outer, q_outer, small.

    The traffic of the Flash orders does not depend on the inner block: by default it
    is min(outer, h), as in the papers; inner=1 leaves all room to the outer one. They
    solve (2 B + 2 b) h + B b + 4 rows <= capacity for the outer block B.
    """
    if schedule == "small":
        block = (math.isqrt(ROW**2 + 12 * capacity) - ROW) // 6  # 3 b^2 + 4 b
        tile = Tile(min(block, t), min(block, s))
    elif schedule in ("k_outer", "q_outer"):
        rows = ROW if schedule == "q_outer" else 0  # statistics per outer row
        b = h if inner is None else inner
        outer = (capacity - 2 * b * h - (ROW - rows) * b) // (2 * h + b + rows)
        if inner is None and outer < h:  # B = b: B^2 + (4 h + 4) B <= capacity
            linear = 4 * h + ROW
            outer = b = (math.isqrt(linear**2 + 4 * capacity) - linear) // 2
        tile = Tile(min(outer, t), min(b, s))
        if schedule == "k_outer":
            tile = Tile(min(b, t), min(outer, s))
    else:
        raise ValueError(
            f"schedule is {schedule!r}; it must be 'k_outer', 'q_outer' or 'small'"
        )
    if min(tile) < 1:
        raise ValueError(
            f"capacity {capacity} holds no tile of {schedule} at width {h}: give more"
        )
    return tile


def best(t: int, s: int, h: int, capacity: int) -> tuple[str, Moved]:
    """The schedule that moves least within the capacity, and what it moves."""
    found = {"ideal": ideal(t, s, h)}
    closed = {"k_outer": k_outer, "q_outer": q_outer, "small": small}
    for name, moved in closed.items():
        inner = None if name == "small" else 1
        try:
            tile = fit(name, t, s, h, capacity, inner=inner)
        except ValueError:
            continue
        found[name] = moved(t, s, h, tile)
    fits = {name: m for name, m in found.items() if m.peak <= capacity}
    if not fits:
        raise ValueError(f"capacity {capacity} is too small for any schedule")
    name = min(fits, key=lambda name: fits[name].elements)
    return name, fits[name]


def bound_trivial(t: int, s: int, h: int) -> int:
    """Three inputs are read and one output is written, whatever the capacity."""
    return 2 * t * h + 2 * s * h


def bound_fused(pairs: int, h: int, capacity: int) -> int:
    """capacity * floor(pairs h^2 / capacity^2) - capacity: "large cache".

    Hypothesis: every score is formed in one go from a row of query and a row of key
    that are held together, so that no part of it is ever stored (both Flash orders).
    While `capacity` elements move, at most 2 * capacity inputs are at hand: x rows and
    y keys with (x + y) h <= 2 * capacity, which form at most (capacity / h)^2 scores
    (after arXiv:2402.07443, the bound for capacity >= h^2). `pairs` is t s, or the
    number of kept entries.
    """
    return capacity * (pairs * h * h // capacity**2) - capacity


def bound(pairs: int, h: int, capacity: int) -> int:
    """Least traffic of any order of the products q_ie k_je, for every capacity.

    Hypothesis: each score is a sum of its h products (no fast matrix multiplication).
    Parts of scores may be kept, stored, read again or formed twice. Cut the run into
    epochs of M = capacity moves. In one, at most 2 M elements of query and key are at
    hand, in all at most M^2 pairs of a query and a key element. Scores formed whole
    within the epoch have at most M^2 / h products. The others come in or go out in
    part, at most 3 M of them, and have by Loomis and Whitney at most
    sqrt(M^2 * 3 M) products. So, for pairs = t s or the kept entries,

        moves >= M (ceil(pairs h / (M^2 / h + sqrt(3) M^1.5)) - 1),

    which tends to pairs h^2 / M for M >> h^2, and is at least
    pairs h / (2.74 sqrt(M)) - M for M <= h^2: both regimes of arXiv:2402.07443, with
    constants of our own.
    """
    epoch = capacity**2 / h + math.sqrt(3) * capacity**1.5
    return max(0, capacity * (math.ceil(pairs * h / epoch) - 1))


def work(
    schedule: str, t: int, s: int, h: int, tile: Tile, visited: Table | None = None
) -> Work:
    """Rescalings and divisions of k_outer (FlashAttention) and q_outer.

    k_outer normalises the output at every tile; q_outer divides once at the end and
    saves one statistic. Two-level tiling (FastAttention, arXiv:2410.16663) is q_outer
    with the large tile as block_k, whatever the small one.
    """
    rows = _seen(t, s, tile, visited, lambda r, k: r * k).rows
    if schedule == "k_outer":
        return Work(rows * h, rows * h, rows, 2)
    if schedule == "q_outer":
        return Work(rows * h, t * h, rows, 1)
    raise ValueError(f"schedule is {schedule!r}; it must be 'k_outer' or 'q_outer'")
