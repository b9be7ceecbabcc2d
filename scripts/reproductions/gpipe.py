"""A pipeline whose stages and microbatches change nothing but time and memory.

Paper: Y. Huang et al., "GPipe: Efficient Training of Giant Neural Networks using
Pipeline Parallelism", arXiv:1811.06965, NeurIPS 2019.
Claim: any row of layers can be cut over K devices and a batch into M microbatches; the
update is that of the whole batch, all but (K - 1) / (M + K - 1) of the time is work,
which is negligible for M >= 4 K, and a device keeps N + (L / K) (N / M) activations.

    JAX_NUM_CPU_DEVICES=8 python scripts/reproduce.py --system=gpipe

Expected: gradients equal to 1e-6, the bubble exact as a rational, memory that falls
with M. Times are simulated: 8 devices on 2 cores have none of their own.
Hardware and time: a CPU simulating 8 devices; quick and full 2 minutes.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.models.transformer import TransformerConfig
from narrows.parallel.layout import Layout
from narrows.parallel.partition import balanced, by_cumulative_cost, cost_of
from narrows.parallel.pipeline import pipeline
from narrows.parallel.pipeline_simulator import simulate
from narrows.parallel.schedules import closed_form, gpipe, make_schedule
from narrows.scripts.claims import Claim, Law, NotMeasured, Ratio, Row, System
from narrows.scripts.layout_curves import compare, mesh_of
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="gpipe",
    title="GPipe: Efficient Training of Giant Neural Networks using Pipeline "
    "Parallelism",
    paper="arXiv:1811.06965, NeurIPS 2019",
    room="parallel/",
    module="narrows.parallel.pipeline",
    summary="layers over stages, microbatches in a ring, by plain differentiation",
)
LAYERS, WIDTH = 8, 16
DECODER = TransformerConfig(
    vocab_size=256, depth=4, width=32, heads=4, mlp_width=64, tied=True
)
# Throughput over that of K = 2, M = 1 at M = 32 (the paper's Table 2), by K.
TRANSFORMER_48 = {2: 1.8, 4: 3.4, 8: 6.3}
AMOEBANET = {2: 1.21, 4: 1.84, 8: 3.48}


def draw(rows: int, seed: int):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "up": jax.random.normal(keys[0], (LAYERS, WIDTH, 4 * WIDTH)) / WIDTH**0.5,
        "down": jax.random.normal(keys[1], (LAYERS, 4 * WIDTH, WIDTH)) / 8,
    }
    x, target = jax.random.normal(keys[2], (2, rows, WIDTH))
    return params, x, target


def layers(params, x):
    """L residual blocks, of which every one keeps 4 times its input inside."""

    def layer(x, own):
        return x + jax.nn.gelu(x @ own["up"]) @ own["down"] / LAYERS**0.5, None

    return jax.lax.scan(layer, x, params)[0]


def loss_of(microbatches: int | None, remat: bool = True) -> Callable:
    """Mean square error of the row of layers; None: not cut at all."""

    def cell(params, shared, x, sides, stage):
        return layers(params, x), (), ()

    def loss(params, x, target):
        if microbatches is None:
            y = layers(params, x)
        else:
            run = jax.checkpoint(cell) if remat else cell
            y, *_ = pipeline(
                run, params, (), x, microbatches=microbatches, axes=(None,)
            )
        return jnp.mean((y - target) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1))


@functools.cache
def program(microbatches: int | None, stages: int):
    """Compiled once for each mesh, not for each seed."""
    del stages
    return jax.jit(loss_of(microbatches))


def exactness(scale: str, seed: int) -> Iterator[Row]:
    """Loss and gradients over K and M, relative to the largest entry of each."""
    batch = draw(32, seed)
    wanted = program(None, 1)(*batch)
    worst = 0.0
    cuts = [(2, 2), (2, 16), (4, 4), (4, 16), (8, 8)]
    for stages, microbatches in cuts:
        with jax.set_mesh(mesh_of(Layout(stage=stages))):
            got = program(microbatches, stages)(*batch)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
        for a, b in jax.device_get(list(pairs)):
            worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    yield Row("relative error", worst)


def bubbles(scale: str, seed: int) -> Iterator[Row]:
    """The exact simulator against (K - 1) / (M + K - 1), for times drawn at random."""
    rng = np.random.default_rng(seed)
    worst = negligible = Fraction(0)
    for k, m in itertools.product(range(1, 17), (1, 2, 4, 8, 32, 128)):
        tf, tb = (Fraction(int(n), 7) for n in rng.integers(1, 50, 2))
        line = simulate(gpipe(k, m), forward=tf, backward=tb)
        wanted = closed_form("gpipe", k, m, 1, tf, tb)
        worst = max(
            worst,
            abs(line.idle_share - Fraction(k - 1, m + k - 1)),
            abs(line.makespan - wanted.makespan),
        )
        if m >= 4 * k:
            negligible = max(negligible, line.idle_share)
    yield Row("difference from the closed form", float(worst))
    yield Row("idle share at M >= 4 K", float(negligible))
    for k, m in itertools.product((2, 4, 8), (1, 4, 32)):
        yield Row(f"throughput M={m}", throughput(k, m), f"K={k}")
    for name, table in (("Transformer-48", TRANSFORMER_48), ("AmoebaNet", AMOEBANET)):
        gaps = [throughput(k, 32) / paper - 1 for k, paper in table.items()]
        yield Row("simulated over the paper's, less one", max(gaps, key=abs), name)


def throughput(k: int, m: int) -> float:
    """Of equal cells over that of K = 2, M = 1; a cell does 1 / (K M) of the work."""

    def time(k, m):
        work = Fraction(1, k * m)  # backward: recomputed, and twice the forward
        return simulate(gpipe(k, m), forward=work, backward=3 * work).makespan

    return float(time(2, 1) / time(k, m))


@functools.cache
def temporary(microbatches: int, remat: bool) -> int:
    """Bytes a device keeps for a gradient of 1024 rows on 4 stages."""
    arrays = draw(1024, 0)
    with jax.set_mesh(mesh_of(Layout(stage=4))):
        compiled = jax.jit(loss_of(microbatches, remat)).lower(*arrays).compile()
    kept = compiled.memory_analysis()
    assert kept is not None
    return kept.temp_size_in_bytes


def memory(scale: str, seed: int) -> Iterator[Row]:
    """The batch stays, the cut gets finer; with and without recomputation."""
    for m in (4, 8, 16, 32):
        for remat in (True, False):
            kept = temporary(m, remat) / 1024
            yield Row(f"KiB M={m}", kept, "recomputed" if remat else "kept")
    yield Row("KiB", temporary(32, True) / 1024, "M=32")
    yield Row("KiB", temporary(4, True) / 1024, "M=4")


def partitions(scale: str, seed: int) -> Iterator[Row]:
    """The dearest cell by the authors' rule over that of the optimal cut."""
    rng = np.random.default_rng(seed)
    ratios, empty = [], 0
    for _ in range(200):
        costs = rng.lognormal(0, 1, rng.integers(16, 64)).tolist()
        cells = int(rng.choice([2, 4, 8]))
        best = max(cost_of(costs, balanced(costs, cells)))
        try:
            ratios.append(max(cost_of(costs, by_cumulative_cost(costs, cells))) / best)
        except ValueError:
            empty += 1
    yield Row("dearest cell", float(np.mean(ratios)), "authors' rule")
    yield Row("dearest cell", 1.0, "optimal")
    yield Row("worst ratio", max(ratios), "authors' rule")
    yield Row("cuts with an empty cell of 200", empty, "authors' rule")


