"""Regression through a bottleneck by Cauchy-Schwarz divergences, beside its rivals.

Paper: Yu, Yu, Lokse, Jenssen and Principe, Cauchy-Schwarz Divergence Information
Bottleneck for Regression, ICLR 2024. The released script trains another loss than the
paper's (`ib/objectives/cs_ib.py`); its table of errors could not be read, so figures
here are of its text: on all of its sets a lower error than VIB, NIB, square-NIB,
exp-NIB and the HSIC bottleneck, without compression and at half of it, and a lower
error under FGSM at every budget.
Claim: a conditional Cauchy-Schwarz divergence in place of squared error, and a
Cauchy-Schwarz information in place of a bound, give lower test errors on real tables.

    python scripts/reproduce.py --system=cs_ib

Expected: with a tenth of the labels shifted far the error to the clean target is less
than half of squared error's; on the real tables there is no gain: the ordering of the
paper is not found.
Every method gets the same runs: one network, one learning rate, as many betas, the
best epoch and the best beta by validation error. Rivals share squared error, so at
beta = 0 those without noise are one run.
Hardware and time: two CPU cores, float32; quick 2 minutes, full 30 minutes.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.data.tables import TABLES, TAILS, friedman, load_table, split
from narrows.ib.kernels import spread
from narrows.ib.objectives.protocol import Objective
from narrows.ib.objectives.table import make_objective
from narrows.scripts.bottleneck_study import (
    Run,
    Shape,
    Task,
    attacked_mse,
    task_of,
    train,
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

SYSTEM = System(
    slug="cs_ib",
    title="Cauchy-Schwarz Divergence Information Bottleneck for Regression",
    paper="ICLR 2024",
    room="ib/",
    module="narrows.ib.objectives.cs_ib",
    summary="kernel divergences in place of squared error and of a variational bound",
)
FEATURES = 25  # of the widest table; others are padded with constant columns
TEST_ROWS = 1000
RADII = (0.1, 0.2, 0.3)  # of attacks, in deviations of a feature
SCALES = {  # training rows of each table, and the network
    "quick": (1024, Shape(64, 32, 128, 40, 2e-3)),
    "full": (2048, Shape(128, 128, 128, 50, 1e-3)),
    "paper": (3968, Shape(128, 128, 128, 200, 1e-4)),  # the smallest table has 3984
}


class Method(NamedTuple):
    betas: tuple[float, ...]  # the first is no compression
    options: dict[str, Any] = {}  # noqa: RUF012


RIVALS = {
    "vib": Method((0, 1e-3, 1e-2, 3e-2, 1e-1)),
    "nib": Method((0, 1e-2, 1e-1, 3e-1, 1)),
    "square_nib": Method((0, 1e-3, 1e-2, 3e-2, 1e-1)),
    "exp_nib": Method((0, 1e-3, 1e-2, 3e-2, 1e-1)),
    "hsic": Method((0, 1, 10, 30, 100), {"width_x": spread(), "width_t": spread()}),
    "dib": Method((0, 1e-2, 1e-1, 3e-1, 1), {"alpha": 2.0}),
}
# Widths by validation on three of the tables at seed 0, of 1, 2, 4 for labels and 0.25,
# 0.5, 1, 2 for inputs: more tuning than a rival got. The paper's are 1 and 1.
METHODS = {
    "cs_ib": Method((0, 0.01, 0.1, 1, 3), {"width_x": 0.5, "width_y": 2.0}),
    "cs_ib widths=1": Method((0, 0.1)),
    **RIVALS,
}
SQUARES = "squared error"  # the rivals' loss at beta = 0, without noise


@functools.cache
def objective(name: str) -> Objective:
    """One object for each, so that its program is compiled once."""
    return make_objective(name.split()[0], **METHODS[name].options)


@functools.cache
def table(folder: str, name: str):
    return load_table(folder, name)


def tables(seed: int, rows: int) -> Task:
    """A split of every table, equally many rows of each."""
    folder = DATA_DIR.get()
    missing = [n for n in TABLES if folder is None or not (folder / n).is_dir()]
    if missing:
        raise NotMeasured(f"{', '.join(missing)} are not in --data_dir")
    parts = [split(table(str(folder), n), seed=seed, rows=rows) for n in TABLES]
    return stacked([task_of(part, FEATURES, TEST_ROWS) for part in parts])


def stacked(tasks: Sequence[Task]) -> Task:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


def runs_of(name: str, tasks: Task, seed: int, shape: Shape) -> Run:
    """All betas on all tasks; leaves [tasks, betas, ...]."""
    count, betas = len(tasks.y), METHODS[name].betas
    which = jnp.repeat(jnp.arange(count), len(betas))
    tiled = jnp.tile(jnp.asarray(betas, jnp.float32), count)
    seeds = jnp.full(len(which), seed, jnp.int32)
    runs = train(tasks, which, tiled, seeds, shape=shape, objective=objective(name))
    return jax.tree.map(lambda a: a.reshape(count, len(betas), *a.shape[1:]), runs)


def at_half(compression: np.ndarray, rmse: np.ndarray) -> float:
    """RMSE where the method's own information is half of that without compression.

    Linear in r = 1 - I / I(beta = 0) along the betas; the last where none reaches it.
    """
    r = np.maximum.accumulate(1 - compression / compression[0])
    return float(np.interp(0.5, r, rmse))


def geometric(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


def real_tables(scale: str, seed: int) -> Iterator[Row]:
    """Test RMSE of standardised labels: without, at half and at tuned compression."""
    rows, shape = SCALES[scale]
    tasks, each = tables(seed, rows), np.arange(len(TABLES))
    found = {name: runs_of(name, tasks, seed, shape) for name in METHODS}
    plain = np.sqrt(np.asarray(found["hsic"].test_mse[:, 0]))
    half, tuned, valid = {}, {}, {}
    for name, runs in found.items():
        rmse = np.sqrt(np.asarray(runs.test_mse))
        own = np.asarray(runs.compression, np.float64)
        best = np.asarray(runs.valid_mse).argmin(1)
        valid[name] = np.asarray(runs.valid_mse)[each, best]
        tuned[name] = rmse[each, best]
        half[name] = np.array([at_half(a, b) for a, b in zip(own, rmse, strict=True)])
        for what, values in (
            ("r=0", rmse[:, 0]),
            ("r=0.5", half[name]),
            ("tuned", tuned[name]),
        ):
            yield Row(f"relative rmse {what}", geometric(values / plain), name)
            for i, title in enumerate(TABLES):
                yield Row(f"rmse {what} {title}", float(values[i]), name)
        for i, title in enumerate(TABLES):
            yield Row(f"beta tuned {title}", METHODS[name].betas[best[i]], name)
            yield Row(f"highest r {title}", float(1 - own[i].min() / own[i, 0]), name)
            for j in range(rmse.shape[1]):
                nats = float(runs.cs_information[i, j])
                yield Row(f"plane {title} {j} I_CS(x;t)", nats, name)
                yield Row(f"plane {title} {j} rmse", float(rmse[i, j]), name)
        chosen = jax.tree.map(lambda a, b=best: a[each, b], runs.params)
        yield from robustness(name, name, chosen, tasks)
    yield from robustness(
        SQUARES, "hsic", jax.tree.map(lambda a: a[:, 0], found["hsic"].params), tasks
    )
    yield Row("relative rmse tuned", 1.0, SQUARES)
    for i, title in enumerate(TABLES):
        yield Row(f"rmse r=0 {title}", float(plain[i]), SQUARES)
        rival = min(RIVALS, key=lambda name, i=i: valid[name][i])
        yield Row(f"rmse tuned {title}", float(tuned[rival][i]), "best rival")


def robustness(arm: str, name: str, params, tasks: Task) -> Iterator[Row]:
    """RMSE of one run a table under attack: the geometric mean over the tables."""
    which, radii = jnp.arange(len(TABLES)), jnp.asarray(RADII)
    like = "vib" if objective(name).noise == "own" else "hsic"  # two kinds of encoder
    for attack, steps in (("fgsm", 1), ("pgd", 5)):
        mse = attacked_mse(
            params, tasks, which, radii, objective=objective(like), steps=steps
        )
        for j, radius in enumerate(RADII):
            rmse = np.sqrt(np.asarray(mse[:, j]))
            yield Row(f"{attack} {radius:g}", geometric(rmse), arm)


def friedman_task(tail: str, seed: int, rows: int) -> Task:
    """Spoilt labels to train and to validate on, clean ones to be judged by."""
    train = friedman(rows, seed=3 * seed, tail=tail)
    valid = friedman(rows // 4, seed=3 * seed + 1, tail=tail)
    clean = friedman(2 * TEST_ROWS, seed=3 * seed + 2, clean=True)
    arrays = []
    for part in (train, valid, clean):
        x = (part.x - 0.5) * math.sqrt(12)  # uniform inputs to unit variance
        arrays.append(np.pad(x, ((0, 0), (0, FEATURES - 10))).astype(np.float32))
        arrays.append(part.y[:, None].astype(np.float32))
    return Task(*arrays)


def heavy_tails(scale: str, seed: int) -> Iterator[Row]:
    """Friedman's function with spoilt labels: RMSE to the clean target."""
    rows, shape = SCALES[scale]
    tasks = stacked([friedman_task(tail, seed, rows) for tail in TAILS])
    for name, arm in (("cs_ib", "cs_ib"), ("hsic", SQUARES)):
        runs = runs_of(name, tasks, seed, shape)
        rmse = np.sqrt(np.asarray(runs.test_mse))
        for i, tail in enumerate(TAILS):
            yield Row(f"clean rmse {tail}", float(rmse[i, 0]), arm)
            if name == "cs_ib":
                for j, beta in enumerate(METHODS[name].betas):
                    value = float(rmse[i, j])
                    yield Row(f"clean rmse {tail} by beta", value, f"beta={beta:g}")


