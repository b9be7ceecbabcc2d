"""A run with lazy checkpoints, stopped and resumed, is the run that never stopped."""

import numpy as np
import pytest
from narrows.parallel.checkpoint import inspect
from narrows.scripts import train
from narrows.scripts.runlog import read_rows


def losses(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_stopped_between_gates_and_resumed(call, tiny, finished, tmp_path, capsys):
    """Bit for bit on the same devices; to 1e-5 the run in one program, and fewer."""
    flags = (*tiny, "--checkpoint=lazy", "--checkpoint_every=3")
    assert call(train, f"--workdir={tmp_path / 'whole'}", *flags) == 0
    run = tmp_path / "run"
    assert call(train, f"--workdir={run}", *flags, "--stop_at=25") == 0
    assert inspect(run / "checkpoints").step == 25
    assert call(train, f"--workdir={run}", *flags) == 0
    assert "restored" in capsys.readouterr().out
    assert losses(run) == losses(tmp_path / "whole")
    np.testing.assert_allclose(losses(run), losses(finished), rtol=1e-5)
    assert all("blocked_s" in row for row in read_rows(run / "metrics.jsonl")[:3])


@pytest.mark.parametrize("engine", ["sync"])
def test_a_save_that_blocks_leaves_the_same_run(call, tiny, finished, tmp_path, engine):
    flags = (*tiny, f"--checkpoint={engine}", "--stop_at=6", "--checkpoint_every=2")
    assert call(train, f"--workdir={tmp_path}", *flags) == 0
    assert losses(tmp_path)[:6] == losses(finished)[:6]
