"""The suite on rare meetings: how it counts, and that it measures every method."""

import json

import pytest
from narrows.optim.local_updates.outer import OUTERS
from narrows.optim.local_updates.pace import round_seconds
from narrows.scripts import benchmark
from narrows.scripts.benchmarks import outer, outer_steps


def test_a_hidden_exchange_exposes_nothing_and_a_waited_one_all():
    """Of times made by the closed form: the counts give back what they were made of."""
    common = {"step_seconds": 0.5, "exchange_seconds": 3.0}
    for stale, exposed in ((True, 0.0), (False, 1.0)):
        seconds = [round_seconds(12, 0.5, 3.0, stale=stale)] * 3
        line = outer._line("any", 12, seconds, common)
        assert line["exposed"]["median"] == pytest.approx(exposed)
        assert line["rate"]["median"] == pytest.approx(6 / seconds[0])


def test_every_method_of_the_library_is_timed():
    assert set(outer.NAMES) == {outer.ONE_BIT, *OUTERS}
    assert set(outer_steps.METHODS) == {outer.DENSE, *outer.NAMES}


@pytest.mark.slow
def test_the_suite_measures_the_mesh_at_hand(tmp_path):
    shape = ("--outer_mesh=data=8", "--outer_depth=1", "--outer_length=16")
    more = ("--outer_methods=co2,one_bit_adam", "--outer_turns=1", "--record")
    argv = ["benchmark", "--suite=outer", *shape, *more, f"--results_dir={tmp_path}"]
    assert benchmark.main(argv) == 0
    lines = (tmp_path / "benchmark_outer.jsonl").read_text().splitlines()
    found = {line["method"]: line for line in map(json.loads, lines)}
    assert list(found) == [outer.DENSE, "co2", outer.ONE_BIT]
    kinds = [what for what, *_ in found["co2"]["events"]]
    assert kinds.count("step") == 2 * found["co2"]["every"]
    assert kinds.count("exchange") == 2
    assert outer.draw(list(found.values()))
