"""Attention beside its peers: every form that serves, forward and with its gradients.

    python scripts/benchmark.py --suite=attention
    python scripts/benchmark.py --suite=attention --lengths=4096 --cases=full --record

Sides: ours (each implementation that serves here), `jax.nn.dot_product_attention` (xla
and, on NVIDIA, cudnn), tokamax and JAX's own Pallas kernels where they run, torch's
scaled_dot_product_attention on a CPU where torch is installed. Cases: causal, full, and
packed (causal within documents of uneven lengths, an eighth of the length on average).
Each line holds the time of a side over ours, the share of a matrix product's rate
measured in the same run (operations of the visible scores only), the bytes of
temporaries of the compiled program, and the largest error of 64 rows against float64.
The defaults take about 15 minutes on 2 CPU cores; a side that would need more than
--memory is left out, and named.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from narrows.models.kernels.attention import IMPLEMENTATIONS, attention
from narrows.scripts.benchmarks.timing import alternate, ratio
from rich.console import Console
from rich.table import Table

CASES = ("causal", "full", "packed")
DOCUMENTS = 8  # of a packed row
CHECKED = 64  # rows compared with float64
MATERIALISED = 5.0  # arrays of all scores, float32, that a plain form holds at once


class Problem(NamedTuple):
    """Arrays [b, t, n, h] of one call, and what a row may see."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    ids: jax.Array | None  # [b, t] of a packed row
    causal: bool

    @property
    def platform(self) -> str:
        (device,) = self.query.devices()
        return device.platform


class Side(NamedTuple):
    call: Callable[..., jax.Array]  # of (query, key, value, ids); output [b, t, n, h]
    plain: bool = False  # holds all scores in memory


def define(values: flags.FlagValues) -> None:
    several = functools.partial(flags.DEFINE_list, flag_values=values)
    several("lengths", ["512", "1024", "2048", "4096"], "attention: tokens in a row")
    several("widths", ["64", "128"], "attention: of a head")
    several("cases", list(CASES), "attention: causal, full, packed")
    flags.DEFINE_integer(
        "tokens", None, "attention: in a batch; default one row", 1, flag_values=values
    )
    flags.DEFINE_integer(
        "hidden", 512, "attention: heads times head width", 1, flag_values=values
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "attention: of the operands",
        flag_values=values,
    )
    flags.DEFINE_float(
        "memory", 8.0, "attention: GiB a side may need", 0.0, flag_values=values
    )


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    """One line for each case, width, length, pass and side."""
    for case in f.cases:
        if case not in CASES:
            raise ValueError(f"cases: {case!r} is none of {', '.join(CASES)}")
        for width, length in [
            (int(w), int(n)) for w in f.widths for n in sorted(f.lengths, key=int)
        ]:
            problem = draw(case, width, length, f.tokens or length, f.hidden, f.dtype)
            for backward in (False, True):
                where = {
                    "case": case,
                    "width": width,
                    "length": length,
                    "dtype": f.dtype,
                    "pass": "forward+backward" if backward else "forward",
                }
                console.print(" ".join(str(x) for x in where.values()))
                for line in compare(problem, backward, f, console):
                    yield {**where, **line}


