"""The flags of the optimizer, and the transformation that they make."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax
from absl import flags
from jax.sharding import Mesh
from narrows.models.language_model import Parts
from narrows.optim.local_updates.step import make_local_step
from narrows.optim.table import (
    LOCAL,
    OPTIMIZERS,
    SHARDED,
    make_optimizer,
    warmup_cosine,
)
from narrows.parallel.layout import Layout
from narrows.parallel.rules import TRANSFORMER, Rule, whole_over
from narrows.parallel.step import make_step
from narrows.scripts.outer_flags import define_outer, pace_of, rounds_of


class Chosen(NamedTuple):
    name: str  # in the table: over fsdp one_bit_adam is sharded_one_bit_adam
    tx: Any  # optax.GradientTransformation, or Rounds: `create_state` takes either
    schedule: optax.Schedule
    make: Callable  # of the step, with the arguments of `parallel.step.make_step`
    rules: Sequence[Rule]  # where its parameters lie
    ask_every: int  # steps between two questions whether any process should stop


def define_optimizer(f: flags.FlagValues) -> None:
    real = functools.partial(flags.DEFINE_float, flag_values=f)
    integer = functools.partial(flags.DEFINE_integer, flag_values=f)
    names = [*OPTIMIZERS, *LOCAL, *SHARDED]
    flags.DEFINE_enum("optimizer", "adamw", names, "by name", flag_values=f)
    real("learning_rate", None, "peak; default 0.03 / width**0.5", 0.0)
    integer("warmup", None, "steps; default 5 % of --steps, at least 10", 0)
    real("weight_decay", 0.1, "of kernels and embeddings", 0.0)
    real("clip", 1.0, "global gradient norm", 0.0)
    integer("freeze_step", None, "compress from here; default: once v has settled", 1)
    define_outer(f)


def optimizer_of(
    f: flags.FlagValues,
    width: int,
    layout: Layout,
    *,
    mesh: Mesh | None = None,
    parts: Parts | None = None,
    folder: pathlib.Path | None = None,
) -> Chosen:
    """What the flags ask for; --outer_every=auto is replaced by what was measured.

    The mesh, the model's parts and the folder of the run's checkpoints are what it is
    measured on. Raises ValueError for flags that do not go together.
    """
    rate = 0.03 / width**0.5 if f.learning_rate is None else f.learning_rate
    warmup = max(10, f.steps // 20) if f.warmup is None else f.warmup
    schedule = warmup_cosine(rate, steps=f.steps, warmup=warmup)
    name, inside = f.optimizer, layout.data == 1 < layout.size
    if name in LOCAL and inside and layout.fsdp > 1:
        name = f"sharded_{name}"
    if inside and name not in {**OPTIMIZERS, **SHARDED}:
        raise ValueError(
            f"mesh: {layout}, but {f.optimizer} compresses what goes over data, which "
            "is one device here; give data some, or take another --optimizer"
            + (f" ({', '.join(SHARDED)} compress over fsdp)" if layout.fsdp > 1 else "")
        )
    if name in SHARDED and layout.data > 1:
        raise ValueError(
            f"mesh: {layout}, but {name} compresses what goes over fsdp; give fsdp the "
            "devices of data, or take another --optimizer"
        )
    tx = make_optimizer(
        name,
        schedule,
        weight_decay=f.weight_decay,
        clip=f.clip,
        workers=layout.fsdp if name in SHARDED else layout.data,
        freeze_step=f.freeze_step,
        earliest=warmup,
    )
    rules = whole_over(TRANSFORMER, "fsdp") if name in SHARDED else TRANSFORMER
    if f.outer == "none":
        gradients = "mean" if name in OPTIMIZERS else "local"
        step = functools.partial(make_step, gradients=gradients)
        return Chosen(name, tx, schedule, step, rules, 10)
    if name not in OPTIMIZERS or f.waist != "none":
        raise ValueError(
            f"outer: {f.outer} takes an --optimizer of {', '.join(OPTIMIZERS)} and "
            f"--waist=none, since its steps exchange nothing; they are {f.optimizer} "
            f"and {f.waist}"
        )
    pace = pace_of(f, folder, parts, tx, layout, mesh)
    if pace.said:
        print(pace.said, flush=True)
        f.outer_every = str(pace.every)
    rounds = rounds_of(f.flag_values_dict(), tx, layout.data)

    def make(loss, rounds, layout, mesh, *, microbatches, advance, rules):
        del advance  # of what learns from sums: there is none
        return make_local_step(
            loss, rounds, layout, mesh, microbatches=microbatches, rules=rules
        )

    # Processes ask by a collective, which would wait for an exchange on its way; so
    # they do it where a checkpoint waits for that anyway.
    return Chosen(name, rounds, schedule, make, rules, f.checkpoint_every)
