"""Train a concept model on rows with named concepts; stop and go on anywhere.

    python scripts/train_concepts.py --workdir=/tmp/concepts
    python scripts/train_concepts.py --workdir=/tmp/energy --model=energy_joint
    python scripts/train_concepts.py --workdir=/tmp/wear --task=fashion_mnist \\
        --data_dir=../shared/data --known=0.5 --mesh=fsdp=8

Without flags a joint concept bottleneck learns a rendered world of six concepts: class
accuracy 0.8 within seconds on a laptop. `--known` hides the other labels of concepts,
which then teach nothing. A workdir that holds a checkpoint is continued, on the same
mesh or another. Exit codes: 0, also after SIGTERM or SIGINT, which save first; 1 for a
loss that is not finite; 2 for bad input.
"""

import functools
import json
import math
import signal
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from narrows.models.concepts import contract
from narrows.models.concepts.table import METHODS, make_concept_model
from narrows.optim.table import warmup_cosine
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.layout import place_batch, process_rows
from narrows.parallel.rules import WHOLE, Rule
from narrows.parallel.state import restore
from narrows.parallel.step import (
    Loss,
    Program,
    abstract_state,
    create_state,
    make_step,
)
from narrows.scripts import command, results
from narrows.scripts.concept_tasks import TASKS, Sizes, make_task
from narrows.scripts.runlog import RunLog
from narrows.scripts.stopping import stop_asked
from rich.console import Console

