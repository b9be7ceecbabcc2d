"""Runs whose workers meet now and then: stopped, moved to fewer workers, sampled."""

import json
import shutil

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
        {name: value for name, value in row.items() if name != "tokens_per_s"}
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
