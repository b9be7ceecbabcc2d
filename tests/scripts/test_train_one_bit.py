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


def test_over_fsdp_its_state_lies_in_shards_and_goes_on_with_fewer(
    call, tiny, tmp_path, capsys
):
    workdir, flags = tmp_path / "run", (*tiny, *FLAGS)
    where = f"--workdir={workdir}"
    assert call(train, where, *flags, "--mesh=fsdp=8", "--stop_at=7") == 0
    assert "step 5: second moment frozen" in capsys.readouterr().out
    assert [row["compressed"] for row in rows(workdir)] == [0] * 4 + [1] * 3
    found = load_trained(workdir)  # one device reads it
    for name, copy in jax.tree_util.tree_leaves_with_path(found.state.params):
        master = found.state.opt.master.over_workers
        for key in name:
            master = master[key.key]
        flat = np.asarray(master).reshape(-1)[: copy.size].reshape(copy.shape)
        # Single numbers may be far behind: one bit says little of a heavy tail.
        gap = np.linalg.norm(flat - copy) / np.linalg.norm(copy)
        assert gap < 0.25, (name, gap)
    for mesh, stop in (("fsdp=4", 9), ("fsdp=2,tensor=2", 10)):
        assert (
            call(train, where, *flags, f"--mesh={mesh}", f"--stop_at={stop}", devices=4)
            == 0
        )
    last = rows(workdir)
    assert [row["step"] for row in last] == list(range(1, 11))
    assert all(np.isfinite(row["loss"]) for row in last)
    assert last[-1]["loss"] < last[0]["loss"]
    # Another kind of optimizer cannot go on from it: the state is named otherwise.
    assert call(train, where, *flags, "--steps=12", devices=4) == 2
    assert "was sharded_one_bit_adam" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("optimizer", "mesh", "said"),
    [
        ("one_bit_lamb", "fsdp=8", "sharded_one_bit_adam, sharded_compressed_sgd"),
        ("one_bit_adam", "tensor=8", "compresses what goes over data"),
        ("sharded_one_bit_adam", "data=2,fsdp=4", "compresses what goes over fsdp"),
    ],
)
def test_layouts_that_it_cannot_take_are_refused(
    optimizer, mesh, said, call, tiny, tmp_path, capsys
):
    flags = (*tiny, *FLAGS, f"--optimizer={optimizer}", f"--mesh={mesh}")
    assert call(train, f"--workdir={tmp_path}", *flags) == 2
    assert said in capsys.readouterr().err
