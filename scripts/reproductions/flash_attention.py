"""Exact attention that never holds the scores: memory linear in length, and faster.

Paper: T. Dao, D. Fu, S. Ermon, A. Rudra and C. Re, arXiv:2205.14135, NeurIPS 2022. Its
settings are A100 GPUs; here the same statements are measured on a CPU, with its own
cache in the place of shared memory and the library's blockwise form in the place of the
kernel (`implementation="xla"`).
Claim: attention in tiles with a running softmax is exact, needs memory linear in the
length, moves Theta(N^2 d^2 / M) elements, is up to 3x faster than plain attention, and
faster yet in proportion where blocks are left out; longer context then buys quality.

    python scripts/reproduce.py --system=flash_attention

Expected: error below 1e-5; temporaries with slopes 1 and 2 in the length; causal
attention of 2048 tokens 3 to 6 times cheaper than plain, with gradients too. Baseline:
the cheaper of our plain form and `jax.nn.dot_product_attention`, in every call.
Hardware and time: two CPU cores; quick 5 minutes, full 15 minutes. Times are processor
time, the sides taking turns.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.models.kernels.attention import io, two_level
from narrows.scripts import attention_cost as cost
from narrows.scripts import recall
from narrows.scripts.claims import Claim, Law, NotMeasured, Ratio, Row, System
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="flash_attention",
    title="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    paper="arXiv:2205.14135, NeurIPS 2022",
    room="models/kernels/",
    module="narrows.models.kernels.attention",
    summary="softmax attention tile by tile, exact, without the matrix of scores",
)


def options(rng: np.random.Generator, case: int, b: int, t: int, s: int, n: int):
    """One of five kinds of call, which between them use every option."""
    ids = np.sort(rng.integers(0, 4, (b, t)), axis=1)
    lengths = jnp.asarray(rng.integers(1, s + 1, b), jnp.int32)
    offset = int(rng.integers(0, 40))
    bias = cost.normal(rng, 1, n, t, s)
    causal = {"is_causal": True, "query_offset": offset}
    return (
        {"is_causal": True},
        {**causal, "local_window_size": (60, 0), "soft_cap": 3.0},
        {"segment_ids": (jnp.asarray(ids), jnp.asarray(np.tile(ids[:, :1], (1, s))))},
        {"bias": bias, "key_value_seq_lengths": lengths, "sinks": cost.normal(rng, n)},
        {**causal, "dropout_rate": 0.2, "dropout_key": jax.random.key(offset)},
    )[case % 5]


def exact(scale: str, seed: int) -> Iterator[Row]:
    """Output and gradients in float32 beside the definition in float64."""
    from narrows.models.kernels.attention import attention

    rng = np.random.default_rng([seed, 1])
    worst, worst_gradient = 0.0, 0.0
    for case in [seed] if scale == "quick" else range(5):
        t, s = (int(rng.integers(30, 300)) for _ in "ts")
        b, k, group = 2, int(rng.integers(1, 3)), int(2 ** rng.integers(0, 3))
        h = int(rng.choice([16, 24, 64, 128, 256]))
        arrays = [cost.normal(rng, b, t, k * group, h)]
        arrays += [cost.normal(rng, b, s, k, h) for _ in "kv"]
        arrays += [cost.normal(rng, b, t, k * group, h)]
        more = options(rng, case, b, t, s, k * group)

        def run(q, k, v, d, *, form, more=more):
            call = functools.partial(attention, implementation=form, **more)
            out, pull = jax.vjp(call, q, k, v)
            return out, *pull(d)

        ours = jax.jit(functools.partial(run, form="xla"))(*arrays)
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
            truth = jax.jit(functools.partial(run, form="reference"))(*wide)
            truth = [np.asarray(x) for x in truth]
        errors = [float(np.abs(a - b).max()) for a, b in zip(ours, truth, strict=True)]
        sizes = [float(np.abs(x).max()) for x in truth]
        worst = max(worst, errors[0])
        for error, size in zip(errors[1:], sizes[1:], strict=True):
            worst_gradient = max(worst_gradient, error / max(1.0, size))
    yield Row("error", worst)
    yield Row("error of gradients", worst_gradient)


def rounded(scale: str, seed: int) -> Iterator[Row]:
    """bfloat16, causal: error beside that of plain bfloat16 attention."""
    from narrows.models.kernels.attention import attention

    rng = np.random.default_rng([seed, 2])
    t = 256 if scale == "quick" else 1024
    arrays = [cost.normal(rng, 1, t, 4, 64, dtype=jnp.bfloat16) for _ in "qkv"]
    forms = {
        "method": functools.partial(attention, implementation="xla"),
        "plain": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
    }
    truth = attention(
        *(x.astype(jnp.float32) for x in arrays),
        is_causal=True,
        implementation="reference",
    )
    for arm, form in forms.items():
        out = form(*arrays, is_causal=True).astype(jnp.float32)
        yield Row("error", float(abs(out - truth).max()), arm)


@functools.cache
def compiled_bytes(scale: str) -> tuple[Row, ...]:
    """Bytes of temporaries of the compiled programs; nothing is run."""
    lengths = (1024, 2048, 4096) if scale == "quick" else (1024, 2048, 4096, 8192)
    rows = []
    for backward in (False, True):
        what = "training" if backward else "forward"
        for arm, name in {"method": "xla", "plain": "jax.nn"}.items():
            call = cost.side(name, backward=backward)
            found = [cost.temporaries(call, n) for n in lengths]
            for n, size in zip(lengths, found, strict=True):
                rows.append(Row(f"{what} temporary bytes n={n}", size, arm))
            order = 1 if arm == "method" else 2
            slope = cost.slope(lengths, found) - order
            rows.append(Row(f"{what} slope less {order}", slope, arm))
    return tuple(rows)


def memory(scale: str, seed: int) -> Iterator[Row]:
    """The same programs for every seed: compiled once."""
    del seed
    yield from compiled_bytes(scale)


def speed(scale: str, seed: int) -> Iterator[Row]:
    """Causal attention, float32: processor time, forward and with gradients."""
    lengths, rounds = ((2048,), 1) if scale == "quick" else ((1024, 2048, 4096), 3)
    for n in lengths:
        arrays = cost.operands(seed, n)
        for backward in (False, True):
            runs = {
                arm: functools.partial(cost.side(name, backward=backward), *arrays)
                for arm, name in cost.SIDES.items()
            }
            found = cost.processor_time(runs, rounds)
            found["best plain"] = min(found["our plain"], found["jax.nn"])
            what = "training" if backward else "forward"
            for arm, seconds in found.items():
                yield Row(f"{what} seconds n={n}", seconds, arm)


def butterfly(blocks: int) -> np.ndarray:
    """Block (i, j) is kept iff i == j or i xor j is a power of two."""
    i = np.arange(blocks)
    apart = i[:, None] ^ i
    return apart & (apart - 1) == 0  # zero and the powers of two


def sparse(scale: str, seed: int) -> Iterator[Row]:
    """A table of cells: the expanded mask's result, and its time beside dense."""
    from narrows.models.kernels.attention import Blocks, attention

    rng = np.random.default_rng([seed, 3])
    kept = rng.random((5, 7)) < 0.4
    kept[0] = False  # rows that see nothing give zero
    q, k, v = (cost.normal(rng, 1, n, 2, 32) for n in (290, 400, 400))
    mask = np.kron(kept, np.ones((64, 64), bool))[:290, :400]
    call = functools.partial(attention, q, k, v, implementation="xla")
    ours = call(mask=Blocks(jnp.asarray(kept), 64, 64))
    plain = attention(q, k, v, mask=jnp.asarray(mask), implementation="reference")
    yield Row("error", float(abs(ours - plain).max()))

    n, cell = (2048 if scale == "quick" else 4096), 128
    count = n // cell
    fly, quarter = butterfly(count), np.zeros((count, count), bool)
    for row in quarter:
        row[rng.choice(count, count // 4, replace=False)] = True
    formula = (1 + np.log2(count)) / count
    yield Row("density less the formula", fly.mean() - formula, "butterfly")
    arrays = cost.operands(seed, n)
    runs = {"dense": functools.partial(cost.side("xla", causal=False), *arrays)}
    for name, table in {"a quarter kept": quarter, "butterfly": fly}.items():
        run = cost.masked(cell)
        runs[name] = functools.partial(run, *arrays, jnp.asarray(table))
    for arm, seconds in cost.processor_time(runs).items():
        yield Row("seconds", seconds, arm)


def traffic(scale: str, seed: int) -> Iterator[Row]:
    """Algorithm 1 in an explicit cache, beside the counts that the paper's loop has."""
    rng = np.random.default_rng([seed, 4])
    off = 0
    for _ in range(10 if scale == "quick" else 50):
        d, block, tiles = int(rng.integers(1, 9)), int(rng.integers(1, 9)), 4
        n = block * tiles * int(rng.integers(1, 4))
        tile = io.Tile(block, block)
        arrays = [rng.normal(size=(n, d)) for _ in "qkv"]
        run = two_level.k_outer(*arrays, tile, 10**6)
        steps = n // block
        reads = 2 * n * d + steps * (2 * n * d + 2 * n)
        writes = steps * (n * d + 2 * n)
        off = max(off, abs(sum(run.moved.reads.values()) - reads))
        off = max(off, abs(sum(run.moved.writes.values()) - writes))
    yield Row("elements off", off)
    # the table of GPT-2 medium's attention: N = 1024, d = 64, bfloat16, 192 KB
    n, d, capacity = 1024, 64, 192 * 1024 // 2
    widths = {"query": 2, "key": 2, "value": 2, "out": 2, "statistics": 4}
    tile = io.fit("k_outer", n, n, d, capacity)
    ours = io.k_outer(n, n, d, tile).bytes(widths)
    plain = io.standard(n, n, d, io.Tile(128, 128)).bytes(
        widths | {"scores": 2, "weights": 2}
    )
    yield Row("bytes", ours)
    yield Row("bytes", plain, "standard")
    sizes = [d * d * 2**i for i in range(4, 8)]
    moved = [
        io.k_outer(2**22, 2**22, d, io.fit("k_outer", 2**22, 2**22, d, m, inner=1))
        for m in sizes
    ]
    yield Row("slope", cost.slope(sizes, [m.elements for m in moved]) + 1)


def context(scale: str, seed: int) -> Iterator[Row]:
    """`scripts/recall.py` with the last 512 tokens and with all 2048."""
    yield Row("nats", float(np.log(recall.VALUES)), "a guess")
    for length in (512, recall.LENGTH):
        run = recall.trained(length, 150 if scale == "quick" else 600)
        yield Row("nats", float(run(seed)), f"context {length}")


def accelerators(scale: str, seed: int) -> Iterator[Row]:
    raise NotMeasured("needs eight GPUs for days; kernels: benchmark.py on a GPU")


CLAIMS = (
    Claim(
        "exact",
        "output within 1e-5 of float64, over every option and odd lengths, float32",
        "exact attention",
        Law("error", 1e-5),
        exact,
    ),
    Claim(
        "exact_gradients",
        "and gradients within 1e-5 of their largest entry",
        "exact attention",
        Law("error of gradients", 1e-5),
        exact,
    ),
    Claim(
        "bfloat16",
        "bfloat16: error at most twice that of plain bfloat16 attention",
        "the rule of the authors' tests",
        Ratio("error", "method", "plain", at_most=2.0),
        rounded,
    ),
    Claim(
        "memory",
        "temporaries grow linearly: slope 1 within 0.15, forward",
        "memory linear in the length",
        Law("forward slope less 1", 0.15),
        memory,
    ),
    Claim(
        "memory_training",
        "and with gradients",
        "memory linear in the length",
        Law("training slope less 1", 0.15),
        memory,
    ),
    Claim(
        "memory_plain",
        "those of plain attention quadratically: slope 2 within 0.15",
        "memory quadratic in the length",
        Law("training slope less 2", 0.15, "plain"),
        memory,
    ),
    Claim(
        "memory_4096",
        "at 4096 tokens, training, at most a twentieth of plain attention's",
        "20x less memory at 4096",
        Ratio("training temporary bytes n=4096", "method", "plain", at_most=0.05),
        memory,
        note="Bytes of temporaries of the compiled program, batch 1, 8 heads of 64.",
    ),
    Claim(
        "traffic",
        "Algorithm 1, run in an explicit cache, moves what its loops say",
        "Theta(N^2 d^2 / M), Theorem 2",
        Law("elements off", 0.0),
        traffic,
    ),
    Claim(
        "traffic_slope",
        "and that falls as 1/M: slope -1 within 0.02",
        "Theta(N^2 d^2 / M), Theorem 2",
        Law("slope", 0.02),
        traffic,
    ),
    Claim(
        "traffic_gpt2",
        "N = 1024, d = 64, 192 KB: forward it moves at most a third of plain's bytes",
        "40.3 against 4.4 GB, forward and backward, with dropout and masks",
        Ratio("bytes", "method", "standard", at_most=1 / 3),
        traffic,
        note="The model of one head's forward pass, scores and weights in 16 bits.",
    ),
    Claim(
        "speed",
        "causal forward at 2048 tokens: at most half the processor time of plain",
        "up to 3x faster, N from 128 to 2K, A100",
        Ratio("forward seconds n=2048", "method", "best plain", at_most=0.5),
        speed,
    ),
    Claim(
        "speed_training",
        "and with gradients",
        "up to 3x faster, N from 128 to 2K, A100",
        Ratio("training seconds n=2048", "method", "best plain", at_most=0.5),
        speed,
    ),
    Claim(
        "speed_4096",
        "and with gradients at 4096 tokens",
        "3x faster at 4096",
        Ratio("training seconds n=4096", "method", "best plain", at_most=0.5),
        speed,
        scales=("full", "paper"),
    ),
    Claim(
        "sparse_exact",
        "a table of cells gives what its expanded mask gives, to 1e-5",
        "block-sparse FlashAttention is exact over the kept entries",
        Law("error", 1e-5),
        sparse,
    ),
    Claim(
        "sparse_speed",
        "with a quarter of the cells kept, at most 0.45 of the dense time",
        "proportional to the kept fraction",
        Ratio("seconds", "a quarter kept", "dense", at_most=0.45),
        sparse,
    ),
    Claim(
        "butterfly",
        "the butterfly pattern keeps (1 + log2 blocks) / blocks",
        "the pattern of the published runs",
        Law("density less the formula", 1e-12, "butterfly"),
        sparse,
    ),
    Claim(
        "context",
        "with a dependency over 1024 tokens, context 2048 is learned, nats",
        "longer context buys quality: GPT-2 at 4K, long documents, Path-X",
        Ratio("nats", "context 2048", "a guess", at_most=0.5),
        context,
    ),
    Claim(
        "no_context",
        "context 512 is not: no better than a guess, to 2 %",
        "longer context buys quality",
        Ratio("nats", "context 512", "a guess", at_least=0.98),
        context,
    ),
    Claim(
        "gpu_training",
        "GPT-2 trains faster on eight A100 than with plain attention",
        "2.7 days against 9.5 (HuggingFace) and 4.7 (Megatron), GPT-2 small",
        Ratio("days", "method", "plain", at_most=1.0),
        accelerators,
    ),
)


def memory_figure(rows: Sequence[Recorded]) -> Figure:
    """Temporaries of a training step against the length."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    start = "training temporary bytes n="
    for arm, label in (("method", "in tiles"), ("plain", "plain")):
        found = {
            int(r.metric.removeprefix(start)): r.value / 2**20
            for r in rows
            if r.arm == arm and r.metric.startswith(start)
        }
        x = sorted(found)
        axes.loglog(x, [found[n] for n in x], "o-", label=label)
    axes.set(xlabel="tokens", ylabel="MiB of temporaries, training step")
    axes.legend()
    return figure


FIGURES = {"flash_attention": memory_figure}
