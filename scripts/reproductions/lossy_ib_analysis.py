"""Information of pictures and of a convolutional network through short codes.

Paper: Butakov, Tolmachev, Malanchuk, Neopryatnaya, Frolov and Andreev, Information
Bottleneck Analysis of Deep Neural Networks via Lossy Compression, arXiv:2305.08013,
ICLR 2024.
Claim: neighbour estimators on codes of a few numbers find the known information between
pictures where the same and neural estimators on pixels do not; in a noisy convolutional
network the planes show phases, the first compression with the fall of the loss.

    python scripts/reproduce.py --system=lossy_ib_analysis

Pictures are compressed by an autoencoder to as many numbers as they have (of soft spots
entropies by neighbours, as in the paper, of rectangles KSG) and by PCA to twice as many
(KSG: see `_through`).
The network: 8, 16 and 32 channels of 3 x 3, then 32 units; noise before every layer, of
0.1 of the root mean square of what enters (the released noise is proportional to each
unit's own value, which gives a unit of 0 no noise, and information without bound).
Fashion-MNIST; I(X;L) of 4 numbers of an autoencoder of X and 4 of PCA of L. quick:
10000 pictures, 4 epochs, 1500 test pictures; full: 60000 pictures, 20 epochs, 4000.
Hardware and time: two CPU cores, float32; quick 4 minutes for five seeds; full is not
yet timed.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array
from matplotlib.figure import Figure
from narrows.data.images import load_images
from narrows.ib import lossy
from narrows.ib.estimators.fitted import fitted
from narrows.ib.estimators.kozachenko_leonenko import (
    kl_information,
    kl_label_information,
)
from narrows.ib.estimators.ksg import ksg
from narrows.ib.image_tasks import IMAGE_TASKS
from narrows.ib.information_plane import log_steps
from narrows.scripts.claims import (
    DATA_DIR,
    Claim,
    Law,
    NotMeasured,
    Ordering,
    Row,
    System,
)
from narrows.scripts.noisy_network import CLASSES, SIGMA, layers_of, train
from narrows.scripts.plane_figure import draw_paths
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="lossy_ib_analysis",
    title="Information Bottleneck Analysis of Deep Neural Networks via Lossy "
    "Compression",
    paper="arXiv:2305.08013, ICLR 2024",
    room="ib/",
    module="narrows.ib.lossy",
    summary="I(X;L) and I(L;Y) of wide noisy layers through codes of a few numbers",
)
TRUTHS = (0.0, 1.0, 2.0, 4.0)  # nats
HARD = TRUTHS[2:]  # at which KSG on pixels and a critic are tried, too
CODES = 4  # numbers in a code of a layer or a picture
POINT = ("x_l", "x_l error", "l_y", "l_y error")


class Size(NamedTuple):
    pairs: int  # of pictures with known information
    code_steps: int  # of training an autoencoder
    train: int
    epochs: int
    batch: int
    measured: int  # test pictures that information is estimated on
    times: int


SIZES = {
    "quick": Size(2500, 2500, 10_000, 4, 128, 1500, 7),
    "full": Size(5000, 6000, 60_000, 20, 256, 4000, 16),
    "paper": Size(5000, 20_000, 60_000, 300, 1024, 10_000, 60),
}


def _drawn(name: str, seed: int, n: int):
    """Pictures to fit codes to, then pairs at every truth: [pairs], [truths, pairs]."""
    keys = jax.random.split(jax.random.key(seed), 1 + len(TRUTHS))
    make = IMAGE_TASKS[name][0]
    alone = make(0.0).sample(keys[0], n)[0]
    pairs = [make(t).sample(k, n) for t, k in zip(TRUTHS, keys[1:], strict=True)]
    return alone, *map(jnp.stack, zip(*pairs, strict=True))


@functools.cache
def _through(method: str, k: int, steps: int):
    """A code of pictures, trained once, and the information between codes of pairs.

    An autoencoder's code of as many numbers as a picture has a density: entropies
    exist, and two numbers a side are few enough for them. PCA's has more, on a curved
    surface without a density, where the difference of entropies has no limit; and of
    codes of four numbers a side it is off by a nat even where there is nothing: there
    KSG counts.
    """
    options = {"steps": steps} if method == "autoencoder" else {}
    estimator = kl_information if (method, k) == ("autoencoder", 2) else ksg

    def run(key, alone, x, y):
        encode = lossy.CODES[method](key, alone, k, **options).encode
        return lax.map(lambda pair: estimator(*map(encode, pair)), (x, y))

    return jax.jit(run)


@jax.jit
def _pixels(x, y):
    return lax.map(lambda pair: ksg(*pair), (x, y))


@jax.jit
def _critic(keys, x, y):
    return lax.map(lambda given: fitted(*given, bound="dv"), (keys, x, y))


def known(scale: str, seed: int) -> Iterator[Row]:
    """Estimates on soft spots and rectangles of 16 x 16 pixels, against the truth.

    All pictures of a task have one law, whatever the information, so one code serves.
    """
    size, key = SIZES[scale], jax.random.key(seed)
    for name, (_, numbers) in IMAGE_TASKS.items():
        alone, x, y = _drawn(name, seed, size.pairs)
        hard = slice(TRUTHS.index(HARD[0]), None)
        keys = jax.random.split(key, len(HARD))
        found = {
            "autoencoder": _through("autoencoder", numbers, size.code_steps)(
                key, alone, x, y
            ),
            "pca": _through("pca", 2 * numbers, 0)(key, alone, x, y),
            "pixels": _pixels(x[hard], y[hard]),
            "network": _critic(keys, x[hard], y[hard]),
        }
        for arm, estimates in found.items():
            truths = TRUTHS[-len(estimates.value) :]
            for i, truth in enumerate(truths):
                value = float(estimates.value[i])
                yield Row(f"{name} at {truth:g}", value, arm)
                yield Row(f"{name} error at {truth:g}", abs(value - truth), arm)
                flagged = float(not estimates.converged[i])
                yield Row(f"{name} flagged at {truth:g}", flagged, arm)
                if truth <= 2:
                    yield Row(f"{name}, error up to 2 nats", value - truth, arm)
    alone, x, y = _drawn("blobs", seed, size.pairs)
    two = slice(TRUTHS.index(2.0), TRUTHS.index(2.0) + 1)
    for method, k in (("pca", 1), ("pca", 2), ("pca", 3), ("random_projection", 3)):
        value = float(_through(method, k, 0)(key, alone, x[two], y[two]).value[0])
        if method == "pca":
            yield Row("blobs at 2, by numbers of PCA", value, str(k))
        else:
            yield Row("blobs at 2, random projection", value, str(k))


@functools.cache
def pictures(scale: str) -> tuple[Array, ...]:
    """Training pictures and labels, and those that are measured; grey in [0, 1]."""
    folder, size = DATA_DIR.get(), SIZES[scale]
    if folder is None:
        raise NotMeasured("no data folder: give --data_dir with fashion_mnist in it")
    try:
        parts = [load_images(folder, "fashion_mnist", s) for s in ("train", "test")]
    except FileNotFoundError as error:
        raise NotMeasured(f"no Fashion-MNIST in {folder}") from error
    (train, test), found = parts, []
    for part, count in ((train, size.train), (test, size.measured)):
        found += [jnp.asarray(part.images[:count], jnp.float32) / 255]
        found += [jnp.asarray(part.labels[:count])]
    return tuple(found)


@jax.jit
def _layer_point(key, code_x, layer, labels):
    """I(X;L) and I(L;Y) of a layer's code of a few numbers, and their errors; nats."""
    code = lossy.pca(key, layer, CODES).encode(layer)
    x_l, l_y = ksg(code_x, code), kl_label_information(code, labels)
    return x_l.value, x_l.standard_error, l_y.value, l_y.standard_error