def draw(case, width, length, tokens, hidden, dtype) -> Problem:
    """Standard normal operands."""
    rng = np.random.default_rng(length)
    if hidden % width or tokens % length:
        raise ValueError(
            f"hidden={hidden} and tokens={tokens} must be multiples of the head width "
            f"{width} and the length {length}"
        )
    shape = (tokens // length, length, hidden // width, width)
    query, key, value = (
        jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(3)
    )
    ids = None
    if case == "packed":
        cuts = np.sort(rng.integers(0, length, (shape[0], DOCUMENTS - 1)), axis=1)
        ids = (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
        ids = jnp.asarray(ids, jnp.int32)
    return Problem(query, key, value, ids, case != "full")


def visible_scores(problem: Problem) -> float:
    """Pairs of a query and a key that it sees, in all heads."""
    b, t, n, _ = problem.query.shape
    if problem.ids is None:
        return b * n * (t * (t + 1) / 2 if problem.causal else t * t)
    sizes = [np.bincount(row) for row in np.asarray(problem.ids)]
    return n * sum(float(k * (k + 1) / 2) for row in sizes for k in row)


def compare(
    problem: Problem, backward: bool, f: flags.FlagValues, console: Console
) -> Iterator[dict[str, Any]]:
    b, t, n, h = problem.query.shape
    work = (7 if backward else 2) * 2 * h * visible_scores(problem)
    need = MATERIALISED * 4 * b * n * t * t / 2**30
    runs: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, side in sides(problem).items():
        if side.plain and need > f.memory:
            console.print(f"  {name} left out: about {need:.0f} GiB of scores")
            continue
        try:
            runs[name], facts[name] = prepare(side, problem, backward)
        except Exception as refusal:  # a peer's own: whatever it raises is its answer
            sentence = str(refusal).strip().splitlines()[0][:160]
            console.print(f"  {name} does not serve: {sentence}")
    if problem.platform == "cpu" and importlib.util.find_spec("torch"):
        runs["torch"] = torch_side(problem, backward)
    product, product_work = matmul(problem.query.dtype)
    best = next(name for name in runs if name.startswith("narrows"))
    times = alternate(
        {**runs, "matmul": product}, rounds=f.rounds, calls=f.calls, console=console
    )
    for name in runs:
        line: dict[str, Any] = {"side": name, **facts.get(name, {})}
        for clock in ("cpu", "wall"):
            theirs = getattr(times[name], clock)
            ours, rate = (getattr(times[k], clock) for k in (best, "matmul"))
            line[f"over_{best}_{clock}"] = ratio(ours, theirs)._asdict()
            line[f"attained_{clock}"] = ratio(theirs, rate * work / product_work)[0]
        if problem.platform != "cpu":
            line["seconds"] = float(np.median(times[name].wall))
            line["tflops"] = work / line["seconds"] / 1e12
        yield line


def sides(problem: Problem) -> dict[str, Side]:
    """All that this machine may run, best of ours first; refusals come later."""
    causal = problem.causal

    def ours(name):
        return lambda q, k, v, ids: attention(
            q, k, v, is_causal=causal, segment_ids=ids, implementation=name
        )

    def jax_nn(name):
        def call(q, k, v, ids):
            mask = None if ids is None else (ids[:, :, None] == ids[:, None])[:, None]
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=causal, implementation=name
            )

        return call

    platform = problem.platform
    found = {
        f"narrows {name}": Side(ours(name), name == "reference")
        for name in IMPLEMENTATIONS
    }
    found["jax.nn xla"] = Side(jax_nn("xla"), plain=True)
    if platform == "gpu":
        found["jax.nn cudnn"] = Side(jax_nn("cudnn"))
        found["jax triton"] = Side(jax_triton(causal))
    if platform == "tpu":
        found["jax tpu"] = Side(jax_tpu(causal))
    if platform != "cpu" and importlib.util.find_spec("tokamax"):
        found["tokamax"] = Side(tokamax(causal))
    return found


def jax_triton(causal):
    def call(q, k, v, ids):
        from jax.experimental.pallas.ops.gpu import attention as kernel

        return kernel.mha(
            q, k, v, segment_ids=ids, sm_scale=q.shape[-1] ** -0.5, causal=causal
        )

    return call


def jax_tpu(causal):
    def call(q, k, v, ids):
        from jax.experimental.pallas.ops.tpu import flash_attention as kernel

        heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
        segments = None if ids is None else kernel.SegmentIds(ids, ids)
        out = kernel.flash_attention(
            *heads_first,
            segment_ids=segments,
            causal=causal,
            sm_scale=q.shape[-1] ** -0.5,
        )
        return out.swapaxes(1, 2)

    return call


def tokamax(causal):
    def call(q, k, v, ids):
        peer = importlib.import_module("tokamax")
        if ids is not None:
            raise NotImplementedError("packed rows are not in its public call")
        return peer.dot_product_attention(q, k, v, is_causal=causal)

    return call


def prepare(side: Side, problem: Problem, backward: bool):
    """Compile; the program as a call without arguments, and what it says of itself."""

    def both(q, k, v, ids, cotangent):
        out, pull = jax.vjp(lambda *a: side.call(*a, ids), q, k, v)
        return out, pull(cotangent)

    program = both if backward else side.call
    arguments = (problem.query, problem.key, problem.value, problem.ids)
    if backward:
        arguments += (problem.query,)
    compiled = jax.jit(program).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    facts: dict[str, Any] = {
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None)
    }
    out = compiled(*arguments)
    facts["error"] = error(out[0] if backward else out, problem)
    return lambda: jax.block_until_ready(compiled(*arguments)), facts


