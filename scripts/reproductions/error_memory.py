"""A memory of recent errors corrects a frozen click model when labels drift.

Paper: ReLoop2, arXiv:2306.08808, KDD 2023. Its gains are on data sets that are not
here; its sketch of buckets is described without its contents, so sums of errors and
counts are our reading of it.
Claim: errors of the model on similar recent samples, added to its predictions, raise
the AUC after a drift, more than labels of such samples do; a sketch of constant size
keeps most of the gain.

    python scripts/reproduce.py --system=error_memory

Streams are made of the hourly air of Beijing (41,757 rows; is PM2.5 above its median?)
and of hourly bicycle hires. The base sees the first 40 % and is frozen;
the rest comes in batches of 50, whose labels are known when the next one is served. A
slice is 1000 events, the drift begins after five. Options were chosen on seed 100 after
a first look at seed 0: of the memories from some twenty combinations each, of the
incremental training from four. The memory of labels has the options of the exact one.
Hardware and time: two CPU cores; quick about 3 minutes.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from narrows.data.drift import BUCKETS, events, load_table
from narrows.models.error_memory import (
    Memory,
    compensate,
    exact,
    replay,
    size_in_bytes,
    sketch,
    strengths,
)
from narrows.scripts.claims import (
    DATA_DIR,
    Claim,
    NotMeasured,
    Ordering,
    Ratio,
    Row,
    System,
)
from narrows.scripts.results import Recorded
from sklearn.metrics import roc_auc_score

SYSTEM = System(
    slug="error_memory",
    title="ReLoop2: Building Self-Adaptive Recommendation Models via Responsive "
    "Error Compensation Loop",
    paper="arXiv:2306.08808, KDD 2023",
    room="models/",
    module="narrows.models.error_memory",
    summary="recent errors of a frozen model, found by similarity, correct it",
)
EMBEDDING, HIDDEN, WIDTH = 8, 64, 32
TRAIN, BATCH, SLICE, BEFORE = 0.4, 50, 20, 5  # share; events; batches; slices
EPOCHS, ROWS = 12, 256
GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)  # strengths
STRENGTH_DECAY = 0.95
RATE = 0.1  # of incremental training, from 0.01, 0.03, 0.1, 0.3
KNN = {"capacity": 8192, "neighbours": 60, "temperature": 4.0, "shrink": 10.0}
SKETCH = {"tables": 16, "bits": 7, "decay": 0.985, "shrink": 0.5}


class Served(NamedTuple):
    """What the base made of a stream after its training, in batches [t, b, ...]."""

    keys: jax.Array
    prediction: jax.Array
    label: jax.Array
    rows: tuple[jax.Array, jax.Array]
    params: dict[str, jax.Array]


def start(key: jax.Array, numbers: int, categories: int) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 4)
    sizes = (numbers + categories * EMBEDDING, HIDDEN, WIDTH, 1)
    params = {"embedding": 0.1 * _normal(keys[0], (categories, BUCKETS, EMBEDDING))}
    for i in range(3):
        params[f"kernel{i}"] = _normal(keys[i + 1], sizes[i : i + 2]) * (
            (2 / sizes[i]) ** 0.5
        )
        params[f"bias{i}"] = jnp.zeros(sizes[i + 1])
    return params


_normal = jax.random.normal


def hidden(params, numbers, categories):
    """The last hidden layer [b, WIDTH] of the base."""
    columns = jnp.arange(categories.shape[-1])
    embedded = params["embedding"][columns, categories].reshape(len(categories), -1)
    x = jnp.concatenate([numbers, embedded], -1)
    for i in range(2):
        x = jax.nn.relu(x @ params[f"kernel{i}"] + params[f"bias{i}"])
    return x


def logit(params, numbers, categories):
    h = hidden(params, numbers, categories)
    return (h @ params["kernel2"] + params["bias2"])[:, 0]


def nats(params, numbers, categories, label):
    z = logit(params, numbers, categories)
    return optax.sigmoid_binary_cross_entropy(z, label).mean()


@jax.jit
def fit(key, numbers, categories, label):
    """The base, trained on rows in random order."""
    first, order = jax.random.split(key)
    params = start(first, numbers.shape[1], categories.shape[1])
    tx = optax.adamw(2e-3, weight_decay=1e-2)
    whole = len(label) // ROWS * ROWS
    rows = jax.vmap(lambda k: jax.random.permutation(k, len(label))[:whole])(
        jax.random.split(order, EPOCHS)
    ).reshape(-1, ROWS)

    def step(carry, at):
        params, state = carry
        slope = jax.grad(nats)(params, numbers[at], categories[at], label[at])
        updates, state = tx.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), rows)[0][0]


@functools.partial(jax.jit, static_argnames="rate")
def incremental(params, rows, label, rate: float):
    """Predictions of a model that takes a gradient step on each batch once known."""

    def step(params, batch):
        p = jax.nn.sigmoid(logit(params, *batch[:2]))
        slope = jax.grad(nats)(params, *batch)
        return jax.tree.map(lambda w, g: w - rate * g, params, slope), p

    return jax.lax.scan(step, params, (*rows, label))[1]


def serve(table: str, drifts: Sequence[str], seed: int) -> dict[str, Served]:
    """The stream of each drift behind one base; before the change all are equal."""
    folder = DATA_DIR.get()
    if folder is None or not (folder / table).is_dir():
        raise NotMeasured(f"{table}/ is not in --data_dir")
    rows = load_table(folder, table)
    n = len(rows.target)
    train = round(TRAIN * n)
    size = BATCH if table == "beijing_pm25" else BATCH // 2
    share = (train + BEFORE * SLICE * size) / n
    served: dict[str, Served] = {}
    params: Any = None
    for drift in drifts:
        stream = events(rows, drift, seed=seed, change=share)
        mean, spread = (f(stream.numbers[:train], 0) for f in (np.mean, np.std))
        numbers = np.clip((stream.numbers - mean) / spread, -5, 5).astype(np.float32)
        known = (numbers, stream.categories, stream.label.astype(np.float32))
        if params is None:
            params = fit(jax.random.key(seed), *(x[:train] for x in known))
        h = hidden(params, *known[:2])
        keys = (h - h[:train].mean(0)) / (h[:train].std(0) + 1e-3)
        p = jax.nn.sigmoid(logit(params, *known[:2]))
        slices = (n - train) // (size * SLICE)
        shape = (slices * SLICE, size)
        cut = [
            x[train : train + shape[0] * size].reshape(*shape, *x.shape[1:])
            for x in (keys, p, *known)
        ]
        served[drift] = Served(
            cut[0], cut[1], jnp.asarray(cut[4]), (cut[2], cut[3]), params
        )
    return served


@functools.partial(jax.jit, static_argnames="memory")
def correct(memory: Memory, keys, prediction, label):
    """The prediction compensated by an error memory, and by one of labels."""
    values = jnp.stack([label - prediction, label], -1)
    found, _ = replay(memory, keys, values)
    errors = (found[..., 0], found[..., 1] - prediction)
    grid = jnp.array(GRID)
    chosen = [
        strengths(prediction, e, label, grid, decay=STRENGTH_DECAY) for e in errors
    ]
    return [
        compensate(prediction, e, s[:, None])
        for e, s in zip(errors, chosen, strict=True)
    ]


def memories(seed: int) -> dict[str, Memory]:
    key = jax.random.key(seed + 1000)
    one = {"tables": 1, "bits": 0, "decay": SKETCH["decay"]}
    return {
        "method": exact(WIDTH, **KNN),
        "sketch": sketch(key, WIDTH, **SKETCH),
        "one bucket": sketch(key, WIDTH, **one),
    }


def slices_auc(prediction, label) -> np.ndarray:
    """AUC of each slice, in points of a hundred."""
    p, y = (np.asarray(x).reshape(-1, SLICE * x.shape[1]) for x in (prediction, label))
    return np.array([100 * roc_auc_score(*pair) for pair in zip(y, p, strict=True)])


def arms(served: Served, seed: int, *, all_of_them: bool) -> dict[str, np.ndarray]:
    """AUC by slice of every arm on a stream, or of the base and both memories."""
    keys, p, y = served[:3]
    found = {"base": p}
    forms = memories(seed)
    for name, memory in forms.items():
        if all_of_them or name != "one bucket":
            found[name], labels = correct(memory, keys, p, y)
            if name == "method":
                found["label memory"] = labels
    if all_of_them:
        moving = incremental(served.params, served.rows, y, RATE)
        found["incremental"] = moving
        found["incremental + memory"] = correct(forms["method"], keys, moving, y)[0]
    return {arm: slices_auc(prediction, y) for arm, prediction in found.items()}


def drifted(table: str, seed: int) -> Iterator[Row]:
    served = serve(table, ("region", "none"), seed)
    by_slice = arms(served["region"], seed, all_of_them=True)
    base = by_slice["base"]
    yield Row("AUC before the drift", base[:BEFORE].mean(), "base")
    for arm, auc in by_slice.items():
        yield Row("AUC after", auc[BEFORE:].mean(), arm)
        yield Row("AUC of the first slice", auc[BEFORE], arm)
        if arm != "base":
            gain = auc[BEFORE:] - base[BEFORE:]
            yield Row("gain", gain.mean(), arm)
            yield Row("gain of the worst slice", gain.min(), arm)
        for i, value in enumerate(auc):
            yield Row(f"AUC of slice {i}", value, arm)
    yield Row("gain of the worst slice", 0.0, "base")
    yield Row("AUC after", base[BEFORE:].mean() + 0.5, "base + 0.5")
    calm = arms(served["none"], seed, all_of_them=False)
    for arm, auc in calm.items():
        yield Row("AUC without drift", auc.mean(), arm)
    yield Row("AUC without drift", calm["base"].mean() - 0.1, "base - 0.1")
    for arm, memory in memories(seed).items():
        state = jax.eval_shape(lambda memory=memory: memory.init(1))
        yield Row("bytes", size_in_bytes(state), arm)


def air(scale: str, seed: int) -> Iterator[Row]:
    """Beijing's air in random order, with a drift of two regions and without."""
    del scale
    yield from drifted("beijing_pm25", seed)


