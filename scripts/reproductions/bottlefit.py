"""A bottleneck of one channel in a classifier of pictures, and the bytes it sends.

Paper: BottleFit, arXiv:2201.02693, WoWMoM 2022 (ResNet-152 and others on ImageNet).
Claim: a small encoder, fitted to a trained classifier in two stages, sends a fraction
of a compressed picture's bytes at hardly any loss of accuracy, and more accurately than
one that is trained in one stage or end to end.

    python scripts/reproduce.py --system=bottlefit --seeds=3

Fashion-MNIST with a margin to 32 x 32; a residual network of 97,000 weights, 5 x 5
numbers of 8 bits sent. Bytes are those of whole payloads, header included, against the
smaller of zlib's pixels (28 x 28) and JPEG without tables and application data, at the
lowest quality at which the teacher loses at most 0.6 points. One teacher a scale; seeds
draw students and their batches. All arms share the rates of `scripts/splits.py`; none
was tuned for one of them. JPEG asks for Pillow, which the test extra brings.
Hardware and time: two CPU cores; quick about two minutes a seed, more at full scale.
"""

import functools
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from narrows.models import bottlefit
from narrows.models.bottlefit import Parts
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.step import create_state, make_step
from narrows.scripts import claims, split_serve, splits
from narrows.scripts.claims import (
    DATA_DIR,
    Claim,
    Law,
    NotMeasured,
    Ordering,
    Ratio,
    Row,
    System,
)
from narrows.scripts.results import ROOT, Recorded
from narrows.scripts.split_costs import costs, jpegs
from narrows.scripts.splits import RULES, Recipe
from narrows.scripts.train_split import accuracy

SYSTEM = System(
    slug="bottlefit",
    title="BottleFit: Learning Compressed Representations in Deep Neural Networks for "
    "Effective and Efficient Split Computing",
    paper="arXiv:2201.02693, WoWMoM 2022",
    room="models/",
    module="narrows.models.bottlefit",
    summary="a classifier split at a bottleneck, fitted to its teacher in two stages",
)
BATCH, LOSS, TESTED = 32, 0.6, 5000  # rows; points; pictures that JPEG is tried on
QUALITIES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95)
WIRED = 200  # pictures through the socket


class Sizes(NamedTuple):
    images: int
    teacher: int  # updates
    stage: int  # of each of two stages; an arm of one stage takes both


SCALES = {
    "quick": Sizes(20_000, 1500, 500),
    "full": Sizes(60_000, 3000, 1500),
    "paper": Sizes(60_000, 10_000, 9000),
}
MATCH, KD, CE = bottlefit.match(), bottlefit.tune(), bottlefit.classify
ALL = ("encoder", "decoder", "tail")
NEW = ("encoder", "decoder")
# Stages of each arm: objective, parts that learn, optimizer and rate. "tune" is SGD
# with momentum, "match" Adam; both fall to a tenth for their second half.
FIRST = (MATCH, NEW, "match", 2e-3)
ARMS: dict[str, tuple[tuple[Callable, tuple[str, ...], str, float], ...]] = {
    "method": (FIRST, (KD, ALL, "tune", 1e-2)),
    "GHND + CE": (FIRST, (CE, ALL, "tune", 1e-2)),
    "encoder frozen": (FIRST, (KD, ("decoder", "tail"), "tune", 1e-2)),
    "HND": ((bottlefit.match(("middle",)), NEW, "match", 2e-3),),
    "KD": ((KD, ALL, "match", 2e-3),),
    "CE": ((CE, ALL, "match", 2e-3),),
}


def data_dir() -> pathlib.Path:
    folder = DATA_DIR.get()
    if folder is None or not (folder / "fashion_mnist").is_dir():
        raise NotMeasured("fashion_mnist/ is not in --data_dir")
    return folder


@functools.lru_cache(maxsize=1)
def pictures(folder: pathlib.Path):
    return [
        splits.pictures(folder, "fashion_mnist", split) for split in ("train", "test")
    ]


