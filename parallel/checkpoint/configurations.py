"""Hugging Face's config.json beside the options of `models/transformer.py`.

What a configuration asks for and the transformer has not is refused by name: a model
that loads and computes something else is worse than one that does not load.
"""

from collections.abc import Mapping
from typing import Any

from .families import family_of

GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
OF_TYPE = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
GPT2 = {"norm": "layer", "position": "learned", "bias": True}
LLAMA = {"norm": "rms", "position": "rotary", "mlp": "gated", "bias": False}
NEITHER = {"qk_norm": False, "causal": True}


def architecture_of(config: Mapping[str, Any]) -> str:
    """The family of a config.json; ValueError for one that is not known."""
    named = config.get("architectures") or [OF_TYPE.get(config.get("model_type", ""))]
    name = str(named[0]) if len(named) == 1 else str(named)
    if name == "None":
        name = str(config.get("model_type"))
    family_of(name)
    return name


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of TransformerConfig; ValueError for what the transformer has not."""
    if architecture_of(config) == "GPT2LMHeadModel":
        return _from_gpt2(config)
    return _from_llama(config)


def config_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a transformer with all these options.

    ValueError for one that is neither a GPT-2 nor a Llama, with what it differs in.
    """
    differs = {
        name: {
            key: value
            for key, value in (wanted | NEITHER).items()
            if options[key] != value
        }
        for name, wanted in (("GPT-2", GPT2), ("Llama", LLAMA))
    }
    if options["mlp"] == "gated":
        differs["GPT-2"]["mlp"] = "gelu or gelu_tanh"
    if options["kv_heads"] != options["heads"]:
        differs["GPT-2"]["kv_heads"] = options["heads"]
    if options["head_width"] * options["heads"] != options["width"]:
        differs["GPT-2"]["head_width"] = options["width"] // options["heads"]
    if not differs["GPT-2"]:
        return _to_gpt2(options)
    if not differs["Llama"]:
        return _to_llama(options)
    said = "; ".join(
        f"a {name} has " + ", ".join(f"{k}={v}" for k, v in found.items())
        for name, found in differs.items()
    )
    raise ValueError(f"architecture: this model is neither a GPT-2 nor a Llama; {said}")


def _from_gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    _only(
        config,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    width = _number(config, "n_embd")
    return GPT2 | {
        "vocab_size": _number(config, "vocab_size"),
        "depth": _number(config, "n_layer"),
        "width": width,
        "heads": _number(config, "n_head"),
        "mlp_width": config.get("n_inner") or 4 * width,
        "max_len": _number(config, "n_positions"),
        "mlp": _among(config, "activation_function", "gelu_new", GELU),
        "norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5)),
        "tied": bool(config.get("tie_word_embeddings", True)),
    }


def _from_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    _only(config, attention_bias=False, mlp_bias=False, rope_scaling=None)
    rotary = config.get("rope_parameters") or {}
    if rotary.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_parameters: {rotary['rope_type']!r} positions are not known, only "
            "the default ones"
        )
    heads = _number(config, "num_attention_heads")
    width = _number(config, "hidden_size")
    base = config.get("rope_theta") or rotary.get("rope_theta") or 10_000.0
    return LLAMA | {
        "vocab_size": _number(config, "vocab_size"),
        "depth": _number(config, "num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": config.get("head_dim") or width // heads,
        "mlp_width": _number(config, "intermediate_size"),
        "max_len": config.get("max_position_embeddings", 2048),
        "mlp": _among(config, "hidden_act", "silu", {"silu": "gated"}),
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rotary_base": float(base),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def _to_gpt2(options: Mapping[str, Any]) -> dict[str, Any]:
    activation = {"gelu_tanh": "gelu_new", "gelu": "gelu"}[options["mlp"]]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": options["vocab_size"],
        "n_layer": options["depth"],
        "n_embd": options["width"],
        "n_head": options["heads"],
        "n_inner": options["mlp_width"],
        "n_positions": options["max_len"],
        "activation_function": activation,
        "layer_norm_epsilon": options["norm_epsilon"],
        "tie_word_embeddings": options["tied"],
    }


def _to_llama(options: Mapping[str, Any]) -> dict[str, Any]:
    base = options["rotary_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": options["vocab_size"],
        "num_hidden_layers": options["depth"],
        "hidden_size": options["width"],
        "num_attention_heads": options["heads"],
        "num_key_value_heads": options["kv_heads"],
        "head_dim": options["head_width"],
        "intermediate_size": options["mlp_width"],
        "max_position_embeddings": options["max_len"],
        "hidden_act": "silu",
        "rms_norm_eps": options["norm_epsilon"],
        "rope_theta": base,  # where releases up to 4 look
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": options["tied"],
    }


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"config.json: {key} is {value!r}, but it must be a positive whole number"
        )
    return value


def _among(config: Mapping[str, Any], key: str, default: str, known: Mapping) -> str:
    value = config.get(key, default)
    if value not in known:
        raise ValueError(f"config.json: {key} is {value!r}; known are {[*known]}")
    return known[value]


def _only(config: Mapping[str, Any], **wanted: Any) -> None:
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"config.json: {key} is {config[key]!r}, but this transformer has "
                f"{value!r}"
            )
