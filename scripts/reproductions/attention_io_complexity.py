"""FlashAttention moves as little as any exact attention may, unless the cache is small.

Paper: B. Saha and C. Ye, arXiv:2402.07443, ICML 2024 (theory; no code was published).
Claim: with a fast memory of M elements and heads of width d, exact attention of length
N moves Theta(N^2 d^2 / M) elements for M >= d^2, which FlashAttention attains, and
Theta(N^2 d / sqrt(M)) below, where tiles of both products beat it.

    python scripts/reproduce.py --system=attention_io_complexity

Expected: every run counts its closed form; slopes -1 and -1/2; the curves cross near
M = 2 d^2; FlashAttention within 15 times the bound and never below; the TPU kernel's
grid moves the model's bytes. Nothing here is a measurement of time: the counts are of a
simulated cache, and of the kernel's own index maps.
Hardware and time: any; quick and full 1 minute.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.models.kernels.attention import io, two_level
from narrows.models.kernels.attention.io import Tile
from narrows.scripts.claims import Claim, Law, NotMeasured, Ratio, Row, System
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="attention_io_complexity",
    title="The I/O Complexity of Attention, or How Optimal is Flash Attention?",
    paper="arXiv:2402.07443, ICML 2024",
    room="models/kernels/",
    module="narrows.models.kernels.attention.io",
    summary="elements between slow and fast memory: closed forms, runs and bounds",
)
FLASH = {"k_outer": io.k_outer, "q_outer": io.q_outer}
TILED = {**FLASH, "standard": io.standard, "small": io.small}


def plain(query, key, value):
    scores = query @ key.T / query.shape[1] ** 0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights @ value / weights.sum(1, keepdims=True)


def runs(scale: str, seed: int) -> Iterator[Row]:
    """Schedules run tile by tile at random sizes, tiles dividing them or not."""
    rng = np.random.default_rng([seed, 1])
    off = error = below = 0.0
    for _ in range(50 if scale == "quick" else 300):
        t, s, h = (int(rng.integers(1, top)) for top in (40, 40, 12))
        tile = Tile(int(rng.integers(1, 14)), int(rng.integers(1, 14)))
        arrays = [rng.normal(size=(n, h)) for n in (t, s, s)]
        found = [
            (moved(t, s, h, tile), getattr(two_level, name))
            for name, moved in TILED.items()
        ]
        done = [
            (closed, run(*arrays, tile, closed.peak), name)
            for (closed, run), name in zip(found, TILED, strict=True)
        ]
        closed = io.ideal(t, s, h)
        done.append((closed, two_level.ideal(*arrays, closed.peak), "ideal"))
        for closed, run, name in done:
            counted = run.moved
            pairs = (counted.reads, closed.reads), (counted.writes, closed.writes)
            off = max(off, abs(counted.peak - closed.peak))
            off = max(off, *(abs(a.get(k, 0) - b[k]) for a, b in pairs for k in b))
            error = max(error, float(np.abs(run.out - plain(*arrays)).max()))
            least = [io.bound_trivial(t, s, h), io.bound(t * s, h, counted.peak)]
            if name in FLASH:
                least.append(io.bound_fused(t * s, h, counted.peak))
            below = max(below, max(least) - counted.elements)
    yield Row("elements off", off)
    yield Row("error", error)
    yield Row("elements below a bound", below)


def flash(n: int, h: int, capacity: int, name: str = "q_outer", inner=None) -> int:
    """Elements moved with the tile that fits best."""
    tile = io.fit(name, n, n, h, capacity, inner=inner)
    return FLASH[name](n, n, h, tile).elements


def small(n: int, h: int, capacity: int) -> int:
    return io.small(n, n, h, io.fit("small", n, n, h, capacity)).elements


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(*np.log(np.array([x, y], float)), 1)[0])


def curves(scale: str, seed: int) -> Iterator[Row]:
    """Traffic against capacity; the width d is the seed's, from 64 to 1024."""
    del scale  # closed forms: nothing to save
    h = 64 * 2 ** (seed % 5)
    n = 2**16 * h  # long: d^2 << M << N d leaves room for a slope
    wide = [h * h * 2**i for i in range(4, 8)]
    yield Row("slope", slope(wide, [flash(n, h, m, inner=1) for m in wide]) + 1)
    blocks = [2**i for i in range(5, int(math.log2(h)) + 1)]  # M << d^2 for 64 h
    tight = [3 * b * b + io.ROW * b for b in blocks]
    moved = [small(n, 64 * h, m) for m in tight]
    yield Row("slope", slope(tight, moved) + 0.5, "small")

    sizes = [int(h * h * 2 ** (i / 8)) for i in range(-24, 105)]  # d^2/8 to N d/8
    yield Row("log2 of crossing over d^2", math.log2(crossing(n, h) / h**2))
    for name, inner in (("k_outer", None), ("q_outer", None), ("q_outer", 1)):
        over = []
        for m in [m for m in sizes if h * h <= m <= n * h / 8]:
            bound = max(io.bound_fused(n * n, h, m), 1)
            over.append(flash(n, h, m, name, inner) / bound)
        arm = name if inner is None else "method"
        yield Row("times the bound", max(over), arm)
        yield Row("share of the bound missed", max(0.0, 1 - min(over)), arm)
    over = [small(n, h, m) / io.bound(n * n, h, m) for m in sizes if m < h * h]
    yield Row("times the bound", max(over), "small")

    for share, where in ((1 / 8, "d^2/8"), (16, "16 d^2")):
        m = int(h * h * share)
        yield Row(f"elements at {where}", flash(n, h, m), "flash")
        yield Row(f"elements at {where}", small(n, h, m), "small")
    name, most = io.best(n, n, h, 4 * n * h)
    extra = most.elements - io.bound_trivial(n, n, h)
    yield Row("extra elements per row", extra / n, "method")
    for m in sizes[::4]:
        x = f"M/d^2={m / h**2:.4f}"
        yield Row(x, flash(n, h, m, "k_outer") / n**2, "FlashAttention")
        yield Row(x, flash(n, h, m) / n**2, "FlashAttention-2")
        yield Row(x, small(n, h, m) / n**2, "tiles of both products")
        yield Row(x, io.bound(n * n, h, m) / n**2, "bound")


