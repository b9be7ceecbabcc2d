"""Look into a checkpoint on any machine: no model, mesh or accelerator is needed.

    python scripts/inspect_checkpoint.py --path=runs/first/checkpoints
    python scripts/inspect_checkpoint.py --path=... --mesh=fsdp=4,tensor=2

Prints each leaf's name, type, bytes, sharding when it was saved and fingerprint, the
patterns of its layout, and, with --mesh, what a device of that mesh would hold. Reads
headers alone. Exit code 2 for bad input, a mesh that the state does not divide over
among it.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.parallel.checkpoint import Contents, Row, inspect
from narrows.parallel.layout import Layout
from narrows.parallel.rules import follow, shardings
from narrows.scripts import command
from rich.console import Console
from rich.table import Table


def main(argv: Sequence[str], console: Console | None = None) -> int:
    f = flags.FlagValues()
    flags.DEFINE_string("path", None, "folder of checkpoints (required)", f)
    flags.DEFINE_integer("step", None, "default: the newest", 0, flag_values=f)
    flags.DEFINE_string("mesh", None, "e.g. data=2,tensor=4", flag_values=f)
    command.parse(f, argv, __doc__)
    wide = None if sys.stdout.isatty() else 220
    console = console or Console(highlight=False, width=wide)  # a pipe has no width
    with command.bad_input():
        if f.path is None:
            raise ValueError("path: give --path, the folder of a run's checkpoints")
        found = inspect(f.path, f.step)
        layout = None if f.mesh is None else Layout.parse(f.mesh)
        shares = {} if layout is None else bytes_on_a_device(found, layout)
    console.print(table_of(found, shares))
    total = sum(row.bytes for row in found.rows)
    console.print(f"step {found.step}: {len(found.rows)} leaves, {total:,} bytes")
    for name in ("mesh", "commit", "data", "optimizer"):
        if name in found.meta:
            console.print(f"{name}: {found.meta[name]}", markup=False)
    for pattern in (found.layout or {}).get("patterns", ()):
        console.print(f"layout: {pattern}", markup=False)
    if layout is not None:
        console.print(
            f"on {layout} ({layout.size} devices): {sum(shares.values()):,} bytes of "
            f"state a device, {sum(shares.values()) * layout.size / total:.2f} copies"
        )
    return 0


def table_of(found: Contents, shares: dict[str, int]) -> Table:
    table = Table(box=None)
    for column in ("leaf", "type", "bytes", "saved as", "fingerprint"):
        table.add_column(column, overflow="fold")
    if shares:
        table.add_column("bytes on a device")
    for row in found.rows:
        kind = f"{row.dtype}{list(row.shape)}"
        cells = [row.name, kind, f"{row.bytes:,}", row.sharding]
        more = [f"{shares[row.name]:,}"] if shares else []
        table.add_row(*cells, f"{row.fingerprint:08x}", *more)
    return table


def bytes_on_a_device(found: Contents, layout: Layout) -> dict[str, int]:
    """What training would put there, by the rules of `parallel/rules.py`.

    ValueError where a rule does not divide, as training would raise it.
    """
    sizes = dataclasses.asdict(layout)
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    parts: dict[str, dict[str, jax.ShapeDtypeStruct]] = {"params": {}, "rest": {}}
    for row in found.rows:
        part, _, name = row.name.partition("/")
        shape = jax.ShapeDtypeStruct(row.shape, jnp.uint8)
        parts.setdefault(part, {})[name] = shape
    placed = {part: shardings(parts[part], mesh) for part in ("params", "rest")}
    if "opt" in parts:
        placed["opt"] = follow(parts["opt"], parts["params"], placed["params"])
    whole = NamedSharding(mesh, P())

    def share(row: Row) -> int:
        part, _, name = row.name.partition("/")
        sharding = placed.get(part, {}).get(name, whole)
        elements = math.prod(row.shape)
        mine = math.prod(sharding.shard_shape(row.shape))
        return row.bytes * mine // max(elements, 1)

    return {row.name: share(row) for row in found.rows}


if __name__ == "__main__":
    sys.exit(main(sys.argv))
