"""A sequence over N devices: attention by a ring, bytes and memory beside the paper's.

Paper: S. Li et al., "Sequence Parallelism: Long Sequence Training from System
Perspective", arXiv:2105.13120, ACL 2023.
Claim: with keys and values sent around a ring, attention over N devices is exact, sends
what tensor parallelism does and needs less memory for long sequences, and N may exceed
the heads; with keys projected to a fixed length nothing is quadratic.

    JAX_NUM_CPU_DEVICES=8 python scripts/reproduce.py --system=ring_attention

Expected: errors of rounding, bytes equal to the closed forms, constant memory of the
online ring. Speed needs accelerators: not measured.
Hardware and time: a CPU simulating 8 devices; 2 minutes at every scale.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from narrows.models.kernels.attention import attention
from narrows.models.transformer import TransformerConfig
from narrows.parallel import wire
from narrows.parallel.all_to_all_heads import (
    all_to_all_attention,
    linformer_attention,
)
from narrows.parallel.closed_forms import layer_memory
from narrows.parallel.full_score_ring import full_score_attention
from narrows.parallel.ring_attention import Ring, ring_attention, ring_values
from narrows.parallel.sequence import ORDERS, Order, arrange, ascend, causal_work
from narrows.parallel.tensor import split_block
from narrows.scripts.claims import Claim, Law, NotMeasured, Ratio, Row, System
from narrows.scripts.layout_curves import compare
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="ring_attention",
    title="Sequence Parallelism: Long Sequence Training from System Perspective",
    paper="arXiv:2105.13120, ACL 2023",
    room="parallel/",
    module="narrows.parallel.ring_attention",
    summary="attention over a cut sequence, keys and values in a ring",
)
DEVICES = (2, 4, 8)
ROWS, HEADS, WIDTH = 2, 8, 16  # of the small problem; its stream is 128 wide
ENCODER = TransformerConfig(
    vocab_size=256, depth=2, width=32, heads=4, mlp_width=64, causal=False
)
MODEL = "From the paper's own memory model, not from hardware."
CASES = (((8, True, "zigzag"), True), ((4, False, "contiguous"), False))  # packed?
BLOCK = functools.partial(attention, return_residual=True)
whole = functools.partial(attention, implementation="reference")


def plain(q, k, v, *, axis_name, order: Order, segment_ids, is_causal=False):
    """The ring with online softmax, without a backward rule of its own."""
    ring = Ring(axis_name, BLOCK, is_causal, order)
    return ring_values(ring, q, k, v, segment_ids)[0]


METHODS: dict[str, Callable] = {
    "online": functools.partial(ring_attention, block=BLOCK),
    "online, plain derivative": plain,
    "paper": full_score_attention,
    "heads": functools.partial(all_to_all_attention, block=BLOCK),
}


def mesh_of(parts: int, axis: str = "seq"):
    if len(jax.devices()) < parts:
        raise NotMeasured(f"{parts} devices: set JAX_NUM_CPU_DEVICES={parts}")
    devices = jax.devices()[:parts]
    return jax.make_mesh((parts,), (axis,), (AxisType.Auto,), devices=devices)


def over(parts: int, method: str, order: Order = "contiguous", check_vma=False, **rest):
    """A method on so many devices, of whole arrays in ascending order."""

    def run(q, k, v, ids=None):
        def body(q, k, v, ids):
            call = dict(rest, axis_name="seq", order=order, segment_ids=ids)
            return METHODS[method](q, k, v, **call)

        along = P(None, "seq")
        cut = jax.shard_map(
            body,
            mesh=mesh_of(parts),
            in_specs=along,
            out_specs=along,
            check_vma=check_vma,
        )
        moved = jax.tree.map(lambda x: arrange(x, order, parts), (q, k, v, ids))
        return ascend(cut(*moved), order, parts)

    return run


def with_gradients(function: Callable, *operands, d_out):
    out, pull = jax.vjp(function, *operands)
    return out, *pull(d_out)


def draw(length: int, seed: int) -> Any:
    """Queries, keys, values and the output's cotangent; then packed, padded ids."""
    keys = jax.random.split(jax.random.key(seed), 4)
    arrays = [jax.random.normal(k, (ROWS, length, HEADS, WIDTH)) for k in keys]
    ids = np.sort(np.random.default_rng(seed).integers(0, 3, (ROWS, length)), 1)
    ids[:, -length // 5 :] = -1
    return *arrays, jnp.asarray(ids, jnp.int32)


@functools.cache
def compiled(method: str, parts: int, is_causal: bool, order: Order):
    """(q, k, v, d_out, ids) -> output and gradients, many devices' and one's."""
    run = over(parts, method, order, is_causal=is_causal)
    exact = functools.partial(whole, is_causal=is_causal)

    def many(q, k, v, d, ids):
        return with_gradients(lambda *x: run(*x, ids=ids), q, k, v, d_out=d)

    def one(q, k, v, d, ids):
        return with_gradients(lambda *x: exact(*x, segment_ids=ids), q, k, v, d_out=d)

    return jax.jit(many), jax.jit(one)


def exactness(scale: str, seed: int) -> Iterator[Row]:
    """Largest error over output and gradients, over the largest entry of each."""
    *arrays, ids = draw(32, seed)
    for name in METHODS:
        worst = 0.0
        for case, packed in (
            ((8, True, "zigzag"), ids),
            ((4, False, "contiguous"), None),
        ):
            many, one = compiled(name, *case)
            pairs = zip(many(*arrays, packed), one(*arrays, packed), strict=True)
            for a, b in jax.device_get(list(pairs)):
                worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
        yield Row("relative error", worst, name)


@functools.cache
def sent(method: str, parts: int, length: int = 64) -> tuple[float, float]:
    """Bytes that a device sends: forward, and forward and backward together."""
    q, k, v, d_out, _ = draw(length, 0)
    run = over(parts, method, "zigzag", check_vma=True, is_causal=True)

    both = functools.partial(with_gradients, run, d_out=d_out)
    return total_sent(run, q, k, v), total_sent(both, q, k, v)


def total_sent(function: Callable, *arguments) -> float:
    found = wire.jaxpr_collectives(jax.make_jaxpr(function)(*arguments))
    return sum(c.count * c.wire_bytes for c in found)


@functools.cache
def sent_by_tensor_parallelism(parts: int, length: int = 64) -> float:
    """A whole layer: attention by heads and an mlp by hidden units, both ways."""
    d = HEADS * WIDTH
    x = jnp.ones((ROWS, length, d))
    heads, out, up = map(
        jnp.ones, ((3, d, HEADS, WIDTH), (HEADS, WIDTH, d), (d, 4 * d))
    )

    def layer(x, heads, out, up):
        def mix(x):
            q, k, v = jnp.einsum("btd,pdnh->pbtnh", x, heads)
            return jnp.einsum("btnh,nhd->btd", whole(q, k, v), out)

        x = split_block(x, mix, "tensor")
        return split_block(x, lambda x: jax.nn.gelu(x @ up) @ up.T, "tensor")

    cut = jax.shard_map(
        layer,
        mesh=mesh_of(parts, "tensor"),
        in_specs=(P(), P(None, None, "tensor"), P("tensor"), P(None, "tensor")),
        out_specs=P(),
    )
    both = functools.partial(with_gradients, cut, d_out=x)
    return total_sent(both, x, heads, out, up)


def traffic(scale: str, seed: int) -> Iterator[Row]:
    """Bytes a device sends, and their relative difference from the closed forms."""
    forms = {"paper": (2, 8), "online": (2, 6)}  # times (N - 1) chunks
    for parts in DEVICES:
        chunk = 4 * ROWS * (64 // parts) * HEADS * WIDTH
        for name, times in forms.items():
            for got, factor in zip(sent(name, parts), times, strict=True):
                wanted = factor * (parts - 1) * chunk
                yield Row("difference of bytes", got / wanted - 1, name)
        layer = sent_by_tensor_parallelism(parts)
        gap = sent("paper", parts)[1] / layer - 1
        yield Row("difference of bytes", gap, "as tensor")
        yield Row(f"bytes N={parts}", layer, "tensor parallelism")
        for name in ("paper", "online", "heads"):
            yield Row(f"bytes N={parts}", sent(name, parts)[1], name)


def temporary(function: Callable, *shapes: tuple[int, ...]) -> int:
    """Bytes that a compiled function keeps on a device beside what comes and goes."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    memory: Any = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


@functools.cache
def kept(method: str, parts: int, length: int) -> int:
    """By attention's output and gradients."""
    run = over(parts, method)
    shape = (ROWS, length, HEADS, WIDTH)
    return temporary(lambda d, *x: with_gradients(run, *x, d_out=d), *[shape] * 4)


@functools.cache
def kept_by_linformer(parts: int, length: int, rank: int = 32) -> int:
    def body(*operands):
        return linformer_attention(*operands, axis_name="seq", block=BLOCK)

    along = P(None, "seq")
    run = jax.shard_map(
        body,
        mesh=mesh_of(parts),
        in_specs=(along, along, along, P("seq"), P("seq")),
        out_specs=along,
        check_vma=False,
    )
    shapes = [(ROWS, length, HEADS, WIDTH)] * 4 + [(length, rank)] * 2
    return temporary(lambda d, *x: with_gradients(run, *x, d_out=d), *shapes)


def memory(scale: str, seed: int) -> Iterator[Row]:
    """Compiled temporaries at 64 local positions, and how Linformer's grow."""
    for name in ("online", "online, plain derivative", "paper"):
        for parts in DEVICES:
            yield Row(f"KiB N={parts}", kept(name, parts, 64 * parts) / 1024, name)
        growth = kept(name, 8, 512) / kept(name, 2, 128) - 1
        yield Row("growth from N=2 to N=8", growth, name)
    long, short = kept_by_linformer(4, 2048), kept_by_linformer(4, 512)
    yield Row("growth of Linformer over that of the length", long / short / 4)


def longest(scale: str, seed: int) -> Iterator[Row]:
    """BERT Base by the paper's memory model; tensor parallelism has but 12 heads."""

    def fits(kind: str, b: int, length: int, n: int) -> bool:
        return 12 * layer_memory(kind, b, length, 768, 12, n) <= 16 * 2**30 / 4

    def most(good: Callable[[int], bool]) -> int:
        low, high = 0, 1 << 24
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(middle) else (low, middle)
        return low

    for kind, n in (("tensor", 12), ("sequence", 64)):
        length = most(lambda x, k=kind, n=n: fits(k, 64, x, n))
        rows = most(lambda x, k=kind, n=n: fits(k, x, 512, n))
        yield Row("longest sequence", length, kind)
        yield Row("largest batch", rows, kind)


def balance(scale: str, seed: int) -> Iterator[Row]:
    """Scores under a causal mask: the busiest device over the mean."""
    for order in ORDERS:
        work = causal_work(order, 2048, 32)
        yield Row("busiest over mean N=32", 32 * work.sum(1).max() / work.sum(), order)
        spread = float(np.ptp(work, axis=0).max())
        yield Row("spread over devices at each hop", spread, order)


def curves(scale: str, seed: int) -> Iterator[Row]:
    """An encoder that fills in hidden bytes: 20 steps on cut and whole sequences."""
    found = compare(ENCODER, ("seq=4", "data=2,seq=4", "tensor=4"), seed)
    yield Row("loss after over before", found.learned)
    yield Row("difference of curves", found.gap)


def on_accelerators(scale: str, seed: int) -> Iterator[Row]:
    raise NotMeasured("64 accelerators with links between them")


CLAIMS = (
    Claim(
        "exact",
        "output and gradients are those of one device, N = 4 and 8, packed or whole",
        "the ring computes full attention",
        Law("relative error", 1e-5, "paper"),
        exactness,
    ),
    Claim(
        "exact_online",
        "and with online softmax and a backward rule of its own",
        "not in the paper",
        Law("relative error", 1e-5, "online"),
        exactness,
    ),
    Claim(
        "bytes",
        "forward 2 (N - 1), in all 8 (N - 1) chunks sent a device and layer",
        "2 (N - 1) and 8 (N - 1), Section 3.2",
        Law("difference of bytes", 0.0, "paper"),
        traffic,
    ),
    Claim(
        "bytes_as_tensor",
        "as many as the four all-reduces of a tensor-parallel layer",
        "the same communication",
        Law("difference of bytes", 0.0, "as tensor"),
        traffic,
    ),
    Claim(
        "bytes_online",
        "online softmax with its own rule sends 6 (N - 1)",
        "not in the paper",
        Law("difference of bytes", 0.0, "online"),
        traffic,
    ),
    Claim(
        "memory_online",
        "at N = 8 it keeps at most a third of what its plain derivative keeps",
        "not in the paper: scores are B Z L^2 / N",
        Ratio("KiB N=8", "online", "online, plain derivative", at_most=1 / 3),
        memory,
    ),
    Claim(
        "memory_linformer",
        "with keys projected to 32 rows temporaries grow no faster than the length",
        "'infinite' length: nothing is quadratic",
        Law("growth of Linformer over that of the length", 1.05),
        memory,
    ),
    Claim(
        "longest",
        "64 devices hold sequences 3 times those of tensor parallelism, by its model",
        "3.0 times, BERT Base, batch 64, 64 P100",
        Ratio("longest sequence", "sequence", "tensor", at_least=3.0),
        longest,
        note=MODEL,
    ),
    Claim(
        "batch",
        "and batches 13.7 times as large at 512 positions, by its model",
        "13.7 times, BERT Base, 64 P100",
        Ratio("largest batch", "sequence", "tensor", at_least=13.7),
        longest,
        note=MODEL,
    ),
    Claim(
        "balance",
        "under a causal mask zigzag order gives all devices equal work at every hop",
        "not in the paper, which is about encoders",
        Law("spread over devices at each hop", 0.0, "zigzag"),
        balance,
    ),
    Claim(
        "curve",
        "an encoder on seq=4, data=2,seq=4 and tensor=4 has the curve of one device",
        "the curve of BERT matches tensor parallelism's",
        Law("difference of curves", 1e-5),
        curves,
    ),
    Claim(
        "sparse",
        "over 114,000 tokens with sparse attention on 64 devices",
        "27 times the longest of one device",
        Ratio("tokens", "sequence", "one device", at_least=27.0),
        on_accelerators,
    ),
)


def figure(rows: Sequence[Recorded]) -> Figure:
    """Bytes a device sends, and what it keeps, against the number of devices."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    for axes, start in zip(figure.subplots(1, 2), ("bytes N=", "KiB N="), strict=True):
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            if row.metric.startswith(start):
                found.setdefault(row.arm, {})[int(row.metric[len(start) :])] = row.value
        for arm, values in found.items():
            axes.loglog(*zip(*sorted(values.items()), strict=True), "o-", label=arm)
        axes.set_xticks(DEVICES, [str(n) for n in DEVICES])
        axes.minorticks_off()
        axes.set(xlabel="devices N", ylabel=start.removesuffix(" N=") + " a device")
        axes.legend(fontsize=7)
    figure.axes[0].set(title="sent for a layer of one length")
    figure.axes[1].set(title="kept for a gradient, 64 positions each")
    return figure


FIGURES = {"ring_attention": figure}
