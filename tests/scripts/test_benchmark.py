"""Benchmarks: ratios are taken within a round; the suite measures a real step."""

import json

import numpy as np
import pytest
from narrows.scripts import benchmark
from narrows.scripts.benchmarks import attention, quantize, timing, train
from rich.console import Console

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def test_the_attention_suite_measures_every_side_against_float64(tmp_path, capsys):
    arguments = ["benchmark", "--suite=attention", "--rounds=2", "--calls=1"]
    shape = ["--lengths=48", "--widths=8", "--hidden=16", "--cases=packed"]
    record = ["--record", f"--results_dir={tmp_path}"]
    assert benchmark.main([*arguments, *shape, *record]) == 0
    text = (tmp_path / "benchmark_attention.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["pass"] for line in lines} == {"forward", "forward+backward"}
    assert {"narrows xla", "jax.nn xla"} <= {line["side"] for line in lines}
    assert all(line.get("error", 0.0) < 1e-5 for line in lines)
    assert "packed 8 48 float32 forward" in capsys.readouterr().out


def test_operations_count_the_visible_scores():
    for case in attention.CASES:
        problem = attention.draw(case, 8, 40, 80, 16, "float32")
        seen = np.ones((2, 40, 40), bool)
        if case != "full":
            seen &= np.tril(seen[0])
        if problem.ids is not None:
            ids = np.asarray(problem.ids)
            seen &= ids[:, :, None] == ids[:, None]
        assert attention.visible_scores(problem) == 2 * seen.sum()


def test_the_quantize_suite_runs_ours_alone_and_beside_its_peer(tmp_path, capsys):
    arguments = ["benchmark", "--suite=quantize", "--rounds=2", "--calls=1"]
    size = ["--quantizers=vq,fsq", "--codes=16", "--rows=32", "--code_width=4"]
    record = ["--memory_codes=0", "--record", f"--results_dir={tmp_path}"]
    assert benchmark.main([*arguments, *size, *record]) == 0
    text = (tmp_path / "benchmark_quantize.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["name"] for line in lines] == ["vq", "fsq"]
    assert all(line["seconds_cpu"] > 0 for line in lines)
    peers = ["peer_over_ours_cpu" in line for line in lines]
    assert all(peers) or "no peer: pip install" in capsys.readouterr().out


def test_a_step_of_ours_needs_a_fraction_of_the_distances():
    _, temporary = quantize.our_step("vq", codes=8192, rows=512, width=8)
    assert temporary < 4 * 8192 * 512 / 8


def test_compressing_is_timed_beside_a_step(tmp_path):
    arguments = ["benchmark", "--suite=compressors", "--rounds=2", "--calls=1"]
    shape = ["--compressed_depth=1", "--compressed_rows=2", "--compressed_length=16"]
    record = ["--compressors=sign,int8", "--record", f"--results_dir={tmp_path}"]
    assert benchmark.main([*arguments, *shape, *record]) == 0
    lines = (tmp_path / "benchmark_compressors.jsonl").read_text().splitlines()
    sign, int8 = map(json.loads, lines)
    assert 1 < sign["bits_a_parameter"] < 2 < 8 < int8["bits_a_parameter"] < 9
    assert all(line["over_step_cpu"]["median"] > 0 for line in (sign, int8))