def fit(phase, batch: Callable[[int], Any], tx, steps: int, seed: int) -> Parts:
    """The parts that `steps` updates leave."""
    layout = Layout()
    mesh = make_mesh(layout, jax.devices()[:1])
    state = create_state(phase.init, tx, seed, mesh, RULES)
    step = make_step(phase.loss, tx, layout, mesh, advance=phase.advance, rules=RULES)
    for i in range(steps):
        state, _ = step.fused(state, batch(i))
    return jax.device_get(phase.parts(state.params, state.rest))


@functools.lru_cache(maxsize=1)
def teacher(folder: pathlib.Path, scale: str) -> tuple[Parts, dict[str, np.ndarray]]:
    """Its parts, and the training pictures with all that it sees in them."""
    sizes = SCALES[scale]
    train = pictures(folder)[0]
    known = {
        "images": np.asarray(splits.scaled(train.images[: sizes.images])),
        "labels": train.labels[: sizes.images],
    }
    tx = splits.optimizer("teacher", sizes.teacher)
    phase = splits.phase_of("teacher", Recipe())
    parts = fit(phase, lambda i: rows_of(known, i, 0), tx, sizes.teacher, 0)
    see = jax.jit(splits.teach(Recipe(), parts))
    seen = [
        jax.device_get(see({k: v[i : i + 500] for k, v in known.items()}))
        for i in range(0, sizes.images, 500)
    ]
    return parts, {k: np.concatenate([s[k] for s in seen]) for k in seen[0]}


def rows_of(known: dict[str, np.ndarray], step: int, seed: int):
    count = len(known["labels"])
    epoch, index = divmod(step, count // BATCH)
    rows = splits.order(count, seed, epoch)[index * BATCH : (index + 1) * BATCH]
    return {name: value[rows] for name, value in known.items()}


def start_of(recipe: Recipe, parts: Parts, seed: int) -> Parts:
    """A drawn encoder and decoder before the teacher's tail."""
    drawn = jax.device_get(splits.draw(recipe, True, jax.random.key(seed)))
    return Parts(
        drawn.params | {"tail": parts.params["tail"]},
        drawn.stats | {"tail": parts.stats["tail"]},
    )


def train(stages, recipe: Recipe, parts: Parts, known, steps: int, seed: int) -> Parts:
    graphs = splits.graphs_of(recipe, True)
    for objective, learn, name, rate in stages:
        before = parts
        phase = bottlefit.phase(graphs, lambda key, p=before: p, objective, learn=learn)
        order = seed * 7 + (name == "tune")  # of batches
        parts = fit(
            phase,
            lambda i, order=order: rows_of(known, i, order),
            splits.optimizer(name, steps, rate),
            steps,
            seed,
        )
    return parts


@functools.lru_cache(maxsize=8)
def matched(folder: pathlib.Path, scale: str, seed: int, channels: int) -> Parts:
    """After the first stage, which some arms share."""
    taught, known = teacher(folder, scale)
    recipe = Recipe(channels=channels)
    begun = start_of(recipe, taught, seed)
    return train((FIRST,), recipe, begun, known, SCALES[scale].stage, seed)


@functools.lru_cache(maxsize=64)
def student(folder: pathlib.Path, scale: str, seed: int, arm: str, channels: int):
    taught, known = teacher(folder, scale)
    recipe, stage, stages = Recipe(channels=channels), SCALES[scale].stage, ARMS[arm]
    if stages[0] == FIRST:
        begun, steps = matched(folder, scale, seed, channels), stage
        return train(stages[1:], recipe, begun, known, steps, seed)
    begun, steps = start_of(recipe, taught, seed), 2 * stage
    return train(stages, recipe, begun, known, steps, seed)


def points(recipe: Recipe, parts: Parts, test, bits: int | None = None) -> float:
    return 100 * accuracy(recipe, parts, test, bits)


def accuracies(scale: str, seed: int) -> Iterator[Row]:
    """Points of accuracy of every arm, of three channels, of fewer bits."""
    folder = data_dir()
    test = pictures(folder)[1]
    taught = teacher(folder, scale)[0]
    whole = points(Recipe(), taught, test)
    yield Row("accuracy", whole, "teacher")
    yield Row("accuracy", whole - LOSS, "teacher - 0.6")
    for arm in ARMS:
        parts = student(folder, scale, seed, arm, 1)
        yield Row("accuracy", points(Recipe(), parts, test, 8), arm)
        if arm == "method":
            plain = points(Recipe(), parts, test)
            for bits in (8, 4, 2):
                change = plain - points(Recipe(), parts, test, bits)
                yield Row(f"points lost to {bits} bits", change)
            yield Row("points lost to bits", plain - points(Recipe(), parts, test, 8))
    if scale != "quick":
        three = student(folder, scale, seed, "method", 3)
        points_of_three = points(Recipe(channels=3), three, test, 8)
        yield Row("accuracy", points_of_three, "three channels")
    first = matched(folder, scale, seed, 1)
    fixed = student(folder, scale, seed, "encoder frozen", 1)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()),
        (first.params["encoder"], first.stats["encoder"]),
        (fixed.params["encoder"], fixed.stats["encoder"]),
    )
    yield Row("change of a frozen encoder", max(jax.tree.leaves(moved)))


