"""A trained model from a workdir, and text from it: for commands and notebooks."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from narrows.data.tokens import Tokenizer, make_tokenizer
from narrows.models.generate import generate
from narrows.models.transformer import Transformer
from narrows.optim.table import make_optimizer
from narrows.parallel.checkpoint import Checkpoints, inspect
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.state import restore
from narrows.parallel.step import TrainState, abstract_state
from narrows.scripts.model_flags import restore_parts
from narrows.scripts.outer_flags import rounds_of


class Trained(NamedTuple):
    state: TrainState
    meta: dict[str, Any]  # corpus, model record, flags: what the run was
    path: pathlib.Path  # of the checkpoint


def load_trained(
    workdir: str | pathlib.Path, *, step: int | None = None, mesh: Any = None
) -> Trained:
    """The newest checkpoint (or that of `step`) onto a mesh, by default one device.

    Raises ValueError where the workdir holds no such checkpoint.
    """
    folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"workdir: {workdir} holds no checkpoints; train there first")
    found = inspect(folder, step)
    mesh = make_mesh(Layout(), jax.devices()[:1]) if mesh is None else mesh
    tx: Any = make_optimizer(found.meta["optimizer"], lambda count: 0.0 * count)
    if found.meta.get("outer", "none") != "none":
        tx = rounds_of(found.meta["flags"], tx, 1)
    init = restore_parts(found.meta["model"]).init
    with Checkpoints(folder) as checkpoints:
        target = abstract_state(init, tx, 0, mesh)
        state, meta = restore(checkpoints, target, step=found.step)
    return Trained(state, meta, folder / str(found.step))


def check_same_run(folder: pathlib.Path, wanted: dict[str, Any]) -> None:
    """Raise ValueError unless the newest checkpoint's run agrees with `wanted`.

    Each entry that differs is named by its flag, with both values.
    """

    def flat(record: dict[str, Any]) -> dict[str, Any]:
        model = record["model"]
        options = model["waist_options"]
        shape = {**model["config"], "waist": model["waist"], **options}
        shape |= {"waist_at": model["waist_at"], "precision": shape.pop("dtype")}
        rest = {name: record.get(name) for name in wanted if name != "model"}
        return {"data": f"text of hash {str(rest.pop('corpus'))[:12]}", **shape, **rest}

    found = inspect(folder)
    here, there = flat(wanted), flat(found.meta)
    if differ := [n for n in here | there if here.get(n) != there.get(n)]:
        said = ", ".join(f"{n}={here.get(n)} (was {there.get(n)})" for n in differ)
        raise ValueError(
            f"workdir: the run in {folder.parent} cannot go on with {said}; give the "
            "flags it was started with, or another --workdir"
        )


def model_of(state: TrainState, record: dict[str, Any]) -> Transformer:
    """The module that a state and its model record make."""
    return nnx.merge(restore_parts(record).graph, state.params, state.rest)


def sample_text(
    model: Transformer,
    tokenizer: str | Tokenizer,
    prompt: str,
    *,
    length: int = 200,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
) -> str:
    """The prompt and `length` tokens after it; the same seed gives the same text."""
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer)
    if not prompt:
        raise ValueError("prompt: it is empty, but it must hold at least one character")
    tokens = np.asarray(tokenizer.encode(prompt.encode("utf-8")), np.int32)
    new = generate(
        model,
        jax.numpy.asarray(tokens[None]),
        length=length,
        key=jax.random.key(seed),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=tokenizer.vocab_size,
    )
    return prompt + tokenizer.decode(jax.device_get(new)[0]).decode("utf-8", "replace")
