"""The same exact attention with less work beside the products, row blocks at will.

Paper: T. Dao, arXiv:2307.08691, ICLR 2024. Its figures are TFLOP/s of A100 and H100;
what is measured here needs no GPU: the orders of both papers in one loop
(`models/kernels/attention/schedules.py`), what they move (`io.py`), and the library's
blockwise form on a CPU.
Claim: with the query blocks in the outer loop the output is divided once, one statistic
a row is kept, row blocks are independent, and causal attention leaves out half of the
blocks: about 2x FlashAttention on an A100.

    python scripts/reproduce.py --system=flash_attention_2

Expected: equal to float64 to 2e-6 in either order; a 16th of the divisions at 16 tiles;
no more than 2/3 of the elements moved; causal at 0.5 to 0.6 of the time of full.
Hardware and time: two CPU cores; quick 2 minutes, full 10 minutes. Times are processor
time, the sides taking turns.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.models.kernels.attention import io, two_level
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.reference import reference
from narrows.models.kernels.attention.schedules import blockwise
from narrows.scripts import attention_cost as cost
from narrows.scripts.claims import Claim, Law, NotMeasured, Ratio, Row, System
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="flash_attention_2",
    title="FlashAttention-2: Faster Attention with Better Parallelism "
    "and Work Partitioning",
    paper="arXiv:2307.08691, ICLR 2024",
    room="models/kernels/",
    module="narrows.models.kernels.attention",
    summary="query blocks outside: one division a row, independent row blocks",
)
ORDERS = {"method": "q_outer", "FlashAttention": "k_outer"}
BLOCK = 32


def truth(arrays, causal: bool):
    """The definition in float64."""
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
        b, t, _, h = q.shape
        low = jnp.zeros((b, t), jnp.int32)
        rows = jnp.arange(1, t + 1, dtype=jnp.int32)
        high = jnp.broadcast_to(rows if causal else t, (b, t)).astype(jnp.int32)
        return np.asarray(reference(q, k, v, Call(low, high), Spec(h**-0.5))[0])


def orders(scale: str, seed: int) -> Iterator[Row]:
    """Both orders, causal and not: error, equality of rows to the bit, and counts."""
    rng = np.random.default_rng([seed, 1])
    n = 512 if scale == "quick" else 2048
    arrays = [cost.normal(rng, 1, n, 2, 64) for _ in "qkv"]
    options = {"block_q": BLOCK, "block_k": BLOCK}
    error, tiles = {}, n // BLOCK
    for causal in (False, True):
        expected = truth(arrays, causal)
        for arm, order in ORDERS.items():
            out, _, count = blockwise(*arrays, order=order, is_causal=causal, **options)
            error[arm] = max(
                error.get(arm, 0.0), float(np.abs(np.asarray(out) - expected).max())
            )
            what = "causal" if causal else "full"
            yield Row(f"divided rows over n, {what}", int(count.divided) / n, arm)
            yield Row(f"tiles, {what}", int(count.tiles), arm)
            if causal:
                half = tiles * (tiles + 1) // 2
                yield Row("tiles off n (n + 1) / 2", int(count.tiles) - half, arm)
                yield Row("masked tiles off n", int(count.masked) - tiles, arm)
    for arm, value in error.items():
        yield Row("error", value, arm)
    yield Row("statistics a row", io.work("q_outer", n, n, 64, io.Tile(8, 8)).saved)
    yield Row(
        "statistics a row",
        io.work("k_outer", n, n, 64, io.Tile(8, 8)).saved,
        "FlashAttention",
    )
    q, k, v = arrays
    whole = np.asarray(blockwise(q, k, v, is_causal=True, **options)[0])
    apart = 0
    for start in rng.permutation(n // BLOCK)[:4] * BLOCK:
        some = q[:, start : start + BLOCK]
        out = blockwise(
            some, k, v, is_causal=True, query_offset=jnp.int32(start), **options
        )[0]
        apart += int((np.asarray(out) != whole[:, start : start + BLOCK]).sum())
    yield Row("entries that differ in a bit", apart)


def traffic(scale: str, seed: int) -> Iterator[Row]:
    """What both orders move with the same fast memory, run at small sizes, and as such.

    Full size: n = 4096, width 64 or 128, 98304 elements (192 KB in 16 bits).
    """
    rng = np.random.default_rng([seed, 2])
    off = 0
    for _ in range(10 if scale == "quick" else 50):
        n, h = int(rng.integers(8, 64)), int(rng.integers(1, 9))
        capacity = int(rng.integers(100, 2000))
        arrays = [rng.normal(size=(n, h)) for _ in "qkv"]
        for name, closed in (("q_outer", io.q_outer), ("k_outer", io.k_outer)):
            tile = io.fit(name, n, n, h, capacity)
            run = getattr(two_level, name)(*arrays, tile, capacity)
            off = max(off, abs(run.moved.elements - closed(n, n, h, tile).elements))
    yield Row("elements off", off)
    n, h, capacity = 4096, (64, 128)[seed % 2], 192 * 1024 // 2
    for arm, name in ORDERS.items():
        closed = io.q_outer if name == "q_outer" else io.k_outer
        moved = closed(n, n, h, io.fit(name, n, n, h, capacity))
        yield Row("elements", moved.elements, arm)


def causal_speed(scale: str, seed: int) -> Iterator[Row]:
    """The library's blockwise form: causal beside full, forward and with gradients."""
    n = 2048 if scale == "quick" else 4096
    arrays = cost.operands(seed, n)
    for backward in (False, True):
        runs = {
            arm: functools.partial(
                cost.side("xla", backward=backward, causal=arm == "causal"), *arrays
            )
            for arm in ("causal", "full")
        }
        what = "training" if backward else "forward"
        for arm, seconds in cost.processor_time(runs).items():
            yield Row(f"{what} seconds", seconds, arm)


