"""Information that a code keeps beyond the label, as a predictor of the gap.

Paper: Kawaguchi, Deng, Ji and Huang, How Does Information Bottleneck Help Deep
Learning?, arXiv:2305.18887, ICML 2023. Its bound for an encoder fixed in advance falls
like sqrt((I(X;Z|Y) + 1) / n); for one learned on the same data I(encoder; training set)
joins. Its tables of correlations could not be read.
Claim: over trained networks I(X;Z|Y) goes with the gap between test and training loss
more than counts and norms of parameters do.

    python scripts/reproduce.py --system=ib_bounds

Expected: a Spearman correlation with the gap near 0.74, norms 0.7, the training margin
0.83, the parameter count none, as over half as many networks a seed before.
The toy study: five Gaussian blobs in the plane, 50 training points, stochastic encoders
of five numbers, all of weight decay, width, constraint on information, two starts and
three draws of the data; the parameters' information I(encoder; S) from posteriors of
the three draws (SWAG). Left out: pictures.
Hardware and time: two CPU cores, float32; quick 2 minutes, full 10 minutes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.ib.bounds import code_bound, combined, given_label
from narrows.ib.channel import sampled_information
from narrows.scripts.blob_study import trained
from narrows.scripts.claims import Claim, Law, Ordering, Row, System
from narrows.scripts.results import Recorded
from scipy import stats

SYSTEM = System(
    slug="ib_bounds",
    title="How Does Information Bottleneck Help Deep Learning?",
    paper="arXiv:2305.18887, ICML 2023",
    room="ib/",
    module="narrows.ib.bounds",
    summary="I(X;Z|Y) of a stochastic code as a predictor of the generalisation gap",
)
DECAYS, RATES, STARTS = (0.0, 1e-2, 1e-1), (0.0, 5e-4), 2
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of labels that are drawn at random
SCALES = {  # widths, steps
    "quick": ((8, 16, 32, 64), 300),
    "full": ((32, 64, 128, 256), 300),
    "paper": ((32, 64, 128, 256), 300),
}
LEAST_ACCURACY = 0.85  # on the training points, as in the paper
PREDICTORS = (
    "I(X;Z|Y)",
    "I(X;Z|Y) Jensen",
    "I(X;Z)",
    "I(X;Z) Jensen",
    "I(encoder;S)",
    "I(encoder;S) Jensen",
    "I(X;Z|Y) + I(encoder;S)",
)
BASELINES = ("parameters", "m log m", "norm sum", "norm product", "margin")


RANKS = {
    "spearman": stats.spearmanr,
    "kendall": stats.kendalltau,
    "pearson": stats.pearsonr,
}


def blob_networks(scale: str, seed: int) -> Iterator[Row]:
    """Spearman's correlation of each predictor with the gap over the networks."""
    widths, steps = SCALES[scale]
    whole, kept, grid = trained(
        seed, steps, widths=widths, decays=DECAYS, rates=RATES, starts=STARTS
    )
    kept &= whole["accuracy"] > LEAST_ACCURACY
    information = whole["I(X;Z|Y)"]
    both = np.full(len(information), np.nan)
    of_data = np.maximum(whole["I(encoder;S) Jensen"][kept], 0)
    both[kept] = combined(information[kept], of_data)
    whole["I(X;Z|Y) + I(encoder;S)"] = both
    yield Row("networks", int(kept.sum()))
    yield Row("gap, nats", float(whole["gap"][kept].mean()))
    for name in (*PREDICTORS, *BASELINES):
        x, gap = whole[name][kept], whole["gap"][kept]
        for title, of in RANKS.items():
            value: Any = of(x, gap)[0]
            yield Row(title, float(np.nan_to_num(value)), name)
        inside = []
        for width in widths:
            mine = kept & np.array([g[0] == width for g in grid])
            if mine.sum() > 4 and np.ptp(whole[name][mine]) > 0:
                inside.append(stats.spearmanr(whole[name][mine], whole["gap"][mine])[0])
        if inside:
            yield Row("spearman within a width", float(np.mean(inside)), name)
    for i in np.flatnonzero(kept):
        yield Row("point gap", float(whole["gap"][i]), str(i))
        yield Row("point I(X;Z|Y)", float(information[i]), str(i))
    yield Row("spearman", 0.0, "chance")


def random_labels(scale: str, seed: int) -> Iterator[Row]:
    """One architecture, labels more and more at random: information and gap."""
    widths, steps = SCALES[scale]
    whole, kept, grid = trained(
        seed, 3 * steps, widths=widths[-1:], starts=STARTS, fractions=FRACTIONS
    )
    for fraction in FRACTIONS:
        mine = kept & np.array([g[4] == fraction for g in grid])
        for name in ("gap", "accuracy", "I(X;Z|Y)"):
            value = float(whole[name][mine].mean())
            yield Row(f"random {name}", value, f"{fraction:g}")
    rho: Any = stats.spearmanr(whole["I(X;Z|Y)"][kept], whole["gap"][kept])[0]
    yield Row("spearman, random labels", float(rho), "I(X;Z|Y)")
    yield Row("spearman, random labels", 0.0, "chance")


def finite_codes(scale: str, seed: int) -> Iterator[Row]:
    """The bound with its constants, over draws of a world whose gap is known."""
    del scale
    rng = np.random.default_rng([seed, 11])
    joint = rng.dirichlet(np.full(16 * 3, 0.3)).reshape(16, 3)
    above, ratios = [], []
    for n in (100, 400, 1600):
        bound = code_bound(joint, n)
        for _ in range(200):
            seen = rng.multinomial(n, joint.ravel()).reshape(joint.shape) / n
            wrong = np.ones(joint.shape)
            wrong[np.arange(16), seen.argmax(1)] = 0  # the best decoder of the n
            gap = float((wrong * (joint - seen)).sum())
            above.append(gap > bound.value)
            ratios.append(bound.value / max(gap, 1e-9))
    yield Row("draws above the bound", float(np.sum(above)))
    yield Row("bound over gap, median", float(np.median(ratios)))
    yield Row("I(X;Z|Y) of the code, nats", given_label(joint))


