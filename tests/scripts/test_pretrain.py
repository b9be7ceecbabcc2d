"""Any mesh trains the encoder that one device trains; stopped, it goes on as it was."""

import lzma

import jax
import numpy as np
import pytest
from narrows.scripts import pretrain
from narrows.scripts.runlog import read_rows

FLAGS = (
    "--sets=cifar10_subset",
    "--half",
    "--channels=8,16",
    "--batch_size=16",
    "--steps=12",
    "--checkpoint_every=6",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a run on 64 pictures of structured noise, of which half are used."""
    folder = tmp_path_factory.mktemp("data")
    place = folder / "cifar10_subset"
    place.mkdir()
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (64, 3, 4, 4), np.uint8)
    with lzma.open(place / "train_images.npy.xz", "wb", preset=0) as file:
        np.save(file, coarse.repeat(8, 2).repeat(8, 3))
    np.save(place / "train_labels.npy", np.arange(64) % 4)
    return (*FLAGS, f"--data_dir={folder}")


@pytest.fixture(scope="module")
def one(call, small, tmp_path_factory):
    """The workdir of a run on one device."""
    workdir = tmp_path_factory.mktemp("one")
    assert call(pretrain, f"--workdir={workdir}", *small, devices=1) == 0
    return workdir


def losses(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    return np.array([[row["loss"], row["grad_norm"]] for row in rows])


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_meshes_have_the_curve_of_one_device(call, small, one, tmp_path, mesh):
    assert call(pretrain, f"--workdir={tmp_path}", *small, f"--mesh={mesh}") == 0
    np.testing.assert_allclose(losses(tmp_path), losses(one), rtol=1e-5)


def test_stopped_on_one_device_and_resumed_on_another_it_has_the_same_curve(
    call, small, one, tmp_path
):
    workdir = f"--workdir={tmp_path}"
    assert call(pretrain, workdir, *small, "--stop_at=6", devices=1) == 0
    assert call(pretrain, workdir, *small, devices=1) == 0
    assert np.array_equal(losses(tmp_path), losses(one))
    images = pretrain.pictures(small[-1].partition("=")[2], ["cifar10_subset"])
    here, there = (pretrain.encoder_of(path)(images) for path in (tmp_path, one))
    assert here.shape == (64, 8, 8, 16)
    assert np.array_equal(here, there)
    assert losses(one)[-1, 0] < losses(one)[0, 0]


def test_another_run_is_not_continued(call, small, one, capsys):
    workdir = f"--workdir={one}"
    assert call(pretrain, workdir, *small, "--seed=1", devices=1) == 2
    assert "expect['seed'] is 1, but" in capsys.readouterr().err


def test_bad_input_is_a_sentence(call, small, tmp_path, capsys):
    for flag, said in (
        ("--sets=birds", "name: 'birds', but allowed are mnist"),
        ("--mesh=tensor=8", "tensor"),
        ("--batch_size=12", "batch_size: 12 rows do not divide"),
    ):
        assert call(pretrain, f"--workdir={tmp_path}", *small, flag) == 2
        assert said in capsys.readouterr().err
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match="holds no checkpoints; train there first"):
        pretrain.encoder_of(tmp_path)
