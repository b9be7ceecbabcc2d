"""Regressors are trained alike on any mesh, alone or beside others, stopped or not."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data import tables
from narrows.ib.kernels import spread
from narrows.scripts import information, train_regression
from narrows.scripts.plane_layers import kind_of, seen_by
from narrows.scripts.regression import grid, objective_of, option_of
from narrows.scripts.runlog import read_rows

SIZES = (
    "--table=friedman_outliers",
    "--rows=96",
    "--batch_size=32",
    "--epochs=3",
    "--width=16",
    "--code_width=8",
    "--betas=0,0.3",
    "--learning_rates=1e-2",
)
STEPS = 9


@pytest.fixture(scope="module")
def train(call):
    def train(workdir, *flags, devices=1):
        given = (f"--workdir={workdir}", *SIZES, *flags)
        return call(train_regression, *given, devices=devices)

    return train


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """The workdir of a run on one device that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("regression") / "finished"
    assert train(workdir, "--radii=0.1,0.3") == 0
    return workdir


def rows_of(workdir, split):
    rows = read_rows(workdir / "metrics.jsonl")
    return [row for row in rows if row["split"] == split]


def losses(workdir):
    rows = rows_of(workdir, "train")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return np.array([row["loss"] for row in rows])


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_a_loss_of_pairs_is_that_of_the_global_batch(train, finished, tmp_path, mesh):
    """Rows on eight devices are compared with those on the others, too."""
    assert train(tmp_path, f"--mesh={mesh}", devices=8) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-5)
    for split in ("validation 0", "test 1", "best 1", "information 1"):
        ours, one = (
            [row["loss"] for row in rows_of(place, split)]
            for place in (tmp_path, finished)
        )
        np.testing.assert_allclose(ours, one, rtol=1e-4)


def test_stopped_and_resumed_on_another_mesh_it_never_stopped(
    train, finished, tmp_path
):
    assert train(tmp_path, "--stop_at=2") == 0
    assert train(tmp_path, "--stop_at=7", "--mesh=data=2,fsdp=2", devices=4) == 0
    assert len(rows_of(tmp_path, "train")) == 7
    assert train(tmp_path) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(finished), rtol=1e-5)
    for split in ("validation 1", "best 0"):
        a, b = (rows_of(place, split) for place in (tmp_path, finished))
        assert [row["step"] for row in a] == [row["step"] for row in b]
        np.testing.assert_allclose(
            [row["loss"] for row in a], [row["loss"] for row in b], rtol=1e-4
        )


def test_runs_do_not_see_each_other(train, finished, tmp_path):
    """The second run of two, trained alone."""
    assert train(tmp_path, "--betas=0.3") == 0
    alone, beside = (
        [row["loss"] for row in rows_of(place, split)]
        for place, split in ((tmp_path, "validation 0"), (finished, "validation 1"))
    )
    np.testing.assert_allclose(alone, beside, rtol=1e-4)


def test_what_is_told_is_of_the_epoch_that_validates_best(finished):
    """Test errors choose nothing; information falls with beta, attacks raise errors."""
    for run in (0, 1):
        valid = [row["loss"] for row in rows_of(finished, f"validation {run}")]
        test = [row["loss"] for row in rows_of(finished, f"test {run}")]
        best = rows_of(finished, f"best {run}")[0]
        np.testing.assert_allclose(best["loss"], test[int(np.argmin(valid))], rtol=1e-5)
        assert -1 <= best["correlation"] <= 1
        fgsm, pgd = (rows_of(finished, f"{a} {run}")[0] for a in ("fgsm", "pgd"))
        assert best["rmse"] < fgsm["0.1"] < fgsm["0.3"]
        assert pgd["0.3"] >= 0.99 * fgsm["0.3"]
    kept = [rows_of(finished, f"information {run}")[0]["loss"] for run in (0, 1)]
    assert kept[1] < kept[0]
    assert json.loads((finished / "run.json").read_text())["betas"] == ["0", "0.3"]


def test_a_grid_is_all_betas_rates_and_seeds():
    runs = grid((0.0, 0.1), (1e-3, 1e-2), 3, first=5)
    assert runs.number == 12
    assert len(set(zip(*(a.tolist() for a in runs), strict=True))) == 12
    assert runs.seed.tolist() == [5, 6, 7] * 4


def test_options_reach_the_objective():
    rows = np.array([[0.0], [2.0]])
    name, rule = option_of("width_t=spread:0.5")
    assert name == "width_t"
    np.testing.assert_allclose(rule(rows), spread(0.5)(rows))
    assert objective_of("cs_ib", ["normalized=false"]).unit == "nats"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--table=boston",), "table: 'boston', but allowed are california_housing"),
        (("--objective=dropout",), "objective: 'dropout'"),
        (("--option=width_x",), "option: 'width_x', but it must be name=value"),
        (("--option=eta=2",), "option: cs_ib takes no such option"),
        (("--betas=-1",), "betas: -1, but it must be at least 0"),
        (("--learning_rates=fast",), "learning_rates: ['fast'], but it takes numbers"),
        (("--batch_size=1000",), "batch_size: 1000, but there are 96 training rows"),
    ],
)
def test_bad_input_is_named(train, tmp_path, capsys, flags, says):
    assert train(tmp_path, *flags) == 2
    assert says in capsys.readouterr().err


def test_other_flags_than_the_run_s_are_refused(train, finished, capsys):
    assert train(finished, "--betas=0,0.1") == 2
    assert "has other betas" in capsys.readouterr().err


def test_the_layers_of_the_plane_are_those_of_the_best_run(finished):
    """The decoder's last layer tells the labels as well as the run says it does."""
    given = {"data": None, "step": None, "rows": 10_000, "classes": 4}
    seen = seen_by(finished, part="test", **given)
    layers = {layer.name: layer.h for layer in seen.layers}
    assert list(layers) == ["encoder 1", "encoder 2", "waist", "decoder 1"]
    assert seen.step == STEPS
    counts = np.bincount(seen.labels)
    assert len(counts) == 4
    assert np.ptp(counts) <= 1
    valid = [
        min(r["loss"] for r in rows_of(finished, f"validation {i}")) for i in (0, 1)
    ]
    said = rows_of(finished, f"best {int(np.argmin(valid))}")[0]
    # what is linear in the last layer can be no worse than the run's own answer
    h = jnp.concatenate([layers["decoder 1"], jnp.ones((len(seen.labels), 1))], 1)
    whole = tables.named_table("", "friedman_outliers")
    y = tables.split(whole, seed=0, rows=96).test.y
    fitted = h @ jnp.linalg.lstsq(h, y)[0]
    assert jnp.square(fitted - y).mean() <= said["loss"] + 1e-5


def test_a_regression_is_put_on_the_plane(call, finished, tmp_path, capsys):
    assert kind_of(finished) == "regression"
    flags = (f"--workdir={finished}", "--rows=60", f"--out_dir={tmp_path}")
    assert call(information, *flags, "--split=train", "--classes=3") == 0
    found = json.loads((tmp_path / "information.json").read_text())
    assert found["rows"] == 60
    assert found["classes"] == 3
    assert {p["layer"] for p in found["points"]} >= {"waist", "decoder 1"}