def curves(scale: str, seed: int) -> Iterator[Row]:
    """A transformer with tied embeddings: 20 steps over stages, with other axes too."""
    layouts = ("stage=4", "data=2,tensor=2,stage=2", "data=2,seq=2,stage=2")
    found = compare(DECODER, layouts, seed)
    yield Row("loss after over before", found.learned)
    yield Row("difference of curves", found.gap)


def on_accelerators(scale: str, seed: int) -> Iterator[Row]:
    raise NotMeasured("ImageNet and accelerators that hold 557 M parameters")


CLAIMS = (
    Claim(
        "exact",
        "loss and gradients are those of the batch that is not cut, K and M up to 16",
        "consistent gradient update regardless of the number of partitions",
        Law("relative error", 1e-6),
        exactness,
    ),
    Claim(
        "curve",
        "a transformer on stages, data, tensor and seq has the curve of one device",
        "the same, over a training run with tied embeddings",
        Law("difference of curves", 1e-5),
        curves,
    ),
    Claim(
        "bubble",
        "a device idles (K - 1) / (M + K - 1) of the time, exactly",
        "O((K - 1) / (M + K - 1)), Section 2.3",
        Law("difference from the closed form", 0.0),
        bubbles,
        note="Simulated with exact rationals, K up to 16, M up to 128.",
    ),
    Claim(
        "negligible",
        "at M >= 4 K it idles at most a fifth of the time",
        "'negligible when M >= 4 K'",
        Law("idle share at M >= 4 K", 0.2),
        bubbles,
    ),
    Claim(
        "throughput",
        "equal cells give the throughput of Transformer-48 at M = 32 to 10 %",
        "1.8, 3.4, 6.3 at K = 2, 4, 8 over K = 2, M = 1",
        Law("simulated over the paper's, less one", 0.1, "Transformer-48"),
        bubbles,
        note="Simulated, with free messages and a backward pass of twice the forward.",
    ),
    Claim(
        "throughput_amoebanet",
        "and that of AmoebaNet",
        "1.21, 1.84, 3.48 at K = 2, 4, 8 over K = 2, M = 1",
        Law("simulated over the paper's, less one", 0.1, "AmoebaNet"),
        bubbles,
        note="Its cells cannot be balanced and its messages are large; the simulator "
        "was given neither, as the paper lists no times.",
    ),
    Claim(
        "memory",
        "at one batch and K = 4, M = 32 keeps less than M = 4",
        "N + (L / K) (N / M)",
        Ratio("KiB", "M=32", "M=4", at_most=1.0),
        memory,
    ),
    Claim(
        "recomputation",
        "recomputing a cell from its input keeps at most half at M = 32",
        "O(N L) without, N + (L / K) (N / M) with",
        Ratio("KiB M=32", "recomputed", "kept", at_most=0.5),
        memory,
    ),
    Claim(
        "partition",
        "the authors' rule is within 10 % of the optimal cut, mean of random rows",
        "a heuristic that minimises the variance of the cells' cost",
        Ratio("dearest cell", "authors' rule", "optimal", at_most=1.1),
        partitions,
        note="Costs are log-normal. The rule rounds each end down without looking at "
        "the next layer, and may leave a cell empty.",
    ),
    Claim(
        "imagenet",
        "AmoebaNet with 557 M parameters reaches 84.4 % on ImageNet",
        "84.4 %",
        Ratio("accuracy", "method", "paper", at_least=1.0),
        on_accelerators,
    ),
)


def figure(rows: Sequence[Recorded]) -> Figure:
    """Who works when on 4 devices, 8 microbatches: straight from the simulator."""
    del rows
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    names = {"gpipe": 1, "one_f_one_b": 1, "interleaved": 2}
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, v) in zip(panels, names.items(), strict=True):
        chunk = {"forward": Fraction(1, v), "backward": Fraction(2, v)}
        line = simulate(make_schedule(name, 4, 8, v), **chunk)
        for device, row in enumerate(line.spans):
            for op, start, finish in row:
                color = {"F": ("C0", "C9"), "B": ("C2", "C8")}[op.kind][op.chunk]
                width = float(finish - start)
                place = {"left": float(start), "color": color, "edgecolor": "white"}
                axes.barh(device, width, **place)
                middle = float(start) + width / 2
                style = {"ha": "center", "va": "center", "fontsize": 5}
                axes.text(middle, device, str(op.microbatch + 1), **style)
        axes.set(ylabel="device", yticks=range(4), title=name)
        axes.invert_yaxis()
    panels[-1].set(xlabel="time, in forward passes of a stage (a backward pass: 2)")
    return figure


FIGURES = {"gpipe": figure}
