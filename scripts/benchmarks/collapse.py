"""Which tricks keep a codebook alive: all quantisers behind one encoder of pictures.

    python scripts/benchmark.py --suite=collapse
    python scripts/benchmark.py --suite=collapse --arms=plain,vq --collapse_seeds=2

Fashion-MNIST through two convolutions to 7 x 7 positions, a waist, and back. Every arm
has the encoder, decoder, Adam, batches and steps of every other, and its seeds are the
same. Measured on the test pictures after training: usage, the share of codes that any
position of the epoch chose (mean over the indices of a position); error, the mean
squared error over the variance of pixels; bits, the entropy of a position's indices,
summed over them. `plain` has none of the tricks: codes from a normal distribution that
follow averages. `plain+...` adds each: `unit` brings inputs to unit mean square,
`start` puts codes at the k-means of a batch, `revive` splits off dead codes. `vq` is
the default, `plain+unit+revive`. Every line is an arm and a seed:
`--arms` measures them in pieces. An arm of 5 seeds takes about a minute on a CPU core.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from matplotlib.figure import Figure
from narrows.data.images import load_images
from narrows.models.convolution import Decoder, Encoder
from narrows.models.quantize.layer import Quantize
from narrows.models.quantize.table import QUANTIZERS, make_quantizer
from narrows.models.quantize.updates import ema, revive
from narrows.models.quantize.vq import vq
from narrows.scripts import results
from rich.console import Console
from rich.table import Table

CHANNELS, CODE_WIDTH, BATCH, LEARNING_RATE, LOSS_WEIGHT = (16, 32), 16, 32, 2e-3, 0.25
TRICKS = ("plain", "plain+unit", "plain+start", "plain+revive", "vq+start")
ARMS = (*TRICKS, *QUANTIZERS)
EVALUATED = 500  # pictures at a time
STEPS = 250  # of training


class Autoencoder(nnx.Module):
    def __init__(self, arm: str, codes: int, *, rngs: nnx.Rngs):
        self.encoder = Encoder(1, CHANNELS, rngs=rngs)
        self.decoder = Decoder(CHANNELS[::-1], 1, rngs=rngs)
        self.waist = waist(arm, codes, rngs=rngs)  # last: all else is drawn alike


class Measured(NamedTuple):
    usage: float
    error: float
    bits: float


def waist(arm: str, codes: int, *, rngs: nnx.Rngs) -> Quantize:
    name, *tricks = arm.split("+")
    if name == "plain":
        rules = (ema(), revive()) if "revive" in tricks else (ema(),)
        quantizer, unit = vq(CODE_WIDTH, codes, rules=rules), "unit" in tricks
    else:
        quantizer = make_quantizer(name, codes=codes)
        unit = QUANTIZERS[name].unit
    return Quantize(CHANNELS[-1], quantizer, unit=unit, rngs=rngs)


def define(values: flags.FlagValues) -> None:
    text = functools.partial(flags.DEFINE_list, flag_values=values)
    text("arms", list(ARMS), "collapse: " + ", ".join(ARMS))
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    integer("collapse_codes", 1024, "collapse: in a codebook", 2)
    integer("collapse_steps", STEPS, "collapse: of training", 1)
    integer("collapse_seeds", 5, "collapse: seeds of each arm", 1)
    flags.DEFINE_string(
        "images_dir",
        str(results.ROOT.parent / "shared" / "data"),
        "collapse: folder that holds fashion_mnist",
        flag_values=values,
    )


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    """A line for each arm and seed."""
    unknown = set(f.arms) - set(ARMS)
    if unknown:
        raise ValueError(f"arms: {sorted(unknown)} are none of {', '.join(ARMS)}")
    if not (pathlib.Path(f.images_dir) / "fashion_mnist").is_dir():
        raise ValueError(f"images_dir: {f.images_dir} holds no folder fashion_mnist")
    train, test = (
        load_images(f.images_dir, "fashion_mnist", split).images
        for split in ("train", "test")
    )
    for arm in f.arms:
        run = runner(arm, f.collapse_codes, f.collapse_steps)
        for seed in range(f.collapse_seeds):
            found = run(jax.random.key(seed), train, test)
            line = {"arm": arm, "seed": seed, "codes": f.collapse_codes}
            line |= {"steps": f.collapse_steps, "capacity": capacity(arm, line)}
            line |= found._asdict()
            console.print(f"{arm} seed {seed}: {line['usage']:.3f} of codes used")
            yield line


def capacity(arm: str, line: dict[str, Any]) -> float:
    return waist(arm, line["codes"], rngs=nnx.Rngs(0)).capacity


def runner(arm: str, codes: int, steps: int) -> Callable[..., Measured]:
    """(key, train, test) -> Measured, compiled once for all seeds of an arm.

    The loop stays outside of the compiled step: XLA's convolutions on a CPU are many
    times slower inside a compiled loop.
    """
    tx = optax.adam(LEARNING_RATE)
    graph = nnx.graphdef(Autoencoder(arm, codes, rngs=nnx.Rngs(0)))

    @jax.jit
    def step(params, rest, state, images):
        x = scaled(images)

        def loss(params):
            model = nnx.merge(graph, params, rest)
            out = model.waist(model.encoder(x))
            off = jnp.mean((model.decoder(out.z) - x) ** 2) / jnp.var(x)
            return off + LOSS_WEIGHT * out.loss, out.stats

        slope, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(slope, state, params)
        model = nnx.merge(graph, optax.apply_updates(params, updates), rest)
        model.waist.update(stats)
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return params, rest, state

    @jax.jit
    def count(params, rest, images):
        """Squared error, and how often each code was chosen, of some pictures."""
        model, x = nnx.merge(graph, params, rest), scaled(images)
        out = model.waist(model.encoder(x))
        sizes = model.waist.quantizer.sizes
        chosen = out.codes.reshape(-1, len(sizes))
        counts = [jnp.bincount(chosen[:, j], length=k) for j, k in enumerate(sizes)]
        return jnp.sum((model.decoder(out.z) - x) ** 2), counts

    def run(key: jax.Array, train: np.ndarray, test: np.ndarray) -> Measured:
        start, order, seed = jax.random.split(key, 3)
        model = Autoencoder(arm, codes, rngs=nnx.Rngs(seed))
        rows = np.asarray(jax.random.randint(order, (steps, BATCH), 0, len(train)))
        if arm.endswith("+start"):  # as many positions as four batches hold
            first = scaled(train[rows[: min(4, steps)].reshape(-1)])
            model.waist.start(start, model.encoder(first))
        _, params, rest = nnx.split(model, nnx.Param, ...)
        state = tx.init(params)
        for chosen in rows:
            params, rest, state = step(params, rest, state, train[chosen])
        parts = [
            jax.device_get(count(params, rest, test[at : at + EVALUATED]))
            for at in range(0, len(test), EVALUATED)
        ]
        error = sum(square for square, _ in parts) / test.size / np.var(test / 255)
        totals = [np.sum(each, 0) for each in zip(*(c for _, c in parts), strict=True)]
        return Measured(
            float(np.mean([np.mean(total > 0) for total in totals])),
            float(error),
            float(sum(entropy_bits(total) for total in totals)),
        )

    return run


def scaled(images: np.ndarray | jax.Array) -> jax.Array:
    return jnp.asarray(images, jnp.float32) / 255


def entropy_bits(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-np.sum(share * np.log2(share)))


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Means and standard deviations over seeds; usage also at its worst seed."""
    made = Table("arm", "seeds", "usage %", "extreme seeds", "error", "bits", "of")
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        usage, error, bits = (
            np.array([line[name] for line in own]) for name in Measured._fields
        )
        made.add_row(
            arm,
            str(len(own)),
            f"{100 * usage.mean():.1f} ± {100 * usage.std(ddof=len(own) > 1):.1f}",
            f"{100 * usage.min():.1f} to {100 * usage.max():.1f}",
            f"{error.mean():.4f} ± {error.std(ddof=len(own) > 1):.4f}",
            f"{bits.mean():.2f}",
            f"{own[0]['capacity']:.2f}",
        )
    return made


