"""A run whose gradients are compressed is stopped and moved like any other."""

import shutil

import jax
import numpy as np
import pytest
from narrows.scripts import train
from narrows.scripts.runlog import read_rows
from narrows.scripts.trained import load_trained

FLAGS = (
    "--optimizer=one_bit_adam",
    "--freeze_step=4",
    "--waist=none",
    "--steps=10",
    "--checkpoint_every=5",
    "--eval_every=10",
    "--depth=1",
)


def rows(workdir):
    found = read_rows(workdir / "metrics.jsonl")
    return [
        {
            name: x
            for name, x in row.items()
            if name not in ("tokens_per_s", "blocked_s")
        }
        for row in found
        if row["split"] == "train"
    ]


def test_it_reports_the_switch_and_goes_on_with_fewer_workers(
    call, tiny, tmp_path, capsys
):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    flags = (*tiny, *FLAGS)
    assert call(train, f"--workdir={whole}", *flags) == 0
    said = [(row["compressed"], row["frozen_at"]) for row in rows(whole)]
    assert said == [(0, -1)] * 3 + [(0, 4)] + [(1, 4)] * 6
    assert "step 5: second moment frozen" in capsys.readouterr().out

    shutil.copytree(whole, moved)  # as if killed after step 5
    shutil.rmtree(moved / "checkpoints" / "10")
    kept = load_trained(moved).state.opt[0].mean.up.worker.per_worker_mean.e
    assert jax.tree.leaves(kept)[0].shape[0] == 1  # read by one device: their mean
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(kept))
    assert call(train, f"--workdir={moved}", *flags, "--stop_at=8") == 0
    assert rows(moved) == rows(whole)[:8]  # by as many workers, bit for bit

    mesh = "--mesh=data=2,tensor=2"
    assert call(train, f"--workdir={moved}", *flags, mesh, devices=4) == 0
    last = rows(moved)
    assert [row["step"] for row in last] == list(range(1, 11))
    assert [row["compressed"] for row in last[-2:]] == [1, 1]
    # The first loss after the move is of the same parameters and rows of text.
    assert last[8]["loss"] == pytest.approx(rows(whole)[8]["loss"], rel=1e-5)
    assert np.isfinite(last[9]["loss"])


def test_layouts_that_it_cannot_take_are_refused(call, tiny, tmp_path, capsys):
    argv = (f"--workdir={tmp_path}", *tiny, *FLAGS, "--mesh=fsdp=8")
    assert call(train, *argv) == 2
    assert "compresses what goes over data" in capsys.readouterr().err
