"""The flags that shape a model, and the record of a model in a checkpoint's meta."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from absl import flags
from narrows.models import information
from narrows.models.language_model import Parts, model_parts
from narrows.models.transformer import TransformerConfig
from narrows.models.waists import WAISTS

PRECISION = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def define_model(values: flags.FlagValues) -> None:
    integer, enum = flags.DEFINE_integer, flags.DEFINE_enum
    integer("depth", 3, "blocks; width and heads follow", 1, flag_values=values)
    integer("width", None, "default 64 x depth", 1, flag_values=values)
    integer("heads", None, "default width / 64", 1, flag_values=values)
    integer("kv_heads", None, "keys shared by groups of heads", 1, flag_values=values)
    flags.DEFINE_bool(
        "qk_norm", False, "normalise queries and keys", flag_values=values
    )
    enum("norm", "rms", ["rms", "layer"], "normalisation", flag_values=values)
    enum("position", "rotary", ["rotary", "learned"], "positions", flag_values=values)
    enum("mlp", "gated", ["gated", "gelu"], "hidden layer", flag_values=values)
    flags.DEFINE_bool("tied", False, "head is the embedding", flag_values=values)
    enum("waist", "codebook", sorted(WAISTS), "bottleneck layer", flag_values=values)
    integer(
        "waist_at", None, "before this block; default middle", 0, flag_values=values
    )
    integer("codes", 1024, "for each index of the waist", 2, flag_values=values)
    integer("code_width", 16, "numbers in a code", 1, flag_values=values)
    enum("precision", "float32", list(PRECISION), "of activations", flag_values=values)
    enum(
        "remat",
        "none",
        ["none", "dots", "full"],
        "recompute backward",
        flag_values=values,
    )
    flags.DEFINE_bool("scan", False, "compile one block, not depth", flag_values=values)


def model_record(values: flags.FlagValues, *, vocab_size: int, max_len: int) -> dict:
    """What `restore_parts` needs to build the same model, as JSON.

    The vocabulary is rounded up to a multiple of 128, so that it divides over devices.
    """
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    config = {name: values[name].value for name in names & set(values)}
    config |= {"vocab_size": -(-vocab_size // 128) * 128, "max_len": max_len}
    options = {}
    if values.waist != "none":
        if values.waist not in information.WAISTS:
            options["codes"] = values.codes
        if values.waist == "codebook" or values["code_width"].present:
            options["code_width"] = values.code_width
    return {
        "config": config | {"dtype": values.precision},
        "waist": values.waist,
        "waist_at": values.waist_at,
        "waist_options": options,
    }


def config_of(record: dict[str, Any]) -> TransformerConfig:
    config = dict(record["config"])
    return TransformerConfig(**config | {"dtype": PRECISION[config["dtype"]]})


def restore_parts(record: dict[str, Any], **pipeline: Any) -> Parts:
    """The functions of the model that a record describes.

    pipeline: microbatches, schedule and chunks, as `model_parts` takes them.
    """
    rest = {name: record[name] for name in ("waist", "waist_at", "waist_options")}
    return model_parts(config_of(record), **rest, **pipeline)
