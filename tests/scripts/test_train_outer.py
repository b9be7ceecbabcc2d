"""Runs whose workers meet now and then: stopped, moved to fewer workers, sampled."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from narrows.scripts import sample, train
from narrows.scripts.runlog import read_rows
from narrows.scripts.trained import load_trained

FLAGS = (
    "--outer=co2",
    "--waist=none",
    "--steps=10",
    "--checkpoint_every=5",
    "--eval_every=10",
    "--depth=1",
)


def rows(workdir):
    found = read_rows(workdir / "metrics.jsonl")
    return [
        {n: value for n, value in row.items() if n not in ("tokens_per_s", "blocked_s")}
        for row in found
        if row["split"] == "train"
    ]


def test_a_run_is_stopped_in_mid_round_and_goes_on_with_fewer_workers(
    call, tiny, tmp_path, capsys
):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    flags = (*tiny, *FLAGS, "--outer_every=3")
    assert call(train, f"--workdir={whole}", *flags) == 0
    shutil.copytree(whole, moved)  # as if killed after step 5
    shutil.rmtree(moved / "checkpoints" / "10")
    kept = load_trained(moved).state.opt
    assert int(kept.anchors[0].rounds) == 1
    assert any(np.abs(x).max() > 0 for x in map(np.asarray, _leaves(kept.arriving)))
    assert call(train, f"--workdir={moved}", *flags, "--stop_at=8") == 0
    assert rows(moved) == rows(whole)[:8]  # by as many workers, bit for bit

    mesh = "--mesh=data=2,tensor=2"
    assert call(train, f"--workdir={moved}", *flags, mesh, devices=4) == 0
    last = rows(moved)
    assert [row["step"] for row in last] == list(range(1, 11))
    assert np.isfinite(last[-1]["loss"])
    assert call(sample, f"--workdir={moved}", "--prompt=def ", "--length=4") == 0
    assert "def " in capsys.readouterr().out


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_the_length_of_a_round_is_measured_once(call, tiny, tmp_path, capsys):
    """Chosen on the first start, said, and kept by a run that goes on."""
    flags = (*tiny, *FLAGS, "--outer_every=auto", f"--workdir={tmp_path}")
    assert call(train, *flags, "--stop_at=5") == 0
    said = capsys.readouterr().out
    assert "a step takes" in said
    every = json.loads((tmp_path / "run.json").read_text())["flags"]["outer_every"]
    assert f"outer_every={every}" in said
    assert call(train, *flags) == 0
    assert f"outer_every={every}, as the run began" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--waist=codebook",), "--waist=none"),
        (("--optimizer=one_bit_adam",), "takes an --optimizer of adamw"),
        (("--outer_every=soon",), "number of steps or auto"),
        (("--outer_every=2", "--fragments=3"), "fragments: 3"),
        (("--outer_momentum=1.5",), "momentum: 1.5"),
    ],
)
def test_flags_that_do_not_go_together(call, tiny, tmp_path, capsys, flags, said):
    argv = (f"--workdir={tmp_path}", *tiny, *FLAGS, *flags)
    assert call(train, *argv) == 2
    assert said in capsys.readouterr().err


def started(workdir, flags, rank, port):
    """Process `rank` of two, of one device each."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    script = pathlib.Path(train.__file__)
    joined = (f"--coordinator=127.0.0.1:{port}", "--process_count=2")
    argv = (*joined, f"--process_id={rank}", "--heartbeat_seconds=10")
    return subprocess.Popen(
        [sys.executable, str(script), f"--workdir={workdir}", *flags, *argv],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_who_is_left_ends_and_the_run_goes_on_with_fewer(call, tiny, tmp_path, capsys):
    """A process is killed in mid-round: the other ends by its heartbeat, and the next
    start names the lost one and goes on from the last checkpoint, at a meeting."""
    rounds = ("--outer_every=100", "--checkpoint_every=100", "--eval_every=4000")
    flags = (*tiny, *FLAGS, *rounds, "--steps=4000", "--mesh=data=2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [started(tmp_path, flags, rank, port) for rank in range(2)]
    try:
        until = time.monotonic() + 120
        note = tmp_path / "groups" / "1-of-2"
        saved = tmp_path / "checkpoints" / "100"
        while not saved.is_dir() or _step(note) % 100 not in range(20, 60):
            assert time.monotonic() < until
            assert all(process.poll() is None for process in both)
            time.sleep(0.01)
        both[1].send_signal(signal.SIGKILL)
        clock = time.monotonic()
        assert both[0].wait(60) != 0
        assert time.monotonic() - clock < 45  # 10 of them without a word
        assert _step(note) % 100  # it did not end a round
    finally:
        for process in both:
            process.kill()
            process.wait()
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    kept = max(int(name) for name in names if name.isdigit())
    assert kept % 100 == 0
    alone = (*flags[:-1], f"--stop_at={kept + 2}", "--mesh=data=1")
    assert call(train, f"--workdir={tmp_path}", *alone, devices=1) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"resumed after step {kept}" in said
    assert "lost: process 1 of 2" in said


def _step(note):
    return int((note.read_text() if note.exists() else "").strip() or 0)