def hires(scale: str, seed: int) -> Iterator[Row]:
    """Bicycle hires likewise, in batches of 25."""
    del scale
    yield from drifted("bike_sharing", seed)


def years(scale: str, seed: int) -> Iterator[Row]:
    """Beijing's air in order of time: what drifts is real."""
    del scale
    served = serve("beijing_pm25", ("time",), seed)["time"]
    for arm, auc in arms(served, seed, all_of_them=False).items():
        yield Row("AUC by time", auc.mean(), arm)


CLAIMS = (
    Claim(
        "every_slice",
        "gain of the worst slice after the drift, exact memory over the frozen base",
        "gains over every base model",
        Ordering("gain of the worst slice", "method", "base", lower_is_better=False),
        air,
    ),
    Claim(
        "half_a_point",
        "AUC after the drift at least half a point above the base",
        "consistent AUC gains",
        Ordering("AUC after", "method", "base + 0.5", lower_is_better=False),
        air,
    ),
    Claim(
        "no_harm",
        "AUC without drift at most 0.1 points below the base",
        "not claimed",
        Ordering("AUC without drift", "method", "base - 0.1", lower_is_better=False),
        air,
    ),
    Claim(
        "no_harm_sketch",
        "the same for the sketch",
        "not claimed",
        Ordering("AUC without drift", "sketch", "base - 0.1", lower_is_better=False),
        air,
    ),
    Claim(
        "sketch_bytes",
        "bytes of the sketch, at most 2 % of the exact memory's",
        "constant memory",
        Ratio("bytes", "sketch", "method", at_most=0.02),
        air,
    ),
    Claim(
        "sketch_gain",
        "and it keeps at least 70 % of the gain in AUC",
        "a fast memory by sketching",
        Ratio("gain", "sketch", "method", at_least=0.7),
        air,
        note="The mean over seeds is above 0.8, but single seeds go down to 0.65.",
    ),
    Claim(
        "sketch_every_slice",
        "gain of the worst slice after the drift, sketch",
        "gains over every base model",
        Ordering("gain of the worst slice", "sketch", "base", lower_is_better=False),
        air,
    ),
    Claim(
        "errors_over_labels",
        "a memory of errors helps more than one of labels",
        "not measured in the paper; its demo averages labels",
        Ordering("AUC after", "method", "label memory", lower_is_better=False),
        air,
    ),
    Claim(
        "similarity",
        "what is similar matters: better than the mean of all recent errors",
        "errors of similar samples",
        Ordering("AUC after", "method", "one bucket", lower_is_better=False),
        air,
    ),
    Claim(
        "first_slice",
        "in the first slice after the drift it beats incremental training",
        "faster than gradient updates follow",
        Ordering(
            "AUC of the first slice", "method", "incremental", lower_is_better=False
        ),
        air,
        note="Incremental training here takes a step after every batch of 50, at the "
        "best of four rates: a schedule that no production model could afford.",
    ),
    Claim(
        "over_incremental",
        "beside incremental training it still raises the AUC after the drift",
        "gains over incremental training alone",
        Ordering(
            "AUC after", "incremental + memory", "incremental", lower_is_better=False
        ),
        air,
    ),
    Claim(
        "real_drift",
        "AUC over the years of Beijing's air, in their real order, above the base",
        "not measured in the paper",
        Ordering("AUC by time", "method", "base", lower_is_better=False),
        years,
        note="It loses half a point. The strength is chosen by log loss on the labels "
        "of the last hours, and a better log loss need not be a better AUC.",
    ),
    Claim(
        "hires",
        "at least half a point above the base on bicycle hires",
        "consistent AUC gains",
        Ordering("AUC after", "method", "base + 0.5", lower_is_better=False),
        hires,
    ),
)


def slices_figure(rows: Sequence[Recorded]) -> Figure:
    """AUC by slice, mean over seeds."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    shown = ("base", "incremental", "label memory", "sketch", "method")
    for arm in shown:
        found: dict[int, list[float]] = {}
        for r in rows:
            if r.arm == arm and r.metric.startswith("AUC of slice "):
                found.setdefault(int(r.metric.split()[-1]), []).append(r.value)
        at = sorted(found)
        label = "error memory" if arm == "method" else arm
        axes.plot(at, [np.mean(found[i]) for i in at], "o-", ms=3, label=label)
    axes.axvline(BEFORE - 0.5, color="grey", lw=0.8)
    axes.set(xlabel="slice of 1000 events", ylabel="AUC, points")
    axes.legend()
    return figure


FIGURES = {"error_memory": slices_figure}