def draw(lines: Sequence[dict[str, Any]]) -> Figure:
    """Usage of each arm, seed by seed; reconstruction against the bits that pass."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    newest = {(x["arm"], x["seed"]): x for x in lines if x["steps"] == STEPS}
    arms = [arm for arm in ARMS if any(own == arm for own, _ in newest)]
    for place, arm in enumerate(arms):
        own = [x for (name, _), x in newest.items() if name == arm]
        usage, error, bits = (np.array([x[n] for x in own]) for n in Measured._fields)
        colour = f"C{place % 10}"
        left.plot(100 * usage, np.full(len(own), place), ".", color=colour, alpha=0.6)
        left.plot(100 * usage.mean(), place, "|", ms=12, mew=2, color=colour)
        marker = "os^Dvx"[place // 3 % 6]
        right.errorbar(
            bits.mean(),
            error.mean(),
            error.std(ddof=len(own) > 1),
            bits.std(ddof=len(own) > 1),
            marker=marker,
            color=colour,
            lw=0.8,
        )
        right.annotate(arm, (bits.mean(), error.mean()), fontsize=6, color=colour)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    left.set(xlabel="% of codes used over the test pictures", xlim=(-2, 102))
    for asked in (60, 95):
        left.axvline(asked, color="grey", lw=0.8, ls=":")
    right.set(xscale="log", xlabel="bits a position", ylabel="error / variance")
    return figure
