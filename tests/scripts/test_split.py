"""A split is trained alike on any mesh, and served by two processes over a socket."""

import contextlib
import gzip
import os
import shutil
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from narrows.models import bottlefit
from narrows.models.split_payload import pack, payload_size
from narrows.scripts import split_serve, splits, train_split
from narrows.scripts.plane_layers import kind_of, seen_by
from narrows.scripts.results import ROOT
from narrows.scripts.runlog import read_rows

SIZES = ("--teacher_steps=3", "--match_steps=3", "--tune_steps=3", "--batch_size=16")
PHASES = ["teacher"] * 3 + ["match"] * 3 + ["tune"] * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of noise, brighter in a corner that their label names."""
    folder = tmp_path_factory.mktemp("data")
    place = folder / "fashion_mnist"
    place.mkdir()
    draw = np.random.default_rng(0)
    for file, count in (("train", 64), ("t10k", 20)):
        labels = draw.integers(0, 10, count).astype(np.uint8)
        images = draw.integers(0, 100, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[label * 2 : label * 2 + 4, :9] += 150
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            packed = gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.data)
            (place / f"{file}-{kind}-ubyte.gz").write_bytes(packed)
    return folder


@pytest.fixture(scope="module")
def train(call, data):
    def train(workdir, *flags, devices=1):
        given = (f"--workdir={workdir}", f"--data_dir={data}", *SIZES, *flags)
        return call(train_split, *given, devices=devices)

    return train


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """The workdir of a run on one device that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("split") / "finished"
    assert train(workdir) == 0
    return workdir


def losses(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["split"] for row in rows] == PHASES
    return np.array([row["loss"] for row in rows])


@pytest.mark.parametrize(
    "mesh", [pytest.param("data=8", marks=pytest.mark.slow), "fsdp=8"]
)
def test_eight_devices_have_the_curve_of_one(train, finished, tmp_path, mesh):
    assert train(tmp_path, f"--mesh={mesh}", devices=8) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-5)


def test_stopped_in_each_phase_and_resumed_it_never_stopped(train, finished, tmp_path):
    for stop in (2, 5, 8):
        assert train(tmp_path, f"--stop_at={stop}") == 0
        assert len(read_rows(tmp_path / "metrics.jsonl")) == stop
    assert train(tmp_path) == 0
    assert np.array_equal(losses(tmp_path), losses(finished))


def test_another_recipe_is_refused(train, finished, capsys):
    assert train(finished, "--channels=2") == 2
    assert "has other recipe" in capsys.readouterr().err


def whole(split, images):
    logits = bottlefit.predict(
        split.graphs, split.parts, splits.scaled(images), bits=split.recipe.bits
    )
    return np.asarray(jax.nn.softmax(logits))


def test_a_tail_in_another_process_finishes_what_the_head_sent(finished, data):
    """Its answers are those of the whole student, and the bytes those declared."""
    split = splits.load_split(finished)
    images = splits.pictures(data, "fashion_mnist", "test").images
    tail = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "scripts" / "split_serve.py"),
            "--role=tail",
            "--connections=1",
            f"--workdir={finished}",
        ],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with tail:
        assert tail.stdout
        port = int(tail.stdout.readline().rsplit(":", 1)[1])
        with socket.create_connection((split_serve.HOST, port), timeout=60) as line:
            sent = split_serve.send(split, line, images)
    assert tail.returncode == 0
    expected = whole(split, images)
    np.testing.assert_allclose(sent.probabilities, expected.max(1), rtol=1e-4)
    sure = np.diff(np.sort(expected)[:, -2:])[:, 0] > 1e-4  # not a tie
    assert np.array_equal(sent.classes[sure], expected.argmax(1)[sure])
    assert sent.bytes_up == len(images) * payload_size(5, 5, 1, 8)
    assert sent.bytes_down == len(images) * 5


def test_a_payload_that_is_none_ends_its_connection_alone(finished, data, capsys):
    split = splits.load_split(finished)
    images = splits.pictures(data, "fashion_mnist", "test").images[:2]
    with socket.create_server((split_serve.HOST, 0)) as listener:
        serving = threading.Thread(
            target=split_serve.serve, args=(split, listener), kwargs={"connections": 3}
        )
        serving.start()
        for bad in (b"\xff" * 40, pack(np.ones((2, 2, 1)))):
            with socket.create_connection(listener.getsockname(), timeout=60) as line:
                line.sendall(bad)
                with contextlib.suppress(OSError):  # it may have hung up already
                    line.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):  # it was not all read
                    assert line.recv(1) == b""
        with socket.create_connection(listener.getsockname(), timeout=60) as line:
            assert len(split_serve.send(split, line, images).classes) == 2
        serving.join(timeout=60)
    said = capsys.readouterr().err
    assert "more than 32" in said
    assert "but must be (5, 5, 1)" in said


def test_a_workdir_without_a_split_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="holds no tuned split"):
        splits.load_split(tmp_path)
    shutil.copy(finished / "run.json", tmp_path)
    (tmp_path / "tune").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        splits.load_split(tmp_path)


def test_the_layers_of_the_plane_are_the_students_own(finished, data):
    assert kind_of(finished) == "split"
    given = {"step": None, "rows": 20, "classes": 8}
    seen = seen_by(finished, data=data, part="test", **given)
    layers = {layer.name: layer.h for layer in seen.layers}
    assert {"waist", "decoder", "tail logits"} <= set(layers)
    test = splits.pictures(data, "fashion_mnist", "test")
    assert np.array_equal(seen.labels, test.labels)
    trained = splits.load_split(finished)
    wanted = bottlefit.predict(
        trained.graphs, trained.parts, splits.scaled(test.images)
    )
    np.testing.assert_allclose(layers["tail logits"], wanted, atol=1e-5)
    with pytest.raises(ValueError, match="step: a split is read where it ended"):
        seen_by(finished, data=data, part="test", **(given | {"step": 1}))
