"""The laws of a training run: stopped, killed or moved, it is the run that never was.

Every run here has the flags of the shared one, so they share compiled programs.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.parallel.checkpoint import inspect, latest_step
from narrows.scripts import train
from narrows.scripts.runlog import RunLog, read_rows
from narrows.scripts.trained import load_trained

WATCH = ("tokens_per_s", "blocked_s")  # what differs between two equal runs


def curve(workdir, split="train"):
    """Rows of a split without their timings."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if name not in WATCH}
        for row in rows
        if row["split"] == split
    ]


def losses(workdir):
    return np.array([[row["loss"], row["objective"]] for row in curve(workdir)])


def assert_same_run(workdir, reference):
    """Bit for bit, every row and number of it."""
    assert curve(workdir) == curve(reference)
    assert curve(workdir, "validation") == curve(reference, "validation")


def signal_at(step, number, monkeypatch):
    """This process signals itself when the row of a step is written."""
    write = RunLog.write

    def writing(self, at, split, *args, **kwargs):
        write(self, at, split, *args, **kwargs)
        if at == step and split == "train":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunLog, "write", writing)


def test_a_run_leaves_its_record(finished, books):
    assert [row["step"] for row in curve(finished)] == list(range(1, 41))
    assert [row["step"] for row in curve(finished, "validation")] == [20, 40]
    assert curve(finished)[-1]["loss"] < 0.7 * curve(finished)[0]["loss"]
    assert curve(finished)[-1]["waist_perplexity"] > 2
    assert (finished / "run.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads((finished / "run.json").read_text())
    assert run["mesh"] == "data=8"
    assert run["flags"]["data"] == str(books)
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert latest_step(finished / "checkpoints") == 40


def test_a_finished_run_is_left_as_it_is(call, tiny, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "again")
    assert call(train, f"--workdir={workdir}", *tiny) == 0
    assert_same_run(workdir, finished)


def test_stopped_by_a_signal_and_resumed_it_never_stopped(
    call, tiny, finished, tmp_path, monkeypatch
):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_at(30, signal.SIGTERM, patch)
        assert call(train, f"--workdir={tmp_path}", *tiny) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = latest_step(tmp_path / "checkpoints")
    assert stopped in (30, 31, 32)  # the row is written while the next update runs
    assert len(curve(tmp_path)) == stopped
    assert call(train, f"--workdir={tmp_path}", *tiny) == 0
    assert_same_run(tmp_path, finished)


def test_stopped_and_resumed_on_ever_fewer_devices_it_has_the_same_curve(
    call, tiny, finished, tmp_path, monkeypatch
):
    """8 devices until SIGINT, 4 with tensor parallelism, then a single one."""
    workdir = f"--workdir={tmp_path}"
    with monkeypatch.context() as patch:
        signal_at(10, signal.SIGINT, patch)
        assert call(train, workdir, *tiny) == 0
    assert latest_step(tmp_path / "checkpoints") in (10, 11, 12)
    mesh = "--mesh=data=2,tensor=2"
    assert call(train, workdir, *tiny, mesh, "--stop_at=25", devices=4) == 0
    assert latest_step(tmp_path / "checkpoints") == 25
    assert call(train, workdir, *tiny, devices=1) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-5)
    meta = inspect(tmp_path / "checkpoints").meta
    assert meta["mesh"] == "data=1"


@pytest.mark.parametrize("mesh", ["data=2,tensor=2,stage=2", "data=4,seq=2"])
def test_stages_and_cut_positions_have_the_same_curve(
    call, tiny, finished, tmp_path, mesh
):
    """Its checkpoint goes on over data alone."""
    workdir = f"--workdir={tmp_path}"
    assert call(train, workdir, *tiny, f"--mesh={mesh}", "--stop_at=8") == 0
    assert call(train, workdir, *tiny, "--stop_at=12") == 0
    np.testing.assert_allclose(losses(tmp_path), losses(finished)[:12], rtol=1e-5)


