"""What the attention kernels cost on TPUs, read from their compiled programs.

    python scripts/benchmarks/tpu_budgets.py
    python scripts/benchmarks/tpu_budgets.py --write

Needs the tpu extra and no TPU: the kernels are compiled for v5e, v5p and v6e, and the
instruction bundles of the final schedule are counted, a bundle being a cycle unless
memory stalls it. A tile costs its body and the control of a grid step; a line of tiles,
its start and its end. Printed is the sum over the tiles that a causal head of 4,096
tokens visits. The compiler is deterministic: figures above `results/tpu_budgets.tsv`
are regressions, are named, and end the command with 1, as does a kernel that has no
budget yet. --write sets the budgets to what is found. 4 minutes on a CPU core.
"""

import csv
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.tpu import default_blocks, fitted, tpu
from narrows.scripts import command, results
from rich.console import Console
from rich.table import Table

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
WIDTHS = (64, 128)
LENGTH = 4096
KERNELS = {"attention_forward": "forward", "attention_backward": "backward"}
BUDGETS = results.RESULTS / "tpu_budgets.tsv"
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Cost(NamedTuple):
    """Of one kernel on one chip; bundles of the parts that make up a run."""

    full: int  # body of a tile without a mask
    part: int  # body of a tile with one
    line: int  # start and end of a line of tiles
    step: int  # control of a grid step
    head: int  # all that a causal head executes
    vmem: int  # bytes
    spills: int  # vector stores that make room for others

    @classmethod
    def of(cls, bodies: "Bodies", tiles: int, vmem: int, spills: int) -> "Cost":
        full, part, line, step = bodies
        visited = tiles * (tiles + 1) // 2
        head = (visited - tiles) * full + tiles * (part + line) + visited * step
        return cls(full, part, line, step, head, vmem, spills)


class Bodies(NamedTuple):
    full: int
    part: int
    line: int
    step: int


def main(argv: Sequence[str]) -> int:
    f = flags.FlagValues()
    flags.DEFINE_bool("write", False, "set the budgets", flag_values=f)
    flags.DEFINE_list("chip", list(TOPOLOGIES), "chips", flag_values=f)
    command.parse(f, argv, __doc__)
    columns = None if sys.stdout.isatty() else 110
    console = Console(highlight=False, width=columns)
    allowed = read(BUDGETS)
    found: dict[tuple[str, str, str], Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        for chip in f.chip:
            for width in WIDTHS:
                for kernel, cost in measure(chip, width, pathlib.Path(folder)).items():
                    found[chip, kernel, str(width)] = cost
    table = Table("chip", "kernel", "width", *Cost._fields, "budget")
    for key, cost in found.items():
        budget = allowed.get(key)
        limit = "none" if budget is None else f"{budget.head:,}"
        table.add_row(*key, *(f"{value:,}" for value in cost), limit)
    console.print(table)
    if f.write:
        write(BUDGETS, allowed | found)
        console.print(f"written to {BUDGETS}")
        return 0
    regressions = list(exceeded(found, allowed))
    for sentence in regressions:
        console.print(sentence)
    return 1 if regressions else 0


def prepare(folder: str) -> None:
    """Environment of a compiler without a chip, which writes down what it makes."""
    os.environ.update(ENVIRONMENT)
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    )


def measure(chip: str, width: int, folder: pathlib.Path) -> dict[str, Cost]:
    """Costs of the kernels of one causal head of `width`, by their names."""
    for old in folder.iterdir():
        old.unlink()
    text, tiles = compiled(chip, width, LENGTH)
    memory = scoped_memory(text)
    if memory.keys() != KERNELS.keys():
        raise ValueError(
            f"{chip}: the compiled program states the fast memory of {sorted(memory)}, "
            f"not of {sorted(KERNELS)}; this compiler writes it in another way"
        )
    costs = {}
    for name, kernel in KERNELS.items():
        program, usage = (
            max(folder.glob(f"*{name}*{ending}"), key=lambda path: path.stat().st_size)
            for ending in (
                "-final_bundles.txt",
                "-final_hlo-static-per-bundle-utilization.txt",
            )
        )
        costs[kernel] = Cost.of(
            bodies(program.read_text()),
            tiles,
            memory[name],
            total(usage.read_text(), "VSTORE:SPILL"),
        )
    return costs


