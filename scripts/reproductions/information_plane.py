"""Layers of a small network on the information plane while it learns a symmetric rule.

Paper: Shwartz-Ziv and Tishby, Opening the Black Box of Deep Neural Networks via
Information, arXiv:1703.00810. Critique: Saxe et al., ICLR 2018.
Claim: training fits first (I(T;Y) rises), then compresses (I(X;T) falls); the change
comes with that of the gradients from drift to diffusion; trained layers lie on the
bound of the information bottleneck; more layers need fewer steps.

    python scripts/reproduce.py --system=information_plane

Expected: in tanh networks I(X;T) of the last hidden layer falls from its peak by bits,
in ReLU networks by far less; layers end near I(T;Y) = H(Y) and, to the right of the
bound, with bits that a code of the label does not need.
Whether it compresses is reported by three estimators side by side: 30 fixed bins, the
noisy channel T + N(0, 0.001 I) by samples, and its bound by kernels.
Not as in the paper: batches are drawn with replacement; Adam (as in its code, not its
text); quick trains with a larger step for fewer steps, and takes 1024 of the 4096
patterns for the noisy channel. Seeds are trained together, in blocks of five.
Hardware and time: two CPU cores, float32; quick 2 minutes, full 30 minutes.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure
from narrows.data.icosahedron import soft_rule, symmetric_rule
from narrows.ib import blahut_arimoto, information_plane
from narrows.ib.estimators.binning import fixed_bins
from narrows.ib.information_plane import BITS, log_steps
from narrows.scripts.claims import Claim, Law, Ordering, Row, System
from narrows.scripts.pattern_networks import ACTIVATIONS, History, Size, train
from narrows.scripts.plane_figure import draw_paths
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="information_plane",
    title="Opening the Black Box of Deep Neural Networks via Information",
    paper="arXiv:1703.00810",
    room="ib/",
    module="narrows.ib.information_plane",
    summary="I(X;T) and I(T;Y) of every layer during training, by several estimators",
)
HIDDEN = (10, 7, 5, 4, 3)
DEPTH = len(HIDDEN)
BLOCK = 5  # seeds that are trained by one program
ESTIMATORS = ("bins", "noisy", "kde_upper")
GAMMA = 66.1  # of the soft rule: I(X; Y) = 0.99 bits
FALL = "fall of I(X;T), bits"  # of its last value from its largest


SIZES = {
    "quick": Size(25_000, 256, 1e-3, 14, 1024),
    "full": Size(60_000, 256, 4e-4, 24, 2048),
    "paper": Size(100_000, 256, 4e-4, 40, 4096),
}


@functools.cache
def block(scale: str, first: int, activation: str, share: float, depth: int) -> History:
    """Networks of seeds first to first + BLOCK - 1, at all times."""
    size, rule = SIZES[scale], symmetric_rule()
    keys = jax.vmap(jax.random.key)(jnp.arange(first, first + BLOCK))
    labels = jnp.tile(jnp.asarray(rule.y), (BLOCK, 1))
    if share == 0:  # labels that patterns do not determine
        labels = jax.vmap(jax.random.permutation)(keys, labels)
    return jax.device_get(
        train(
            keys,
            jnp.asarray(rule.x),
            labels,
            hidden=HIDDEN[:depth],
            activation=activation,
            size=size,
            share=share or 0.8,
            steps=log_steps(size.steps, size.times),
        )
    )


def history(scale, seed, activation, *, share=0.8, depth=DEPTH) -> History:
    first = seed // BLOCK * BLOCK
    whole = block(scale, first, activation, share, depth)
    return jax.tree.map(lambda a: a[seed - first], whole)


@functools.cache
def _estimator(name: str, low: float):
    """Of [times] outputs and labels -> [times, 2], I(X; T) and I(T; Y) in bits."""
    options = {"low": low, "high": 1.0} if name == "bins" else {}
    estimator = functools.partial(information_plane.PLANE[name], **options)

    def at(h, y):
        x_t, t_y = estimator(jax.random.key(0), h, y)
        return BITS * jnp.stack([x_t.value, t_y.value])

    return jax.jit(lambda h, y: jax.lax.map(lambda a: at(a, y), h))


def path(scale: str, seed: int, activation: str, layer: Array, name: str) -> Array:
    """[times, 2]: a layer's path over the plane by one estimator, bits.

    ReLU's bins reach from 0 to the largest value of all times, so that they stay.
    """
    rows = np.arange(len(layer[0]))
    if name != "bins":
        rows = np.random.default_rng(seed).permutation(rows)[: SIZES[scale].rows]
    if name == "bins" and activation == "relu":
        layer = layer / max(layer.max(), 1e-9)  # all units may have died
    labels = jnp.asarray(symmetric_rule().y[rows])
    estimator = _estimator(name, -1.0 if activation == "tanh" else 0.0)
    return np.asarray(estimator(jnp.asarray(layer[:, rows]), labels))


@functools.cache
def soft_curve() -> blahut_arimoto.Curve:
    betas = np.concatenate([np.geomspace(1.001, 30, 12), np.geomspace(60, 1000, 12)])
    return blahut_arimoto.curve(soft_rule(GAMMA) / 4096, betas)


def _against_soft_rule(h: Array, activation: str) -> tuple[float, float]:
    """I(X;T) by 30 bins, and the least that I(T;Y) of the soft rule needs; bits."""
    high = 1.0 if activation == "tanh" else max(float(h.max()), 1e-9)
    low = -1.0 if activation == "tanh" else 0.0
    cells = np.asarray(fixed_bins(h, 30, low, high))
    which = np.unique(cells, axis=0, return_inverse=True)[1].ravel()
    joint = np.zeros((which.max() + 1, 2))
    np.add.at(joint, which, soft_rule(GAMMA) / 4096)
    p_t = joint.sum(1)
    t_y, whole = blahut_arimoto.information(joint), 0.99 / BITS
    rate = blahut_arimoto.least_rate(soft_curve(), np.array([t_y]), whole)
    return float(-(p_t * np.log2(p_t)).sum()), float(rate[0]) * BITS


def dynamics(scale: str, seed: int) -> Iterator[Row]:
    """Both kinds of network on the plane; what the claims say of the last hidden layer.

    `bound` of a deterministic rule is min(I(X;T), H(Y)).
    """
    steps = log_steps(SIZES[scale].steps, SIZES[scale].times)
    h_y = blahut_arimoto.information(np.eye(2)[symmetric_rule().y] / 4096) * BITS
    worst = 0.0
    for activation in ACTIVATIONS:
        seen = history(scale, seed, activation)
        yield Row("accuracy, held out", float(seen.accuracy[-1]), activation)
        for name in ESTIMATORS:
            for i, layer in enumerate(seen.layers):
                found = path(scale, seed, activation, layer, name)
                for step, (x_t, t_y) in zip(steps, found.tolist(), strict=True):
                    where = f"{activation} {name} {i + 1} {step}"
                    yield Row("x_t", round(x_t, 3), where)
                    yield Row("t_y", round(t_y, 3), where)
                x_t, t_y = found.T
                arm = f"{activation} {name} {i + 1}"
                if name == "bins":
                    out = np.maximum(-t_y, t_y - np.minimum(x_t, h_y)).max()
                    worst = max(worst, float(out))
                    yield Row("below the bound, bits", min(x_t[-1], h_y) - t_y[-1], arm)
                    yield Row("right of the bound, bits", x_t[-1] - t_y[-1], arm)
                if i < len(HIDDEN) - 1:
                    continue
                peak = int(x_t.argmax())
                yield Row(FALL, x_t[peak] - x_t[-1], arm)
                yield Row("peak at share of steps", steps[peak] / steps[-1], arm)
                yield Row("I(T;Y), bits", t_y[0], f"{arm} start")
                yield Row("I(T;Y), bits", t_y[-1], f"{arm} end")
        phases = np.nan_to_num(list(seen.phases.values()), posinf=0.0)  # died: 0
        signal = phases.mean(0)
        for step, value in zip(steps, signal.tolist(), strict=True):
            yield Row("snr", round(value, 4), f"{activation} {step}")
        yield Row("signal to noise", float(signal[:-3].max()), f"{activation} drift")
        yield Row("signal to noise", float(signal[-3:].mean()), f"{activation} end")
        x_t = path(scale, seed, activation, seen.layers[-1], "bins")[:, 0]
        fall = np.flatnonzero(signal >= signal.max() / 2)[-1]
        apart = np.log10(max(steps[fall], 1) / max(steps[x_t.argmax()], 1))
        yield Row("decades between the changes", abs(float(apart)), activation)
        x_t, rate = _against_soft_rule(seen.layers[-1][-1], activation)
        yield Row("above the soft rule's curve, bits", x_t - rate, activation)
    yield Row("decades between the changes", 0.5, "half a decade")
    yield Row(FALL, 2.0, "2 bits")
    yield Row(FALL, 1.0, "1 bit")
    yield Row("0 <= I(T;Y) <= min(I(X;T), H(Y)), bits over", worst)
    yield Row("right of the bound, bits", 0.1, "0.1 bits")
    yield Row("below the bound, bits", 0.1, "0.1 bits")


def bound(scale: str, seed: int) -> Iterator[Row]:
    """Blahut and Arimoto on the soft rule: its ends, and that it never falls."""
    del scale
    rng = np.random.default_rng(seed)
    joint = soft_rule(GAMMA * rng.uniform(0.5, 2)) / 4096
    betas = np.concatenate([[0.5, 0.9], np.geomspace(1.01, 30, 10), [1e5]])
    found = blahut_arimoto.curve(joint, betas)
    whole = blahut_arimoto.information(joint)
    yield Row("I(T;Y) at beta < 1, bits", float(found.t_y[:2].max()) * BITS)
    yield Row("I(X;Y) - I(T;Y) at the last beta, bits", (whole - found.t_y[-1]) * BITS)
    yield Row("step down, bits", float(np.diff(found.t_y).min().clip(max=0)) * BITS)


def controls(scale: str, seed: int) -> Iterator[Row]:
    """Depth, little data, and labels that patterns do not determine."""
    steps = log_steps(SIZES[scale].steps, SIZES[scale].times)
    for depth in (1, 3, 5):
        seen = history(scale, seed, "tanh", depth=depth)
        t_y = path(scale, seed, "tanh", seen.layers[-1], "scaled_bins")[:, 1]
        there = np.flatnonzero(seen.accuracy > 0.95)
        yield Row(
            "steps to 0.95", steps[there[0]] if there.size else np.inf, str(depth)
        )
        yield Row("I(T;Y) by depth, bits", float(t_y[-1]), str(depth))
    few = history(scale, seed, "tanh", share=0.05)
    t_y = path(scale, seed, "tanh", few.layers[-1], "bins")[:, 1]
    yield Row("I(T;Y) on 5 %, bits", float(t_y.max()), "peak")
    yield Row("I(T;Y) on 5 %, bits", float(t_y[-1]), "end")
    none = history(scale, seed, "tanh", share=0.0)
    yield Row("accuracy on random labels - 1/2", float(none.accuracy[-1]) - 0.5)


def _more(metric: str, better: str, worse: str) -> Ordering:
    return Ordering(metric, better, worse, lower_is_better=False)


def claims() -> Iterator[Claim]:
    yield Claim(
        "fitting",
        "I(T;Y) of the last hidden layer rises while it trains (tanh, bins)",
        "a fitting phase",
        _more("I(T;Y), bits", "tanh bins 5 end", "tanh bins 5 start"),
        dynamics,
    )
    for name, said in (
        ("bins", "by 30 bins"),
        ("noisy", "of the noisy channel"),
        ("kde_upper", "by its bound from kernels"),
    ):
        yield Claim(
            f"compression_{name}",
            f"I(X;T) of tanh's last hidden layer, {said}, falls 2 bits from its peak",
            "most of the training compresses",
            _more(FALL, f"tanh {name} 5", "2 bits"),
            dynamics,
        )
        yield Claim(
            f"relu_{name}",
            f"and of ReLU's, {said}, by less than tanh's",
            "not claimed; Saxe et al.: ReLU does not compress",
            Ordering(FALL, f"relu {name} 5", f"tanh {name} 5"),
            dynamics,
        )
    yield Claim(
        "relu_none",
        "I(X;T) of ReLU's last hidden layer, by 30 bins, falls by less than 1 bit",
        "Saxe et al.: ReLU does not compress",
        Ordering(FALL, "relu bins 5", "1 bit"),
        dynamics,
    )
    yield Claim(
        "drift_diffusion",
        "gradients of batches agree less at the end than at their best (tanh)",
        "from drift to diffusion",
        _more("signal to noise", "tanh drift", "tanh end"),
        dynamics,
    )
    yield Claim(
        "coincidence",
        "signal to noise halves within half a decade of steps of I(X;T)'s peak (tanh)",
        "the change of phase starts the compression",
        Ordering("decades between the changes", "tanh", "half a decade"),
        dynamics,
    )
    yield Claim(
        "on_the_bound",
        "the last hidden layer ends within 0.1 bits below the bound (tanh, bins)",
        "converged layers lie on the bound",
        Ordering("below the bound, bits", "tanh bins 5", "0.1 bits"),
        dynamics,
    )
    yield Claim(
        "no_excess",
        "and keeps at most 0.1 bits more of X than a code of the label needs",
        "converged layers lie on the bound",
        Ordering("right of the bound, bits", "tanh bins 5", "0.1 bits"),
        dynamics,
    )
    yield Claim(
        "inequalities",
        "every point of the plane by bins obeys 0 <= I(T;Y) <= min(I(X;T), H(Y))",
        "exact",
        Law("0 <= I(T;Y) <= min(I(X;T), H(Y)), bits over", 1e-4),
        dynamics,
    )
    for name, metric, text in (
        ("curve_start", "I(T;Y) at beta < 1, bits", "the bound starts at 0"),
        ("curve_end", "I(X;Y) - I(T;Y) at the last beta, bits", "it ends at I(X;Y)"),
        ("curve_rises", "step down, bits", "and never falls with beta"),
    ):
        yield Claim(name, text, "exact", Law(metric, 1e-3), bound)
    yield Claim(
        "depth",
        "five hidden layers reach 95 % on held-out patterns in fewer steps than one",
        "more layers need far fewer epochs",
        Ordering("steps to 0.95", "5", "1"),
        controls,
        scales=("full", "paper"),
    )
    yield Claim(
        "little_data",
        "trained on 5 % of the patterns, I(T;Y) ends below its peak",
        "with 5 % of the data compression destroys I(T;Y)",
        _more("I(T;Y) on 5 %, bits", "peak", "end"),
        controls,
        scales=("full", "paper"),
    )
    yield Claim(
        "random_labels",
        "with random labels the accuracy on held-out patterns stays within 0.06 of 1/2",
        "a control",
        Law("accuracy on random labels - 1/2", 0.06),
        controls,
        scales=("full", "paper"),
    )


CLAIMS = tuple(claims())


def plane_figure(rows: Sequence[Recorded]) -> Figure:
    """Mean paths of all layers: a row an activation, a column an estimator."""
    scale = max((r.scale for r in rows), key=("quick", "full", "paper").index)
    points: dict[tuple[str, str, int, int], dict[str, list[float]]] = {}
    for r in rows:
        if r.scale == scale and r.metric in ("x_t", "t_y"):
            activation, name, layer, step = r.arm.split()
            at = points.setdefault((activation, name, int(layer), int(step)), {})
            at.setdefault(r.metric, []).append(r.value)
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes: Any = figure.subplots(
        len(ACTIVATIONS), len(ESTIMATORS), sharex=True, sharey=True
    )
    coloured: Any = None
    for row, activation in zip(axes, ACTIVATIONS, strict=True):
        for axis, name in zip(row, ESTIMATORS, strict=True):
            paths = [
                [
                    (step, np.mean(at["x_t"]), np.mean(at["t_y"]))
                    for (a, n, i, step), at in sorted(points.items())
                    if (a, n, i) == (activation, name, layer)
                ]
                for layer in range(1, len(HIDDEN) + 1)
            ]
            coloured = draw_paths(axis, paths, h_y=0.99916)
            axis.set_title(f"{activation}, {name}", fontsize=9)
        row[0].set_ylabel("I(T;Y), bits")
    for axis in axes[-1]:
        axis.set_xlabel("I(X;T), bits")
    figure.colorbar(coloured, ax=axes, label="step")
    return figure


FIGURES = {"information_plane": plane_figure}