# Once the first checkpoint is complete, and some steps later, as by `kill -9`.
KILLED = """
import os, signal, sys, time
from narrows.parallel.checkpoint import latest_step
from narrows.scripts import train
from narrows.scripts.runlog import RunLog

write = RunLog.write

def writing(self, step, *args, **kwargs):
    write(self, step, *args, **kwargs)
    if step == 27:
        while latest_step(self.path.parent / "checkpoints") is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

RunLog.write = writing
train.main(sys.argv)
"""


def test_killed_between_checkpoints_and_resumed_it_never_stopped(
    call, tiny, finished, tmp_path
):
    flags = f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false"
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags}
    argv = [sys.executable, "-c", KILLED, f"--workdir={tmp_path}", *tiny]
    killed = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert latest_step(tmp_path / "checkpoints") == 20
    assert len(curve(tmp_path)) == 27  # seven of them to be made again
    assert call(train, f"--workdir={tmp_path}", *tiny) == 0
    assert_same_run(tmp_path, finished)


def train_in_this_process(arguments, kill_at):
    """In a process of the cluster; the second one alone is told to stop."""
    asked = train.stop_asked

    def asking(stops, done, **options):
        if jax.process_index() == 1 and done == kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(stops, done, **options)

    train.stop_asked = asking
    try:
        code = train.main(["train", *arguments])
    except SystemExit as stop:
        code = stop.code
    finally:
        train.stop_asked = asked
    return code


def test_processes_stop_together_and_one_device_goes_on(
    call, tiny, finished, two_processes, tmp_path
):
    """Two processes of two devices; a signal to one stops both after step 10."""
    arguments = [f"--workdir={tmp_path}", *tiny, "--mesh=data=2,tensor=2"]
    codes = two_processes(
        train_in_this_process, arguments=arguments, kill_at=4, timeout=300
    )
    assert codes == [0, 0]
    assert latest_step(tmp_path / "checkpoints") == 10
    assert len(curve(tmp_path)) == 10
    assert call(train, f"--workdir={tmp_path}", *tiny, devices=1) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_a_trace_is_written(
    call, tiny, finished, tmp_path
):
    flags = ("--precision=bfloat16", "--steps=6", "--warmup=2", "--microbatches=2")
    profile = "--profile_steps=3:4"
    code = call(train, f"--workdir={tmp_path}", *tiny, *flags, profile, devices=1)
    assert code == 0
    dtypes = {row.dtype for row in inspect(tmp_path / "checkpoints").rows}
    assert dtypes == {"float32", "int32", "key<fry>"}
    assert list(tmp_path.glob("tensorboard/**/*.xplane.pb"))
    first, exact = losses(tmp_path)[0, 0], losses(finished)[0, 0]
    assert first == pytest.approx(exact, rel=0.02)  # 8 bits of mantissa
    assert first != exact


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_way_back(
    call, tiny, finished, tmp_path, capsys
):
    """A run that went well is continued with a rate that no model survives."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    flags = ("--learning_rate=1e30", "--steps=60", "--checkpoint_every=1")
    assert call(train, f"--workdir={workdir}", *tiny, *flags) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert "not finite" in said
    assert f"last good checkpoint: {workdir / 'checkpoints' / '40'};" in said
    last = latest_step(workdir / "checkpoints")
    assert last in (40, 41)  # the state after one such update still gives a finite loss
    assert f"step {last + 1}" in said
    assert (f"delete {workdir / 'checkpoints' / '41'}" in said) == (last == 41)
    assert all(np.isfinite(losses(workdir)).ravel())
    state = load_trained(workdir).state
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))
    if last == 41:
        shutil.rmtree(workdir / "checkpoints" / "41")
    assert call(train, f"--workdir={workdir}", *tiny) == 0
    assert_same_run(workdir, finished)


def test_the_module_is_a_script(tmp_path):
    """Started as the manual says, from another folder, with a mistake."""
    script = pathlib.Path(train.__file__).resolve()
    done = subprocess.run(
        [sys.executable, str(script), "--wordkir=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unknown command line flag 'wordkir'")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
