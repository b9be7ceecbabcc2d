"""The flags of the optimizer, and the transformation that they make."""

import functools
from typing import Literal, NamedTuple

import optax
from absl import flags
from narrows.optim.table import LOCAL, OPTIMIZERS, make_optimizer, warmup_cosine
from narrows.parallel.layout import Layout


class Chosen(NamedTuple):
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    gradients: Literal["mean", "local"]  # what it takes: see `parallel.step`


def define_optimizer(f: flags.FlagValues) -> None:
    real = functools.partial(flags.DEFINE_float, flag_values=f)
    integer = functools.partial(flags.DEFINE_integer, flag_values=f)
    names = [*OPTIMIZERS, *LOCAL]
    flags.DEFINE_enum("optimizer", "adamw", names, "by name", flag_values=f)
    real("learning_rate", None, "peak; default 0.03 / width**0.5", 0.0)
    integer("warmup", None, "steps; default 5 % of --steps, at least 10", 0)
    real("weight_decay", 0.1, "of kernels and embeddings", 0.0)
    real("clip", 1.0, "global gradient norm", 0.0)
    integer("freeze_step", None, "compress from here; default: once v has settled", 1)


def optimizer_of(f: flags.FlagValues, width: int, layout: Layout) -> Chosen:
    """Raises ValueError for flags that do not go together."""
    rate = 0.03 / width**0.5 if f.learning_rate is None else f.learning_rate
    warmup = max(10, f.steps // 20) if f.warmup is None else f.warmup
    schedule = warmup_cosine(rate, steps=f.steps, warmup=warmup)
    local = f.optimizer in LOCAL
    if local and layout.data == 1 < layout.size:
        raise ValueError(
            f"mesh: {layout}, but {f.optimizer} compresses what goes over data, which "
            "is one device here; give data some, or take another --optimizer"
        )
    tx = make_optimizer(
        f.optimizer,
        schedule,
        weight_decay=f.weight_decay,
        clip=f.clip,
        workers=layout.data,
        freeze_step=f.freeze_step,
        earliest=warmup,
    )
    return Chosen(tx, schedule, "local" if local else "mean")