def crossing(n: int, h: int) -> float:
    """The capacity from which FlashAttention's order moves less, by bisection."""
    low, high = h * h // 8, 64 * h * h
    while high - low > 1:
        middle = (low + high) // 2
        if flash(n, h, middle) < small(n, h, middle):
            high = middle
        else:
            low = middle
    return float(high)


def kernel(scale: str, seed: int) -> Iterator[Row]:
    """The TPU kernel's grid and index maps beside the model, for random causal calls.

    Two tile sizes a call: the model must also say which of them moves more.
    """
    try:
        from narrows.models.kernels.attention.call import Call, Spec
        from narrows.models.kernels.attention.tpu import tpu
        from narrows.models.kernels.attention.tpu_tile import Tiling
        from narrows.models.kernels.attention.traffic import kernels
    except ImportError as error:
        raise NotMeasured(f"no TPU kernel to read: {error}") from error
    h = 128

    def run(q, k, v, low, high, tiling):
        call, spec = Call(low, high), Spec(h**-0.5)
        return tpu(q, k, v, call, spec, interpret=True, blocks=tiling)

    rng = np.random.default_rng([seed, 2])
    off = wrong = 0
    for _ in range(2 if scale == "quick" else 6):
        t = 256 * int(rng.integers(2, 9))
        x = jnp.zeros((1, t, 1, h), jnp.bfloat16)
        low = jnp.zeros((1, t), jnp.int32)
        high = jnp.arange(1, t + 1, dtype=jnp.int32)[None]
        moved, modelled = [], []
        for block in (128, 256):
            tiling = Tiling(block, block, block, 128)
            (found,) = kernels(run, x, x, x, low, high, tiling=tiling)
            ours = ("query", "key", "value", "outputs")
            moved.append(
                sum(o.bytes for o in found.operands if any(n in o.name for n in ours))
            )
            starts = np.arange(0, t, block)
            visited = starts < starts[:, None] + block
            model = io.q_outer(t, t, h, Tile(block, block), visited, reuse=True)
            modelled.append(model.bytes(WIDTHS))
        off = max(off, *(abs(a - b) for a, b in zip(moved, modelled, strict=True)))
        wrong += (moved[0] > moved[1]) != (modelled[0] > modelled[1])
    yield Row("bytes off", off)
    yield Row("wrong orders", wrong)


WIDTHS = {"query": 2, "key": 2, "value": 2, "out": 2, "statistics": 4}  # bfloat16