def wire(scale: str, seed: int) -> Iterator[Row]:
    """Bytes through a socket to a tail in another process, beside zlib and JPEG."""
    folder = data_dir()
    test = pictures(folder)[1]
    taught, _ = teacher(folder, scale)
    parts = student(folder, scale, seed, "method", 1)
    recipe = Recipe()
    split = splits.Split(recipe, splits.graphs_of(recipe, True), parts)
    sent = other_process(split, test.images[:WIRED])
    here = here_too(split, test.images[:WIRED])
    yield Row("answers that differ", float((sent.classes != here).sum()))
    ours = sent.bytes_up / WIRED
    yield Row("bytes a picture", ours)

    inner = test.images[:TESTED, 2:-2, 2:-2, 0]
    packed = np.mean([len(zlib.compress(x.tobytes(), 9)) for x in inner])
    yield Row("bytes a picture", packed, "zlib")
    smaller = packed
    whole = points(recipe, taught, head_of(test, test.images))
    for quality, size, decoded in tried(inner):
        images = np.pad(decoded, ((0, 0), (2, 2), (2, 2)))[..., None]
        lost = whole - points(recipe, taught, head_of(test, images))
        yield Row(f"bytes at quality {quality}", size, "JPEG")
        yield Row(f"points lost at quality {quality}", lost, "JPEG")
        if lost <= LOSS:
            smaller = min(smaller, size)
            yield Row("bytes a picture", size, "JPEG")
            break
    yield Row("bytes a picture", smaller, "smaller of both")
    for metric, arm, value in costs(split, taught, ours, smaller):
        yield Row(metric, value, arm)


def head_of(test, images):
    return test._replace(images=images[:TESTED], labels=test.labels[:TESTED])


def tried(pictures: np.ndarray):
    try:
        yield from jpegs(pictures, QUALITIES)
    except ImportError as error:
        raise NotMeasured("Pillow is not installed: pip install pillow") from error


