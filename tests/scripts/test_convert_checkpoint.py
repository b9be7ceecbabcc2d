"""Weights of other programs become ours and theirs again, or a sentence says why not.

Logits are compared with `transformers` where it and PyTorch are installed (the extra
"hf"); all else needs neither.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.typing import DTypeLike
from narrows.parallel.checkpoint import inspect
from narrows.parallel.checkpoint.safetensors_files import read_folder, write_folder
from narrows.scripts import convert_checkpoint, sample
from narrows.scripts.foreign_checkpoints import record_of, shapes_of
from narrows.scripts.trained import load_trained, model_of

CONFIGS = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 300,
        "n_layer": 2,
        "n_embd": 24,
        "n_head": 3,
        "n_positions": 32,
        "layer_norm_epsilon": 1e-3,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 300,
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 40,
        "rms_norm_eps": 1e-3,
        "rope_theta": 5e5,
    },
}


def write_theirs(
    folder, kind, dtype: DTypeLike = np.float32, change=None, shard_bytes=2**31
):
    """A folder of Hugging Face's with random weights; what it holds."""
    from narrows.parallel.checkpoint.configurations import architecture_of, options_of
    from narrows.parallel.checkpoint.families import exchange

    config = CONFIGS[kind]
    ours = shapes_of(record_of(options_of(config)))
    shapes = exchange(architecture_of(config), ours).theirs
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=s).astype("f4") / 2 for name, s in shapes.items()}
    if change:
        change(arrays)
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    shapes = {name: x.shape for name, x in arrays.items()}
    write_folder(
        folder, shapes, arrays.__getitem__, dtype, config, shard_bytes=shard_bytes
    )
    return arrays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_there_and_back_bit_for_bit(call, tmp_path, kind, dtype, capsys):
    """Several files and one; bfloat16 fits into our float32 and out of it again."""
    number = np.dtype(getattr(ml_dtypes, dtype, dtype))
    theirs = write_theirs(tmp_path / "theirs", kind, number, shard_bytes=20_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert not call(
        convert_checkpoint, f"--source={tmp_path / 'theirs'}", f"--to={tmp_path / 'o'}"
    )
    assert not call(
        convert_checkpoint,
        f"--source={tmp_path / 'o'}",
        f"--to={tmp_path / 'back'}",
        f"--dtype={dtype}",
    )
    assert "parameters to" in capsys.readouterr().out
    back = read_folder(tmp_path / "back")
    assert back.keys() == theirs.keys()
    for name, x in theirs.items():
        assert back[name].dtype == x.dtype
        assert back[name].read().tobytes() == x.tobytes(), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.items() >= CONFIGS[kind].items()


def test_a_converted_model_writes_text_and_a_trained_one_leaves(
    call, tmp_path, finished, capsys
):
    """The workdir is one of ours: `sample.py` reads it. A waist stays at home."""
    write_theirs(tmp_path / "theirs", "gpt2")
    ours, theirs = f"--to={tmp_path / 'ours'}", f"--source={tmp_path / 'theirs'}"
    assert not call(convert_checkpoint, theirs, ours, "--vocab_size=384")
    rows = {row.name: row for row in inspect(tmp_path / "ours" / "checkpoints").rows}
    assert rows["params/embed/embedding"].shape == (384, 24)
    prompt = ("--prompt=ab", "--length=4")
    assert not call(sample, f"--workdir={tmp_path / 'ours'}", *prompt)
    back = (f"--source={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}")
    assert not call(convert_checkpoint, *back, "--vocab_size=300")
    held = read_folder(tmp_path / "back")["transformer.wte.weight"].read()
    given = read_folder(tmp_path / "theirs")["transformer.wte.weight"].read()
    np.testing.assert_array_equal(held, given)
    capsys.readouterr()
    arguments = (f"--source={finished}", f"--to={tmp_path / 'no'}")
    assert call(convert_checkpoint, *arguments) == 2
    assert "'codebook' has no counterpart" in capsys.readouterr().err


def drop(name):
    return lambda arrays: arrays.pop(name)


BAD = {
    "missing leaf": (
        "gpt2",
        drop("transformer.h.1.attn.c_proj.bias"),
        "1 missing: transformer.h.1.attn.c_proj.bias",
    ),
    "wrong shape": (
        "llama",
        lambda a: a.update({"model.layers.0.mlp.up_proj.weight": np.ones((40, 25))}),
        "model.layers.0.mlp.up_proj.weight (there (40, 25), by the configuration "
        "(40, 24))",
    ),
    "unknown leaf": (
        "llama",
        lambda a: a.update({"model.layers.0.self_attn.q_norm.weight": np.ones(6)}),
        "1 unknown: model.layers.0.self_attn.q_norm.weight",
    ),
    "another head": (
        "gpt2",
        lambda a: a.update({"lm_head.weight": np.ones((300, 24))}),
        "'lm_head.weight' is another array",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_one_sentence_with_names(call, tmp_path, kind, capsys):
    model, change, sentence = BAD[kind]
    write_theirs(tmp_path / "theirs", model, change=change)
    arguments = (f"--source={tmp_path / 'theirs'}", f"--to={tmp_path / 'ours'}")
    assert call(convert_checkpoint, *arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "ours").exists()


def test_folders_and_configurations_that_are_not_there(call, tmp_path, capsys):
    def said(*arguments):
        assert call(convert_checkpoint, *arguments) == 2
        return capsys.readouterr().err

    theirs = tmp_path / "theirs"
    write_theirs(theirs, "llama", shard_bytes=20_000)
    to = f"--to={tmp_path / 'ours'}"
    assert "give --source" in said(to)
    assert "there is no folder" in said(to, f"--source={tmp_path / 'no'}")
    assert "is there already" in said(f"--source={theirs}", f"--to={tmp_path}")
    (tmp_path / "empty").mkdir()
    assert "holds no model.safetensors" in said(to, f"--source={tmp_path / 'empty'}")
    config, index = theirs / "config.json", theirs / "model.safetensors.index.json"
    config.write_text(config.read_text().replace("LlamaFor", "OpaqueFor"))
    assert "'OpaqueForCausalLM' is not known" in said(to, f"--source={theirs}")
    config.write_text("[")
    assert "config.json cannot be read" in said(to, f"--source={theirs}")
    config.unlink()
    assert "give --config" in said(to, f"--source={theirs}")
    whole = index.read_text()
    index.write_text(whole.replace("model-00001", "../model-00001"))
    assert "is not the name of a file" in said(to, f"--source={theirs}")
    index.write_text(whole.replace("model-00001", "model-00009"))
    assert "is missing" in said(to, f"--source={theirs}")
    index.write_text(whole.replace("model.norm.weight", "model.norm.scale"))
    assert "other than the index says" in said(to, f"--source={theirs}")
    index.write_text("{}")
    assert "has no weight_map" in said(to, f"--source={theirs}")
    index.write_text(whole)
    file = next(theirs.glob("model-00001*"))
    file.write_bytes(file.read_bytes()[:-8])
    assert "cannot be read" in said(to, f"--source={theirs}")


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_transformers(call, tmp_path, kind):
    """1e-4 of logits near 1, in float32, and back in their library the same bits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    names = {"gpt2": "GPT2", "llama": "Llama"}
    make = getattr(transformers, names[kind] + "Config")
    theirs = write_theirs(tmp_path / "theirs", kind)
    model = transformers.AutoModelForCausalLM.from_config(make(**CONFIGS[kind]))
    found = {name: torch.from_numpy(x) for name, x in theirs.items()}
    missing, unknown = model.load_state_dict(found, strict=False)
    assert not unknown
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    tokens = np.random.default_rng(1).integers(0, 300, (2, 21))
    want = model.eval()(torch.from_numpy(tokens)).logits.detach().numpy()
    ours = tmp_path / "ours"
    assert not call(
        convert_checkpoint, f"--source={tmp_path / 'theirs'}", f"--to={ours}"
    )
    trained = load_trained(ours)
    got = model_of(trained.state, trained.meta["model"])(jnp.asarray(tokens, "int32"))
    np.testing.assert_allclose(jax.device_get(got.logits), want, atol=1e-4)
    assert np.abs(want).max() > 0.5
    assert not call(convert_checkpoint, f"--source={ours}", f"--to={tmp_path / 'back'}")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    again = back(torch.from_numpy(tokens)).logits.detach().numpy()
    np.testing.assert_array_equal(again, want)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_torch_wrote_is_what_safetensors_holds(call, tmp_path, kind):
    """A distributed checkpoint beside an optimizer, and DeepSpeed's model states."""
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("torch.distributed.checkpoint").save
    theirs = write_theirs(tmp_path / "theirs", kind)
    weights = {name: torch.from_numpy(x) for name, x in theirs.items()}
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    more = {"optimizer": optimizer.state_dict(), "epoch": 3}
    save({"model": weights, **more}, checkpoint_id=tmp_path / "distributed")
    (tmp_path / "ranks").mkdir()
    torch.save(
        {"module": weights, "global_steps": 5},
        tmp_path / "ranks" / "mp_rank_00_model_states.pt",
    )
    config = f"--config={tmp_path / 'theirs' / 'config.json'}"
    prints = []
    for source, *flags in (
        ("theirs",), ("distributed", config, "--prefix=model."), ("ranks", config)
    ):  # fmt: skip
        to = tmp_path / f"{source}_ours"
        arguments = (f"--source={tmp_path / source}", f"--to={to}", *flags)
        assert not call(convert_checkpoint, *arguments)
        rows = inspect(to / "checkpoints").rows
        prints.append([r.fingerprint for r in rows if r.name.startswith("params/")])
    assert prints[0] == prints[1] == prints[2]