WIDE = "(encoder/inward|inward|sides|point|doubts|by_class|by_concept|by_pattern)"
RULES = (  # layers into hidden units lie over fsdp, all else is small
    Rule(f"{WIDE}/kernel", (None, "fsdp")),
    Rule(f"({WIDE}/bias|encoder/outward/.*|(head|scorer)/.*)", WHOLE),
    Rule("(anchors|class_points|log_scales|.*_embedding|.*_out)", WHOLE),
)


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer, real, enum = (
        functools.partial(define, flag_values=f)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_enum,
        )
    )
    text("workdir", None, "checkpoints and log (required)")
    enum("model", "joint", list(METHODS), "concept model")
    enum("task", "world", list(TASKS), "rows, concepts and classes")
    text("data_dir", None, "folder of the sets that are read from files")
    integer("learn_rows", 4000, "rows to learn from", 1)
    integer("eval_rows", 1024, "rows to test", 1)
    real("known", 1.0, "share of concept labels that are known", 0.0, 1.0)
    integer("hidden", 64, "hidden units", 1)
    integer("seed", 0, "of parameters and rows", 0)
    integer("steps", 1000, "and the schedule's length", 1)
    integer("stop_at", None, "stop early, with the schedule of --steps", 1)
    integer("batch_size", 128, "rows in a step", 1)
    real("learning_rate", 1e-2, "peak", 0.0)
    text("mesh", "", "e.g. data=2,fsdp=4; default: all on data")
    integer("checkpoint_every", 500, "steps", 1)
    integer("keep", 2, "newest checkpoints to keep, beside the best", 1)
    integer("eval_every", 250, "steps", 1)
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
        mine = process_rows(mesh, f.batch_size)  # refuses what does not divide
        process_rows(mesh, f.eval_rows)
        sizes = Sizes(f.learn_rows, 1, f.eval_rows)
        task = make_task(f.task, f.data_dir, sizes, seed=f.seed)
        known = np.random.default_rng(f.seed).random(task.learn.concepts.shape)
        learn = contract.make_labels(
            task.learn.concepts, task.learn.labels, known < f.known
        )
        way = METHODS[f.model]
        width = task.learn.x.shape[1]
        make = functools.partial(
            make_concept_model,
            *(f.model, width, task.names, task.classes),
            hidden=f.hidden,
        )
        graph = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]
        schedule = warmup_cosine(
            f.learning_rate, steps=f.steps, warmup=min(50, f.steps)
        )
        tx = optax.adam(schedule)
        same = {  # a resumed run must agree in these
            name: f[name].value
            for name in (
                *("model", "task", "learn_rows", "known", "hidden"),
                *("seed", "batch_size"),
            )
        }
        meta = same | {
            "flags": f.flag_values_dict(),
            "mesh": str(layout),
            **results.provenance(),
        }
        folder = workdir / "checkpoints"
        checkpoints = Checkpoints(folder, keep=f.keep, best="failures")
        first = checkpoints.latest or 0
        last = min(f.stop_at or f.steps, f.steps)

        def init(key):
            parts = nnx.split(make(rngs=nnx.Rngs(key)), nnx.Param, ...)[1:]
            return tuple(map(nnx.as_pure, parts))

        if checkpoints.latest is None:
            state = create_state(init, tx, f.seed, mesh, RULES)
        else:
            target = abstract_state(init, tx, f.seed, mesh, RULES)
            state, _ = restore(checkpoints, target, step=first, expect=same)
        log = RunLog(workdir, step=first) if chief else None
        if chief:
            (workdir / "run.json").write_text(json.dumps(meta, indent=1) + "\n")

    def loss(params, rest, batch, key) -> Loss:
        """Means over the batch, as sums over its rows."""
        x, labels = batch
        said = way.losses(nnx.merge(graph, params, rest), x, labels, key)
        count = jnp.asarray(len(x), jnp.float32)
        total = sum(way.weights[name] * said[name] for name in way.weights)
        return Loss(total * count, count, {k: v * count for k, v in said.items()})

    def rows(x, labels, chosen):
        """The batch of these rows, of which each process brings its own."""
        part, parts = mine
        chosen = np.array_split(chosen, parts)[part]
        batch = (x[chosen], jax.tree.map(lambda a: np.asarray(a)[chosen], labels))
        return place_batch(batch, mesh)

    def judged(state, batch):
        x, labels = batch
        model = nnx.merge(graph, state.params, state.rest)
        return contract.accuracy(model(x), labels)

    step, judge = make_step(loss, tx, layout, mesh, rules=RULES), Program(judged, mesh)
    x = task.learn.x.astype(np.float32)
    held = contract.make_labels(task.test.concepts, task.test.labels)
    held = rows(task.test.x.astype(np.float32), held, np.arange(f.eval_rows))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    console.print(f"{size:,} parameters on {layout}", markup=False)
    if first:
        console.print(f"resumed after step {first} of {last}")
    done = saved = first
    with checkpoints:
        while done < last and not stop_asked(stops, done):
            draw = np.random.default_rng([f.seed, done])
            chosen = draw.integers(len(x), size=f.batch_size)
            state, metrics = step.fused(state, rows(x, learn, chosen))
            done += 1
            got = {name: float(v) for name, v in jax.device_get(metrics).items()}
            nats = got.pop("loss")
            if not math.isfinite(nats + got["grad_norm"]):
                good = checkpoints.latest
                print(
                    f"error: loss {nats} at step {done}: not finite; last good "
                    f"checkpoint: {good and folder / str(good)}; try a smaller "
                    "--learning_rate",
                    file=sys.stderr,
                )
                return 1
            if log:
                log.write(done, "train", nats, **got)
            found = None
            if done % f.eval_every == 0 or done == last:
                said = {k: float(v) for k, v in judge(state, held).items()}
                found = {"failures": 1 - said["classes"]}
                console.print(
                    f"step {done}: right are {100 * said['classes']:.1f} % of classes, "
                    f"{100 * said['concepts']:.1f} % of concepts"
                )
                if log:
                    log.write(done, "validation", found["failures"], **said)
            if found or done % f.checkpoint_every == 0:
                checkpoints.save(done, state, meta, metrics=found)
                saved = done
        if saved < done:
            checkpoints.save(done, state, meta)
    if log:
        log.close()
    if stops:
        console.print(f"stopped at step {done} by {signal.Signals(stops[0]).name}")
    console.print(f"checkpoint {folder / str(done)}", soft_wrap=True)
    console.print(f"log        {workdir / 'metrics.jsonl'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
