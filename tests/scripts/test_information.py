"""The plane of a trained model: its own layers, honest numbers, a figure, a file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.scripts import benchmark, information
from narrows.scripts.trained import load_trained, model_of


@pytest.fixture
def model(finished):
    trained = load_trained(finished)
    return model_of(trained.state, trained.meta["model"])


def test_the_layers_are_the_models_own(model):
    """The last of them gives the logits that the model itself gives."""
    tokens = np.random.default_rng(0).integers(0, 200, size=(50, 12)).astype(np.int32)
    layers = information.layers_of(model, tokens)
    depth = model.config.depth
    assert [layer.name for layer in layers].count("waist") == 1
    assert len(layers) == depth + 2
    logits = model._logits(layers[-1].h[:, None])[:, 0]
    wanted = model(jnp.asarray(tokens)).logits[:, -1]
    assert jnp.allclose(logits, wanted, atol=1e-4)
    waist = model(jnp.asarray(tokens)).waist
    (found,) = [layer for layer in layers if layer.name == "waist"]
    assert jnp.allclose(found.h, waist.z[:, -1], atol=1e-5)
    assert jnp.array_equal(found.codes, waist.codes[:, -1])


def test_rare_tokens_are_one_class():
    tokens = np.array([7, 7, 7, 3, 3, 9, 1])
    assert information.classes_of(tokens, 2).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_layer_that_is_the_label_holds_it_and_noise_does_not():
    y = np.arange(400) % 4
    told = information.Layer("told", jnp.eye(4)[y] * 5.0)
    points = {p["estimator"]: p for p in information.on_the_plane(told, y, 0.05)}
    for name in ("noisy", "cells"):
        assert points[name]["t_y"] == pytest.approx(2.0, abs=0.05)
        assert points[name]["shuffled"] < 0.1
    h = jax.random.normal(jax.random.key(0), (400, 4))
    blind = {
        p["estimator"]: p
        for p in information.on_the_plane(information.Layer("blind", h), y, 0.05)
    }
    assert abs(blind["neighbours"]["t_y"]) < 3 * blind["neighbours"]["t_y_half"]
    for name in ("noisy", "cells"):  # these find something in nothing, and say how much
        assert blind[name]["t_y"] == pytest.approx(blind[name]["shuffled"], abs=0.2)


def test_one_figure_and_one_file(call, finished, tmp_path):
    flags = (f"--workdir={finished}", "--rows=64", f"--out_dir={tmp_path}")
    assert call(information, *flags) == 0
    found = json.loads((tmp_path / "information.json").read_text())
    assert found["unit"] == "bits"
    assert found["rows"] >= 50
    layers = {p["layer"] for p in found["points"]}
    assert {"embedding", "waist", "block 1"} <= layers
    for p in found["points"]:
        if p["estimator"] == "cells":
            assert 0 <= p["t_y"] <= min(p["x_t"], found["h_y"]) + 1e-4
            assert p["x_t"] <= found["ceiling"] + 1e-4
    assert "<svg" in (tmp_path / "information.svg").read_text()


def test_bad_input_is_a_sentence(call, finished, capsys):
    assert call(information) == 2
    assert "workdir" in capsys.readouterr().err
    assert call(information, f"--workdir={finished}", "--split=train", "--rows=10") == 2


def test_the_suite_of_estimators_measures_and_records(tmp_path, capsys):
    arguments = [
        "benchmark",
        "--suite=information",
        "--estimators=gaussian,ksg",
        "--tasks=gaussian",
        "--dims=1",
        "--samples=200",
        "--information_seeds=3",
        "--record",
        f"--results_dir={tmp_path}",
    ]
    assert benchmark.main(arguments) == 0
    path = tmp_path / "benchmark_information.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["estimator"] for line in lines] == ["gaussian", "ksg", "scikit-learn"]
    assert all(line["error"] < 0.3 for line in lines)
    assert lines[2]["peer_over_ksg_cpu"]["median"] > 0
    assert "recorded in" in capsys.readouterr().out