def error(out: jax.Array, problem: Problem) -> float:
    """Largest difference to float64 over `CHECKED` rows of the first batch row."""
    q, k, v = (
        np.asarray(x[0], np.float64).swapaxes(0, 1)
        for x in (problem.query, problem.key, problem.value)
    )
    t = q.shape[1]
    rows = np.unique(np.linspace(0, t - 1, CHECKED).astype(int))
    scores = q[:, rows] @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5
    if problem.causal:
        scores[:, rows[:, None] < np.arange(t)] = -np.inf
    if problem.ids is not None:
        ids = np.asarray(problem.ids[0])
        scores[:, ids[rows, None] != ids] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ v
    return float(
        np.abs(np.asarray(out[0, rows], np.float64) - exact.swapaxes(0, 1)).max()
    )


def torch_side(problem: Problem, backward: bool) -> Callable[[], object]:
    """torch's scaled_dot_product_attention on the same numbers, all its threads."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as call

    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, problem.query.dtype.name)
    q, k, v = (
        torch.from_numpy(np.array(x, np.float32).swapaxes(1, 2).copy())
        .to(dtype)
        .requires_grad_(backward)
        for x in (problem.query, problem.key, problem.value)
    )
    mask = None
    if problem.ids is not None:
        ids = torch.from_numpy(np.array(problem.ids))
        mask = (ids[:, None, :, None] == ids[:, None, None]).tril()
    causal = problem.causal and mask is None
    cotangent = q.detach().clone()

    def run():
        with torch.set_grad_enabled(backward):
            out = call(q, k, v, attn_mask=mask, is_causal=causal)
        return torch.autograd.grad(out, (q, k, v), cotangent) if backward else out

    return run


def matmul(dtype) -> tuple[Callable[[], object], float]:
    """A large square product: what the machine attains; its operations."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, 4, lambda _, y: (x @ y) * (1 / size), x)

    return lambda: jax.block_until_ready(products(x)), 4 * 2.0 * size**3


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Each side's time over ours, and its share of the matrix product's rate."""
    made = Table(
        "case", "width", "length", "pass", "side", "cpu time over ours", "quartiles"
    )
    for column in ("wall over ours", "of the product's rate", "MiB", "error"):
        made.add_column(column)
    for line in lines:
        cpu, wall = (
            next(v for k, v in line.items() if k.startswith("over") and k.endswith(c))
            for c in ("cpu", "wall")
        )
        bytes_ = line.get("temporary_bytes")
        made.add_row(
            *(str(line[k]) for k in ("case", "width", "length", "pass", "side")),
            f"{cpu['median']:.2f}",
            f"{cpu['low']:.2f} to {cpu['high']:.2f}",
            f"{wall['median']:.2f}",
            f"{line['attained_cpu']:.2f}",
            "" if bytes_ is None else f"{bytes_ / 2**20:.1f}",
            f"{line['error']:.1e}" if "error" in line else "",
        )
    return made
