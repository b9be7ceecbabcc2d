"""Layers and labels of trained models that are no language models.

What `information.py` puts on the plane, read from the workdirs of `train_concepts.py`,
`train_regression.py` and `train_split.py`: each has a run.json that says what it is.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from narrows.data.tables import named_table, split
from narrows.ib.information_plane import layer_outputs
from narrows.models import bottlefit
from narrows.models.concepts.table import make_concept_model
from narrows.parallel.checkpoint import Checkpoints, inspect
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.rules import WHOLE, Rule
from narrows.parallel.state import restore
from narrows.parallel.step import abstract_state
from narrows.scripts import regression, splits
from narrows.scripts.bottleneck_study import Network, sample
from narrows.scripts.concept_tasks import Sizes, make_task

SWEPT = ("betas", "learning_rates")  # flags of a regression with several values
KINDS = {"recipe": "split", "objective": "regression", "known": "concepts"}


class Layer(NamedTuple):
    name: str
    h: Float[Array, "n d"]  # float32; of a text at the last position of each window
    codes: Array | None = None  # a discrete waist's, one row an input


class Seen(NamedTuple):
    """The layers of a model on some inputs, and a class of each input."""

    layers: list[Layer]
    labels: Int[np.ndarray, " n"]
    step: int


def kind_of(workdir: str | pathlib.Path) -> str:
    """concepts, regression, split or, for all others, text."""
    path = pathlib.Path(workdir).expanduser() / "run.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    return next((kind for key, kind in KINDS.items() if key in record), "text")


def seen_by(
    workdir: str | pathlib.Path,
    *,
    data: str | pathlib.Path | None,
    step: int | None,
    part: str,
    rows: int,
    classes: int,
) -> Seen:
    """What a run of a kind other than text makes of `rows` of its rows.

    part: train, validation or test; only regressions keep rows to validate apart, for
    others these are the test rows. classes: parts of equally many labels into which
    the labels of a regression are cut. data: the folder of the sets.
    Raises: ValueError for text, or a workdir without such a checkpoint.
    """
    readers = {"concepts": _concepts, "regression": _regression, "split": _split}
    kind = kind_of(workdir)
    if kind not in readers:
        raise ValueError(f"workdir: {workdir} is no run of {', '.join(readers)}")
    folder = pathlib.Path(workdir).expanduser().absolute()
    record = json.loads((folder / "run.json").read_text())
    found = readers[kind](folder, record, data, step, part, rows, classes)
    layers = [
        layer._replace(h=layer.h.reshape(len(layer.h), -1).astype(jnp.float32))
        for layer in found.layers
    ]
    return found._replace(layers=layers)


def _restored(folder: pathlib.Path, init, tx, step: int | None):
    """The state of a checkpoint on one device, and its step."""
    if not folder.is_dir():
        raise ValueError(f"workdir: {folder.parent} holds no checkpoints")
    step = inspect(folder, step).step
    mesh = make_mesh(Layout(), jax.devices()[:1])
    with Checkpoints(folder) as checkpoints:
        target = abstract_state(init, tx, 0, mesh, (Rule(".*", WHOLE),))
        return restore(checkpoints, target, step=step)[0], step


def _concepts(folder, record, data, step, part, rows, classes) -> Seen:
    """Submodules by their path; the concepts as the model believes them: the waist."""
    del classes
    given = record["flags"]
    data = given["data_dir"] if data is None else data
    sizes = Sizes(record["learn_rows"], 1, given["eval_rows"])
    task = make_task(record["task"], data, sizes, seed=record["seed"])
    chosen = task.learn if part == "train" else task.test

    def make(key):
        shape = chosen.x.shape[1], task.names, task.classes
        return make_concept_model(
            record["model"], *shape, hidden=record["hidden"], rngs=nnx.Rngs(key)
        )

    def init(key):
        return tuple(map(nnx.as_pure, nnx.split(make(key), nnx.Param, ...)[1:]))

    tx = optax.adam(lambda count: 0.0 * count)
    state, step = _restored(folder / "checkpoints", init, tx, step)
    graph = nnx.split(nnx.eval_shape(lambda: make(0)))[0]
    model = nnx.merge(graph, state.params, state.rest)
    x = jnp.asarray(chosen.x[:rows], jnp.float32)
    module: Any = model
    layers = [Layer(name, h) for name, h in layer_outputs(module, x).items() if name]
    layers.append(Layer("waist", model(x).concepts))
    return Seen(layers, np.asarray(chosen.labels[:rows], np.int32), step)


def _regression(folder, record, data, step, part, rows, classes) -> Seen:
    """The run that validated best: hidden layers, the draw of its code, its answer."""
    betas, rates = ([float(v) for v in record[name]] for name in SWEPT)
    runs = regression.grid(betas, rates, record["seeds"], record["seed"])
    objective = regression.objective_of(record["objective"], record["option"])
    table = named_table(data or "", record["table"], seed=record["seed"])
    parts = split(table, seed=record["seed"], rows=record["rows"])
    network = Network(record["width"], record["code"])
    begin = regression.start(runs, parts.train.x.shape[1], network, objective)
    tx = regression.optimizer(runs)
    state, step = _restored(folder / "checkpoints", begin, tx, step)
    validated = np.asarray(state.rest["best_mse"])
    best = int(validated.argmin())
    if not np.isfinite(validated[best]):
        raise ValueError(f"workdir: {folder} has not trained for a whole epoch yet")
    params: Any = jax.tree.map(lambda a: a[best], state.rest["best"])
    given = {"train": parts.train, "validation": parts.valid, "test": parts.test}[part]
    x, y = jnp.asarray(given.x[:rows]), jnp.asarray(given.y[:rows])
    code = sample(params, x, y, jax.random.key(0), objective).code
    layers = [
        *_hidden("encoder", params["encoder"], x),
        Layer("waist", code),
        *_hidden("decoder", params["decoder"], code),
    ]
    cuts = np.quantile(np.asarray(y[:, 0]), np.arange(1, classes) / classes)
    return Seen(layers, np.searchsorted(cuts, np.asarray(y[:, 0])), step)


def _hidden(name: str, layers: dict[str, Any], x) -> list[Layer]:
    """Each hidden layer of `bottleneck_study`'s networks."""
    found = []
    for number in range(len(layers) - 1):
        w, b = layers[str(number)]
        x = jax.nn.relu(x @ w + b)
        found.append(Layer(f"{name} {number + 1}", x))
    return found


def _split(folder, record, data, step, part, rows, classes) -> Seen:
    """The student's parts; what the device sends is the waist, before quantising."""
    del record, classes
    if step is not None:
        raise ValueError("step: a split is read where it ended; leave --step out")
    if data is None:
        raise ValueError("data: none, but pictures are read from files: name a folder")
    trained = splits.load_split(folder)
    images = splits.pictures(
        data, trained.recipe.dataset, "train" if part == "train" else "test"
    )
    x, layers = splits.scaled(images.images[:rows]), []
    for name, graph in trained.graphs.items():
        own = trained.parts.params[name], trained.parts.stats[name]
        x = bottlefit.call(graph, *own, x)[0]
        if name == "tail":
            layers += [Layer(f"tail {key}", h) for key, h in x._asdict().items()]
        else:
            layers.append(Layer("waist" if name == "encoder" else name, x))
    with Checkpoints(folder / "tune") as checkpoints:
        ended = checkpoints.latest or 0
    return Seen(layers, np.asarray(images.labels[:rows], np.int32), ended)
