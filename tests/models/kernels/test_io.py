"""The traffic model: runs count what the closed forms say, and no run beats a bound."""

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.models.kernels.attention import io, two_level
from narrows.models.kernels.attention.io import Tile

SIZES = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6))
TILES = st.builds(Tile, st.integers(1, 6), st.integers(1, 6))
PLENTY = 10**6
FIT: Any = io.fit
WORK: Any = io.work
CLOSED: dict[str, Any] = {
    "standard": io.standard,
    "k_outer": io.k_outer,
    "q_outer": io.q_outer,
    "small": io.small,
}
RUNS: dict[str, Any] = {name: getattr(two_level, name) for name in CLOSED}
quick = settings(max_examples=60, deadline=None)


@functools.cache
def draw(t, s, h):
    rng = np.random.default_rng([t, s, h])
    q, k, v = (rng.normal(size=(n, h)) for n in (t, s, s))
    return q, k, v


def plain(query, key, value, mask=None):
    scores = query @ key.T / query.shape[1] ** 0.5
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - np.max(scores, 1, keepdims=True, initial=-1e30))
    total = weights.sum(1, keepdims=True)
    return weights @ value / np.where(total == 0, 1, total)


def check(run, closed, expected):
    assert run.moved.reads == {k: v for k, v in closed.reads.items() if v}
    assert run.moved.writes == {k: v for k, v in closed.writes.items() if v}
    assert run.moved.peak == closed.peak
    np.testing.assert_allclose(run.out, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CLOSED)
@quick
@given(sizes=SIZES, tile=TILES)
def test_runs_count_the_closed_forms_and_give_attention(name, sizes, tile):
    arrays = draw(*sizes)
    closed = CLOSED[name](*sizes, tile)
    run = RUNS[name](*arrays, tile, closed.peak)
    check(run, closed, plain(*arrays))
    assert run.moved.elements >= io.bound_trivial(*sizes)
    with pytest.raises(ValueError, match="capacity"):
        RUNS[name](*arrays, tile, closed.peak - 1)


@given(sizes=SIZES)
@quick
def test_ideal_moves_inputs_and_output_once(sizes):
    arrays, closed = draw(*sizes), io.ideal(*sizes)
    run = two_level.ideal(*arrays, closed.peak)
    check(run, closed, plain(*arrays))
    assert closed.elements == io.bound_trivial(*sizes)