def network(scale: str, seed: int) -> Iterator[Row]:
    """A convolutional network on Fashion-MNIST, its layers at several times."""
    size = SIZES[scale]
    x, y, shown, labels = pictures(scale)
    steps = size.epochs * len(x) // size.batch
    looks = log_steps(steps, size.times)
    key = jax.random.key(seed)
    params, losses = train(key, x, y, batch=size.batch, looks=looks)
    flat = shown.reshape(len(shown), -1)
    code_x = _encoded(key, x.reshape(len(x), -1), flat, size.code_steps)
    worst, found = 0.0, {}
    for place, step in enumerate(looks):
        at = jax.tree.map(lambda a, i=place: a[i], params)
        logits, layers = layers_of(at, jax.random.fold_in(key, step), shown, SIGMA)
        for i, layer in enumerate(layers):
            point = [float(v) for v in _layer_point(key, code_x, layer, labels)]
            found[i, step] = point
            worst = max(worst, point[2] - np.log(CLASSES))
            for metric, value in zip(POINT, point, strict=True):
                yield Row(metric, round(value, 4), f"{i + 1} {step}")
        if step < looks[-1]:
            yield Row("loss", float(losses[place]), str(step))
    accuracy = float((logits.argmax(1) == labels).mean())
    yield Row("accuracy", accuracy)
    yield Row("I(L;Y) over log 10, nats", worst)
    last = looks[-1]
    yield Row("I(L;Y) of the last layer, nats", found[4, 0][2], "start")
    yield Row("I(L;Y) of the last layer, nats", found[4, last][2], "end")
    drop = int(np.argmin(np.diff(np.asarray(losses)[:-1])))  # steepest between looks
    for i in range(5):
        path = np.array([found[i, s][0] for s in looks])
        yield Row("fall of I(X;L), nats", path.max() - path[-1], str(i + 1))
        falls = np.flatnonzero(np.diff(path) < 0)
        if falls.size:
            yield Row(
                "looks from the loss's drop to I(X;L)'s", falls[0] - drop, str(i + 1)
            )
    at = jax.tree.map(lambda a: a[-1], params)
    for sigma in (0.03, 0.1, 0.3, 1.0):
        _, layers = layers_of(at, key, shown, sigma)
        point = _layer_point(key, code_x, layers[3], labels)
        yield Row("I(X;L) by noise, nats", float(point[0]), f"{sigma:g}")


