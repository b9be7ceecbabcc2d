"""Quantisers beside vector-quantize-pytorch: a training step, and its peak of memory.

    python scripts/benchmark.py --suite=quantize
    python scripts/benchmark.py --suite=quantize --quantizers=vq --codes=1024 --record

A step is forward, backward (to the input) and the update of the codes by averages, on
the same rows. Sides: ours, compiled; the peer's module in training mode, where it is
installed (pip install vector-quantize-pytorch torch). Each line holds the peer's time
over ours and, for --memory_codes, by how many bytes a step raises the peak of a process
of its own (Linux). The defaults take about 5 minutes on 2 CPU cores.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from narrows.models.quantize.fsq import fsq, levels_for
from narrows.models.quantize.lfq import lfq
from narrows.models.quantize.protocol import Quantizer
from narrows.models.quantize.residual import residual
from narrows.models.quantize.updates import ema
from narrows.models.quantize.vq import vq
from narrows.scripts.benchmarks.timing import alternate, ratio
from rich.console import Console
from rich.table import Table

METHODS = ("vq", "rotation_vq", "residual_vq", "fsq", "lfq")
STAGES, DECAY = 4, 0.8
HIGH_WATER = "VmHWM:"  # in /proc/self/status, in KiB; "5" in clear_refs resets it


def define(values: flags.FlagValues) -> None:
    several = functools.partial(flags.DEFINE_list, flag_values=values)
    several("quantizers", list(METHODS), "quantize: " + ", ".join(METHODS))
    several("codes", ["1024", "16384"], "quantize: in a codebook")
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    integer("rows", 4096, "quantize: positions in a step", 1)
    integer("code_width", 64, "quantize: numbers in a code of vq", 1)
    integer("memory_codes", 65536, "quantize: where the peak is taken; 0 skips", 0)


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    """A line for each quantizer and size, and one for the peak of each side."""
    peer = importlib.util.find_spec("vector_quantize_pytorch") is not None
    if not peer:
        console.print("no peer: pip install vector-quantize-pytorch torch")
    for name in f.quantizers:
        if name not in METHODS:
            raise ValueError(f"quantizers: {name!r} is none of {', '.join(METHODS)}")
        for codes in map(int, f.codes):
            size = {"name": name, "codes": codes, "rows": f.rows, "width": f.code_width}
            console.print(f"{name}, {codes} codes")
            sides = {"narrows": our_step(**size)[0]}
            if peer:
                sides["peer"] = peer_step(**size)
            times = alternate(sides, rounds=f.rounds, calls=f.calls, console=console)
            line: dict[str, Any] = dict(size)
            for clock in ("cpu", "wall"):
                ours = getattr(times["narrows"], clock)
                line[f"seconds_{clock}"] = float(np.median(ours))
                if peer:
                    theirs = getattr(times["peer"], clock)
                    line[f"peer_over_ours_{clock}"] = ratio(ours, theirs)._asdict()
            yield line
    if f.memory_codes:
        size = {"codes": f.memory_codes, "rows": f.rows // 4, "width": f.code_width}
        size = {"name": "vq", **size}
        line = {**size, "matrix_bytes": 4 * size["codes"] * size["rows"]}
        line["temporary_bytes"] = our_step(**size)[1]
        for side in ("narrows", "peer") if peer else ("narrows",):
            line[f"peak_bytes_{side}"] = peak_apart(side, size)
        yield line


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Times of the peer over ours, and peaks in MiB."""
    made = Table("quantizer", "codes", "cpu ms", "peer cpu over ours", "quartiles")
    for column in ("peer wall over ours", "peak MiB, ours", "peer's", "distances"):
        made.add_column(column)
    for line in lines:
        cells = [line["name"], str(line["codes"])]
        if "seconds_cpu" in line:
            cells.append(f"{1e3 * line['seconds_cpu']:.1f}")
            cpu, wall = (line.get(f"peer_over_ours_{c}") for c in ("cpu", "wall"))
            if cpu and wall:
                cells.append(f"{cpu['median']:.2f}")
                cells.append(f"{cpu['low']:.2f} to {cpu['high']:.2f}")
                cells.append(f"{wall['median']:.2f}")
        else:
            cells += [""] * 4
            for key in ("peak_bytes_narrows", "peak_bytes_peer", "matrix_bytes"):
                value = line.get(key)
                cells.append("" if value is None else f"{value / 2**20:.0f}")
        made.add_row(*cells)
    return made


