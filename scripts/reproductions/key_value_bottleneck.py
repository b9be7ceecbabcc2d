"""A memory of frozen keys keeps classes that a probe forgets, without replay.

Paper: Traeuble et al., arXiv:2207.11240, ICML 2023. Its accuracies are curves without
tables; its Figure 2 is the toy below.
Claim: between a frozen encoder and its classes, values that are read and written by
their nearest key forget far less than a linear or MLP probe when classes come two at a
time, come close to their own accuracy on shuffled samples, and need no task boundaries.

    python scripts/reproduce.py --system=key_value_bottleneck

Expected: the toy at least 0.99 over all classes where an MLP keeps one quarter;
Fashion-MNIST at least 25 points above both probes, CIFAR-10 at least 15.
Encoders are our own, trained without labels by `scripts/pretrain.py`: for Fashion-MNIST
on MNIST and grey CIFAR-10, for CIFAR-10 on half of its pictures, the stream being on
the other half. A rate is chosen for every arm and seed from a grid by accuracy on
validation rows: of shuffled samples ("points"), or, in hindsight, at the end of the
stream itself ("hindsight points"). EWC's penalty is always chosen in hindsight.
Hardware and time: two CPU cores; quick about 5 minutes of CPU time for 5 seeds, half of
it the two encoders and compilation; full was not timed.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.models import key_value_bottleneck as kv
from narrows.scripts import learners
from narrows.scripts.claims import Claim, Law, Ordering, Row, System
from narrows.scripts.class_incremental import (
    BOOKS,
    PAIRS,
    WIDTH,
    Bed,
    bed,
    draw,
    fits,
    points,
)
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="key_value_bottleneck",
    title="Discrete Key-Value Bottleneck",
    paper="arXiv:2207.11240, ICML 2023",
    room="models/",
    module="narrows.models.key_value_bottleneck",
    summary="frozen keys, values learned in their own cells",
)
MEMORY_RATES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of plain gradient descent
PROBE_RATES = (1e-5, 1e-4, 1e-3, 1e-2)  # of Adam
PENALTIES = (1.0, 1e2, 1e4)  # of EWC
# ---------------------------------------------------------------- the paper's Figure 2

CENTRES = ((1, 1), (3, 1), (3, 3), (1, 3), (3, 2), (2, 3), (1, 2), (2, 1))  # quarters


def square(rng: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    """100 points of each of 8 classes, deviation 0.035."""
    centres = np.repeat(np.array(CENTRES) / 4, 100, 0)
    x = centres + 0.035 * rng.normal(size=centres.shape)
    return jnp.asarray(x, jnp.float32), jnp.repeat(jnp.arange(8), 100)


def toy(scale: str, seed: int) -> Iterator[Row]:
    """Accuracy over all 8 classes after 4 tasks of 2, each 1000 steps of its 200."""
    del scale
    rng = np.random.default_rng([seed, 1])
    (x, y), (test, truth) = square(rng), square(rng)
    tasks = [np.flatnonzero(np.isin(y, (t, t + 4))) for t in range(4)]
    rows = jnp.asarray(np.repeat(np.stack(tasks)[:, None], 1000, 1))
    plane = jnp.asarray(rng.uniform(size=(4000, 2)), jnp.float32)
    keys = jax.random.split(jax.random.key(seed), 3)
    samples = learners.Samples(x, y, test)
    books = {
        "method": (jnp.eye(2)[None], 400),
        "20 books": (kv.projections(keys[0], 2, books=20, width=2), 20),
    }
    for arm, (places, pairs) in books.items():
        chosen = kv.average_keys(keys[1], kv.heads(places, plane), pairs)
        memory = kv.empty(places, chosen, 8)
        drawn = 1e-3 * jax.random.normal(keys[2], memory.values.shape)
        held = learners.Memory(
            memory._replace(values=drawn),
            kv.find(memory, x, written=False),
            kv.find(memory, test, written=False),
        )
        votes = learners.key_value(held, samples, 0.3, rows)
        for name, logits in zip((arm, f"{arm}, every cell"), votes, strict=True):
            right = float((logits.argmax(-1) == truth).mean())
            yield Row("accuracy", right, name)
            yield Row("short of 0.99", max(0.0, 0.99 - right), name)
    logits = learners.probe(samples, 1e-3, rows, keys[2], classes=8, hidden=(32,))
    right = float((logits.argmax(-1) == truth).mean())
    yield Row("accuracy", right, "MLP")
    yield Row("off a quarter", right - 0.25, "MLP")


# ------------------------------------------------------------------------- exact laws


def laws(scale: str, seed: int) -> Iterator[Row]:
    """What other samples leave bit for bit: values, logits, and the memory itself."""
    del scale
    keys = jax.random.split(jax.random.key(seed), 6)
    features = jax.random.normal(keys[0], (2000, 16))
    labels = jax.random.randint(keys[1], (2000,), 0, 10)
    places = kv.projections(keys[2], 16, books=8, width=8)
    chosen = kv.average_keys(keys[3], kv.heads(places, features), 256, passes=2)
    memory = kv.empty(places, chosen, 10)
    learn = jax.jit(functools.partial(kv.learn, rate=0.3))
    memory, _ = learn(memory, features[:1000], labels[:1000])
    batch = slice(1000, 1016)
    after, _ = learn(memory, features[batch], labels[batch])
    index = np.asarray(kv.find(memory, features, written=False))[..., 0]
    hit = np.zeros(memory.hits.shape, bool)
    hit[np.arange(8), index[batch]] = True
    moved = np.any(np.asarray(memory.values != after.values), -1)
    yield Row("values changed elsewhere", int(moved[~hit].sum()))
    yield Row("values changed where hit", int(moved[hit].sum()))
    apart = ~hit[np.arange(8), index].any(1)
    before, later = (
        np.asarray(kv.vote(kv.fetch(m, features, written=False)))
        for m in (memory, after)
    )
    yield Row("samples that share no cell", int(apart.sum()))
    yield Row("their logits' change", float(np.abs(later - before)[apart].max()))
    yield Row("others' logits' change", float(np.abs(later - before)[~apart].max()))

    one = kv.empty(places[:1], chosen[:1], 10)
    cells = index[:, 0]

    @jax.jit
    def run(order):
        def step(memory, i):
            return kv.learn(memory, features[i][None], labels[i][None], rate=0.3)

        return jax.lax.scan(step, one, order)[0].values

    rng = np.random.default_rng([seed, 2])
    turn = rng.permutation(2000)  # then each cell's own samples back in their order
    places_of = np.argsort(cells[turn], kind="stable")
    mixed = turn.copy()
    mixed[places_of] = np.argsort(cells, kind="stable")
    straight = run(jnp.arange(2000))
    yield Row("moved samples", int((mixed != np.arange(2000)).sum()))
    gap = jnp.abs(run(jnp.asarray(mixed)) - straight).max()
    yield Row("change by another order", float(gap))
    gap = jnp.abs(run(jnp.asarray(turn)) - straight).max()
    yield Row("change by an order that mixes cells", float(gap))


# ---------------------------------------------------------------------------- streams


def compare(name: str, scale: str, seed: int, margin: float) -> Iterator[Row]:
    """Test points of every arm at the end of the stream, and on shuffled samples."""
    found = bed(name, scale)
    drawn = draw(found, scale, seed)
    for arm, fit in fits(drawn, found, seed).items():
        grid: Sequence[Any] = PROBE_RATES
        if arm == "method":
            grid = MEMORY_RATES
        elif arm == "EWC":
            grid = [(rate, p) for rate in PROBE_RATES[1:3] for p in PENALTIES]
        ends = [points(drawn, fit(choice, drawn.stream)) for choice in grid]
        late = max(range(len(grid)), key=lambda i: ends[i][0])
        chosen = late
        if arm != "EWC":
            mixed = [points(drawn, fit(choice, drawn.shuffled)) for choice in grid]
            chosen = max(range(len(grid)), key=lambda i: mixed[i][0])
            yield Row("shuffled points", mixed[chosen][1], arm)
            for choice, end, other in zip(grid, ends, mixed, strict=True):
                yield Row(f"points at rate {choice:g}", end[1], arm)
                yield Row(f"shuffled points at rate {choice:g}", other[1], arm)
        handicap = margin if arm == "method" else 0.0
        for title, place in (("points", chosen), ("hindsight points", late)):
            yield Row(title, ends[place][1], arm)
            yield Row(
                f"{title}, method less {margin:g}", ends[place][1] - handicap, arm
            )


def fashion(scale: str, seed: int) -> Iterator[Row]:
    yield from compare("fashion_mnist", scale, seed, 25.0)


def cifar(scale: str, seed: int) -> Iterator[Row]:
    yield from compare("cifar10_subset", scale, seed, 15.0)


SHAPES: dict[str, tuple[int, ...]] = {
    "books": (4, 16, 64),
    "pairs": (16, 128, 1024),
    "width": (2, 8, 32),
}


def ablations(scale: str, seed: int) -> Iterator[Row]:
    """Fashion-MNIST at the end of the stream, rates chosen by it, one size changed."""
    found = bed("fashion_mnist", scale)
    drawn = draw(found, scale, seed)
    own = found._replace(unlabelled=np.asarray(drawn.samples.features))

    def end(bed: Bed, **shape) -> float:
        fit = fits(drawn, bed, seed, **shape)["method"]
        runs = [points(drawn, fit(rate, drawn.stream)) for rate in MEMORY_RATES[::2]]
        return max(runs)[1]

    standard = end(found)
    for name, values in SHAPES.items():
        for value in values:
            same = value in (BOOKS, PAIRS, WIDTH)
            score = standard if same else end(found, **{name: value})
            yield Row(f"points by {name}", score, str(value))
    yield Row("points by keys' data", standard, "other data")
    ours = end(own)
    yield Row("points by keys' data", ours, "own data")
    yield Row("points by keys' data, own less 5", standard, "other data")
    yield Row("points by keys' data, own less 5", ours - 5.0, "own data")


def more(metric: str, better: str, worse: str) -> Ordering:
    return Ordering(metric, better, worse, lower_is_better=False)


def stream_claims(short: str, title: str, margin: int, measure) -> tuple[Claim, ...]:
    far = f"points, method less {margin}"
    made = [
        Claim(
            f"{short}_{probe.split()[0].lower()}",
            f"{title}, classes two by two: at least {margin} points above the {probe}",
            "forgets far less than probes (curves)",
            more(far, "method", probe),
            measure,
        )
        for probe in ("linear probe", "MLP probe")
    ]
    made += [
        Claim(
            f"{short}_{probe.split()[0].lower()}_hindsight",
            "the same, with every rate chosen by the end of the stream",
            "not in the paper",
            more(f"hindsight {far}", "method", probe),
            measure,
            note="A rate so small that its weights stay near zero only adds up its "
            "samples, in any order: a linear probe then is a classifier by class "
            "means, which forgets far less.",
        )
        for probe in ("linear probe", "MLP probe")
    ]
    return (
        *made,
        Claim(
            f"{short}_ewc",
            f"{title}: more than EWC, which knows where tasks end",
            "above replay-free continual learning",
            more("points", "method", "EWC"),
            measure,
        ),
    )


CLAIMS = (
    Claim(
        "toy",
        "one book of 400 pairs: at least 0.99 over all 8 classes after 4 tasks of 2",
        "Fig. 2: no class is forgotten",
        Law("short of 0.99", 0.0),
        toy,
    ),
    Claim(
        "toy_books",
        "the same with 20 books of 20 pairs",
        "Fig. 2",
        Law("short of 0.99", 0.0, "20 books"),
        toy,
    ),
    Claim(
        "toy_network",
        "an MLP keeps the last task alone: within 0.005 of a quarter",
        "Fig. 2: forgets all but the last task",
        Law("off a quarter", 0.005, "MLP"),
        toy,
    ),
    Claim(
        "toy_mask",
        "reading cells that were never written costs accuracy",
        "Sec. 3: keys not hit in training are masked",
        more("accuracy", "method", "method, every cell"),
        toy,
    ),
    Claim(
        "local",
        "a step leaves every value that it did not read, bit for bit",
        "Sec. 3: localised updates",
        Law("values changed elsewhere", 0.0),
        laws,
    ),
    Claim(
        "blind",
        "and the logits of every sample that shares no cell with it",
        "Sec. 3",
        Law("their logits' change", 0.0),
        laws,
    ),
    Claim(
        "order",
        "any order that keeps each cell's own leaves the same memory, bit for bit",
        "follows from locality, one book",
        Law("change by another order", 0.0),
        laws,
    ),
    *stream_claims("fashion", "Fashion-MNIST", 25, fashion),
    *stream_claims("cifar", "CIFAR-10", 15, cifar),
    *(
        Claim(
            f"more_{name}",
            f"Fashion-MNIST: {high} {name} keep more than {low}",
            "ablations: accuracy grows with capacity",
            more(f"points by {name}", str(high), str(low)),
            ablations,
            scales=("full", "paper"),
        )
        for name, low, high in (("books", 4, 64), ("pairs", 16, 1024), ("width", 2, 8))
    ),
    Claim(
        "other_keys",
        "keys from other data keep within 5 points of keys from the stream's own",
        "ablation: nearly as good",
        more("points by keys' data, own less 5", "other data", "own data"),
        ablations,
        scales=("full", "paper"),
    ),
)


def stream_figure(rows: Sequence[Recorded]) -> Figure:
    """Points at the end of the stream against the rate, mean over seeds."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    scale = "full" if any(r.scale == "full" for r in rows) else "quick"
    sets = {"fashion": "Fashion-MNIST", "cifar": "CIFAR-10"}
    lines = {"points at rate ": "o-", "shuffled points at rate ": "s:"}
    arms = {"method": "C0", "linear probe": "C1", "MLP probe": "C2"}
    for axes, measured in zip(figure.subplots(1, 2), sets, strict=True):
        for arm, start in itertools.product(arms, lines):
            found: dict[float, list[float]] = {}
            for r in rows:
                same = (r.measurement, r.arm, r.scale) == (measured, arm, scale)
                if same and r.metric.startswith(start):
                    rate = float(r.metric.removeprefix(start))
                    found.setdefault(rate, []).append(r.value)
            rates = sorted(found)
            means = [np.mean(found[rate]) for rate in rates]
            label = "key-value memory" if arm == "method" else arm
            label += ", shuffled" if start.startswith("shuffled") else ""
            options = {"color": arms[arm], "label": label, "ms": 4}
            axes.semilogx(rates, means, lines[start], **options)
        axes.set(title=sets[measured], xlabel="rate (memory: descent; probes: Adam)")
        axes.set(ylabel="test points, all classes", ylim=(0, 100))
    figure.axes[0].legend(fontsize=7, frameon=False)
    return figure


FIGURES = {"key_value_bottleneck": stream_figure}
