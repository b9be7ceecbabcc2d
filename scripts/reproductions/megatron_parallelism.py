"""Tensor, pipeline and data parallelism together, and the schedule that fits them.

Paper: D. Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM", arXiv:2104.04473, SC 2021.
Claim: interleaving v chunks of layers on a device divides the pipeline's bubble by v;
1F1B keeps as many microbatches as stages; a tensor-parallel layer sends 8 b s h
(t - 1) / t elements; size, arithmetic and days of training follow closed forms.

    JAX_NUM_CPU_DEVICES=16 python scripts/reproduce.py --system=megatron_parallelism

Expected: bubbles and stashes exact as rationals, bytes exact, sizes of the paper's ten
models within rounding. Throughput needs the cluster and is not measured.
Hardware and time: a CPU simulating 16 devices; minutes at every scale, most of them
compiling.
"""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from narrows.parallel import wire
from narrows.parallel.closed_forms import (
    batch_time,
    gpt_parameters,
    tensor_parallel_sent,
    training_days,
)
from narrows.parallel.layout import Layout
from narrows.parallel.pipeline_simulator import simulate
from narrows.parallel.plan_cost import calibrate
from narrows.parallel.plan_machines import MACHINES, Machine
from narrows.parallel.plan_model import Job, Sizes
from narrows.parallel.plan_search import cost
from narrows.parallel.schedules import closed_form, make_schedule
from narrows.parallel.tensor import split_block, vocabulary_nats
from narrows.scripts.claims import Claim, Law, NotMeasured, Ratio, Row, System
from narrows.scripts.layout_curves import DECODER, compare, curve, mesh_of
from narrows.scripts.layout_table import (
    TABLE,
    TOGETHER,
    farthest,
    text_curve,
    together,
)
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="megatron_parallelism",
    title="Efficient Large-Scale Language Model Training on GPU Clusters Using "
    "Megatron-LM",
    paper="arXiv:2104.04473, SC 2021",
    room="parallel/",
    module="narrows.parallel.schedules",
    summary="tensor, pipeline and data parallelism; 1F1B and its interleaved form",
)
# Billions of parameters, width, layers: the paper's Table 1.
MODELS = (
    (1.7, 2304, 24),
    (3.6, 3072, 30),
    (7.5, 4096, 36),
    (18.4, 6144, 40),
    (39.1, 8192, 48),
    (76.1, 10240, 60),
    (145.6, 12288, 80),
    (310.1, 16384, 96),
    (529.6, 20480, 105),
    (1008.0, 25600, 128),
)
VOCABULARY, POSITIONS = 51200, 2048
# Heads, tensor, stages, GPUs, rows of a batch, teraFLOP/s a GPU: the same table. (What
# is not width, layers, tensor, stages and the speed is as recalled, not looked up.)
MEASURED = (
    (24, 1, 1, 32, 512, 137),
    (32, 2, 1, 64, 512, 138),
    (32, 4, 1, 128, 512, 142),
    (48, 8, 1, 256, 1024, 135),
    (64, 8, 2, 512, 1536, 138),
    (80, 8, 4, 1024, 1792, 140),
    (96, 8, 8, 1536, 2304, 148),
    (128, 8, 16, 1920, 2160, 155),
    (128, 8, 35, 2520, 2520, 163),
    (160, 8, 64, 3072, 3072, 163),
)