def rows_of(width: int, rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, rows, width)).astype(np.float32)


def ours_of(name: str, codes: int, width: int) -> Quantizer:
    one = functools.partial(vq, width, codes, rules=(ema(DECAY),))
    makers: dict[str, Callable[[], Quantizer]] = {
        "vq": one,
        "rotation_vq": functools.partial(one, estimator="rotation"),
        "residual_vq": lambda: residual(*[one()] * STAGES),
        "fsq": lambda: fsq(levels_for(codes)),
        "lfq": lambda: lfq(codes.bit_length() - 1, commitment_weight=1.0),
    }
    return makers[name]()


def our_step(
    name: str, codes: int, rows: int, width: int
) -> tuple[Callable[[], object], int]:
    """A call without arguments that ends with its work done; bytes of temporaries."""
    q = ours_of(name, codes, width)
    x = jnp.asarray(rows_of(q.width, rows))
    state = q.init(jax.random.key(0))

    def step(state, x):
        def loss(x):
            out = q.quantize(state, x)
            weighed = sum(q.weights[k] * v for k, v in out.losses.items())
            return jnp.sum(out.z) + weighed, (out.stats, out.indices)

        slope, (stats, indices) = jax.grad(loss, has_aux=True)(x)
        return q.update(state, stats)[0], slope, indices

    compiled = jax.jit(step, donate_argnums=0).lower(state, x).compile()

    def run():
        nonlocal state
        state, *rest = compiled(state, x)
        return jax.block_until_ready((state, rest))

    memory: Any = compiled.memory_analysis()
    return run, memory.temp_size_in_bytes


def peer_step(name: str, codes: int, rows: int, width: int) -> Callable[[], object]:
    import torch
    import vector_quantize_pytorch as peer

    torch.set_num_threads(os.cpu_count() or 1)
    bits = codes.bit_length() - 1
    common: dict[str, Any] = {"decay": DECAY, "rotation_trick": name == "rotation_vq"}
    makers: dict[str, Callable[[], Any]] = {
        "residual_vq": lambda: peer.ResidualVQ(
            dim=width, num_quantizers=STAGES, codebook_size=codes, **common
        ),
        "fsq": lambda: peer.FSQ(list(levels_for(codes))),
        "lfq": lambda: peer.LFQ(
            dim=bits, codebook_size=codes, commitment_loss_weight=1.0
        ),
    }
    single = functools.partial(peer.VectorQuantize, width, codes, **common)
    module = makers.get(name, single)().train()
    x = torch.from_numpy(rows_of(ours_of(name, codes, width).width, rows))
    x.requires_grad_()

    def run():
        out = module(x)
        loss = out[0].sum() + (out[2].sum() if len(out) > 2 else 0.0)
        return torch.autograd.grad(loss, x)

    return run


def peak(side: str, size: dict[str, Any]) -> int:
    """Bytes by which a step raises this process's peak; -1 where it cannot be read."""
    run = our_step(**size)[0] if side == "narrows" else peer_step(**size)
    status = pathlib.Path("/proc/self/status")
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return -1

    def high() -> int:
        lines = status.read_text().splitlines()
        line = next(line for line in lines if line.startswith(HIGH_WATER))
        return 1024 * int(line.split()[1])

    before = high()
    run()
    return high() - before


def peak_apart(side: str, size: dict[str, Any]) -> int | None:
    """`peak` in a fresh process; None where the system does not tell."""
    code = (
        "import json, sys\n"
        "from narrows.scripts.benchmarks.quantize import peak\n"
        "print(peak(sys.argv[1], json.loads(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, side, json.dumps(size)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = int(done.stdout.split()[-1])
    return None if found < 0 else found
