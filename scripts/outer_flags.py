"""The flags of local updates: how often workers meet, and by which outer step."""

import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from narrows.models.language_model import Parts
from narrows.optim.local_updates.outer import OUTERS, make_outer
from narrows.optim.local_updates.pace import steps_to_hide
from narrows.optim.local_updates.rounds import Rounds, local_updates
from narrows.optim.local_updates.step import LocalStep, make_local_step
from narrows.parallel.checkpoint import Checkpoints, inspect
from narrows.parallel.layout import Layout, place_batch
from narrows.parallel.step import create_state

TRIES = 3  # of a step and of a meeting, of which the least time counts


def define_outer(f: flags.FlagValues) -> None:
    names = ["none", *OUTERS]
    text, integer, real = (
        functools.partial(define, flag_values=f)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float)
    )
    flags.DEFINE_enum("outer", "none", names, "how workers meet", flag_values=f)
    text("outer_every", "20", "steps of a round, or auto: measured, to hide meetings")
    integer("fragments", 1, "parts of the parameters that meet in turn", 1)
    real("outer_rate", None, "of the outer step; default by --outer", 0.0)
    real("outer_momentum", None, "of the outer step; default by --outer", 0.0)
    real("outer_clip", 1.0, "of the outer momentum of co2, number by number", 0.0)


def rounds_of(
    values: dict[str, Any], inner: optax.GradientTransformation, workers: int
) -> Rounds:
    """The local updates that flags (or a run's stored flags) ask for.

    Raises ValueError for values that do not go together.
    """
    every = str(values["outer_every"])
    if not every.isdecimal():
        raise ValueError(f"outer_every: {every!r}, but it is a number of steps or auto")
    options = {"clip": values["outer_clip"]} if values["outer"] == "co2" else {}
    rate, momentum = values["outer_rate"], values["outer_momentum"]
    outer = make_outer(values["outer"], rate=rate, momentum=momentum, **options)
    return local_updates(
        inner,
        outer,
        workers=workers,
        every=int(every),
        fragments=values["fragments"],
    )


class Pace(NamedTuple):
    every: int
    said: str  # how it was chosen; "" where it was given


def pace_of(
    f: flags.FlagValues,
    folder: pathlib.Path | None,
    parts: Parts | None,
    inner: optax.GradientTransformation,
    layout: Layout,
    mesh: Mesh | None,
) -> Pace:
    """Steps of a round: as given, as in the run's checkpoint, or measured for "auto".

    Measured are, on a state that is thrown away, the least time of a step and of a
    meeting that is waited for; H is `steps_to_hide` of the slowest process.
    """
    if f.outer_every != "auto":
        return Pace(int(f.outer_every) if f.outer_every.isdecimal() else 0, "")
    if mesh is None or parts is None or folder is None:
        raise ValueError("outer_every: auto, but there is no model to measure it on")
    with Checkpoints(folder) as stored:
        if stored.latest is not None:
            every = inspect(folder, stored.latest).meta["flags"]["outer_every"]
            return Pace(int(every), f"outer_every={every}, as the run began")
    rounds = local_updates(inner, make_outer("local_sgd"), workers=layout.data, every=1)
    step: LocalStep = make_local_step(
        parts.loss, rounds, layout, mesh, microbatches=f.microbatches or 1
    )
    state = create_state(parts.init, rounds, f.seed, mesh)
    rows = f.batch_size // jax.process_count()
    tokens = np.zeros((rows, f.seq_len), np.int32)
    batch = place_batch({"tokens": tokens, "targets": tokens}, mesh)
    spent: dict[str, list[float]] = {"step": [], "meeting": []}
    for _ in range(TRIES + 1):  # the first compiles
        start = time.perf_counter()
        mine, number, _ = step.local(
            state.opt.own, state.rest, state.step, state.key, batch
        )
        state = state._replace(opt=state.opt._replace(own=mine), step=number)
        jax.block_until_ready(state)
        middle = time.perf_counter()
        state = jax.block_until_ready(step.meet(state, 0))
        spent["step"].append(middle - start)
        spent["meeting"].append(time.perf_counter() - middle)
    least = np.array([min(times[1:]) for times in spent.values()])
    seconds = np.max(np.atleast_2d(multihost_utils.process_allgather(least)), 0)
    every = max(f.fragments, steps_to_hide(*map(float, seconds)))
    return Pace(
        every,
        f"outer_every={every}: a step takes {seconds[0]:.3g} s, a meeting "
        f"{seconds[1]:.3g} s",
    )