def schedules(scale: str, seed: int) -> Iterator[Row]:
    """The exact simulator against the closed forms, for times drawn at random."""
    rng = np.random.default_rng(seed)
    cases = [
        ("one_f_one_b", p, m, 1) for p in range(1, 13) for m in (1, 3, p, 4 * p)
    ] + [
        ("interleaved", p, rounds * p, v)
        for p, rounds, v in itertools.product(range(1, 9), (1, 2, 4), (1, 2, 3, 4))
    ]
    bubble = stash = time = Fraction(0)
    for name, p, m, v in cases:
        tf, tb = (Fraction(int(n), 7) for n in rng.integers(1, 50, 2))
        line = simulate(make_schedule(name, p, m, v), forward=tf / v, backward=tb / v)
        wanted = closed_form(name, p, m, v, tf, tb)
        bubble = max(bubble, abs(line.bubble - Fraction(p - 1, v * m)))
        kept = zip(line.stash, wanted.stash, strict=True)
        stash = max(stash, *(abs(Fraction(n, v) - want) for n, want in kept))
        if v == 1:
            formula = batch_time(m, 1, p, lambda b, t=tf + tb: t)
            time = max(time, abs(line.makespan - formula))
    yield Row("difference of bubbles", float(bubble))
    yield Row("difference of stashes", float(stash))
    yield Row("difference of times", float(time))
    for m in (8, 16, 32, 64, 128):
        for name, v in (("gpipe", 1), ("one_f_one_b", 1), ("interleaved", 4)):
            chunk = {"forward": Fraction(1, v), "backward": Fraction(2, v)}
            line = simulate(make_schedule(name, 8, m, v), **chunk)
            yield Row(f"time a microbatch m={m}", float(line.makespan / m), name)
            yield Row(f"most kept m={m}", max(line.stash) / v, name)


def forms(scale: str, seed: int) -> Iterator[Row]:
    """Sizes of the ten models and days of two runs, against the paper's figures."""
    for billions, h, l in MODELS:
        found = gpt_parameters(l, h, VOCABULARY, POSITIONS) / 1e9
        yield Row("size over the paper's, less one", found / billions - 1)
    runs = ((300e9, 175e9, 1024, 140e12, 34), (450e9, 1008e9, 3072, 163e12, 84))
    for tokens, size, devices, speed, days in runs:
        found = training_days(tokens, size, devices, speed)
        yield Row("days over the paper's, less one", found / days - 1)


def traffic(scale: str, seed: int) -> Iterator[Row]:
    """Bytes of a layer and of the loss, written out by hand, as traced."""
    b, s, h, v = 2, 16, 32, 64
    x, up = jnp.ones((b, s, h)), jnp.ones((h, 4 * h))
    logits, targets = jnp.ones((b, s, v)), jnp.zeros((b, s), int)

    def layer(x, up):
        for _ in range(2):  # attention and mlp are cut alike
            x = split_block(x, lambda x: jnp.tanh(x @ up) @ up.T, "tensor")
        return x

    def nats(logits, targets):
        return vocabulary_nats(logits, targets, "tensor")

    def total(function, in_specs, t, *arguments):
        cut = jax.shard_map(
            function,
            mesh=mesh_of(Layout(tensor=t)),
            in_specs=in_specs,
            out_specs=P(),
        )

        def both(*arguments):
            return jax.value_and_grad(lambda x: cut(x, *arguments[1:]).sum())(
                arguments[0]
            )

        found = wire.jaxpr_collectives(jax.make_jaxpr(both)(*arguments))
        return sum(c.count * c.wire_bytes for c in found)

    for t in (2, 4, 8):
        sent = total(layer, (P(), P(None, "tensor")), t, x, up)
        wanted = 4 * tensor_parallel_sent(b, s, h, t)
        yield Row("difference of a layer's bytes", float(sent / wanted - 1))
        sent = total(nats, (P(None, None, "tensor"), P()), t, logits, targets)
        wanted = 3 * 4 * b * s * 2 * (t - 1) / t
        yield Row("difference of the loss's bytes", sent / wanted - 1)
        whole = v * 4 * b * s * 2 * (t - 1) / t
        yield Row(f"loss's bytes over those of whole logits t={t}", sent / whole)


def curves(scale: str, seed: int) -> Iterator[Row]:
    """20 steps of a small transformer on combinations of axes; what rounding does."""
    layouts = ("data=2,tensor=4", "data=2,tensor=2,stage=2", "tensor=2,stage=4")
    found = compare(DECODER, layouts, seed)
    yield Row("loss after over before", found.learned)
    yield Row("difference of curves", found.gap)
    one = curve(DECODER, "data=1", seed)
    for draw in range(4):
        gap = np.abs(curve(DECODER, "data=1", seed, rounded=draw) / one - 1).max()
        yield Row("difference of curves", float(gap), "one device, one rounding moved")


