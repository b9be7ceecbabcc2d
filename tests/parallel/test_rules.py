"""Sharding rules: the golden table of the transformer, and what they refuse."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.table import OPTIMIZERS, make_optimizer
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.rules import (
    TRANSFORMER,
    Rule,
    check_every_axis_is_used,
    follow,
    name_of,
    sharding_of,
    shardings,
)
from narrows.parallel.step import abstract_state, create_state

WHOLE = P()
SIZES: dict[str, Any] = {"depth": 2, "width": 32, "heads": 4, "mlp_width": 64}
LLAMA = {
    "embed/embedding": P("tensor", "fsdp"),
    "blocks/attention_norm/scale": P("stage", None),
    "blocks/attention/query/kernel": P("stage", "fsdp", "tensor", None),
    "blocks/attention/key/kernel": P("stage", "fsdp", "tensor", None),
    "blocks/attention/value/kernel": P("stage", "fsdp", "tensor", None),
    "blocks/attention/out/kernel": P("stage", "tensor", None, "fsdp"),
    "blocks/mlp_norm/scale": P("stage", None),
    "blocks/mlp/up/kernel": P("stage", "fsdp", "tensor"),
    "blocks/mlp/gate/kernel": P("stage", "fsdp", "tensor"),
    "blocks/mlp/down/kernel": P("stage", "tensor", "fsdp"),
    "final_norm/scale": WHOLE,
    "head/kernel": P("fsdp", "tensor"),
}
CODEBOOK = {
    "waist/norm/scale": WHOLE,
    "waist/inward/kernel": WHOLE,
    "waist/outward/kernel": WHOLE,
}
GPT2 = {
    "embed/embedding": P("tensor", "fsdp"),
    "position/embedding": P(None, "fsdp"),
    "blocks/attention_norm/scale": P("stage", None),
    "blocks/attention_norm/bias": P("stage", None),
    "blocks/attention/query/kernel": P("stage", "fsdp", "tensor", None),
    "blocks/attention/query/bias": P("stage", "tensor", None),
    "blocks/attention/key/kernel": P("stage", "fsdp", "tensor", None),
    "blocks/attention/key/bias": P("stage", "tensor", None),
    "blocks/attention/value/kernel": P("stage", "fsdp", "tensor", None),
    "blocks/attention/value/bias": P("stage", "tensor", None),
    "blocks/attention/query_norm/scale": P("stage", None),
    "blocks/attention/key_norm/scale": P("stage", None),
    "blocks/attention/out/kernel": P("stage", "tensor", None, "fsdp"),
    "blocks/attention/out/bias": P("stage", None),
    "blocks/mlp_norm/scale": P("stage", None),
    "blocks/mlp_norm/bias": P("stage", None),
    "blocks/mlp/up/kernel": P("stage", "fsdp", "tensor"),
    "blocks/mlp/up/bias": P("stage", "tensor"),
    "blocks/mlp/down/kernel": P("stage", "tensor", "fsdp"),
    "blocks/mlp/down/bias": P("stage", None),
    "final_norm/scale": WHOLE,
    "final_norm/bias": WHOLE,
}
MODELS = {
    "llama": ({}, "none", LLAMA),
    "llama with a codebook": ({}, "codebook", LLAMA | CODEBOOK),
    "gpt2 with normalised queries": (
        {
            "norm": "layer",
            "position": "learned",
            "mlp": "gelu",
            "bias": True,
            "tied": True,
            "qk_norm": True,
        },
        "none",
        GPT2,
    ),
}
LAYOUTS = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=2,tensor=4"]


def shapes_of(options, waist="none"):
    """Parameters and rest of a small model, as shapes."""
    parts = model_parts(TransformerConfig(**SIZES | options), waist)
    return jax.eval_shape(parts.init, jax.random.key(0))


def flat(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_lies_where_the_table_says(model, layout):
    options, waist, golden = MODELS[model]
    params, rest = shapes_of(options, waist)
    mesh = make_mesh(Layout.parse(layout))
    placed = flat(shardings(params, mesh))
    assert {name: s.spec for name, s in placed.items()} == golden
    for name, x in flat(params).items():
        names = [axis for entry in golden[name] if entry for axis in [entry]]
        ways = math.prod(mesh.shape[axis] for axis in names)
        assert math.prod(placed[name].shard_shape(x.shape)) == x.size // ways
    assert all(s.spec == WHOLE for s in flat(shardings(rest, mesh)).values())


@pytest.mark.parametrize(
    ("layout", "options", "said"),
    [
        ("tensor=8", {}, ["blocks/attention/key/kernel", "dimension 2", "tensor=8"]),
        (
            "fsdp=8",
            {"width": 36, "head_width": 8},
            ["dimension 1", "36", "fsdp=8", "multiple of 8"],
        ),
        ("data=2,tensor=4", {"vocab_size": 258}, ["embed/embedding", "dimension 0"]),
        (
            "data=2,tensor=4",
            {"kv_heads": 2},
            ["blocks/attention/key/kernel (2, 32, 2, 8)", "tensor=4", "head count"],
        ),
        ("data=2,tensor=4", {"mlp_width": 66}, ["blocks/mlp", "66", "tensor=4"]),
    ],
)
def test_a_shape_that_does_not_divide_raises(layout, options, said):
    params, _ = shapes_of(options)
    with pytest.raises(ValueError, match="rules: dimension") as error:
        shardings(params, make_mesh(Layout.parse(layout)))
    assert all(words in str(error.value) for words in said)


def test_a_name_matches_one_rule_or_raises():
    mesh = make_mesh(Layout(data=8))
    with pytest.raises(ValueError, match=r"blocks/extra/kernel \(4,\) .* matches none"):
        shardings({"blocks": {"extra": {"kernel": jnp.zeros(4)}}}, mesh)
    twice = (*TRANSFORMER, Rule("head/.*", None))
    with pytest.raises(ValueError, match=r"'head/kernel', 'head/\.\*'"):
        sharding_of("head/kernel", (8, 8), twice, mesh)
    with pytest.raises(ValueError, match="names 2 dimensions"):
        sharding_of("head/kernel", (8, 8, 8), TRANSFORMER, mesh)
    with pytest.raises(ValueError, match="matches none"):  # the whole name, no part
        sharding_of("my/head/kernel", (8, 8), TRANSFORMER, mesh)


@pytest.mark.parametrize("layout", ["expert=8", "expert=2,data=4"])
def test_an_axis_that_shards_nothing_raises(layout):
    """In the state's making, where the training script would meet it."""
    parts = model_parts(TransformerConfig(**SIZES))
    mesh = make_mesh(Layout.parse(layout))
    with pytest.raises(ValueError, match=r"nothing .* lies over expert="):
        abstract_state(parts.init, optax.sgd(0.1), 0, mesh)


