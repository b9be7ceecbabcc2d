"""Train a convolutional encoder of pictures without labels, on any mesh.

    python scripts/pretrain.py --workdir=/tmp/encoder --sets=mnist,cifar10_subset --grey
    python scripts/pretrain.py --workdir=/tmp/colours --sets=cifar10_subset --half
    python scripts/pretrain.py --workdir=/tmp/colours --sets=cifar10_subset --half \\
        --mesh=data=2,fsdp=4

The loss falls from 5.5 to about 3.4 nats in 300 steps of 128 pictures, about a minute
of one CPU core. A workdir that holds a checkpoint is continued, on the same mesh or
another. `encoder_of(workdir)` gives the encoder. Exit codes: 0, also after SIGTERM or
SIGINT, which save first; 1 for a loss that is not finite; 2 for bad input.
"""

import functools
import math
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from narrows.data.images import NAMES, grey, load_images, padded
from narrows.data.streams import halves, shuffled
from narrows.models.self_supervised import contrastive_parts
from narrows.optim.table import make_optimizer, warmup_cosine
from narrows.parallel.checkpoint import Checkpoints, inspect
from narrows.parallel.layout import Layout, make_mesh, place_batch, process_rows
from narrows.parallel.rules import WHOLE, Rule
from narrows.parallel.state import restore
from narrows.parallel.step import abstract_state, create_state, make_step
from narrows.scripts import command, results
from narrows.scripts.runlog import RunLog
from narrows.scripts.stopping import stop_asked
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