def order_speed(scale: str, seed: int) -> Iterator[Row]:
    """Both orders of one loop on a CPU, causal, tiles of 128 x 128."""
    n = 1024 if scale == "quick" else 4096
    arrays = cost.operands(seed, n)
    runs = {
        arm: functools.partial(
            blockwise, *arrays, order=order, block_q=128, block_k=128, is_causal=True
        )
        for arm, order in ORDERS.items()
    }
    for arm, seconds in cost.processor_time(runs).items():
        yield Row("seconds", seconds, arm)


def accelerators(scale: str, seed: int) -> Iterator[Row]:
    raise NotMeasured("needs a GPU: scripts/benchmark.py --suite=attention")


def chips(scale: str, seed: int) -> Iterator[Row]:
    raise NotMeasured("needs a TPU compiler: scripts/benchmarks/tpu_budgets.py")


CLAIMS = (
    Claim(
        "exact",
        "query blocks outside: within 2e-6 of float64, causal and full",
        "the same exact output",
        Law("error", 2e-6),
        orders,
    ),
    Claim(
        "exact_k_outer",
        "and FlashAttention's order too",
        "the same exact output",
        Law("error", 2e-6, "FlashAttention"),
        orders,
    ),
    Claim(
        "independent",
        "row blocks run apart are equal to the bit",
        "the forward pass is parallel over row blocks",
        Law("entries that differ in a bit", 0.0),
        orders,
    ),
    Claim(
        "divisions",
        "rows are divided once; FlashAttention divides them at every tile",
        "no rescaling of both terms at each step",
        Ratio("divided rows over n, full", "method", "FlashAttention", at_most=1 / 16),
        orders,
    ),
    Claim(
        "statistics",
        "one number a row is kept for the backward pass in place of two",
        "only the logsumexp is stored",
        Ratio("statistics a row", "method", "FlashAttention", at_most=0.5),
        orders,
    ),
    Claim(
        "skipping",
        "causal attention visits n (n + 1) / 2 of n^2 square tiles",
        "about half of the blocks are left out",
        Law("tiles off n (n + 1) / 2", 0.0),
        orders,
    ),
    Claim(
        "one_mask",
        "and masks one tile of each row of tiles",
        "only one block a row needs the mask",
        Law("masked tiles off n", 0.0),
        orders,
    ),
    Claim(
        "traffic_counts",
        "both orders, run in an explicit cache, move what the model says",
        "not in the paper",
        Law("elements off", 0.0),
        traffic,
    ),
    Claim(
        "traffic",
        "with the same fast memory the query-outer order moves at most 0.7 as much",
        "fewer reads and writes of the output",
        Ratio("elements", "method", "FlashAttention", at_most=0.7),
        traffic,
    ),
    Claim(
        "causal",
        "causal forward takes at most 0.65 of the processor time of full",
        "1.7-1.8x over attention without the mask",
        Ratio("forward seconds", "causal", "full", at_most=0.65),
        causal_speed,
    ),
    Claim(
        "causal_training",
        "and with gradients",
        "1.7-1.8x over attention without the mask",
        Ratio("training seconds", "causal", "full", at_most=0.65),
        causal_speed,
    ),
    Claim(
        "faster_order",
        "the same loop with the query blocks outside takes less time on a CPU",
        "about 2x FlashAttention, A100",
        Ratio("seconds", "method", "FlashAttention", at_most=1.0),
        order_speed,
        note="On a CPU the order alone, in one loop; warps and thread blocks, to which "
        "the paper owes most of its gain, have no counterpart.",
    ),
    Claim(
        "gpu",
        "TFLOP/s forward on a GPU above FlashAttention's",
        "up to 230 TFLOP/s, 73 % of an A100; FlashAttention 25-40 %",
        Ratio("tflops", "method", "FlashAttention", at_least=1.0),
        accelerators,
    ),
    Claim(
        "tpu",
        "larger tiles take fewer instruction bundles of a TPU for the same call",
        "not in the paper",
        Ratio("bundles", "1024 wide", "128 wide", at_most=0.25),
        chips,
    ),
)


def order_figure(rows: Sequence[Recorded]) -> Figure:
    """Rows divided and elements moved by the two orders, over ours."""
    figure = Figure(figsize=(5, 2.5), layout="constrained")
    axes = figure.subplots()
    metrics = ("divided rows over n, full", "statistics a row", "elements", "seconds")
    labels = ("divisions", "statistics kept", "elements moved", "processor time")
    ratios = []
    for metric in metrics:
        mean = {
            arm: np.mean([r.value for r in rows if (r.metric, r.arm) == (metric, arm)])
            for arm in ORDERS
        }
        ratios.append(mean["FlashAttention"] / mean["method"])
    axes.barh(labels, ratios)
    axes.set(xlabel="FlashAttention's order over FlashAttention-2's", xscale="log")
    axes.axvline(1, color="black", linewidth=0.5)
    return figure


FIGURES = {"flash_attention_2": order_figure}