def test_an_axis_is_used_by_the_batch_or_by_a_parameter():
    params, _ = shapes_of({})
    mesh = make_mesh(Layout(data=2, fsdp=2, tensor=2))
    placed = shardings(params, mesh)
    check_every_axis_is_used(mesh, placed, ("data",))
    with pytest.raises(ValueError, match="lies over data=2,"):
        check_every_axis_is_used(mesh, placed, ())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_lies_with_its_parameter(name):
    params, _ = shapes_of({}, "codebook")
    mesh = make_mesh(Layout(data=2, fsdp=2, tensor=2))
    placed = flat(shardings(params, mesh))
    opt = jax.eval_shape(make_optimizer(name, lambda count: 0.1).init, params)
    found = flat(follow(opt, params, shardings(params, mesh)))
    followed = set()
    for path, sharding in found.items():
        owners = [owner for owner in placed if path.endswith("/" + owner)]
        owner = max(owners, key=len, default=None)
        assert sharding.spec == (placed[owner].spec if owner else WHOLE)
        followed |= {owner} - {None}
    assert followed == set(placed)  # each has a moment, and none was lost


def test_optimizer_state_of_unknown_shape_raises():
    params = {"head": {"kernel": jnp.zeros((8, 8))}}
    mesh = make_mesh(Layout(fsdp=8))
    placed = shardings(params, mesh)
    rows = {"mu": {"head": {"kernel": jnp.zeros(8)}}}  # a row's mean, as in Adafactor
    with pytest.raises(ValueError, match=r"mu/head/kernel \(8,\)"):
        follow(rows, params, placed)


def test_a_large_table_is_never_whole_on_one_device():
    """Created under the rules; each device holds an eighth, and only that."""
    rules = (Rule("embed/embedding", ("tensor", "fsdp")),)

    def init(key):
        return {"embed": {"embedding": jax.random.normal(key, (512, 64))}}, {}

    mesh = make_mesh(Layout(fsdp=4, tensor=2))
    state = create_state(init, optax.adam(0.1), 0, mesh, rules)
    whole = 512 * 64
    for table in (state.params, state.opt[0].mu, state.opt[0].nu):
        pieces = table["embed"]["embedding"].addressable_shards
        assert [piece.data.size for piece in pieces] == [whole // 8] * 8
    alone = create_state(
        init, optax.adam(0.1), 0, make_mesh(Layout(), jax.devices()[:1]), rules
    )
    np.testing.assert_array_equal(
        np.asarray(state.params["embed"]["embedding"]),
        np.asarray(alone.params["embed"]["embedding"]),
    )
