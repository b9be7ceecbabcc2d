"""Schedules and their exact times: every closed form as a rational, no tolerance."""

import itertools
import random
from fractions import Fraction

import pytest
from narrows.parallel.partition import balanced, by_cumulative_cost, cost_of
from narrows.parallel.pipeline_simulator import simulate
from narrows.parallel.schedules import Op, closed_form, gpipe, make_schedule

GRID = [
    *itertools.product(("gpipe", "one_f_one_b"), range(1, 9), (1, 2, 5, 16), (1,)),
    *(
        ("interleaved", p, rounds * p, v)
        for p, rounds, v in itertools.product(range(1, 9), (1, 2, 3), (1, 2, 3, 4))
    ),
]
TIMES = [(1, 2), (Fraction(3, 7), Fraction(5, 3)), (1, 1)]


@pytest.mark.parametrize(("forward", "backward"), TIMES)
def test_times_and_stashes_equal_the_closed_forms(forward, backward):
    for name, p, m, v in GRID:
        schedule = make_schedule(name, p, m, v)
        chunk = {"forward": Fraction(forward) / v, "backward": Fraction(backward) / v}
        got = simulate(schedule, **chunk)
        wanted = closed_form(name, p, m, v, forward, backward)
        assert got.makespan == wanted.makespan, (name, p, m, v)
        assert got.bubble == wanted.bubble == Fraction(p - 1, v * m)
        assert got.idle_share == Fraction(p - 1, v * m + p - 1)
        assert tuple(Fraction(n, v) for n in got.stash) == wanted.stash


def test_every_operation_runs_once_and_after_what_it_needs():
    for name, p, m, v in GRID[::5]:
        line = simulate(make_schedule(name, p, m, v), send=Fraction(1, 3))
        at = {
            (s.op.kind, s.op.microbatch, s.op.chunk * p + device): s
            for device, spans in enumerate(line.spans)
            for s in spans
        }
        assert len(at) == 2 * m * v * p
        for (kind, i, k), span in at.items():
            if kind == "F" and k:
                assert span.start >= at["F", i, k - 1].finish + Fraction(p > 1, 3)
            if kind == "B":
                assert span.start >= at["F", i, k].finish
                if k + 1 < v * p:
                    assert span.start >= at["B", i, k + 1].finish + Fraction(p > 1, 3)
        for spans in line.spans:
            pairs = itertools.pairwise(spans)
            assert all(a.finish <= b.start for a, b in pairs)


def test_a_rest_of_microbatches_breaks_the_interleaved_law():
    with pytest.raises(ValueError, match=r"6 are no multiple of the 4 .*: 4 or 8"):
        make_schedule("interleaved", 4, 6, 2)


def test_one_slow_stage_sets_the_pace():
    """m - 1 times the slowest stage, and once through all."""
    times = [1, 5, 1, 1]
    line = simulate(gpipe(4, 6), forward=times, backward=[0] * 4)
    assert line.makespan == 5 * max(times) + sum(times)


def test_impossible_schedules_raise():
    schedule = gpipe(2, 2)
    schedule[0].reverse()
    with pytest.raises(ValueError, match="device 0 waits for ever before"):
        simulate(schedule)
    missing = gpipe(2, 2)
    missing[0].remove(Op("B", 0))
    with pytest.raises(ValueError, match=r"7 operations, but .* take 8"):
        simulate(missing)
    with pytest.raises(ValueError, match="3 times, but there are 2 stages"):
        simulate(gpipe(2, 2), forward=[1, 1, 1])
    with pytest.raises(ValueError, match="schedule: 'zigzag'"):
        make_schedule("zigzag", 2, 2, 1)
    with pytest.raises(ValueError, match="gpipe has one chunk"):
        make_schedule("gpipe", 2, 2, 2)


def every_cut(layers, cells):
    for ends in itertools.combinations(range(1, layers), cells - 1):
        marks = (0, *ends, layers)
        yield [b - a for a, b in itertools.pairwise(marks)]


def test_the_balanced_partition_is_the_best_of_all():
    draw = random.Random(0)
    worse = 0
    for _ in range(60):
        costs = [draw.randint(1, 20) for _ in range(draw.randint(2, 9))]
        cells = draw.randint(1, min(4, len(costs)))
        best = min(max(cost_of(costs, cut)) for cut in every_cut(len(costs), cells))
        found = balanced(costs, cells)
        assert len(found) == cells
        assert sum(found) == len(costs)
        assert min(found) > 0
        assert max(cost_of(costs, found)) == best
        try:
            rule = max(cost_of(costs, by_cumulative_cost(costs, cells)))
        except ValueError:
            continue
        assert rule >= best
        worse += rule > best
    assert worse > 0


def test_a_layer_that_dominates_empties_a_cell_of_the_rule():
    costs = [1, 100, 1, 1]
    with pytest.raises(ValueError, match="leave cell 1 without layers"):
        by_cumulative_cost([1, 1, 100, 1], 4)
    assert balanced(costs, 4) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="cells: 5"):
        balanced(costs, 5)