@functools.cache
def _encoder(steps: int):
    def run(key, x, shown):
        return lossy.autoencoder(key, x, CODES, steps=steps).encode(shown)

    return jax.jit(run)


def _encoded(key, x, shown, steps: int) -> Array:
    """Codes of the pictures shown, by an autoencoder of the training pictures."""
    return _encoder(steps)(key, x, shown)


def bounds(scale: str, seed: int) -> Iterator[Row]:
    """The bound on what PCA loses of a linear Gaussian layer, against closed forms."""
    del scale
    rng = np.random.default_rng(seed)
    d, noise = 12, 0.05
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    spectrum = 2.0 ** -np.arange(d)
    total = (turn * (spectrum + noise)) @ turn.T

    def information(basis):
        inside = basis.T @ total @ basis
        own = noise * np.eye(basis.shape[1])
        return (np.linalg.slogdet(inside)[1] - np.linalg.slogdet(own)[1]) / 2

    draws = rng.multivariate_normal(np.zeros(d), total, size=4000).astype(np.float32)
    worst = np.inf
    for k in range(1, d + 1):
        code = lossy.pca(jax.random.key(seed), jnp.asarray(draws), k)
        basis = np.asarray(code.encode(jnp.eye(d)) - code.encode(jnp.zeros((1, d))))
        mse = np.trace(total) - np.trace(basis.T @ total @ basis)
        gap = information(np.eye(d)) - information(basis)
        limit = lossy.projection_gap(max(mse, 1e-12), d - k, noise) if k < d else 0.0
        worst = min(worst, limit - gap)
        yield Row("bound less loss, nats", limit - gap, str(k))
    yield Row("loss over its bound, nats", max(-worst, 0.0))


