"""Our arrays as Hugging Face's: what a line of numpy says, and back bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest
from narrows.parallel.checkpoint.configurations import config_of, options_of
from narrows.parallel.checkpoint.families import exchange, repad, whole_names

L, D, N, K, H, F, V, T = 2, 12, 4, 2, 3, 10, 7, 5  # depth, width, heads, ...

LLAMA = {
    "embed/embedding": (V, D),
    "blocks/attention_norm/scale": (L, D),
    "blocks/attention/query/kernel": (L, D, N, H),
    "blocks/attention/key/kernel": (L, D, K, H),
    "blocks/attention/value/kernel": (L, D, K, H),
    "blocks/attention/out/kernel": (L, N, H, D),
    "blocks/mlp_norm/scale": (L, D),
    "blocks/mlp/gate/kernel": (L, D, F),
    "blocks/mlp/up/kernel": (L, D, F),
    "blocks/mlp/down/kernel": (L, F, D),
    "final_norm/scale": (D,),
    "head/kernel": (D, V),
}
GPT2 = {
    "embed/embedding": (V, D),
    "position/embedding": (T, D),
    "blocks/attention_norm/scale": (L, D),
    "blocks/attention_norm/bias": (L, D),
    **{
        f"blocks/attention/{part}/{leaf}": shape
        for part in ("query", "key", "value")
        for leaf, shape in (("kernel", (L, D, N, H)), ("bias", (L, N, H)))
    },
    "blocks/attention/out/kernel": (L, N, H, D),
    "blocks/attention/out/bias": (L, D),
    "blocks/mlp_norm/scale": (L, D),
    "blocks/mlp_norm/bias": (L, D),
    "blocks/mlp/up/kernel": (L, D, F),
    "blocks/mlp/up/bias": (L, F),
    "blocks/mlp/down/kernel": (L, F, D),
    "blocks/mlp/down/bias": (L, D),
    "final_norm/scale": (D,),
    "final_norm/bias": (D,),
}
SHAPES = {"GPT2LMHeadModel": GPT2, "LlamaForCausalLM": LLAMA}


def arrays_of(shapes, dtype="float32"):
    """Random bits of any kind, NaN payloads among them."""
    rng, kind = np.random.default_rng(0), jnp.dtype(dtype)

    def array(shape):
        raw = rng.integers(0, 256, (*shape, kind.itemsize), dtype=np.uint8)
        return raw.view(kind).reshape(shape)

    return {name: array(shape) for name, shape in shapes.items()}


def assert_bits(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_there_and_back_keeps_every_bit(architecture, dtype):
    ours = arrays_of(SHAPES[architecture], dtype)
    way = exchange(architecture, SHAPES[architecture])
    theirs = {name: way.to_theirs(name, ours.__getitem__) for name in way.theirs}
    assert {name: x.shape for name, x in theirs.items()} == way.theirs
    assert sum(x.size for x in theirs.values()) == sum(x.size for x in ours.values())
    for name, x in ours.items():
        assert_bits(way.to_ours(name, theirs.__getitem__), x)


def test_llama_is_what_numpy_says():
    ours = arrays_of(LLAMA)
    way = exchange("LlamaForCausalLM", LLAMA)

    def theirs(name):
        return way.to_theirs(name, ours.__getitem__)

    block = "model.layers.1."
    key = ours["blocks/attention/key/kernel"][1]
    assert_bits(theirs(block + "self_attn.k_proj.weight"), key.reshape(D, K * H).T)
    out = ours["blocks/attention/out/kernel"][1]
    assert_bits(theirs(block + "self_attn.o_proj.weight"), out.reshape(N * H, D).T)
    up = ours["blocks/mlp/up/kernel"][1]
    assert_bits(theirs(block + "mlp.up_proj.weight"), up.T)
    scale = ours["blocks/mlp_norm/scale"][1]
    assert_bits(theirs(block + "post_attention_layernorm.weight"), scale)
    assert_bits(theirs("lm_head.weight"), ours["head/kernel"].T)
    assert_bits(theirs("model.embed_tokens.weight"), ours["embed/embedding"])


def test_gpt2_is_what_numpy_says():
    ours = arrays_of(GPT2)
    way = exchange("GPT2LMHeadModel", GPT2)

    def theirs(name):
        return way.to_theirs(name, ours.__getitem__)

    block = "transformer.h.1."
    for leaf, shape in (("weight", (D, N * H)), ("bias", (N * H,))):
        ours_leaf = leaf.replace("weight", "kernel")
        parts = [
            ours[f"blocks/attention/{part}/{ours_leaf}"][1].reshape(shape)
            for part in ("query", "key", "value")
        ]
        want = np.concatenate(parts, -1)
        assert_bits(theirs(f"{block}attn.c_attn.{leaf}"), want)
    assert_bits(theirs(block + "mlp.c_fc.weight"), ours["blocks/mlp/up/kernel"][1])
    assert_bits(theirs("transformer.ln_f.bias"), ours["final_norm/bias"])
    assert "lm_head.weight" not in way.theirs  # it is tied


@pytest.mark.parametrize("whole", ["nothing", "embedding", "everything"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_tensor_parallel_ranks_come_together(architecture, whole):
    """Each rank has heads and hidden units of its own, [q k v] of them side by side;
    what `whole` names is on both ranks."""
    shapes = SHAPES[architecture]
    ours = arrays_of(shapes, "float32")
    one = exchange(architecture, shapes)
    ranks: dict[str, np.ndarray] = {}
    for name in one.theirs:
        x = one.to_theirs(name, ours.__getitem__)
        columns = any(s in name for s in ("q_p", "k_p", "v_p", "gate", "up_proj"))
        axis = 0 if columns else 1 if "o_proj" in name or "down_proj" in name else None
        if architecture.startswith("GPT2"):
            axis = {"c_attn": -1, "c_fc": -1}.get(name.split(".")[-2])
            if name.endswith("c_proj.weight"):
                axis = 0
        if "embed_tokens" in name or "wpe" in name:
            axis = None if whole == "embedding" else 1  # of another framework
        if whole == "everything":
            axis = None
        for rank in range(2):
            part = x
            if axis is not None and "c_attn" in name:
                part = np.concatenate(
                    [np.split(p, 2, -1)[rank] for p in np.split(x, 3, -1)], -1
                )
            elif axis is not None:
                part = np.split(x, 2, axis)[rank]
            ranks[f"{name}/{rank}"] = np.ascontiguousarray(part)
    found = {name: x.shape for name, x in ranks.items()}
    way = exchange(architecture, shapes, found, ranks=2, source="here")
    for name, x in ours.items():
        assert_bits(way.to_ours(name, ranks.__getitem__), x)
    other = dict(ranks)
    name = next(n for n in ranks if "norm.weight/1" in n or "ln_1.weight/1" in n)
    other[name] = np.ones_like(other[name])
    with pytest.raises(ValueError, match=r"copies of .* differ"):
        [way.to_ours(name, other.__getitem__) for name in ours]


def test_arrays_that_do_not_fit_are_named():
    way = exchange("LlamaForCausalLM", LLAMA)
    good = way.theirs | {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    assert exchange("LlamaForCausalLM", LLAMA, good).theirs == way.theirs
    bad = good | {"model.norm.weight": (D + 1,), "model.extra": (1,)}
    del bad["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"^here: arrays do not fit; ") as caught:
        exchange("LlamaForCausalLM", LLAMA, bad, source="here")
    said = str(caught.value)
    assert "1 missing: model.layers.1.mlp.up_proj.weight" in said
    assert "1 unknown: model.extra" in said
    assert "model.norm.weight (there (13,), by the configuration (12,))" in said
    with pytest.raises(ValueError, match="'Mamba' is not known; there are GPT2"):
        exchange("Mamba", LLAMA)
    with pytest.raises(ValueError, match="no counterpart of 'blocks/0/attention/q"):
        exchange("LlamaForCausalLM", {"blocks/attention/query_norm/scale": (L, H)})


def test_vocabularies_grow_by_zeros_and_shrink_by_what_is_behind():
    x = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(repad(x, (6, 3)), np.pad(x, ((0, 2), (0, 0))))
    np.testing.assert_array_equal(repad(repad(x, (4, 5)), (4, 3)), x)
    np.testing.assert_array_equal(repad(x, (2, 3)), x[:2])
    assert repad(x, (4, 3)) is x
    with pytest.raises(ValueError, match="differ in more than one axis"):
        repad(x, (5, 4))


def test_a_trunk_alone_gets_the_names_of_the_whole():
    found = {"wte.weight": 1, "h.0.ln_1.bias": 2, "lm_head.weight": 3}
    assert whole_names("GPT2LMHeadModel", found).keys() == {
        "transformer.wte.weight",
        "transformer.h.0.ln_1.bias",
        "lm_head.weight",
    }
    whole = {"transformer.wte.weight": 1}
    assert whole_names("GPT2LMHeadModel", whole) == whole


GPT2_CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": V,
    "n_layer": L,
    "n_embd": D,
    "n_head": N,
    "n_positions": T,
}
LLAMA_CONFIG = {
    "model_type": "llama",
    "vocab_size": V,
    "num_hidden_layers": L,
    "hidden_size": D,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "intermediate_size": F,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}


@pytest.mark.parametrize("config", [GPT2_CONFIG, LLAMA_CONFIG])
def test_a_configuration_comes_back(config):
    """What was not said has the value that their library gives it."""
    options = {"qk_norm": False, "causal": True} | options_of(config)
    options = {"kv_heads": N, "head_width": H, "rotary_base": 1e4} | options
    again = config_of(options)
    assert options_of(again).items() <= options.items()
    assert {k: again[k] for k in config if k in again}.items() <= {
        k: config[k] for k in config
    }.items()
    if "rope_parameters" in config:
        assert options["rotary_base"] == 5e5
        assert options["norm_epsilon"] == 1e-6
        assert not options["tied"]
    else:
        assert (options["mlp"], options["mlp_width"]) == ("gelu_tanh", 4 * D)
        assert options["tied"]


REFUSED = {
    "family": (LLAMA_CONFIG | {"model_type": "mamba"}, "'mamba' is not known"),
    "scaling": (LLAMA_CONFIG | {"rope_scaling": {"factor": 8}}, "rope_scaling is"),
    "llama3": (
        LLAMA_CONFIG | {"rope_parameters": {"rope_type": "llama3"}},
        "'llama3' positions are not known",
    ),
    "bias": (LLAMA_CONFIG | {"attention_bias": True}, "attention_bias is True"),
    "activation": (LLAMA_CONFIG | {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "absent": ({"model_type": "gpt2", "n_embd": 4}, "vocab_size is None|n_embd"),
    "text": (GPT2_CONFIG | {"n_layer": "2"}, "n_layer is '2'"),
    "scores": (
        GPT2_CONFIG | {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_configuration_of_something_else_is_refused(kind):
    config, sentence = REFUSED[kind]
    with pytest.raises(ValueError, match=sentence):
        options_of(config)


def test_a_model_that_is_neither_is_told_what_it_differs_in():
    options = {"qk_norm": True, "causal": True} | options_of(LLAMA_CONFIG)
    with pytest.raises(ValueError, match="a Llama has qk_norm=False"):
        config_of(options)
