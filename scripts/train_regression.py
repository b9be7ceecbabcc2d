"""Train regressors under an information-bottleneck objective, many at once.

    python scripts/train_regression.py --workdir=/tmp/housing --table=california_housing
    python scripts/train_regression.py --workdir=/tmp/sweep --objective=vib \
        --betas=0,1e-3,1e-2,1e-1 --learning_rates=1e-3,3e-3 --seeds=5

Every beta x learning rate x seed is a run of its own; all are one program. Losses that
compare the rows of a batch see the global batch, so every mesh has one device's curve.
The epoch with the least squared error on the validation part is kept; the test part
chooses nothing. One run on 12,000 rows takes some minutes on two CPU cores.
A workdir that holds a checkpoint is continued, on the same mesh or another. Exit codes:
0, also after SIGTERM or SIGINT, which save first; 1 for a loss that is not finite; 2
for bad input.
"""

import functools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.data.tables import Split, named_table, split
from narrows.ib.objectives.protocol import Objective
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.layout import place_batch, process_rows
from narrows.parallel.state import restore
from narrows.parallel.step import abstract_state, create_state, make_step
from narrows.scripts import command, regression, results
from narrows.scripts.bottleneck_study import (
    MEASURED,
    Network,
    attacked_mse,
    stacked,
    task_of,
)
from narrows.scripts.regression import RULES, Runs
from narrows.scripts.runlog import RunLog
from narrows.scripts.splits import order
from narrows.scripts.stopping import stop_asked
from rich.console import Console
from rich.table import Table


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer = (
        functools.partial(define, flag_values=f)
        for define in (flags.DEFINE_string, flags.DEFINE_integer)
    )
    text("workdir", None, "checkpoints and log (required)")
    text("data_dir", str(results.ROOT.parent / "shared" / "data"), "tables of files")
    text("table", "california_housing", "a name of narrows.data.tables")
    text("objective", "cs_ib", "a name of narrows.ib.objectives.table")
    flags.DEFINE_multi_string(
        "option", [], "of the objective: name=0.5, name=true, name=spread:0.5", f
    )
    flags.DEFINE_list("betas", ["0.01"], "weights of the penalty", flag_values=f)
    flags.DEFINE_list("learning_rates", ["1e-3"], "of Adam", flag_values=f)
    integer("seeds", 1, "runs for each beta and learning rate", 1)
    integer("seed", 0, "of the split, of batches and of the first run", 0)
    integer("rows", None, "of the training part, at most", 4)
    integer("width", 128, "of hidden layers", 1)
    integer("code_width", 128, "numbers of the code", 1)
    integer("batch_size", 128, "rows of the global batch", 1)
    integer("epochs", 50, "of the training part", 1)
    integer("stop_at", None, "stop after this many updates in all", 1)
    integer("checkpoint_every", 1000, "updates", 1)
    flags.DEFINE_list(
        "radii", [], "at the end, attack by FGSM and PGD so far, in deviations", f
    )
    text("mesh", "", "e.g. data=2,fsdp=4; default: all on data")
    command.define_processes(f)
    return f


def main(argv: Sequence[str], devices: Sequence | None = None) -> int:
    """Train as argv says, on all devices unless some are given; the exit code."""
    return command.run_training(define_flags(), argv, __doc__, train, devices)


def numbers(name: str, given: Sequence[str], least: float) -> tuple[float, ...]:
    """The numbers of a flag. Raises: ValueError where one is none, or below least."""
    try:
        found = tuple(float(part) for part in given)
    except ValueError:
        raise ValueError(f"{name}: {given}, but it takes numbers, a,b,c") from None
    if bad := [x for x in found if not least <= x < math.inf]:
        raise ValueError(f"{name}: {bad[0]:g}, but it must be at least {least:g}")
    return found


