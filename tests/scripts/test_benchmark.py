"""Benchmarks: ratios are taken within a round; the suite measures a real step."""

import json

import numpy as np
import pytest
from narrows.scripts import benchmark
from narrows.scripts.benchmarks import timing, train
from rich.console import Console


def test_a_ratio_is_taken_within_its_round():
    """The machine slows down fourfold half way: the ratio does not notice."""
    slow = np.array([1.0, 1.0, 1.0, 4.0, 4.0])
    spread = timing.ratio(2.0 * slow, 3.0 * slow)
    assert spread == pytest.approx((1.5, 1.5, 1.5))


def test_sides_take_turns():
    turns = []
    sides = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    found = timing.alternate(sides, rounds=3, calls=2, console=Console(quiet=True))
    assert "".join(turns) == "aabb" + 3 * "aabb"  # two calls each to warm up
    assert all(len(times.cpu) == 3 for times in found.values())


def test_operations_of_a_step_are_those_of_the_compiled_products():
    """nanoGPT's own count: 6 N + 12 L T D per token, attention halved by causality."""
    parameters = 10_750_000
    per_token = train.step_operations(parameters) / (train.ROWS * train.LENGTH)
    matrices = 6 * (parameters - train.LENGTH * train.WIDTH)
    assert per_token == matrices + 12 * train.DEPTH * train.WIDTH * train.LENGTH / 2


def test_the_suite_runs_and_records(monkeypatch, tmp_path, capsys):
    for name, size in (("ROWS", 2), ("LENGTH", 16), ("DEPTH", 1), ("WIDTH", 64)):
        monkeypatch.setattr(train, name, size)
    arguments = ["benchmark", "--rounds=2", "--calls=1", "--record"]
    assert benchmark.main([*arguments, f"--results_dir={tmp_path}"]) == 0
    assert "no peer" in capsys.readouterr().out
    (line,) = (tmp_path / "benchmark_train.jsonl").read_text().splitlines()
    assert json.loads(line)["attained_cpu"]["median"] > 0


def test_a_peer_that_is_not_there_is_refused(monkeypatch, tmp_path, capsys):
    for name, size in (("ROWS", 2), ("LENGTH", 16), ("DEPTH", 1), ("WIDTH", 64)):
        monkeypatch.setattr(train, name, size)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["benchmark", f"--peer={tmp_path}"])
    assert ended.value.code == 2
    assert "holds no model.py" in capsys.readouterr().err
