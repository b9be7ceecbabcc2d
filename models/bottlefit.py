"""A bottleneck injected into a classifier, trained in two stages (arXiv:2201.02693).

The front of a trained classifier gives way to a small `Encoder`, whose few channels are
all that is sent, and a `Decoder` that restores the shape of the front's output. First
both are fitted to the teacher, seen through its frozen tail (`match`); then the student
is tuned on labels and the teacher's logits (`tune`).

Parts are named modules; a `Phase` trains some of them and leaves the others untouched,
their running statistics too. It is what `parallel/step.py` asks of a model: init, loss
and advance, plain sums over rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from .affine import dequantize, grid_of, quantize
from .image_classifier import ConvNorm, Front, Seen, Tail

DECAY = 0.9  # of the running statistics, a step
MATCHES = ("middle", "third", "fourth")
ORDER = ("front", "encoder", "decoder", "tail")  # in which parts are called


class Encoder(nnx.Module):
    """The device's part: pictures to a few channels (the paper's version 2).

    7x7 / 2, norm, ReLU, 3x3 / 2 maximum, norm, ReLU, 2x2 / 2. Height n becomes
    floor(ceil(n / 4) / 2) + 1 for even n / 4, as in 32 -> 5 and 224 -> 29.
    """

    def __init__(self, inputs: int, channels: int, *, width: int = 16, rngs: nnx.Rngs):
        self.read = ConvNorm(inputs, width, 7, stride=2, pad=3, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.0, rngs=rngs)
        self.squeeze = nnx.Conv(
            width,
            channels,
            (2, 2),
            strides=2,
            padding=((1, 1), (1, 1)),
            use_bias=False,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b h w c"], train: bool = False):
        x = nnx.relu(self.read(x, train))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return self.squeeze(nnx.relu(self.norm(x, use_running_average=not train)))


class Decoder(nnx.Module):
    """Four 2x2 convolutions and an average of 2x2: height n becomes n - 1."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(channels, momentum=0.0, rngs=rngs)
        self.layers = nnx.List(
            [
                ConvNorm(channels if i == 0 else width, width, 2, pad=pad, rngs=rngs)
                for i, pad in enumerate((1, 1, 0))
            ]
        )
        self.last = nnx.Conv(
            width, width, (2, 2), padding="VALID", use_bias=False, rngs=rngs
        )

    def __call__(self, z: Float[Array, "b t s k"], train: bool = False):
        z = nnx.relu(self.norm(z, use_running_average=not train))
        for layer in self.layers:
            z = nnx.relu(layer(z, train))
        return nnx.avg_pool(self.last(z), (2, 2), strides=(1, 1))


class Parts(NamedTuple):
    """Arrays of named modules; graphs are kept apart, in `Phase`."""

    params: dict[str, Any]
    stats: dict[str, Any]  # means and variances of normalisation


class Loss(NamedTuple):
    """Sums over rows: see `parallel/step.py`."""

    total: jax.Array
    weight: jax.Array
    sums: dict[str, jax.Array]
    stats: Any


class Phase(NamedTuple):
    init: Callable  # key -> (params, rest)
    loss: Callable  # (params, rest, batch, key) -> Loss
    advance: Callable  # (params, rest, stats) -> (rest, report)
    parts: Callable[[Any, Any], Parts]  # (params, rest) -> all parts, learned or not


def teacher_modules(inputs: int, classes: int, *, rngs: nnx.Rngs, **options):
    front = Front(inputs, rngs=rngs, **options)
    return {"front": front, "tail": Tail(classes, rngs=rngs, **options)}


def student_modules(
    inputs: int, channels: int, classes: int, *, width: int, rngs: nnx.Rngs, **options
):
    """width: channels of the front's output, which the decoder restores."""
    return {
        "encoder": Encoder(inputs, channels, rngs=rngs),
        "decoder": Decoder(channels, width, rngs=rngs),
        "tail": Tail(classes, rngs=rngs, **options),
    }


def split(modules: Mapping[str, nnx.Module]) -> tuple[dict[str, Any], Parts]:
    """Graphs and arrays of modules, in ORDER whatever the order of the mapping."""
    graphs, params, stats = {}, {}, {}
    for name in (name for name in ORDER if name in modules):
        module = modules[name]
        graphs[name], own, other = nnx.split(module, nnx.Param, ...)
        params[name], stats[name] = nnx.as_pure(own), nnx.as_pure(other)
    return graphs, Parts(params, stats)


def call(graph, params, stats, x, train: bool = False):
    """The output of a part, and the statistics it then holds."""
    module = nnx.merge(graph, params, stats)
    out = module(x, train)
    return out, nnx.as_pure(nnx.state(module, nnx.Not(nnx.Param)))