def table(scale: str, seed: int) -> Iterator[Row]:
    """50 steps on text on every layout of the table; what one rounding does."""
    one = text_curve("data=1", seed)
    yield Row("loss after over before", float(one[-5:].mean() / one[:5].mean()))
    yield Row("layouts", len(TABLE))
    for layout in TABLE:
        found = text_curve(layout, seed)
        yield Row("difference on text", farthest(found, one))
        yield Row(f"difference on text, {layout}", farthest(found, one))
    moved = text_curve("data=1", seed, rounded=0)
    yield Row("difference on text", farthest(moved, one), "one device, one rounding")


def processes(scale: str, seed: int) -> Iterator[Row]:
    """The same curve, four processes of one device each."""
    one = text_curve("data=1", seed)
    for layout, found in together(TOGETHER, seed).items():
        yield Row("difference on text", farthest(found, one))
        yield Row(f"difference on text, {layout}", farthest(found, one))


def modelled(size: tuple, run: tuple, chip: Machine) -> float:
    """TeraFLOP/s a GPU by the cost model, at its best microbatch and chunks."""
    _, h, l = size
    heads, t, p, devices, rows, _ = run
    sizes, data = Sizes(l, h, heads), devices // (t * p)
    layout = Layout(stage=p, data=data, tensor=t)
    speeds = []
    for b, v in itertools.product((1, 2, 4, 8, 16), (1, 2) if p > 1 else (1,)):
        job = Job(
            batch=rows,
            microbatches=max(1, rows // (data * b)),
            chunks=v,
            state=18.0,
            flash=False,
            head_on_last=True,
        )
        if job.microbatch(layout) == b:
            found = cost(sizes, layout, job, chip)
            if found.plan is not None and not found.refused:
                speeds.append(found.plan.hardware * chip.peak / 1e12)
    return max(speeds)


def throughput(scale: str, seed: int) -> Iterator[Row]:
    """The ten rows by the cost model: nothing fitted; one number set by the first."""
    chip = MACHINES["a100"]
    set_by = calibrate(
        chip, lambda chip: modelled(MODELS[0], MEASURED[0], chip), MEASURED[0][-1]
    )
    arms = {"assumed": chip, "by the first row": set_by}
    for arm, machine in arms.items():
        yield Row("share of peak that products reach", machine.matmul, arm)
        for size, run in zip(MODELS, MEASURED, strict=True):
            found = modelled(size, run, machine)
            yield Row(f"teraFLOP/s, {size[0]:g} B", found, arm)
            if arm == "assumed" or run is not MEASURED[0]:
                yield Row("speed over the paper's, less one", found / run[-1] - 1, arm)


def on_a_cluster(scale: str, seed: int) -> Iterator[Row]:
    raise NotMeasured("3072 A100 GPUs")


CLAIMS = (
    Claim(
        "bubble",
        "idle over work is (p - 1) / m for 1F1B, (p - 1) / (v m) interleaved, exactly",
        "Section 2.2",
        Law("difference of bubbles", 0.0),
        schedules,
        note="Simulated in rationals, p up to 12, v up to 4.",
    ),
    Claim(
        "stash",
        "1F1B keeps min(p - s, m) microbatches on device s, interleaved its formula",
        "at most the pipeline's depth",
        Law("difference of stashes", 0.0),
        schedules,
    ),
    Claim(
        "batch_time",
        "a batch takes (b' / b + p - 1) (tf + tb)",
        "Eq. 1",
        Law("difference of times", 0.0),
        schedules,
    ),
    Claim(
        "interleaving",
        "four chunks on each of 8 devices take at most 1 / 1.1 of the time at m = 16",
        "10 % and more of throughput at small batches",
        Ratio("time a microbatch m=16", "interleaved", "one_f_one_b", at_most=1 / 1.1),
        schedules,
        note="Simulated with free messages; interleaving sends v times as many.",
    ),
    Claim(
        "parameters",
        "the formula gives the ten models' sizes to 3 %",
        "Table 1",
        Law("size over the paper's, less one", 0.03),
        forms,
    ),
    Claim(
        "days",
        "and the days of training of 175 B and 1 T parameters to 1 %",
        "34 days on 1024 GPUs, 84 days on 3072",
        Law("days over the paper's, less one", 0.01),
        forms,
        note="From the paper's own operations a second.",
    ),
    Claim(
        "bytes",
        "a tensor-parallel layer sends 8 b s h (t - 1) / t elements, exactly",
        "Section 3.2",
        Law("difference of a layer's bytes", 0.0),
        traffic,
    ),
    Claim(
        "bytes_of_loss",
        "the loss over a cut vocabulary sends three numbers a position, exactly",
        "logits stay where they are",
        Law("difference of the loss's bytes", 0.0),
        traffic,
    ),
    Claim(
        "curve",
        "data, tensor and stages together have the loss curve of one device, to 1e-5",
        "strict optimizer semantics",
        Law("difference of curves", 1e-5),
        curves,
        note="Where it falls short, one device differs from itself by as much after "
        "one rounding of its parameters.",
    ),
    Claim(
        "table",
        "seventeen layouts, over one to four axes, have the loss curve of one device "
        "over 50 steps, to 1e-5",
        "strict optimizer semantics",
        Law("difference on text", 1e-5),
        table,
        note="data, fsdp, tensor, seq (a ring) and stage (a pipeline); 4 axes take 16 "
        "devices.",
    ),
    Claim(
        "processes",
        "so have four processes on loopback, on four layouts",
        "strict optimizer semantics",
        Law("difference on text", 1e-5),
        processes,
    ),
    Claim(
        "speeds_unfitted",
        "a cost model with nothing fitted gives the ten models' speeds to 25 %",
        "Table 1: 135 to 163 teraFLOP/s a GPU",
        Law("speed over the paper's, less one", 0.25, "assumed"),
        throughput,
        note="Predicted from the A100's and its links' rates; no row is measured here.",
    ),
    Claim(
        "speeds",
        "with the products' share of peak set by the first row, the other nine to 10 %",
        "Table 1",
        Law("speed over the paper's, less one", 0.1, "by the first row"),
        throughput,
        note="Predicted. The first row's products are the smallest; larger ones reach "
        "more of the peak, which one share for all cannot say: the two largest models "
        "come out 13 and 15 % too slow.",
    ),
    Claim(
        "throughput",
        "a trillion parameters train at 52 % of peak",
        "163 teraFLOP/s a GPU, 502 petaFLOP/s on 3072",
        Ratio("share of peak", "method", "paper", at_least=1.0),
        on_a_cluster,
    ),
)


def figure(rows: Sequence[Recorded]) -> Figure:
    """Time and memory of three schedules on 8 devices against microbatches."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    starts = ("time a microbatch m=", "most kept m=")
    for axes, start in zip(figure.subplots(1, 2), starts, strict=True):
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            if row.metric.startswith(start):
                found.setdefault(row.arm, {})[int(row.metric[len(start) :])] = row.value
        for (arm, values), style in zip(
            found.items(), ("o-", "s--", "^-"), strict=True
        ):
            axes.plot(*zip(*sorted(values.items()), strict=True), style, label=arm)
        axes.set(xlabel="microbatches m", xscale="log", xticks=(8, 16, 32, 64, 128))
        axes.set_xticks((8, 16, 32, 64, 128), ["8", "16", "32", "64", "128"])
        axes.minorticks_off()
        axes.legend(fontsize=7)
    figure.axes[0].set(ylabel="time a microbatch (work: 3)")
    figure.axes[1].set(ylabel="microbatches kept", yscale="log")
    return figure


FIGURES = {"megatron_parallelism": figure}
