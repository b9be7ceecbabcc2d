"""FlashAttention-2 on other units: two tile sizes, a small mask, sums in tiles.

Paper: H. Lin, X. Yu, K. Zhao, L. Hou et al., arXiv:2410.16663, 2024 (no code found).
Its figures are those of Ascend NPUs and V100 GPUs; here three of its strategies are
held to what they promise, exactly, and a CPU stands for the device of few resources.
Claim: one softmax step for a large tile whose products run in small ones; a triangle of
twice the tile's side in place of the mask; the projection's sum over devices cut into
tiles that travel while the next is computed.

    python scripts/reproduce.py --system=fast_attention

Expected: equal results, a quarter of the rescalings with tiles of 4 to 1; no difference
between views and masks; one reduction a tile in the compiled program of four devices;
attention of 2048 tokens 3 to 6 times cheaper than plain on a CPU.
Hardware and time: two CPU cores, four simulated devices; quick 2 minutes, full 5.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from matplotlib.figure import Figure
from narrows.models.kernels.attention.schedules import blockwise, kind, triangle, view
from narrows.models.kernels.attention.tiles import FULL, PART, SKIP
from narrows.parallel.tiled_reduce import finish, project
from narrows.parallel.wire import collectives
from narrows.scripts import attention_cost as cost
from narrows.scripts.claims import Claim, Law, NotMeasured, Ratio, Row, System
from narrows.scripts.results import ROOT, Recorded

SYSTEM = System(
    slug="fast_attention",
    title="FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs",
    paper="arXiv:2410.16663, preprint 2024",
    room="models/kernels/",
    module="narrows.models.kernels.attention.schedules",
    summary="two-level tiling, tiling-mask and tiling-AllReduce",
)
TILES, DEVICES = (1, 2, 4, 8), 4


def two_levels(scale: str, seed: int) -> Iterator[Row]:
    """Tiles of 256 keys in pieces of 64, beside tiles of 64."""
    rng = np.random.default_rng([seed, 1])
    n = 512 if scale == "quick" else 2048
    arrays = [cost.normal(rng, 1, n, 2, 64) for _ in "qkv"]
    one, _, of_one = blockwise(*arrays, block_q=64, block_k=64)
    two, _, of_two = blockwise(*arrays, block_q=64, block_k=256, inner=64)
    yield Row("difference", float(abs(one - two).max()))
    yield Row("pieces off", int(of_one.products) - int(of_two.products))
    for arm, count in (("one level", of_one), ("method", of_two)):
        yield Row("rescalings a row", int(count.rescaled) / n, arm)
        yield Row("hand-overs", 2 * int(count.tiles), arm)  # to the softmax and back
    expected = int(of_one.rescaled) - 4 * int(of_two.rescaled)
    yield Row("rescalings off a quarter", expected)
    over = int(of_one.tiles) - 4 * int(of_two.tiles)
    yield Row("hand-overs off a quarter", over)
    for inner in (64, 128, 256):
        *_, count = blockwise(*arrays, block_q=64, block_k=256, inner=inner)
        yield Row("rescalings of 256 keys", int(count.rescaled), f"inner {inner}")


def tiling_mask(scale: str, seed: int) -> Iterator[Row]:
    """Views of the small triangle at random places, and attention masked by them."""
    rng = np.random.default_rng([seed, 2])
    wrong = 0
    for _ in range(300 if scale == "quick" else 3000):
        rows, keys = (int(rng.integers(1, 20)) for _ in "rk")
        r0, c0 = (int(rng.integers(0, 60)) for _ in "rc")
        seen = c0 + np.arange(keys) <= (r0 + np.arange(rows))[:, None]
        expected = FULL if seen.all() else PART if seen.any() else SKIP
        found = int(kind(r0 - c0, rows, keys))
        wrong += found != expected
        if expected == PART:
            part = view(triangle(max(rows, keys)), r0 - c0, rows, keys)
            wrong += int((np.asarray(part) != seen).sum())
    yield Row("wrong entries or kinds", wrong)
    arrays = cost.operands(seed, 512)
    options = {"block_q": 64, "block_k": 64, "is_causal": True}
    masks = [blockwise(*arrays, tiling_mask=m, **options)[0] for m in (False, True)]
    yield Row("difference", float(abs(masks[0] - masks[1]).max()))


@functools.cache
def mask_bytes(scale: str) -> tuple[Row, ...]:
    lengths = (1024, 2048, 4096) if scale == "quick" else (1024, 2048, 4096, 8192)
    options = {"block_q": 128, "block_k": 128, "is_causal": True, "tiling_mask": True}
    call = functools.partial(blockwise, **options)
    found = [cost.temporaries(call, n) for n in lengths]
    plain = [cost.temporaries(cost.side("jax.nn"), n) for n in lengths]
    rows = [Row("slope less 1", cost.slope(lengths, found) - 1)]
    for arm, sizes in (("method", found), ("plain", plain)):
        for n, size in zip(lengths, sizes, strict=True):
            rows.append(Row(f"temporary bytes n={n}", size, arm))
    return tuple(rows)


def mask_memory(scale: str, seed: int) -> Iterator[Row]:
    del seed
    yield from mask_bytes(scale)


@functools.cache
def reductions(scale: str) -> tuple[tuple[str, float, str], ...]:
    """`in_tiles` on four simulated devices, which only a fresh process can have."""
    del scale
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    more = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}
    run = "from narrows.scripts.reproductions import fast_attention as f; f.in_tiles()"
    child = subprocess.run(
        [sys.executable, "-c", run],
        env=os.environ | more | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(child.stderr)
    return tuple((m, v, a) for m, v, a in json.loads(child.stdout.splitlines()[-1]))


def in_tiles() -> None:
    """Print the rows of a projection that four devices sum up in tiles."""
    P = jax.sharding.PartitionSpec
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((DEVICES,), ("tensor",), axis_types=auto)
    rng = np.random.default_rng(0)
    x, w = cost.normal(rng, 512, 512), cost.normal(rng, 512, 256)
    rows, whole = [], np.asarray(x @ w)
    for tiles in TILES:
        run = jax.jit(
            jax.shard_map(
                functools.partial(project, axis_name="tensor", tiles=tiles),
                mesh=mesh,
                in_specs=(P(None, "tensor"), P("tensor", None)),
                out_specs=P(),
            )
        )
        compiled = run.lower(x, w).compile()
        found = collectives(compiled, mesh)
        error = np.abs(np.asarray(compiled(x, w)) - whole).max()
        off = sum(c.count for c in found) - tiles
        size = sum(c.bytes * c.count for c in found) - whole.nbytes
        rows.append(("difference", float(error), f"{tiles} tiles"))
        rows.append(("reductions off tiles", float(abs(off)), f"{tiles} tiles"))
        rows.append(("bytes off", float(abs(size)), f"{tiles} tiles"))
    for metric in ("difference", "reductions off tiles", "bytes off"):
        # two tiles are one turn of the loop, which the compiler inlines and merges
        left_out = "2 tiles" if metric == "reductions off tiles" else ""
        worst = max(v for name, v, arm in rows if name == metric and arm != left_out)
        rows.append((metric, worst, "method"))
    print(json.dumps(rows))


def tiled_sum(scale: str, seed: int) -> Iterator[Row]:
    """Compiled once for all seeds; then the time that tiles would take, by events."""
    for metric, value, arm in reductions(scale):
        yield Row(metric, value, arm)
    rng = np.random.default_rng([seed, 4])
    off = 0.0
    for _ in range(1000):
        n = int(rng.integers(1, 64))
        c, r = rng.uniform(0.01, 10, 2)
        formula = c + (n - 1) * max(c, r) + r
        off = max(off, abs(finish([c] * n, [r] * n) / formula - 1))
    yield Row("events over formula less 1", off)
    for n in (1, 4, 16, 64):  # computing and reducing take as long, in all 1 + 1
        yield Row("time", finish([1 / n] * n, [1 / n] * n), f"{n} tiles")


def speed(scale: str, seed: int) -> Iterator[Row]:
    """Processor time of attention beside plain, forward: inference."""
    n, rounds = (2048, 1) if scale == "quick" else (4096, 3)
    arrays = cost.operands(seed, n)
    for causal in (True, False):
        runs = {
            arm: functools.partial(cost.side(name, causal=causal), *arrays)
            for arm, name in cost.SIDES.items()
        }
        found = cost.processor_time(runs, rounds)
        found["best plain"] = min(found["our plain"], found["jax.nn"])
        what = "causal" if causal else "full"
        for arm, seconds in found.items():
            yield Row(f"{what} seconds", seconds, arm)


def devices(scale: str, seed: int) -> Iterator[Row]:
    raise NotMeasured("needs Ascend NPUs or V100 GPUs, for which JAX has no kernels")


def tiers(scale: str, seed: int) -> Iterator[Row]:
    raise NotMeasured("needs a server with a cache on host and device: not built yet")


CLAIMS = (
    Claim(
        "two_levels",
        "tiles of 256 keys in pieces of 64 give what tiles of 64 give, to 2e-6",
        "two-level tiling changes no result",
        Law("difference", 2e-6),
        two_levels,
    ),
    Claim(
        "rescalings",
        "with a quarter of the rescalings, exactly",
        "one softmax step for each large tile",
        Law("rescalings off a quarter", 0.0),
        two_levels,
    ),
    Claim(
        "hand_overs",
        "and a quarter of the hand-overs between product and softmax units",
        "fewer synchronisations of Cube and Vector units",
        Law("hand-overs off a quarter", 0.0),
        two_levels,
    ),
    Claim(
        "tiling_mask",
        "views of one small triangle are the mask, and the kind of every tile is right",
        "an M-mask of twice the tile's side in place of the whole mask",
        Law("wrong entries or kinds", 0.0),
        tiling_mask,
    ),
    Claim(
        "tiling_mask_exact",
        "attention masked by views is equal to the bit",
        "no change of the result",
        Law("difference", 0.0),
        tiling_mask,
    ),
    Claim(
        "mask_memory",
        "its temporaries grow linearly with the length: slope 1 within 0.15",
        "8 GiB of mask saved at 64K tokens",
        Law("slope less 1", 0.15),
        mask_memory,
    ),
    Claim(
        "mask_memory_4096",
        "at 4096 tokens at most a twentieth of plain attention's",
        "memory of the mask",
        Ratio("temporary bytes n=4096", "method", "plain", at_most=0.05),
        mask_memory,
    ),
    Claim(
        "tiled_sum",
        "the projection of sharded heads summed in 1, 2, 4 and 8 tiles is the whole's",
        "tiling-AllReduce changes no result",
        Law("difference", 2e-4),
        tiled_sum,
        note="Sums of 512 products of size one, against one device.",
    ),
    Claim(
        "reductions",
        "the compiled program of four devices has one reduction a tile: 1, 4 and 8",
        "the AllReduce of a tile overlaps with the next tile",
        Law("reductions off tiles", 0.0),
        tiled_sum,
        note="Falls short for two tiles: the compiler merges their reductions.",
    ),
    Claim(
        "bytes",
        "and the same bytes in all",
        "the AllReduce is cut, not repeated",
        Law("bytes off", 0.0),
        tiled_sum,
    ),
    Claim(
        "overlap_model",
        "tile by tile, events end when c + (n - 1) max(c, r) + r says",
        "the cost model of the overlap, as reconstructed",
        Law("events over formula less 1", 1e-9),
        tiled_sum,
    ),
    Claim(
        "overlap",
        "in that model 16 tiles take at most 0.55 of the time where c = r",
        "communication is hidden behind computation",
        Ratio("time", "16 tiles", "1 tiles", at_most=0.55),
        tiled_sum,
        note="A model of events, not a measurement: simulated devices share two cores.",
    ),
    Claim(
        "cpu",
        "on a CPU, causal inference takes at most half the time of plain attention",
        "up to 10.7x over standard attention on an Ascend 910B",
        Ratio("causal seconds", "method", "best plain", at_most=0.5),
        speed,
    ),
    Claim(
        "cpu_full",
        "and without a causal mask less time",
        "1.43x over xformers' FlashAttention on a V100",
        Ratio("full seconds", "method", "best plain", at_most=1.0),
        speed,
    ),
    Claim(
        "devices",
        "faster on Ascend NPUs and V100 GPUs",
        "10.7x over standard attention; 1.43x over xformers on V100",
        Ratio("seconds", "method", "standard", at_most=0.1),
        devices,
    ),
    Claim(
        "cooperative",
        "decoding with a part of cache and attention on the host beats uploading",
        "256K tokens on eight V100",
        Ratio("seconds", "method", "upload", at_most=1.0),
        tiers,
    ),
)


def overlap_figure(rows: Sequence[Recorded]) -> Figure:
    """The model's time of n tiles over that of one, where c = r."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    found = {int(r.arm.split()[0]): r.value for r in rows if r.metric == "time"}
    x = sorted(found)
    axes.semilogx(x, [found[n] / found[1] for n in x], "o-", base=2)
    axes.axhline(0.5, color="black", linewidth=0.5)
    axes.set(
        xlabel="tiles", ylabel="time over that of one tile (model)", ylim=(0, 1.05)
    )
    return figure


FIGURES = {"fast_attention": overlap_figure}