def linear_channel(scale: str, seed: int) -> Iterator[Row]:
    """The estimate of a linear Gaussian code against its closed form."""
    del scale
    rng = np.random.default_rng([seed, 9])
    weights, noise = rng.normal(size=(3, 2)), 0.7
    exact = 0.5 * np.linalg.slogdet(np.eye(2) + weights.T @ weights / noise**2)[1]
    mean = (rng.normal(size=(4000, 3)) @ weights).astype(np.float32)
    code = mean + noise * rng.normal(size=mean.shape).astype(np.float32)
    spread = np.full_like(mean, noise)
    arrays = tuple(jnp.asarray(a, jnp.float32) for a in (code, mean, spread))
    found = {b: float(sampled_information(*arrays, bound=b)) for b in BOUNDS}
    yield Row("error of the mixture, nats", found["mixture"] - exact)
    yield Row("jensen", found["jensen"], "jensen")
    yield Row("jensen", exact, "exact")


BOUNDS = ("mixture", "jensen")


NOTES = {
    "norm sum": "Above it in the mean, by less than seeds differ.",
    "norm product": "Above it in the mean, by less than seeds differ.",
    "m log m": "Ranks as the parameter count does.",
    "margin": "The margin says how low the training loss is: a part of the gap itself.",
}


def claims() -> Iterator[Claim]:
    yield Claim(
        "chance",
        "I(X;Z|Y) rises with the gap: Spearman's correlation above 0",
        "the bound grows with I(X;Z|Y)",
        Ordering("spearman", "I(X;Z|Y)", "chance", lower_is_better=False),
        blob_networks,
    )
    for name in BASELINES:
        yield Claim(
            f"beats_{name.replace(' ', '_')}",
            f"it correlates with the gap more than {name}",
            "more strongly and more consistently than counts and norms",
            Ordering("spearman", "I(X;Z|Y)", name, lower_is_better=False),
            blob_networks,
            note=NOTES.get(name, ""),
        )
    yield Claim(
        "given_y",
        "what the code keeps beyond the label says more than all that it keeps",
        "I(X;Z|Y) is what the bound holds",
        Ordering("spearman", "I(X;Z|Y)", "I(X;Z)", lower_is_better=False),
        blob_networks,
        note="Networks that fit keep the same I(Z;Y): both order them alike.",
    )
    yield Claim(
        "parameters_join",
        "with what the encoder's parameters keep of the data it says more",
        "alone or with I(encoder; S) it is above the baselines",
        Ordering(
            "spearman", "I(X;Z|Y) + I(encoder;S)", "I(X;Z|Y)", lower_is_better=False
        ),
        blob_networks,
    )
    yield Claim(
        "random_labels",
        "one architecture, labels more and more at random: the gap rises with I(X;Z|Y)",
        "the bound grows with I(X;Z|Y)",
        Ordering(
            "spearman, random labels", "I(X;Z|Y)", "chance", lower_is_better=False
        ),
        random_labels,
    )
    yield Claim(
        "bound",
        "a code of 16 values: no gap of 600 draws of the data is above the bound",
        "with probability 1 - delta (Thm 1; constants are ours)",
        Law("draws above the bound", 0.0),
        finite_codes,
    )
    yield Claim(
        "closed_form",
        "the estimate of a linear Gaussian code is exact to 0.06 nats at n = 4000",
        "exact in the limit",
        Law("error of the mixture, nats", 0.06),
        linear_channel,
    )
    yield Claim(
        "jensen",
        "and Jensen's form lies above the truth",
        "an upper bound",
        Ordering("jensen", "jensen", "exact", lower_is_better=False),
        linear_channel,
    )


CLAIMS = tuple(claims())


def gap_figure(rows: Sequence[Recorded]) -> Figure:
    """Gap against I(X;Z|Y), a point a network, and the correlations beside it."""
    scale = "full" if any(r.scale == "full" for r in rows) else "quick"
    rows = [r for r in rows if r.scale == scale]
    points: dict[tuple[int, str], dict[str, float]] = {}
    for r in rows:
        if r.metric.startswith("point "):
            points.setdefault((r.seed, r.arm), {})[r.metric[6:]] = r.value
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for seed in sorted({s for s, _ in points}):
        mine = [p for (s, _), p in points.items() if s == seed]
        left.plot(
            [p["I(X;Z|Y)"] for p in mine],
            [p["gap"] for p in mine],
            ".",
            label=str(seed),
        )
    left.set(xlabel="I(X;Z|Y), nats", ylabel="test - training loss, nats")
    names = (*PREDICTORS, *BASELINES)
    for offset, metric in ((-0.2, "spearman"), (0.2, "spearman within a width")):
        found = [
            [r.value for r in rows if r.metric == metric and r.arm == n] for n in names
        ]
        right.barh(
            np.arange(len(names)) + offset,
            [np.mean(v) if v else 0 for v in found],
            0.4,
            xerr=[np.std(v) if v else 0 for v in found],
            label=metric,
        )
    right.set_yticks(range(len(names)), names)
    right.set_xlabel("rank correlation with the gap")
    right.legend()
    return figure


FIGURES = {"ib_bounds": gap_figure}