def claims() -> Iterator[Claim]:
    for name, text in (("blobs", "soft spots"), ("rectangles", "rectangles")):
        for code, how in (("autoencoder", "autoencoders'"), ("pca", "PCA's")):
            yield Claim(
                f"{name}_{code}",
                f"{how} codes of {text} give the known information to 0.15 nats, up "
                "to 2 nats",
                "tracks known information on images of 16 x 16",
                Law(f"{name}, error up to 2 nats", 0.15, code),
                known,
            )
        for arm, said in (("pixels", "KSG on pixels"), ("network", "a trained critic")):
            for truth in (2, 4):
                yield Claim(
                    f"{name}_{arm}_{truth}",
                    f"at {truth} nats of {text} autoencoders' codes err less than "
                    f"{said}",
                    "direct k-NN and MINE do not track it",
                    Ordering(f"{name} error at {truth}", "autoencoder", arm),
                    known,
                )
    for k in (1, 2):
        yield Claim(
            f"numbers_{k + 1}",
            f"{k + 1} numbers of PCA hold more of soft spots than {k}",
            "more latent numbers, less error",
            Ordering(
                "blobs at 2, by numbers of PCA",
                str(k + 1),
                str(k),
                lower_is_better=False,
            ),
            known,
        )
    yield Claim(
        "gap_bound",
        "what PCA loses of a linear Gaussian layer is within the bound by its error",
        "an error bound by the reconstruction",
        Law("loss over its bound, nats", 1e-4),
        bounds,
    )
    yield Claim(
        "fitting",
        "I(L;Y) of the last layer rises while it trains",
        "a fitting phase",
        Ordering(
            "I(L;Y) of the last layer, nats", "end", "start", lower_is_better=False
        ),
        network,
    )
    yield Claim(
        "label_limit",
        "no layer holds more of the label than log 10",
        "exact",
        Law("I(L;Y) over log 10, nats", 0.0),
        network,
        note="The row is at most 0 where the law holds.",
    )
    yield Claim(
        "noise",
        "more injected noise leaves less I(X;L) in the dense layer",
        "I(X;L) is set by the noise",
        Ordering("I(X;L) by noise, nats", "1", "0.03"),
        network,
    )


CLAIMS = tuple(claims())


def figure(rows: Sequence[Recorded]) -> Figure:
    """Estimates against known information, and the layers' planes."""
    scale = max((r.scale for r in rows), key=("quick", "full", "paper").index)
    rows = [r for r in rows if r.scale == scale]
    made = Figure(figsize=(11, 3.5), layout="constrained")
    *known_axes, plane = made.subplots(1, 3)
    for axis, name in zip(known_axes, IMAGE_TASKS, strict=True):
        axis.plot([0, TRUTHS[-1]], [0, TRUTHS[-1]], color="0.7")
        for arm in ("autoencoder", "pca", "pixels", "network"):
            found = [
                (truth, [r.value for r in rows if r.arm == arm and r.metric == metric])
                for truth in TRUTHS
                for metric in (f"{name} at {truth:g}",)
            ]
            found = [(truth, values) for truth, values in found if values]
            if found:
                truths, values = zip(*found, strict=True)
                middle, spread = ([f(v) for v in values] for f in (np.mean, np.std))
                axis.errorbar(truths, middle, spread, marker=".", label=arm)
        axis.set(xlabel="known I, nats", ylabel="estimate, nats", title=name)
        axis.legend()
    points: dict[tuple[int, int], dict[str, list[float]]] = {}
    for r in rows:
        if r.metric in ("x_l", "l_y"):
            layer, step = map(int, r.arm.split())
            points.setdefault((layer, step), {}).setdefault(r.metric, []).append(
                r.value
            )
    paths = [
        [
            (step, float(np.mean(at["x_l"])), float(np.mean(at["l_y"])))
            for (i, step), at in sorted(points.items())
            if i == layer
        ]
        for layer in range(1, 6)
    ]
    if any(paths):
        coloured: Any = draw_paths(plane, paths, h_y=float(np.log(CLASSES)))
        made.colorbar(coloured, ax=plane, label="step")
    plane.set(xlabel="I(X;L), nats", ylabel="I(L;Y), nats", title="network")
    return made


FIGURES = {"lossy_ib_analysis": figure}