def predict(
    graphs: Mapping[str, Any], parts: Parts, images, *, bits: int | None = None
) -> Float[Array, "b classes"]:
    """Logits of a teacher or a student; with `bits` what is sent is quantised."""
    x = images
    for name, graph in graphs.items():
        x = call(graph, parts.params[name], parts.stats[name], x)[0]
        if name == "encoder" and bits is not None:
            grid = grid_of(x, bits, axes=(1, 2, 3))
            x = dequantize(quantize(x, grid), grid)
    return x.logits


def phase(
    graphs: Mapping[str, Any],
    start: Callable[[jax.Array], Parts],
    objective: Callable[[Any, Seen, Any], tuple[jax.Array, dict[str, jax.Array]]],
    *,
    learn: Sequence[str],
) -> Phase:
    """Train the parts `learn`; the others run with their running statistics.

    start(key) -> the parts to start from. objective(middle, seen, batch) -> (a loss for
    each row, named sums): middle is what the tail was given. batch is a mapping with
    `images` and whatever the objective reads.

    Raises: ValueError where `learn` names no part.
    """
    unknown = set(learn) - set(graphs)
    if unknown or not learn:
        raise ValueError(f"learn: {list(learn)}, but parts are {', '.join(graphs)}")

    def init(key):
        parts = start(key)
        rest = {
            "stats": {name: parts.stats[name] for name in learn},
            "frozen": {
                name: {"params": parts.params[name], "stats": parts.stats[name]}
                for name in graphs
                if name not in learn
            },
        }
        return {name: parts.params[name] for name in learn}, rest

    def joined(params, rest) -> Parts:
        frozen = rest["frozen"]
        return Parts(
            {n: params[n] if n in learn else frozen[n]["params"] for n in graphs},
            {n: rest["stats"][n] if n in learn else frozen[n]["stats"] for n in graphs},
        )

    def loss(params, rest, batch, key) -> Loss:
        del key
        parts = joined(params, rest)
        x, seen = batch["images"], {}
        middle = x
        for name, graph in graphs.items():
            middle = x
            x, stats = call(
                graph, parts.params[name], parts.stats[name], x, name in learn
            )
            if name in learn:
                seen[name] = stats
        rows, sums = objective(middle, x, batch)
        count = jnp.float32(len(rows))
        return Loss(
            rows.sum(),
            count,
            sums,
            {"rows": count, "stats": jax.tree.map(lambda s: count * s, seen)},
        )

    def advance(params, rest, stats):
        del params
        moved = jax.tree.map(
            lambda old, new: DECAY * old + (1 - DECAY) * new / stats["rows"],
            rest["stats"],
            stats["stats"],
        )
        return rest | {"stats": moved}, {}

    return Phase(init, loss, advance, joined)


def classify(middle, seen: Seen, batch):
    """Cross-entropy with the labels, nats."""
    del middle
    nats = optax.softmax_cross_entropy_with_integer_labels(seen.logits, batch["labels"])
    return nats, {"correct": _correct(seen.logits, batch["labels"])}


def match(layers: Sequence[str] = MATCHES):
    """Squared distance to the teacher, summed over `layers` of MATCHES (Equation 2).

    All three are generalised head network distillation; ("middle",) alone is head
    network distillation. The batch holds the teacher's layers by name.
    """
    if not layers or not set(layers) <= set(MATCHES):
        raise ValueError(f"layers: {layers}, but allowed are {', '.join(MATCHES)}")

    def objective(middle, seen: Seen, batch):
        ours = {"middle": middle, "third": seen.third, "fourth": seen.fourth}
        for name in layers:
            if ours[name].shape != batch[name].shape:
                raise ValueError(
                    f"{name}: the student's is {ours[name].shape}, the teacher's "
                    f"{batch[name].shape}: give pictures of 32 k pixels"
                )
        rows = sum(
            jnp.sum((ours[name] - batch[name]) ** 2, (1, 2, 3)) for name in layers
        )
        return rows, {"correct": _correct(seen.logits, batch["labels"])}

    return objective


def tune(alpha: float = 0.5, temperature: float = 1.0):
    """alpha CE + (1 - alpha) T^2 KL(teacher || student), nats; logits over T in KL."""

    def objective(middle, seen: Seen, batch):
        nats, sums = classify(middle, seen, batch)
        ours, theirs = (
            jax.nn.log_softmax(x / temperature) for x in (seen.logits, batch["logits"])
        )
        apart = jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)
        return alpha * nats + (1 - alpha) * temperature**2 * apart, sums

    return objective


def _correct(logits, labels):
    return (logits.argmax(-1) == labels).sum(dtype=jnp.float32)