def counters(scale: str, seed: int) -> Iterator[Row]:
    """Traffic counters of a device, against the model."""
    del scale, seed
    raise NotMeasured(f"needs a GPU's counters; this is {jax.default_backend()}")


CLAIMS = (
    Claim(
        "counts",
        "five schedules, run in an explicit cache, count their closed forms exactly",
        "the model of the paper: every element moved counts one",
        Law("elements off", 0.0),
        runs,
    ),
    Claim(
        "exact",
        "and each of them returns attention, to 1e-12",
        "exact attention",
        Law("error", 1e-12),
        runs,
    ),
    Claim(
        "no_run_below",
        "no run moves less than a bound that holds for it",
        "lower bounds",
        Law("elements below a bound", 0.0),
        runs,
    ),
    Claim(
        "flash_slope",
        "FlashAttention's traffic falls as 1/M: log-log slope -1 within 0.02",
        "Theta(N^2 d^2 / M) for M >= d^2",
        Law("slope", 0.02),
        curves,
        note="At d^2 << M << N d, with an inner block of one key; its tile leaves the "
        "slope about -1.1 near d^2.",
    ),
    Claim(
        "small_slope",
        "tiles of both products: slope -1/2 within 0.02 for M << d^2",
        "Theta(N^2 d / sqrt(M)) for M < d^2",
        Law("slope", 0.02, "small"),
        curves,
    ),
    Claim(
        "crossing",
        "the curves cross at M between d^2 / 8 and 8 d^2",
        "FlashAttention is not optimal for M < d^2",
        Law("log2 of crossing over d^2", 3.0),
        curves,
    ),
    Claim(
        "below_d2",
        "at M = d^2 / 8 tiles of both products move less",
        "a better algorithm exists for M < d^2",
        Ratio("elements at d^2/8", "small", "flash", at_most=1.0),
        curves,
    ),
    Claim(
        "above_d2",
        "at M = 16 d^2 FlashAttention's order moves less",
        "FlashAttention is optimal for M >= d^2",
        Ratio("elements at 16 d^2", "flash", "small", at_most=1.0),
        curves,
    ),
    Claim(
        "constant",
        "FlashAttention-2's order stays within 32 times the bound from d^2 to N d / 8",
        "optimal up to constants",
        Law("times the bound", 32.0, "q_outer"),
        curves,
    ),
    Claim(
        "constant_k_outer",
        "and FlashAttention's own order too",
        "optimal up to constants",
        Law("times the bound", 32.0, "k_outer"),
        curves,
    ),
    Claim(
        "small_constant",
        "tiles of both products stay within 32 times the bound below d^2",
        "optimal up to constants, for products by sums",
        Law("times the bound", 32.0, "small"),
        curves,
    ),
    Claim(
        "never_below",
        "and it is never below the bound",
        "lower bound",
        Law("share of the bound missed", 0.0, "q_outer"),
        curves,
    ),
    Claim(
        "enough_room",
        "with M = 4 N d the best schedule moves 4 N d and at most one element a row",
        "the trivial bound",
        Law("extra elements per row", 1.0),
        curves,
    ),
    Claim(
        "kernel",
        "the TPU kernel's grid moves the model's bytes, causal, to the byte",
        "not in the paper",
        Law("bytes off", 0.0),
        kernel,
        note="Read from the kernel's index maps; tables of visited tiles are extra.",
    ),
    Claim(
        "which_tile",
        "the model says which of two tile sizes moves more",
        "not in the paper",
        Law("wrong orders", 0.0),
        kernel,
    ),
    Claim(
        "counters",
        "a GPU's traffic counters agree with the model within a tenth",
        "not in the paper",
        Ratio("bytes", "method", "model", at_least=0.9, at_most=1.1),
        counters,
    ),
)


def traffic_figure(rows: Sequence[Recorded]) -> Figure:
    """Elements moved over N^2 against M / d^2, and the bound; width 64."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    arms = ("FlashAttention", "FlashAttention-2", "tiles of both products", "bound")
    for arm in arms:
        found = {
            float(r.metric.split("=")[1]): r.value
            for r in rows
            if r.arm == arm and r.metric.startswith("M/d^2=") and r.seed % 5 == 0
        }
        x = sorted(found)
        axes.loglog(
            x, [found[m] for m in x], "k:" if arm == "bound" else "-", label=arm
        )
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set(xlabel="fast memory M / d²", ylabel="elements moved / N²")
    axes.legend()
    return figure


FIGURES = {"attention_io_complexity": traffic_figure}
