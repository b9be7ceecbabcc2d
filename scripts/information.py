"""Put the layers of a trained model on the information plane, the waist among them.

    python scripts/information.py --workdir=/tmp/waist
    python scripts/information.py --workdir=/tmp/waist --step=2000 --data=book.txt
    python scripts/information.py --workdir=/tmp/concepts
    python scripts/information.py --workdir=/tmp/housing --data=../shared/data

A workdir of train.py: X is a window of text up to one position, T a layer's vector
there, Y the class of the token that comes next: one of the --classes most frequent
here, or all others. Of train_concepts.py and train_split.py: a row or a picture, a
layer, its class. Of train_regression.py: a row, a layer of the run that validates best,
and which of --classes equal parts its label falls into.

T is made coarse, since else every vector would tell its input: by noise of --noise
times the layer's root mean square a number, and by cells of four numbers of PCA.
Numbers are bits for the --rows inputs taken, with 95 % intervals. `shuffled` is I(T;Y)
with the classes in another order: what an estimator finds where there is nothing.

Writes information.json and information.svg into --out_dir, by default the workdir.
Minutes for a small model; exit code 2 for bad input.
"""

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from narrows.data.text import SPLITS, load_corpus, windows
from narrows.ib import lossy
from narrows.ib.estimators.binning import discrete
from narrows.ib.estimators.estimate import Estimate
from narrows.ib.estimators.kozachenko_leonenko import kl_label_information
from narrows.ib.information_plane import BITS, kde, noisy, scaled_bins
from narrows.models.transformer import Transformer
from narrows.scripts import command, results
from narrows.scripts.plane_layers import Layer, Seen, kind_of, seen_by
from narrows.scripts.trained import load_trained, model_of
from rich.console import Console

CHUNK = 50  # windows that go through the model at a time
NUMBERS = 4  # of PCA that cells and neighbours see
PANELS = ("noisy", "kde_upper", "cells")  # estimators with both numbers everywhere


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("workdir", None, "of a trained run (required)", flag_values=f)
    integer("step", None, "checkpoint; default the newest", 0, flag_values=f)
    said = "text, or the folder of data sets; default that of the run"
    text("data", None, said, flag_values=f)
    flags.DEFINE_enum("split", "validation", list(SPLITS), "which part", flag_values=f)
    integer("rows", 2000, "windows, rows or pictures", CHUNK, flag_values=f)
    said = "next tokens, and all others one more; or parts of a regression's labels"
    integer("classes", 8, said, 1, flag_values=f)
    flags.DEFINE_float("noise", 0.1, "over a layer's rms", 1e-4, flag_values=f)
    text("out_dir", None, "default: the workdir", flag_values=f)
    return f


def main(argv: Sequence[str]) -> int:
    f = define_flags()
    command.parse(f, argv, __doc__)
    console = Console(stderr=True, highlight=False)
    with command.bad_input():
        if f.workdir is None:
            raise ValueError("workdir: give --workdir, the folder of a trained run")
        seen = seen_in(f)
        folder = pathlib.Path(f.out_dir or f.workdir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    layers, labels = seen.layers, seen.labels
    points = []
    for layer in layers:
        for point in on_the_plane(layer, labels, f.noise):
            points.append(point)
            console.print(
                f"{layer.name:>10} {point['estimator']:>10}  I(X;T) "
                f"{_said(point, 'x_t')}  I(T;Y) {_said(point, 't_y')}",
                markup=False,
            )
    shares = np.bincount(labels) / len(labels)
    h_y = float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
    found = {
        "workdir": str(f.workdir),
        "step": seen.step,
        "split": f.split,
        "rows": len(labels),
        "classes": int(labels.max()) + 1,
        "noise": f.noise,
        "unit": "bits",
        "ceiling": float(np.log2(len(labels))),
        "h_y": h_y,
        "points": points,
    }
    (folder / "information.json").write_text(json.dumps(found, indent=1) + "\n")
    figure = drawn(points, h_y)
    FigureCanvasAgg(figure)
    figure.savefig(folder / "information.svg")
    print(folder / "information.json", folder / "information.svg", sep="\n")
    return 0


def seen_in(f: flags.FlagValues) -> Seen:
    """The layers and labels that the flags ask for."""
    if kind_of(f.workdir) != "text":
        folder = results.ROOT.parent / "shared" / "data"
        return seen_by(
            f.workdir,
            data=f.data or (folder if folder.is_dir() else None),
            step=f.step,
            part=f.split,
            rows=f.rows,
            classes=f.classes,
        )
    trained = load_trained(f.workdir, step=f.step)
    run = trained.meta
    corpus = load_corpus(
        run["flags"]["data"] if f.data is None else f.data, tokenizer=run["tokenizer"]
    )
    tokens, following = last_positions(corpus, f.split, run["seq_len"], f.rows)
    model = model_of(trained.state, run["model"])
    labels = classes_of(following, f.classes)
    return Seen(layers_of(model, tokens), labels, int(trained.state.step))


def last_positions(corpus, split: str, length: int, rows: int):
    """Windows of a split, and the token after each; ValueError where there are few."""
    tokens, following = [], []
    for batch in windows(corpus, split, length, batch_size=64, limit=rows):
        whole = batch["mask"].all(1)
        tokens.append(batch["tokens"][whole])
        following.append(batch["targets"][whole, -1])
    tokens, following = np.concatenate(tokens), np.concatenate(following)
    if len(tokens) < CHUNK:
        raise ValueError(
            f"data: {len(tokens)} whole windows of {length} tokens in its {split} "
            "split, but at least 50 are needed; name a longer text with --data"
        )
    count = len(tokens) // CHUNK * CHUNK
    return tokens[:count], following[:count]


def classes_of(tokens: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " n"]:
    """0 for the most frequent token and so on; `count` for all that are rarer."""
    values, shares = np.unique(tokens, return_counts=True)
    order = {int(v): i for i, v in enumerate(values[np.argsort(-shares)][:count])}
    return np.array([order.get(int(t), count) for t in tokens])


def layers_of(model: Transformer, tokens: Int[np.ndarray, "n t"]) -> list[Layer]:
    """Embedding, every block and the waist, at the last position of each window."""
    graph, stack = nnx.split(model.blocks)

    def run(model, stack, tokens):
        config = model.config
        x = jnp.take(model.embed.embedding[...], tokens, axis=0).astype(config.dtype)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if model.position is not None:
            x = x + model.position(positions).astype(config.dtype)
        found = [(x, None)]
        for i in range(config.depth + 1):
            if i == model.waist_at:
                waist = model.waist(x, None)
                x = waist.z
                found.append((x, waist.codes))
            if i < config.depth:
                block = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stack))
                x, _ = block(
                    x,
                    cache=None,
                    positions=positions,
                    segment_ids=None,
                    length=jnp.zeros((), jnp.int32),
                    order="contiguous",
                )
                found.append((x, None))
        return [
            (h[:, -1].astype(jnp.float32), None if c is None else c[:, -1])
            for h, c in found
        ]

    names = [f"block {i + 1}" for i in range(model.config.depth)]
    names.insert(model.waist_at, "waist")
    step = jax.jit(run)
    parts = [
        step(model, stack, jnp.asarray(tokens[i : i + CHUNK]))
        for i in range(0, len(tokens), CHUNK)
    ]
    layers = []
    for place, name in enumerate(("embedding", *names)):
        h, codes = zip(*(part[place] for part in parts), strict=True)
        joined = None if codes[0] is None else jnp.concatenate(codes)
        layers.append(Layer(name, jnp.concatenate(h), joined))
    return layers