@pytest.mark.parametrize(
    ("name", "options"),
    [("k_outer", {}), ("q_outer", {}), ("q_outer", {"reuse": True})],
)
@quick
@given(sizes=SIZES, tile=TILES, seed=st.integers(0, 99))
def test_block_sparse_runs_visit_the_kept_tiles_only(name, options, sizes, tile, seed):
    (t, s, _), (block_q, block_k) = sizes, tile
    rng = np.random.default_rng(seed)
    visited = rng.random((-(-t // block_q), -(-s // block_k))) < 0.5
    mask = np.kron(visited, np.ones(tile, bool))[:t, :s]
    arrays = draw(*sizes)
    closed = CLOSED[name](*sizes, tile, visited, **options)
    run = RUNS[name](*arrays, tile, PLENTY, visited=visited, mask=mask, **options)
    check(run, closed, plain(*arrays, mask))
    assert run.work == WORK(name, *sizes, tile, visited)


@quick
@given(sizes=SIZES, tile=TILES)
def test_reuse_leaves_out_blocks_that_are_in_place(sizes, tile):
    arrays = draw(*sizes)
    closed = CLOSED["q_outer"](*sizes, tile, reuse=True)
    run = two_level.q_outer(*arrays, tile, PLENTY, reuse=True)
    check(run, closed, plain(*arrays))


def test_the_published_counts():
    """Of Algorithm 1 of both papers, in elements; here N = 64, d = 8, blocks of 16."""
    n, d, tile, blocks = 64, 8, Tile(16, 16), 4
    first, second = io.k_outer(n, n, d, tile), io.q_outer(n, n, d, tile)
    assert sum(first.reads.values()) == 2 * n * d + blocks * (2 * n * d + 2 * n)
    assert sum(first.writes.values()) == blocks * (n * d + 2 * n)
    assert sum(second.reads.values()) == n * d + blocks * 2 * n * d
    assert sum(second.writes.values()) == n * d + n


@pytest.mark.parametrize("name", ["k_outer", "q_outer"])
def test_work_is_counted_as_it_is_done(name):
    sizes, tile = (13, 11, 3), Tile(4, 3)
    run = RUNS[name](*draw(*sizes), tile, PLENTY)
    assert run.work == WORK(name, *sizes, tile)
    assert run.work.divided == 13 * 3 * (4 if name == "k_outer" else 1)


@quick
@given(
    name=st.sampled_from(["k_outer", "q_outer", "small"]),
    lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    h=st.integers(1, 12),
    capacity=st.integers(60, 3000),
    inner=st.sampled_from([None, 1]),
)
def test_fitted_tiles_fit_and_no_larger_one_does(name, lengths, h, capacity, inner):
    inner = None if name == "small" else inner
    tile = FIT(name, *lengths, h, capacity, inner=inner)
    assert CLOSED[name](*lengths, h, tile).peak <= capacity
    far = 10**6  # no length binds
    tile = io.fit(name, far, far, h, capacity, inner=inner)
    square = tile[0] == tile[1] and inner is None
    grown = Tile(
        tile[0] + (square or name == "q_outer"), tile[1] + (square or name == "k_outer")
    )
    if name != "small" or min(grown) <= h:  # beyond h its tiles are no squares
        assert CLOSED[name](far, far, h, tile).peak <= capacity
        assert CLOSED[name](far, far, h, grown).peak > capacity


@quick
@given(
    sizes=st.tuples(st.integers(8, 400), st.integers(8, 400), st.integers(1, 24)),
    capacity=st.integers(200, 4000),
)
def test_no_schedule_beats_the_bounds(sizes, capacity):
    t, s, h = sizes
    for name in ("k_outer", "q_outer", "small"):
        for inner in (None,) if name == "small" else (None, 1):
            tile = io.fit(name, t, s, h, capacity, inner=inner)
            moved = CLOSED[name](t, s, h, tile).elements
            assert moved >= io.bound_trivial(t, s, h)
            assert moved >= io.bound(t * s, h, capacity)
            if name != "small":
                assert moved >= io.bound_fused(t * s, h, capacity)
    name, moved = io.best(t, s, h, capacity)
    assert moved.peak <= capacity
    assert moved.elements >= io.bound_trivial(t, s, h)


def test_with_room_for_everything_the_least_is_reached():
    n, d = 512, 16
    _, moved = io.best(n, n, d, 4 * n * d)
    assert moved.elements <= io.bound_trivial(n, n, d) + n
    assert moved.elements < io.k_outer(n, n, d, Tile(64, 64)).elements


def test_bytes_weigh_operands():
    moved = io.q_outer(8, 8, 4, Tile(4, 4))
    widths = {"query": 2, "key": 2, "value": 2, "out": 2, "statistics": 4}
    assert moved.bytes(widths) == 2 * (moved.elements - 8) + 4 * 8
    assert moved.bytes(dict.fromkeys(widths, 1)) == moved.elements


def test_errors_name_what_does_not_fit():
    with pytest.raises(ValueError, match="capacity 5 holds no tile of q_outer"):
        io.fit("q_outer", 8, 8, 4, 5)
    with pytest.raises(ValueError, match="schedule is 'fast'"):
        io.fit("fast", 8, 8, 4, 500)
    with pytest.raises(ValueError, match="schedule is 'small'"):
        io.work("small", 8, 8, 4, Tile(2, 2))
    with pytest.raises(ValueError, match="visited has shape"):
        io.q_outer(8, 8, 4, Tile(4, 4), np.ones((3, 2), bool))
    with pytest.raises(ValueError, match="too small for any schedule"):
        io.best(8, 8, 4, 5)