def train(f: flags.FlagValues, devices: Sequence, stops: list[int]) -> int:
    chief = jax.process_index() == 0
    wide = None if sys.stdout.isatty() else 140
    console = Console(quiet=not chief, highlight=False, width=wide)
    with command.bad_input():
        workdir, layout, mesh = command.place_of(f, devices)
        index, count = process_rows(mesh, f.batch_size)
        objective = regression.objective_of(f.objective, f.option)
        betas, radii = numbers("betas", f.betas, 0), numbers("radii", f.radii, 0)
        rates = numbers("learning_rates", f.learning_rates, 1e-12)
        if not betas or not rates:
            raise ValueError("betas, learning_rates: give at least one number of each")
        runs = regression.grid(betas, rates, f.seeds, f.seed)
        table = named_table(f.data_dir, f.table, seed=f.seed)
        parts = split(table, seed=f.seed, rows=f.rows)
        rows, features = parts.train.x.shape
        if rows < f.batch_size:
            raise ValueError(
                f"batch_size: {f.batch_size}, but there are {rows} training rows"
            )
        network = Network(f.width, f.code_width)
        names = "table objective option betas learning_rates seeds seed rows batch_size"
        same = {name: f[name].value for name in names.split()}
        same |= network._asdict() | {"epochs": f.epochs}  # a resumed run must agree
        if (workdir / "run.json").is_file():
            there = json.loads((workdir / "run.json").read_text())
            if differ := [name for name in same if there.get(name) != same[name]]:
                raise ValueError(
                    f"workdir: the run in {workdir} has other {', '.join(differ)}; "
                    "give the flags it was started with, or another --workdir"
                )
        elif chief:
            workdir.mkdir(parents=True, exist_ok=True)
            record = same | results.provenance()
            (workdir / "run.json").write_text(json.dumps(record, indent=1) + "\n")
        tx = regression.optimizer(runs)
        begin = regression.start(runs, features, network, objective)
        target = abstract_state(begin, tx, f.seed, mesh, RULES)

    step = make_step(regression.loss(runs, objective), tx, layout, mesh, rules=RULES)
    whole: Any = NamedSharding(mesh, P())
    places = jax.tree.map(lambda leaf: leaf.sharding, target.rest)
    keep = jax.jit(regression.keep_best, out_shardings=places)
    judge = jax.jit(
        functools.partial(regression.judge, objective=objective), out_shardings=whole
    )
    informed = jax.jit(
        functools.partial(regression.informed, objective=objective),
        out_shardings=whole,
    )
    valid, test, seen = jax.device_put(
        (
            parts.valid,
            parts.test,
            parts.train._replace(
                x=parts.train.x[:MEASURED], y=parts.train.y[:MEASURED]
            ),
        ),
        whole,
    )
    per_epoch = rows // f.batch_size
    total = f.epochs * per_epoch
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        done = checkpoints.latest or 0
        if checkpoints.latest is None:
            state = create_state(begin, tx, f.seed, mesh, RULES)
        else:
            state, _ = restore(checkpoints, target, step=done)
        log = RunLog(workdir, step=done) if chief else None

        def said(what: str, params, part) -> dict[str, np.ndarray]:
            found = jax.device_get(judge(params, part))
            found["rmse"] = np.sqrt(found["mse"]) * parts.unit
            for i in range(runs.number if log else 0):
                row = {name: float(values[i]) for name, values in found.items()}
                log.write(done, f"{what} {i}", row.pop("mse"), **row)
            return found

        last = min(total, f.stop_at or total)
        while done < last and not stop_asked(stops, done):
            epoch, place = divmod(done, per_epoch)
            shuffled = order(rows, f.seed, epoch)
            start = place * f.batch_size + index * f.batch_size // count
            chosen = shuffled[start : start + f.batch_size // count]
            batch = {"x": parts.train.x[chosen], "y": parts.train.y[chosen]}
            state, metrics = step.fused(state, place_batch(batch, mesh))
            done += 1
            got = {key: float(x) for key, x in jax.device_get(metrics).items()}
            if not math.isfinite(got["loss"] + got["grad_norm"]):
                print(
                    f"error: loss {got['loss']} at step {done}: not finite; last good "
                    f"checkpoint: {checkpoints.latest}",
                    file=sys.stderr,
                )
                return 1
            if log:
                log.write(done, "train", got.pop("loss"), **got)
            if done % per_epoch == 0:
                with jax.set_mesh(mesh):
                    found = said("validation", state.params, valid)
                    rest = keep(state.rest, state.params, found["mse"], np.int32(done))
                    said("test", state.params, test)  # for the record alone
                state = state._replace(rest=rest)
            if done % f.checkpoint_every == 0 and done < last:
                checkpoints.save(done, state, same)
        if done and done != checkpoints.latest:
            checkpoints.save(done, state, same)
        checkpoints.wait()
        if done < total:
            console.print(f"stopped after {done} updates")
        elif done >= per_epoch:
            with jax.set_mesh(mesh):
                best = state.rest["best"]
                known = jax.device_get(informed(best, seen, state.key))
                known |= said("best", best, test)
            known["validation"] = np.sqrt(jax.device_get(state.rest["best_mse"]))
            known["epoch"] = jax.device_get(state.rest["best_step"]) // per_epoch
            for name in ("information", "cs_information"):
                for i in range(runs.number if log else 0):
                    log.write(done, f"{name} {i}", float(known[name][i]))
            console.print(summary(runs, known, parts.unit, objective))
            if radii:
                gathered = jax.jit(lambda tree: tree, out_shardings=whole)(best)
                params = jax.device_get(gathered)
                console.print(attacks(params, parts, objective, radii, log, done))
        if log:
            log.close()
    return 0


def summary(runs: Runs, known, unit: float, objective: Objective) -> Table:
    """A line a run: what its best epoch by validation is worth on the test part."""
    shown = Table(title="at the epoch that validates best")
    information = f"I(x;t), {objective.unit or 'no unit'}"
    for title in ("run", "beta", "learning rate", "seed", "epoch", "RMSE, validation"):
        shown.add_column(title)
    for title in ("RMSE, test", "correlation", "I(t;y), bits", information, "I_CS"):
        shown.add_column(title)
    for i, run in enumerate(zip(*tuple(runs), strict=True)):
        values = (known["validation"][i] * unit, known["rmse"][i])
        others = ("correlation", "bits_label", "information", "cs_information")
        cells = (*values, *(known[name][i] for name in others))
        line = (i, *(f"{x:g}" for x in run), known["epoch"][i])
        shown.add_row(*map(str, line), *(f"{float(x):.4f}" for x in cells))
    return shown


def attacks(
    params, parts: Split, objective: Objective, radii, log: RunLog | None, done: int
) -> Table:
    """Test RMSE of every run under attack: FGSM in one step, PGD in five."""
    task = stacked([task_of(parts, parts.train.x.shape[1], len(parts.test.y))])
    which = jnp.zeros(len(params["noise"]), jnp.int32)
    shown = Table(title="RMSE, test, under attack")
    for title in ("run", "attack", *(f"{radius:g}" for radius in radii)):
        shown.add_column(title)
    for attack, steps in (("fgsm", 1), ("pgd", 5)):
        mse = attacked_mse(
            params, task, which, jnp.asarray(radii), objective=objective, steps=steps
        )
        for i, row in enumerate(np.sqrt(np.asarray(mse)) * parts.unit):
            shown.add_row(str(i), attack, *(f"{x:.4f}" for x in row))
            if log:
                named = {f"{r:g}": float(x) for r, x in zip(radii, row, strict=True)}
                log.write(done, f"{attack} {i}", float(row[0]), **named)
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv))