NOTE = (
    "Equal to squared error within the spread of seeds. The script released with the "
    "paper trains squared error, not this loss."
)


def claims() -> Iterator[Claim]:
    for title in TABLES:
        yield Claim(
            f"plain_{title}",
            f"at beta = 0 it has a lower test RMSE than squared error, {title}",
            "lower RMSE at r = 0 on every set",
            Ordering(f"rmse r=0 {title}", "cs_ib", SQUARES),
            real_tables,
            note=NOTE,
        )
    for rival in RIVALS:
        yield Claim(
            f"half_{rival}",
            f"at half of the information a lower RMSE than {rival}, mean of the tables",
            "lower RMSE at r = 0.5 on every set" if rival != "dib" else "not stated",
            Ratio("relative rmse r=0.5", "cs_ib", rival, at_most=1.0),
            real_tables,
            note="hsic does not reach half on three tables; read at its last beta."
            if rival == "hsic"
            else "",
        )
    for title in TABLES:
        yield Claim(
            f"tuned_{title}",
            f"with beta tuned, lower than the rival that validates best, {title}",
            "1 to 4 % lower RMSE",
            Ordering(f"rmse tuned {title}", "cs_ib", "best rival"),
            real_tables,
        )
    for rival in (SQUARES, *RIVALS):
        yield Claim(
            f"fgsm_{rival.replace(' ', '_')}",
            f"a lower RMSE under FGSM of 0.2 deviations than {rival}, both tuned",
            "lower RMSE at every budget",
            Ratio("fgsm 0.2", "cs_ib", rival, at_most=1.0),
            real_tables,
            note="Noise in the code smooths; a sharper fit is attacked more easily.",
        )
    yield Claim(
        "outliers",
        "with a tenth of the labels shifted far, a quarter of squared error's RMSE",
        "not measured: robust to labels without a Gaussian law is the method's motive",
        Ratio("clean rmse outliers", "cs_ib", SQUARES, at_most=0.25),
        heavy_tails,
    )
    yield Claim(
        "student",
        "with noise of Student's t, 1.5 degrees of freedom, a lower RMSE",
        "not measured",
        Ratio("clean rmse student", "cs_ib", SQUARES, at_most=1.0),
        heavy_tails,
    )
    yield Claim(
        "gaussian",
        "with Gaussian noise no worse than squared error by more than 5 %",
        "not measured",
        Ratio("clean rmse none", "cs_ib", SQUARES, at_most=1.05),
        heavy_tails,
    )


CLAIMS = tuple(claims())


def plane_figure(rows: Sequence[Recorded]) -> Figure:
    """Test RMSE against I_CS(x;t), the common currency, one panel a table."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    scale = "full" if any(r.scale == "full" for r in rows) else "quick"
    means: dict[tuple[str, str], list[float]] = {}
    for r in rows:
        if r.scale == scale and r.metric.startswith("plane "):
            means.setdefault((r.metric, r.arm), []).append(r.value)
    for panel, title in zip(panels, TABLES, strict=False):
        for name, method in METHODS.items():
            points = [
                tuple(
                    np.mean(means.get((f"plane {title} {j} {what}", name), [np.nan]))
                    for what in ("I_CS(x;t)", "rmse")
                )
                for j in range(len(method.betas))
            ]
            line = "o-" if name == "cs_ib" else ".--"
            panel.plot(*zip(*points, strict=True), line, label=name)
        panel.set(title=title, xlabel="I_CS(x;t), nats", ylabel="test RMSE")
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center")
    return figure


FIGURES = {"cs_ib": plane_figure}