def on_the_plane(
    layer: Layer, labels: Int[np.ndarray, " n"], noise: float
) -> Iterator[dict[str, Any]]:
    """A point an estimator that fits the layer, as in the JSON file."""
    y = jnp.asarray(labels)
    key = jax.random.key(0)
    variance = noise**2 * jnp.square(layer.h).mean()
    short = lossy.pca(key, layer.h, min(NUMBERS, layer.h.shape[1])).encode(layer.h)

    def codes(y):
        assert layer.codes is not None
        symbols = layer.codes.reshape(len(layer.h), -1).astype(jnp.int32)
        return discrete(symbols, symbols), discrete(symbols, y[:, None])

    methods = {
        "noisy": lambda y: noisy(key, layer.h, y, noise=variance),
        "kde_upper": lambda y: kde(key, layer.h, y, noise=variance, bound="upper"),
        "cells": lambda y: scaled_bins(key, short, y),
        "neighbours": lambda y: (None, kl_label_information(short, y)),
    }
    if layer.codes is not None:
        methods["codes"] = codes
    for name, method in methods.items():
        x_t, t_y = method(y)
        _, nothing = method(jax.random.permutation(key, y))
        yield {
            "layer": layer.name,
            "estimator": name,
            **_numbers("x_t", x_t),
            **_numbers("t_y", t_y),
            "shuffled": BITS * float(nothing.value),
        }


def _numbers(name: str, found: Estimate | None) -> dict[str, Any]:
    if found is None:
        return {name: None, f"{name}_half": None, f"{name}_converged": None}
    return {
        name: BITS * float(found.value),
        f"{name}_half": 1.96 * BITS * float(found.standard_error),  # 95 % interval
        f"{name}_converged": bool(found.converged),
    }


def _said(point: dict[str, Any], name: str) -> str:
    if point[name] is None:
        return f"{'':14}"
    doubt = "" if point[f"{name}_converged"] else " ?"
    return f"{point[name]:6.2f} ± {point[f'{name}_half']:.2f}{doubt:2}"


def drawn(points: Sequence[dict[str, Any]], h_y: float) -> Figure:
    """A panel an estimator with its intervals; a number beside each layer's point."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3, sharey=True), PANELS, strict=True):
        mine = [p for p in points if p["estimator"] == name]
        for place, p in enumerate(mine):
            style = "s" if p["layer"] == "waist" else "o"
            axis.errorbar(
                p["x_t"], p["t_y"], p["t_y_half"], p["x_t_half"], fmt=style,
                color=f"C{place % 10}", markersize=4, label=p["layer"],
            )  # fmt: skip
        axis.axhline(h_y, color="0.8", linewidth=0.8)
        axis.set(xlabel="I(X;T), bits", title=name)
    figure.axes[0].set_ylabel("I(T;Y), bits")
    figure.axes[-1].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv))
