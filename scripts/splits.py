"""What the commands of split computing share: pictures, phases, a trained split.

A run has three phases, each with a checkpoint folder of its own in the workdir:
`teacher` trains a classifier on labels, `match` fits encoder and decoder to it, `tune`
trains the student on labels and the teacher's logits.
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from narrows.data.images import Images, load_images
from narrows.models import bottlefit
from narrows.models.bottlefit import Parts, Phase
from narrows.models.image_classifier import WIDTHS
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.rules import Rule
from narrows.parallel.state import restore
from narrows.parallel.step import abstract_state

PHASES = ("teacher", "match", "tune")
SIDE = 32  # of pictures as the networks see them; smaller ones get a margin of zeros

_PART = r"(frozen/)?(front|tail|encoder|decoder)/(params/)?"
RULES = (
    Rule(_PART + "(?!squeeze).*conv/kernel", (None, None, None, "fsdp")),
    Rule(_PART + "last/kernel", (None, None, None, "fsdp")),
    Rule(_PART + "squeeze/kernel", None),  # a few channels: all that is sent
    Rule(_PART + "head/kernel", ("fsdp", None)),
    Rule(_PART + "head/bias", None),
    Rule(_PART + ".*norm/(scale|bias)", None),
    Rule(r"(stats|frozen)/.*norm/(mean|var)", None),
)


class Recipe(NamedTuple):
    """What makes a split model; kept in the run's record."""

    dataset: str = "fashion_mnist"
    inputs: int = 1
    classes: int = 10
    channels: int = 1  # of the bottleneck
    bits: int = 8
    frozen_encoder: bool = False  # while tuning


class Split(NamedTuple):
    recipe: Recipe
    graphs: dict[str, Any]
    parts: Parts


def pictures(data_dir: str | pathlib.Path, dataset: str, split: str) -> Images:
    """A set with its pictures brought to SIDE pixels by zeros around."""
    found = load_images(data_dir, dataset, split)
    margins = [((SIDE - n) // 2, SIDE - n - (SIDE - n) // 2) for n in (28, 28)]
    if found.images.shape[1:3] == (SIDE, SIDE):
        return found
    return found._replace(images=np.pad(found.images, ((0, 0), *margins, (0, 0))))


def scaled(images) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1


def batch_of(train: Images, step: int, size: int, seed: int) -> dict[str, np.ndarray]:
    """Batch number `step`: every epoch has an order of its own."""
    per_epoch = len(train.labels) // size
    epoch, index = divmod(step, per_epoch)
    rows = order(len(train.labels), seed, epoch)[index * size : (index + 1) * size]
    return {"images": train.images[rows], "labels": train.labels[rows]}


@functools.lru_cache(maxsize=2)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def graphs_of(recipe: Recipe, student: bool) -> dict[str, Any]:
    return bottlefit.split(
        nnx.eval_shape(lambda: _modules(recipe, student, nnx.Rngs(0)))
    )[0]


def draw(recipe: Recipe, student: bool, key: jax.Array) -> Parts:
    return bottlefit.split(_modules(recipe, student, nnx.Rngs(key)))[1]


def _modules(recipe: Recipe, student: bool, rngs: nnx.Rngs):
    sizes = (recipe.inputs, recipe.channels, recipe.classes)
    if student:
        return bottlefit.student_modules(*sizes, width=WIDTHS[2], rngs=rngs)
    return bottlefit.teacher_modules(sizes[0], sizes[2], rngs=rngs)


def phase_of(name: str, recipe: Recipe, before: Parts | None = None) -> Phase:
    """A phase of PHASES, started from the parts that the phase before it left.

    `match` takes the teacher's tail and draws the rest; without parts, which is enough
    to know shapes, all are drawn.
    """
    graphs = graphs_of(recipe, name != "teacher")

    def start(key) -> Parts:
        drawn = draw(recipe, name != "teacher", key)
        if before is None:
            return drawn
        if name == "tune":
            return before
        return Parts(
            drawn.params | {"tail": before.params["tail"]},
            drawn.stats | {"tail": before.stats["tail"]},
        )

    objective, learn = {
        "teacher": (bottlefit.classify, ("front", "tail")),
        "match": (bottlefit.match(), ("encoder", "decoder")),
        "tune": (
            bottlefit.tune(),
            ("decoder", "tail") if recipe.frozen_encoder else tuple(graphs),
        ),
    }[name]
    return bottlefit.phase(graphs, start, objective, learn=learn)


def optimizer(name: str, steps: int, rate: float | None = None):
    """Adam, or SGD with momentum for `tune`; a tenth of the rate in the second half."""
    rates = {"teacher": 2e-3, "match": 2e-3, "tune": 1e-2}
    schedule = optax.piecewise_constant_schedule(rate or rates[name], {steps // 2: 0.1})
    if name != "tune":
        return optax.adam(schedule)
    return optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9)
    )


def teach(recipe: Recipe, teacher: Parts):
    """batch -> batch with all that the teacher sees in its pictures."""
    graphs = graphs_of(recipe, False)

    def add(batch):
        p, s = teacher
        middle = bottlefit.call(
            graphs["front"], p["front"], s["front"], batch["images"]
        )[0]
        seen = bottlefit.call(graphs["tail"], p["tail"], s["tail"], middle)[0]
        return batch | {"middle": middle} | seen._asdict()

    return add


def load_split(workdir: str | pathlib.Path) -> Split:
    """The student of a finished run.

    Raises: ValueError where the workdir holds none.
    """
    folder = pathlib.Path(workdir).expanduser().absolute()
    if not (folder / "run.json").is_file() or not (folder / "tune").is_dir():
        raise ValueError(f"workdir: {workdir} holds no tuned split; train there first")
    record = json.loads((folder / "run.json").read_text())
    recipe = Recipe(**record["recipe"])
    found = phase_of("tune", recipe)
    mesh = make_mesh(Layout(), jax.devices()[:1])
    tx = optimizer("tune", record["steps"]["tune"])
    with Checkpoints(folder / "tune") as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"workdir: {folder / 'tune'} holds no checkpoint yet")
        target = abstract_state(found.init, tx, 0, mesh, RULES)
        state, _ = restore(checkpoints, target, step=checkpoints.latest)
    return Split(recipe, graphs_of(recipe, True), found.parts(state.params, state.rest))
