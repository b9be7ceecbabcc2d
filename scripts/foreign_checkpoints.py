"""Weights of other programs as checkpoints of ours, and ours as Hugging Face's.

What `scripts/convert_checkpoint.py` does, for notebooks and other commands to call.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from narrows.models.transformer import TransformerConfig
from narrows.optim.table import make_optimizer
from narrows.parallel.checkpoint import Checkpoints, inspect
from narrows.parallel.checkpoint.configurations import (
    architecture_of,
    config_of,
    options_of,
)
from narrows.parallel.checkpoint.deepspeed_files import read_deepspeed
from narrows.parallel.checkpoint.distributed_files import read_distributed
from narrows.parallel.checkpoint.families import exchange, repad, whole_names
from narrows.parallel.checkpoint.leaves import named
from narrows.parallel.checkpoint.safetensors_files import (
    INDEX,
    WHOLE,
    read_folder,
    write_folder,
)
from narrows.parallel.checkpoint.unpickle import Tensor
from narrows.parallel.step import TrainState
from narrows.scripts import model_flags, results

DTYPES = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16
}  # fmt: skip


class Foreign(NamedTuple):
    """What a folder of another program holds."""

    tensors: dict[str, Tensor]  # by name, or name/rank with several ranks
    config: dict[str, Any]  # as in their config.json
    ranks: int  # of tensor parallelism
    step: int
    kind: str


def read_foreign(
    path: Any, *, config: Any = None, inert: Sequence[str] = ()
) -> Foreign:
    """The tensors of a folder, each read when asked for, and its configuration.

    ValueError for a folder of no known kind, and for all that its reader refuses.
    """
    folder = pathlib.Path(path)
    ranks, step = 1, 0
    if (folder / INDEX).is_file() or (folder / WHOLE).is_file():
        tensors, kind = read_folder(folder), "Hugging Face"
    elif (folder / ".metadata").is_file():
        tensors, kind = read_distributed(folder, inert=inert), "distributed"
    elif (folder / "latest").is_file() or any(folder.glob("*_model_states.pt")):
        (tensors, ranks, step), kind = read_deepspeed(folder, inert=inert), "DeepSpeed"
    else:
        raise ValueError(
            f"source: {folder} holds no {WHOLE} or {INDEX} (Hugging Face), no "
            ".metadata (torch.distributed.checkpoint), no *_model_states.pt "
            "(DeepSpeed) and no checkpoints of ours"
        )
    file = folder / "config.json" if config is None else pathlib.Path(config)
    if not file.is_file():
        raise ValueError(
            f"config: there is no {file}; give --config, the config.json of the model"
        )
    try:
        said = json.loads(file.read_text())
        if not isinstance(said, dict):
            raise ValueError("it is no dictionary")
    except ValueError as error:
        raise ValueError(f"config: {file} cannot be read ({error})") from error
    return Foreign(tensors, said, ranks, step, kind)


def bring_in(
    found: Foreign,
    to: pathlib.Path,
    *,
    source: str,
    prefix: str = "",
    vocab_size: int | None = None,
    optimizer: str = "adamw",
    tokenizer: str = "bytes",
) -> str:
    """Write a workdir whose checkpoint has these weights; what was done, in a sentence.

    All weights become float32, which holds every float16 and bfloat16. ValueError for
    arrays that are missing, unknown, or of another shape or type.
    """
    architecture = architecture_of(found.config)
    options = options_of(found.config)
    record = record_of(options)
    tensors = whole_names(
        architecture,
        {
            name.removeprefix(prefix): tensor
            for name, tensor in found.tensors.items()
            if name.startswith(prefix)
        },
    )
    if options["tied"]:
        tensors = _without_tied_head(tensors, source)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    way = exchange(
        architecture, shapes_of(record), shapes, ranks=found.ranks, source=source
    )
    for name in way.theirs:
        if tensors[name].dtype not in [np.dtype(kind) for kind in DTYPES.values()]:
            raise ValueError(
                f"{source}: {name!r} is {tensors[name].dtype}, but weights must be "
                f"{', '.join(DTYPES)}"
            )
    tx = make_optimizer(optimizer, lambda count: 0.0 * count)
    final = record_of(options | {"vocab_size": vocab_size or options["vocab_size"]})

    def leaf(name: str, shape: tuple[int, ...]) -> jax.Array:
        array = way.to_ours(name, lambda theirs: tensors[theirs].read())
        return jnp.asarray(repad(array, shape).astype(np.float32))

    wanted, rest = jax.eval_shape(_init(final), jax.random.key(0))
    leaves = [leaf(name, x.shape) for name, x in named(wanted).items()]
    params = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    step = jnp.asarray(found.step, jnp.int32)
    state = TrainState(params, rest, tx.init(params), step, jax.random.key(0))
    meta = {
        "model": final,
        "optimizer": optimizer,
        "tokenizer": tokenizer,
        "converted": {"kind": found.kind, "architecture": architecture},
        "data": {"next_index": 0},
        **results.provenance(),
    }
    with Checkpoints(to / "checkpoints") as checkpoints:
        checkpoints.save(found.step, state, meta)
    size = sum(x.size for x in leaves)
    return (
        f"{found.kind} {architecture}: {len(way.theirs)} arrays, {size:,} parameters "
        f"to {to / 'checkpoints' / str(found.step)}"
    )


def export(
    folder: pathlib.Path,
    to: pathlib.Path,
    *,
    step: int | None = None,
    vocab_size: int | None = None,
    dtype: Any = np.float32,
    shard_bytes: int = 2**31,
) -> str:
    """Write the weights of a checkpoint of ours as safetensors; what was done.

    ValueError for a model that is neither a GPT-2 nor a Llama.
    """
    contents = inspect(folder, step)
    if "model" not in contents.meta:
        raise ValueError(f"source: the meta of {folder} does not say what its model is")
    record = contents.meta["model"]
    if record["waist"] != "none":
        raise ValueError(
            f"architecture: the waist {record['waist']!r} has no counterpart in GPT-2 "
            "or Llama; only a model with --waist=none is theirs"
        )
    options = dataclasses.asdict(model_flags.config_of(record))
    held = options["vocab_size"]
    options["vocab_size"] = vocab_size or held
    config = config_of(options)
    architecture = architecture_of(config)
    logical = (contents.layout or {}).get("logical") or {
        row.name: row.shape for row in contents.rows
    }
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        "params/" + name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=one)
        for name, shape in shapes_of(record).items()
    }
    drop = [re.escape(name) for name in logical if not name.startswith("params/")]
    params = Checkpoints(folder).resume(target, step=contents.step, ignore=drop).state
    ours = shapes_of(record_of(options))
    way = exchange(architecture, ours)

    def read(name: str) -> np.ndarray:
        return repad(np.asarray(params["params/" + name]), ours[name])

    files = write_folder(
        to,
        way.theirs,
        lambda name: way.to_theirs(name, read),
        dtype,
        config | {"dtype": np.dtype(dtype).name, "torch_dtype": np.dtype(dtype).name},
        shard_bytes=shard_bytes,
    )
    size = sum(math.prod(shape) for shape in way.theirs.values())
    return f"{architecture}: {len(way.theirs)} arrays, {size:,} parameters to " + (
        ", ".join(str(to / file) for file in files)
    )


def record_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a model with these options of TransformerConfig and no waist."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    config = {name: value for name, value in options.items() if name in known}
    waist = {"waist": "none", "waist_at": None, "waist_options": {}}
    return {"config": config | {"dtype": "float32"}, **waist}


def shapes_of(record: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters."""
    params, _ = jax.eval_shape(_init(record), jax.random.key(0))
    return {name: x.shape for name, x in named(params).items()}


def _init(record: Mapping[str, Any]):
    return model_flags.restore_parts(dict(record)).init


def checkpoints_in(folder: pathlib.Path) -> pathlib.Path | None:
    """Where a workdir, or a folder of steps, has checkpoints of ours."""
    for place in (folder / "checkpoints", folder):
        if place.is_dir() and any(p.name.isdecimal() for p in place.iterdir()):
            return place
    return None


def _without_tied_head(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A tied head is the embedding, if it is there; ValueError for another."""
    heads = [
        name for name in tensors if re.fullmatch(r"lm_head\.weight(?:/\d+)?", name)
    ]
    for head in heads:
        rank = head.removeprefix("lm_head.weight")
        table = [n + rank for n in EMBEDDINGS if n + rank in tensors]
        array = tensors[head].read()
        if not table or array.tobytes() != tensors[table[0]].read().tobytes():
            raise ValueError(
                f"{source}: by its configuration the output projection is the "
                f"embedding, but {head!r} is another array"
            )
    return {name: tensor for name, tensor in tensors.items() if name not in heads}


EMBEDDINGS = ("transformer.wte.weight", "model.embed_tokens.weight")
