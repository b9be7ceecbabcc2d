"""The ring of host memory: regions apart, in order, within bounds, never stuck."""

import itertools
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.parallel.checkpoint.arena import LINE, Arena, room_for


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.integers(1, 12),
    moves=st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 99))),
)
def test_regions_never_overlap_and_room_comes_back(capacity, moves):
    """Whatever is taken and given back, in whatever order."""
    arena = Arena(capacity * LINE)
    held = []
    for take, lines, which in moves:
        size = lines * LINE - which % LINE
        if take and room_for(size) <= arena.capacity:
            fits = arena._room(room_for(size)) is not None
            if fits:
                held.append(arena.take(size))
                held[-1].view[:] = which
        elif held:
            arena.give_back(held.pop(which % len(held)))
        spans = sorted((r.start, r.stop) for r in arena.live)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert all(0 <= a < b <= arena.capacity for a, b in spans)
        assert {r.start for r in held} <= {a for a, _ in spans}
    for region in held:
        arena.give_back(region)
    assert not arena.live
    whole = arena.take(arena.capacity)  # a region may be as large as the arena
    assert whole.view.size == arena.capacity


def test_who_waits_for_room_gets_it_in_turn():
    arena = Arena(4 * LINE)
    first, second = arena.take(2 * LINE), arena.take(LINE)
    got = []
    thread = threading.Thread(target=lambda: got.append(arena.take(3 * LINE)))
    thread.start()
    arena.give_back(second)  # not the oldest: nothing is free yet
    thread.join(0.05)
    assert thread.is_alive()
    arena.give_back(first)
    thread.join(10)
    assert got[0].start == 0


def test_what_never_fits_is_refused():
    with pytest.raises(ValueError, match="region of 100 bytes does not fit into 64"):
        Arena(64).take(100)
    with pytest.raises(ValueError, match="at least 1 byte"):
        Arena(0)
    arena = Arena(64)
    arena.take(64)
    waiting = []

    def wait():
        try:
            arena.take(1)
        except RuntimeError as error:
            waiting.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    arena.close()
    thread.join(10)
    assert waiting == ["arena: closed"]
