"""The laws of a run that trains a concept model: its curve on any mesh, going on."""

import json

import numpy as np
import pytest
from narrows.parallel.checkpoint import inspect, latest_step
from narrows.scripts import train_concepts
from narrows.scripts.concept_tasks import Sizes, make_task
from narrows.scripts.plane_layers import kind_of, seen_by
from narrows.scripts.runlog import read_rows

SMALL = (
    "--learn_rows=64",
    "--eval_rows=32",
    "--hidden=16",
    "--batch_size=16",
    "--steps=12",
    "--eval_every=6",
    "--checkpoint_every=6",
    "--known=0.7",
)


def rows(workdir, split="train"):
    return [r for r in read_rows(workdir / "metrics.jsonl") if r["split"] == split]


def losses(workdir):
    return np.array([row["loss"] for row in rows(workdir)])


@pytest.fixture(scope="module", params=["joint", "energy", "probabilistic"])
def run(request, call, tmp_path_factory):
    """Flags, and the workdir of a run on one device that nothing disturbed."""
    flags = (*SMALL, f"--model={request.param}")
    workdir = tmp_path_factory.mktemp(request.param) / "one"
    assert call(train_concepts, f"--workdir={workdir}", *flags, devices=1) == 0
    return flags, workdir


def test_a_run_leaves_its_record(run):
    _, workdir = run
    assert [row["step"] for row in rows(workdir)] == list(range(1, 13))
    assert [row["step"] for row in rows(workdir, "validation")] == [6, 12]
    assert all(0 <= row["all_concepts"] <= 1 for row in rows(workdir, "validation"))
    assert losses(workdir)[-4:].mean() < losses(workdir)[:4].mean()
    assert json.loads((workdir / "run.json").read_text())["mesh"] == "data=1"
    assert latest_step(workdir / "checkpoints") == 12


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_eight_devices_give_the_curve_of_one(run, call, tmp_path, mesh):
    flags, workdir = run
    code = call(train_concepts, f"--workdir={tmp_path}", *flags, f"--mesh={mesh}")
    assert code == 0
    np.testing.assert_allclose(losses(tmp_path), losses(workdir), rtol=1e-5, atol=1e-5)
    assert inspect(tmp_path / "checkpoints").meta["mesh"] == mesh


def test_stopped_and_resumed_it_never_stopped(run, call, tmp_path):
    flags, workdir = run
    there = f"--workdir={tmp_path}"
    assert call(train_concepts, there, *flags, "--stop_at=7", devices=1) == 0
    assert latest_step(tmp_path / "checkpoints") == 7
    assert call(train_concepts, there, *flags, devices=1) == 0
    assert rows(tmp_path) == rows(workdir)
    assert rows(tmp_path, "validation")[-1] == rows(workdir, "validation")[-1]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--batch_size=12", "batch_size: 12 rows do not divide"),
        ("--mesh=data=3", "mesh: data=3 takes 3 devices"),
        ("--task=birds", "folder: none, but birds is read from files"),
        ("--model=oracle", "model"),
    ],
)
def test_bad_flags_are_refused_with_a_sentence(call, tmp_path, capsys, flag, words):
    workdir = tmp_path / "new"
    assert call(train_concepts, f"--workdir={workdir}", *SMALL, flag) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not workdir.exists()


def test_a_run_is_not_continued_as_another(run, call, capsys):
    flags, workdir = run
    code = call(train_concepts, f"--workdir={workdir}", *flags, "--seed=1", devices=1)
    assert code == 2
    assert "expect['seed'] is 1" in capsys.readouterr().err


def test_the_layers_of_the_plane_are_the_models_own(run):
    """Its concepts are right as often as the log says, and the waist is the last."""
    _, workdir = run
    assert kind_of(workdir) == "concepts"
    given = {"data": None, "step": 12, "rows": 32, "classes": 8}
    seen = seen_by(workdir, part="test", **given)
    assert seen.step == 12
    assert len(seen.layers) > 1
    waist = seen.layers[-1]
    assert waist.name == "waist"
    assert all(len(layer.h) == len(seen.labels) == 32 for layer in seen.layers)
    task = make_task("world", None, Sizes(64, 1, 32), seed=0)
    assert np.array_equal(seen.labels, task.test.labels)
    right = ((np.asarray(waist.h) > 0.5) == (task.test.concepts > 0.5)).mean()
    assert right == pytest.approx(rows(workdir, "validation")[-1]["concepts"], abs=1e-6)