def other_process(split: splits.Split, images: np.ndarray) -> split_serve.Sent:
    """Send pictures to `scripts/split_serve.py --role=tail`, started for them."""
    with tempfile.TemporaryDirectory() as place:
        workdir = pathlib.Path(place)
        save(split, workdir)
        script = ROOT / "scripts" / "split_serve.py"
        flags = ("--role=tail", f"--workdir={workdir}", "--connections=1")
        process = subprocess.Popen(
            [sys.executable, str(script), *flags], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout
            said = process.stdout.readline()
            if not said.startswith("listening"):
                raise RuntimeError(f"the tail did not start: it said {said!r}")
            address = (split_serve.HOST, int(said.rsplit(":", 1)[1]))
            with socket.create_connection(address, timeout=60) as line:
                sent = split_serve.send(split, line, images)
    return sent


def save(split: splits.Split, workdir: pathlib.Path) -> None:
    """A workdir as `scripts/train_split.py` leaves it."""
    phase = splits.phase_of("tune", split.recipe, split.parts)
    mesh = make_mesh(Layout(), jax.devices()[:1])
    state = create_state(phase.init, splits.optimizer("tune", 1), 0, mesh, RULES)
    with Checkpoints(workdir / "tune") as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
    record = {"recipe": split.recipe._asdict(), "steps": {"tune": 1}}
    (workdir / "run.json").write_text(json.dumps(record))


def here_too(split: splits.Split, images: np.ndarray) -> np.ndarray:
    """Classes by the whole student, quantised, in this process."""
    logits = bottlefit.predict(
        split.graphs, split.parts, splits.scaled(images), bits=split.recipe.bits
    )
    return np.asarray(logits.argmax(-1))


FULL = ("full", "paper")


def _order(name: str, better: str, worse: str, text: str, scales=claims.SCALES):
    criterion = Ordering("accuracy", better, worse, lower_is_better=False)
    paper = "the paper's ordering"
    return Claim(name, text, paper, criterion, accuracies, scales=scales)


CLAIMS = (
    Claim(
        "bytes",
        "at most 23 % of the smaller of zlib and JPEG, header counted",
        "77.1 % less than JPEG",
        Ratio("bytes a picture", "method", "smaller of both", at_most=0.23),
        wire,
    ),
    Claim(
        "socket",
        "a tail in another process answers as the whole student does, every picture",
        "not stated",
        Law("answers that differ", 0.0),
        wire,
    ),
    Claim(
        "accuracy",
        "at most 0.6 points below the teacher, sending 25 numbers of 8 bits",
        "at most 0.6 points lost",
        Ordering("accuracy", "method", "teacher - 0.6", lower_is_better=False),
        accuracies,
    ),
    _order("two_losses", "method", "GHND + CE", "KD in the second stage beats labels"),
    _order("two_stages", "GHND + CE", "HND", "two stages beat a match of one layer"),
    _order("match_first", "method", "KD", "matching first beats KD alone"),
    _order("hnd_over_kd", "HND", "KD", "a match of one layer beats KD alone"),
    _order("kd_over_ce", "KD", "CE", "KD alone beats labels alone"),
    _order("naive", "method", "CE", "matching first beats labels alone"),
    _order("channels", "three channels", "method", "three channels beat one", FULL),
    Claim(
        "eight_bits",
        "8 bits change accuracy by at most 0.3 points",
        "no visible loss",
        Law("points lost to bits", 0.3),
        accuracies,
    ),
    Claim(
        "frozen_codes",
        "tuning with a frozen encoder leaves what is sent as it was, bit for bit",
        "one head for several tails",
        Law("change of a frozen encoder", 0.0),
        accuracies,
    ),
)


def bytes_figure(rows: Sequence[Recorded]) -> Figure:
    """Accuracy lost against bytes a picture: the split and JPEG by quality."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()

    def mean(metric, arm):
        found = [r.value for r in rows if r.metric == metric and r.arm == arm]
        return float(np.mean(found)) if found else np.nan

    tried = [
        (
            mean(f"bytes at quality {q}", "JPEG"),
            mean(f"points lost at quality {q}", "JPEG"),
        )
        for q in QUALITIES
    ]
    axes.plot(*zip(*tried, strict=True), "o-", label="JPEG without tables, teacher")
    lost = mean("accuracy", "teacher") - mean("accuracy", "method")
    axes.plot(mean("bytes a picture", "method"), lost, "s", label="split, 8 bits")
    axes.axvline(mean("bytes a picture", "zlib"), color="grey", lw=0.8, label="zlib")
    axes.axhline(LOSS, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="bytes a picture", ylabel="points of accuracy lost")
    axes.legend()
    return figure


FIGURES = {"bottlefit": bytes_figure}