# Channels that a layer makes lie over fsdp; norms are whole.
RULES = (
    Rule("encoder/layers/.*/kernel", (None, None, None, "fsdp")),
    Rule("encoder/layers/.*/bias", ("fsdp",)),
    Rule("(hidden|out)/kernel", ("fsdp", None)),
    Rule("hidden/bias|norm/.*", WHOLE),
)
COLUMNS = (
    *Progress.get_default_columns()[:2],
    TextColumn("{task.completed}/{task.total}"),
    TextColumn("{task.fields[nats]} nats"),
    TimeRemainingColumn(),
)


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer, real, yes, several = (
        functools.partial(define, flag_values=f)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_bool,
            flags.DEFINE_list,
        )
    )
    text("workdir", None, "checkpoints and log (required)")
    text("data_dir", str(results.ROOT.parent / "shared" / "data"), "folder of the sets")
    several("sets", ["mnist"], "whose training pictures: " + ", ".join(NAMES))
    integer("limit", None, "take only so many pictures of each set", 1)
    yes("half", False, "only the first of two halves of each set, drawn by seed 0")
    yes("grey", False, "turn colours into brightness")
    several("channels", ["32", "64", "128"], "of the layers, each of stride 2")
    integer("seed", 0, "of parameters, order and views", 0)
    integer("steps", 300, "updates, and the schedule's length", 1)
    integer("stop_at", None, "stop early, with the schedule of --steps", 1)
    integer("batch_size", 128, "pictures of the global batch", 2)
    real("learning_rate", 2e-3, "peak, of AdamW", 0.0)
    real("weight_decay", 1e-4, "of kernels", 0.0)
    real("temperature", 0.2, "of the loss", 1e-3)
    text("mesh", "", "e.g. data=2,fsdp=4; default: all on data")
    integer("checkpoint_every", 100, "steps", 1)
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
        images = pictures(
            f.data_dir, f.sets, to_grey=f.grey, half=f.half, limit=f.limit
        )
        channels = [int(size) for size in f.channels]
        model = {"inputs": images.shape[-1], "channels": channels}
        same = {  # a resumed run must agree in these, or its curve would differ
            "model": model,
            "sets": f.sets,
            "pictures": len(images),
            "seed": f.seed,
            "steps": f.steps,
            "batch_size": f.batch_size,
            "learning_rate": f.learning_rate,
            "weight_decay": f.weight_decay,
            "temperature": f.temperature,
        }
        meta = same | {
            "half": f.half,
            "mesh": str(layout),
            **results.provenance(),
        }
        parts = contrastive_parts(**model, temperature=f.temperature)
        schedule = warmup_cosine(
            f.learning_rate, steps=f.steps, warmup=max(10, f.steps // 20)
        )
        tx = make_optimizer(
            "adamw", schedule, weight_decay=f.weight_decay, clip=10.0, workers=1
        )
        checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
        first = checkpoints.latest or 0
        last = min(f.stop_at or f.steps, f.steps)
        if checkpoints.latest is None:
            state = create_state(parts.init, tx, f.seed, mesh, RULES)
        else:
            target = abstract_state(parts.init, tx, f.seed, mesh, RULES)
            state, _ = restore(checkpoints, target, step=first, expect=same)
        stream = shuffled(
            images,
            batch_size=f.batch_size,
            seed=f.seed,
            start=first,
            shard=(index, count),
        )
        step = make_step(parts.loss, tx, layout, mesh, rules=RULES)
        log = RunLog(workdir, step=first) if chief else None

    console.print(f"{len(images):,} pictures {images.shape[1:]} on {layout}")
    if first:
        console.print(f"resumed after step {first} of {last}")

    def settle(done: int, metrics: dict[str, jax.Array]) -> None:
        """Fetch and log the metrics of an update; refuse to go on from a broken one."""
        got = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not math.isfinite(got["loss"] + got["grad_norm"]):
            checkpoints.wait()
            said = f"loss {got['loss']} at step {done}: not finite; try a smaller "
            print(f"error: {said}--learning_rate", file=sys.stderr)
            raise SystemExit(1)
        if log:
            log.write(done, "train", got["nats"], grad_norm=got["grad_norm"])
        bar.update(task, completed=done, nats=f"{got['nats']:.3f}")

    pending: tuple[int, dict] | None = None
    done = first
    with (
        checkpoints,
        Progress(*COLUMNS, console=console, disable=not console.is_terminal) as bar,
        jax.transfer_guard("disallow"),
    ):
        task = bar.add_task("pretrain", total=last, completed=first, nats="-")
        while done < last and not stop_asked(stops, done):
            state, metrics = step.fused(state, place_batch(next(stream), mesh))
            done += 1
            if pending:
                settle(*pending)
            pending = (done, metrics)
            if done % f.checkpoint_every == 0 or done == last:
                settle(*pending)
                pending = None
                checkpoints.save(done, state, meta)
        if pending:
            settle(*pending)
            checkpoints.save(done, state, meta)
    if log:
        log.close()
    console.print(f"checkpoint {workdir / 'checkpoints' / str(done)}", soft_wrap=True)
    return 0


def pictures(
    folder: str | pathlib.Path,
    sets: Sequence[str],
    *,
    to_grey: bool = False,
    half: bool = False,
    limit: int | None = None,
) -> np.ndarray:
    """Training pictures of some sets, uint8 [n, 32, 32, channels]."""
    found = []
    for name in sets:
        images, labels = load_images(folder, name, "train")
        if half:
            images = images[halves(labels, seed=0)[0]]
        images = padded(images[:limit])
        found.append(grey(images) if to_grey else images)
    if len({images.shape[-1] for images in found}) != 1:
        raise ValueError(f"sets: {sets} are grey and in colours; give --grey")
    return np.concatenate(found)


def encoder_of(
    workdir: str | pathlib.Path, *, step: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """The features of a trained encoder: uint8 [n, h, w, c] -> float32 [n, t, s, d].

    Raises: ValueError where the workdir holds no such checkpoint.
    """
    folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"workdir: {workdir} holds no checkpoints; train there first")
    found = inspect(folder, step)
    parts = contrastive_parts(**found.meta["model"])
    mesh = make_mesh(Layout(), jax.devices()[:1])
    tx = make_optimizer("adamw", lambda count: 0.0 * count, workers=1)
    with Checkpoints(folder) as checkpoints:
        target = abstract_state(parts.init, tx, 0, mesh, RULES)
        state, _ = restore(checkpoints, target, step=found.step)

    @jax.jit
    def encode(params, rest, x):
        model = nnx.merge(parts.graph, params, rest)
        return model.features(x.astype(jnp.float32) / 255)

    def features(images: np.ndarray) -> np.ndarray:
        pieces = np.array_split(images, max(1, len(images) // 500))
        return np.concatenate(
            [np.asarray(encode(state.params, state.rest, piece)) for piece in pieces]
        )

    return features


if __name__ == "__main__":
    sys.exit(main(sys.argv))