def compiled(chip: str, width: int, length: int) -> tuple[str, int]:
    """Program of a causal head with its gradients, and its tiles along a side."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip]
    ).devices
    one = jax.sharding.SingleDeviceSharding(devices[0])
    head = jax.ShapeDtypeStruct((1, length, 1, width), jnp.bfloat16, sharding=one)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=one)
    spec = Spec(width**-0.5)
    blocks = default_blocks(width, head.dtype, chip)

    def run(query, key, value, d_out, d_log, low, high):
        def serve(query, key, value):
            return tpu(query, key, value, Call(low, high), spec, blocks=blocks)

        out, pull = jax.vjp(serve, query, key, value)
        return out, pull((d_out, d_log))

    statistics = jax.ShapeDtypeStruct((1, length, 1), jnp.float32, sharding=one)
    arguments = (*[head] * 4, statistics, row, row)
    text = jax.jit(run).lower(*arguments).compile().as_text() or ""
    size = fitted(blocks, length, length, None)
    if size.q != size.k:
        raise ValueError(f"tiles of {size.q} x {size.k}; the sum needs square ones")
    return text, length // size.q


def scoped_memory(text: str) -> dict[str, int]:
    """Bytes of fast memory that each kernel was given, from the program's text."""
    found = {}
    for line in text.splitlines():
        size = re.search(r'"used_scoped_memory_configs":\[\{[^]]*"size":"(\d+)"', line)
        for name in KERNELS:
            if size and "tpu_custom_call" in line and re.search(rf"%\w*{name}", line):
                found[name] = int(size[1])
    return found


def bodies(text: str) -> Bodies:
    """Bundles of a kernel's parts, from the text of its final schedule.

    A part that runs under a condition begins behind a branch over it and ends where
    that lands (marked PF). The grid step itself is such a part; in it, those that hold
    matrix products are the bodies of the tiles, without and with a mask.
    """
    inside: list[tuple[int, int]] = []
    parts: list[tuple[int, int, int]] = []  # depth, bundles, products
    products, address = 0, 0
    for line in text.splitlines():
        at = re.match(r"\s*(0x[0-9a-f]+|0)\s+(PF)?\s*:", line)
        if at is None:
            continue
        address = int(at[1], 16)
        if at[2] and inside:
            start, before = inside.pop()
            parts.append((len(inside), address - start, products - before))
        products += line.count(" vmatmul")
        if "sbr.rel (%" in line:  # (!%...) is the jump back of a loop
            inside.append((address + 1, products))
    depths = [depth for depth, _, work in parts if work]
    level = next(depth for depth in sorted(depths) if depths.count(depth) > 1)
    full, part = (size for depth, size, work in parts if depth == level and work)
    line = sum(size for depth, size, work in parts if depth == level and not work)
    return Bodies(full, part, line, address - full - part - line)


def total(text: str, column: str) -> int:
    """Sum of a column of the table of the units that each bundle uses."""
    rows = (re.sub(r"[,|]", " ", line).split() for line in text.splitlines())
    rows = [row for row in rows if row]
    place = next(row.index(column) for row in rows if column in row)
    start = next(i for i, row in enumerate(rows) if "UTILIZATION:" in row)
    return sum(int(row[place]) for row in rows[start + 1 :])


def exceeded(found: dict, allowed: dict) -> Iterator[str]:
    """A sentence for each figure above its budget."""
    for key, cost in found.items():
        if key not in allowed:
            yield f"{' '.join(key)}: has no budget; --write sets it"
            continue
        for name in ("head", "vmem", "spills"):
            now, limit = getattr(cost, name), getattr(allowed[key], name)
            if now > limit:
                yield f"{' '.join(key)}: {name} is {now:,}, above its budget {limit:,}"


def read(path: pathlib.Path) -> dict[tuple[str, str, str], Cost]:
    if not path.exists():
        return {}
    with path.open() as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return {
        (chip, kernel, width): Cost(*map(int, rest))
        for chip, kernel, width, *rest in rows
    }


def write(path: pathlib.Path, costs: dict[tuple[str, str, str], Cost]) -> None:
    with path.open("w") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["chip", "kernel", "width", *Cost._fields])
        for key, cost in sorted(costs.items()):
            writer.writerow([*key, *cost])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
