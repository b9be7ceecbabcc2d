"""What a trained run is good for: text from it, and an honest score."""

import json
import shutil

import numpy as np
import pytest
from narrows.scripts import evaluate, sample
from narrows.scripts.evaluate import block_interval
from narrows.scripts.runlog import read_rows


@pytest.fixture
def said(call, capsys):
    """`said(script, *arguments, devices=n)`: what a command prints to its output."""

    def said(script, *arguments, **options):
        capsys.readouterr()
        assert call(script, *arguments, **options) == 0
        return capsys.readouterr().out

    return said


def score(said, *arguments, **options):
    return json.loads(said(evaluate, *arguments, **options))


def test_the_same_seed_writes_the_same_text(said, finished):
    """From a checkpoint that 8 devices saved, on one device."""
    flags = (f"--workdir={finished}", "--length=40", "--prompt=def f(")
    first, again = said(sample, *flags), said(sample, *flags)
    assert first == again
    assert first.startswith("def f(")
    assert len(first) > 30
    assert said(sample, *flags, "--seed=1") != first


def test_the_prompt_may_be_a_file_and_the_step_an_older_one(said, finished, tmp_path):
    (tmp_path / "start.py").write_text("def f(")
    flags = (f"--workdir={finished}", "--length=40", "--top_k=20")
    prompt = f"--prompt_file={tmp_path / 'start.py'}"
    newest = said(sample, *flags, "--prompt=def f(")
    assert said(sample, *flags, prompt) == newest
    assert said(sample, *flags, prompt, "--step=20") != newest


def test_the_score_is_that_of_training_within_its_interval(said, finished):
    got = score(said, f"--workdir={finished}", "--split=validation", "--rows=16")
    low, high = got["interval"]
    assert low < got["bits_per_byte"] < high
    assert got["step"] == 40
    assert got["tokens"] == 16 * 16
    # at most those of a code that none of the last 32 steps of 8 x 16 positions chose
    assert 0 < got["waist_bits"] <= np.log2((32 * 8 * 16 + 32 / 2) / 0.5)
    rows = read_rows(finished / "metrics.jsonl")
    logged = next(r for r in reversed(rows) if r["split"] == "validation")
    assert got["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-5)


def test_eight_devices_score_as_one_does(said, finished):
    flags = (f"--workdir={finished}", "--rows=20")  # the last batch is not full
    one = score(said, *flags, devices=1)
    many = score(said, *flags, "--mesh=data=8")
    assert one["tokens"] == many["tokens"] == 20 * 16
    for name in ("loss", "bits_per_byte", "waist_bits", "interval"):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5)


def test_a_run_is_not_scored_on_a_text_that_changed(
    call, said, books, finished, tmp_path, capsys
):
    """Unless the text is named: then its splits are the caller's affair."""
    flags = (f"--workdir={finished}", "--rows=16")
    moved = shutil.copytree(books, tmp_path / "moved")
    before = score(said, *flags)
    held = (books / "heapq.py").read_bytes()
    try:
        (books / "heapq.py").write_bytes(held + b"# a line more\n" * 99)
        assert call(evaluate, *flags) == 2
        assert "name the text to score with --data" in capsys.readouterr().err
        assert score(said, *flags, f"--data={books}")["loss"] != before["loss"]
    finally:
        (books / "heapq.py").write_bytes(held)
    assert score(said, *flags, f"--data={moved}") == before  # the same text elsewhere


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """Windows of unequal counts from a known law, 400 times."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        count = rng.integers(8, 17, size=100).astype(float)
        nats = count * (2.0 + rng.normal(size=100))
        low, high = block_interval(nats, count)
        inside += low < 2.0 < high
    assert 0.92 < inside / 400 < 0.98  # 0.95, give or take three standard errors


def test_the_interval_of_like_neighbours_is_wider():
    """Windows in runs of five alike, so a fifth as many independent ones."""
    rng = np.random.default_rng(0)
    count = np.ones(100)
    alone, alike = rng.normal(size=100), np.repeat(rng.normal(size=20), 5)
    widths = [np.ptp(block_interval(x, count)) for x in (alone, alike)]
    assert widths[1] > 1.6 * widths[0]  # sqrt 5, up to the luck of 20 draws
