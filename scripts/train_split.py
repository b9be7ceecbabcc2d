"""Train a classifier that is split between a device and a server, on any mesh.

    python scripts/train_split.py --workdir=/tmp/split --data_dir=../shared/data
    python scripts/split_serve.py --workdir=/tmp/split --role=tail --port=7710
    python scripts/split_serve.py --workdir=/tmp/split --role=head --port=7710

Three phases: a teacher on labels; a small encoder and a decoder fitted to what the
teacher sees; the student tuned on labels and the teacher's logits (BottleFit,
arXiv:2201.02693). Fashion-MNIST to 32 bytes a picture in some minutes on two CPU cores.
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
import numpy as np
from absl import flags
from narrows.models import bottlefit
from narrows.models.split_payload import payload_size
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.layout import place_batch, process_rows
from narrows.parallel.state import restore
from narrows.parallel.step import abstract_state, create_state, make_step
from narrows.scripts import command, results, splits
from narrows.scripts.runlog import RunLog
from narrows.scripts.splits import PHASES, RULES, Recipe
from narrows.scripts.stopping import stop_asked
from rich.console import Console


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer = (
        functools.partial(define, flag_values=f)
        for define in (flags.DEFINE_string, flags.DEFINE_integer)
    )
    text("workdir", None, "checkpoints and log (required)")
    text("data_dir", str(results.ROOT.parent / "shared" / "data"), "image sets")
    text("dataset", "fashion_mnist", "or mnist, cifar10_subset")
    integer("channels", 1, "of the bottleneck", 1, 255)
    integer("bits", 8, "a number that is sent", 1, 8)
    integer("images", 60_000, "of the training set, the first ones", 1)
    integer("teacher_steps", 2000, "updates", 1)
    integer("match_steps", 1500, "updates", 1)
    integer("tune_steps", 1500, "updates", 1)
    integer("batch_size", 64, "pictures of the global batch", 1)
    integer("seed", 0, "of parameters and data order", 0)
    integer("stop_at", None, "stop after this many updates in all", 1)
    integer("checkpoint_every", 500, "updates", 1)
    text("mesh", "", "e.g. data=2,fsdp=4; default: all on data")
    flags.DEFINE_bool(
        "frozen_encoder", False, "tune the server's part alone", flag_values=f
    )
    command.define_processes(f)
    return f


def main(argv: Sequence[str], devices: Sequence | None = None) -> int:
    """Train as argv says, on all devices unless some are given; the exit code."""
    return command.run_training(define_flags(), argv, __doc__, train, devices)


def train(f: flags.FlagValues, devices: Sequence, stops: list[int]) -> int:
    chief = jax.process_index() == 0
    console = Console(quiet=not chief, highlight=False)
    with command.bad_input():
        workdir, layout, mesh = command.place_of(f, devices)
        index, count = process_rows(mesh, f.batch_size)
        data = splits.pictures(f.data_dir, f.dataset, "train")
        data = data._replace(
            images=data.images[: f.images], labels=data.labels[: f.images]
        )
        test = splits.pictures(f.data_dir, f.dataset, "test")
        if len(data.labels) < f.batch_size:
            raise ValueError(
                f"batch_size: {f.batch_size}, but there are {len(data.labels)} pictures"
            )
        recipe = Recipe(
            f.dataset,
            data.images.shape[-1],
            channels=f.channels,
            bits=f.bits,
            frozen_encoder=f.frozen_encoder,
        )
        steps = {name: f[f"{name}_steps"].value for name in PHASES}
        same = {  # a resumed run must agree in these
            "recipe": recipe._asdict(),
            "steps": steps,
            "seed": f.seed,
            "batch_size": f.batch_size,
            "images": len(data.labels),
        }
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

    parts: dict[str, Any] = {}
    offset = 0  # updates of the phases before
    log: RunLog | None = None
    teach = None
    for name in PHASES:
        before = parts.get("teacher" if name == "match" else "match")
        phase = splits.phase_of(name, recipe, before)
        tx = splits.optimizer(name, steps[name])
        step = make_step(
            phase.loss, tx, layout, mesh, advance=phase.advance, rules=RULES
        )
        with Checkpoints(workdir / name, keep=2) as checkpoints:
            first = checkpoints.latest or 0
            if checkpoints.latest is None:
                seed = f.seed + PHASES.index(name)
                state = create_state(phase.init, tx, seed, mesh, RULES)
            else:
                target = abstract_state(phase.init, tx, f.seed, mesh, RULES)
                state, _ = restore(checkpoints, target, step=first)
            if log is None and chief and first < steps[name]:
                log = RunLog(workdir, step=offset + first)
            last = min(steps[name], (f.stop_at or math.inf) - offset)
            done = first
            while done < last and not stop_asked(stops, done):
                batch = splits.batch_of(data, done, f.batch_size, f.seed)
                mine = slice(
                    index * f.batch_size // count, (index + 1) * f.batch_size // count
                )
                batch = {key: value[mine] for key, value in batch.items()}
                batch["images"] = np.asarray(splits.scaled(batch["images"]))
                batch = place_batch(batch, mesh)
                state, metrics = step.fused(state, teach(batch) if teach else batch)
                done += 1
                got = {key: float(x) for key, x in jax.device_get(metrics).items()}
                if not math.isfinite(got["loss"] + got["grad_norm"]):
                    good = checkpoints.latest
                    print(
                        f"error: loss {got['loss']} at step {done} of {name}: not "
                        f"finite; last good checkpoint: {good}",
                        file=sys.stderr,
                    )
                    return 1
                if log:
                    log.write(offset + done, name, got.pop("loss"), **got)
                if done % f.checkpoint_every == 0 and done < last:
                    checkpoints.save(done, state, same)
            if done and done != checkpoints.latest:
                checkpoints.save(done, state, same)
            checkpoints.wait()
        if done < steps[name]:
            console.print(f"stopped after {done} updates of {name}")
            break
        parts[name] = jax.device_get(phase.parts(state.params, state.rest))
        if name == "teacher":
            teach = jax.jit(splits.teach(recipe, parts[name]))
        if first < steps[name]:
            bits = f.bits if name != "teacher" else None
            score = accuracy(recipe, parts[name], test, bits)
            console.print(f"{name}: {100 * score:.2f} % of the test pictures")
        offset += steps[name]
    else:
        encoder = jax.eval_shape(
            lambda: bottlefit.call(
                splits.graphs_of(recipe, True)["encoder"],
                parts["tune"].params["encoder"],
                parts["tune"].stats["encoder"],
                splits.scaled(test.images[:1]),
            )[0]
        )
        size = payload_size(*encoder.shape[1:], f.bits)
        console.print(f"{size} bytes a picture; serve it with scripts/split_serve.py")
    if log:
        log.close()
    return 0


def accuracy(recipe: Recipe, parts, test, bits: int | None, rows: int = 500) -> float:
    """Share of test pictures, with what is sent quantised where bits are given."""
    graphs = splits.graphs_of(recipe, "encoder" in parts.params)

    @jax.jit
    def correct(parts, images, labels):
        logits = bottlefit.predict(graphs, parts, splits.scaled(images), bits=bits)
        return (logits.argmax(-1) == labels).sum()

    cuts = range(0, len(test.labels), rows)
    return sum(
        int(correct(parts, test.images[i : i + rows], test.labels[i : i + rows]))
        for i in cuts
    ) / len(test.labels)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
