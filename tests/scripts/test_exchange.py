"""The suite on exchanges: what it predicts, and that it measures every method."""

import json
import math

import numpy as np
import pytest
from narrows.scripts import benchmark
from narrows.scripts.benchmarks import exchange, exchange_steps
from narrows.scripts.benchmarks.processes import started

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_at_the_break_even_bandwidth_both_take_equally_long():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sent = (1e8 * rng.uniform(0.5, 1), 1e6 * rng.uniform(1, 9))
        local = (1.0, 1.0 + rng.uniform(0.01, 1))
        efficiency = rng.uniform(0.5, 1)
        even = exchange.break_even(sent, local, efficiency)
        link = {
            "dense": {"bytes_s": even, "delay_s": 0.0},
            "two_phase": {"bytes_s": efficiency * even, "delay_s": 0.0},
        }
        dense = exchange.predict(sent[0], local[0], link, "dense")
        method = exchange.predict(sent[1], local[1], link, "two_phase")
        assert method == pytest.approx(dense)


def test_a_method_that_computes_no_longer_pays_at_any_bandwidth():
    assert exchange.break_even((100.0, 3.0), (1.0, 0.9)) == math.inf
    assert exchange.break_even((100.0, 300.0), (1.0, 2.0)) == 0.0
    assert exchange.break_even((100.0, 300.0), (1.0, 0.9)) == 0.0


def test_methods_are_told_apart_by_what_they_send():
    assert tuple(exchange_steps.METHODS) == exchange.NAMES


@pytest.mark.slow
def test_the_suite_measures_the_mesh_at_hand(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exchange_steps, "LEAST_SECONDS", 0.0)
    arguments = ["benchmark", "--suite=exchange", "--mesh=data=8", "--rounds=2"]
    size = ["--exchange_depth=1", "--learn_steps=2", "--methods=one_bit_adam"]
    record = ["--record", f"--results_dir={tmp_path}"]
    assert benchmark.main([*arguments, *size, *record]) == 0
    text = (tmp_path / "benchmark_exchange.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    kinds = [(line["kind"], line.get("method")) for line in lines]
    assert kinds == [
        ("loss", "adam"),
        ("loss", "one_bit_adam"),
        ("link", None),
        ("step", "adam"),
        ("step", "one_bit_adam"),
    ]
    # Both saw the same text, and were dense as long as v moved.
    assert lines[0]["nats"] == pytest.approx(lines[1]["nats"], rel=1e-4)
    dense, one_bit = lines[3:]
    assert dense["times_as_fast"]["median"] == 1
    assert one_bit["sent_bytes"] < dense["sent_bytes"] / 25
    said = capsys.readouterr().out
    assert ("one_bit_adam loses" in said) == (one_bit["times_as_fast"]["median"] < 1)
    exchange.draw(lines)


def test_bad_flags_are_refused(capsys):
    for flag, said in (
        ("--methods=adamant", "'adamant' is none of adam, one_bit_adam"),
        ("--mesh=data=1", "mesh: data=1"),
        ("--exchange_rows=7", "exchange_rows: 7 do not divide over 4 processes"),
    ):
        with pytest.raises(SystemExit) as ended:
            benchmark.main(["benchmark", "--suite=exchange", flag])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_a_process_that_ends_is_told_with_what_it_printed():
    wrong = "narrows.scripts.benchmarks.exchange_steps:Nothing"
    with (
        started(wrong, {}, [[]], "127.0.0.1:29418") as ask,
        pytest.raises(RuntimeError, match=r"process 0 ended in facts(.|\n)*Nothing"),
    ):
        ask("facts")
