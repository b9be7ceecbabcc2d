"""Ahead of time: a step compiled for machines that are not there, and what it needs.

    devices = devices_of("v5p:8x8x4")                  # 256 chips, none of them here
    compiled = compile_step(step.fused, state, batch, memory=95e9)
    ledger.ledger(compiled, mesh)

Compile time follows the program, not the chips: a scanned trunk is one layer.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from .step import Program

SHOWN = 8  # largest tensors that a refusal names


class DoesNotFit(ValueError):
    """A step that needs more memory than a device has; names what is largest."""


def devices_of(topology: str) -> list:
    """Devices to compile for.

    "v5p:8x8x4", or any name that libtpu knows: chips of a TPU slice that need not be
    here (needs the `tpu` extra, and on a machine without a TPU the environment that
    `scripts/plan.py` sets). "cpu:8": simulated devices of this process.

    Raises ValueError for a name that cannot be read or is not known.
    """
    kind, colon, size = topology.partition(":")
    if not colon or not re.fullmatch(r"\d+(x\d+)*", size):
        raise ValueError(
            f"topology: cannot read {topology!r}; write v5p:8x8x4, v5e:4x4 or cpu:8"
        )
    if kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < math.prod(map(int, size.split("x"))):
            raise ValueError(
                f"topology: {topology}, but this process has {len(found)} CPU devices; "
                f"set JAX_NUM_CPU_DEVICES={size}"
            )
        return found[: int(size)]
    from jax.experimental import topologies

    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"topology: {topology!r} is not known to libtpu, or there is none; install "
            f"the `tpu` extra and write v4, v5e, v5p or v6e: {first_line(error)}"
        ) from error


def compile_step(
    program: Program, state, batch, *, memory: float, quick: bool = False
) -> jax.stages.Compiled:
    """Compile `program` for the devices that the shardings of `state` name.

    state, batch: trees of `jax.ShapeDtypeStruct` with shardings. memory: bytes of a
    device. quick: ask the compiler for less effort: a third of the time, and more
    memory and traffic than the step will have.

    Raises DoesNotFit, before compiling where the state alone is too large; else with
    what the compiler says.
    """
    check_state(state, memory)
    options: Any = {"exec_time_optimization_effort": -1.0} if quick else None
    try:
        compiled = program.lower(state, batch).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(refusal(str(error))) from error
    return compiled


def bytes_on_device(leaf) -> int:
    """Of an array's shape with a sharding, on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 16 * math.prod(shape)
    return math.prod(shape) * leaf.dtype.itemsize


def largest(tree, count: int = SHOWN) -> list[tuple[str, tuple, int]]:
    """(name, shape on a device, bytes there) of the largest leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    rows = [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape,
            bytes_on_device(leaf),
        )
        for path, leaf in leaves
    ]
    return sorted(rows, key=lambda row: -row[2])[:count]


def check_state(state, memory: float) -> None:
    """Raise DoesNotFit where the state alone exceeds a device's memory."""
    total = sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(state))
    if total > memory:
        named = listing(largest(state))
        raise DoesNotFit(
            f"memory: parameters and moments alone take {total / 1e9:.1f} GB on a "
            f"device of {memory / 1e9:.1f} GB, {(total - memory) / 1e9:.1f} too many; "
            f"cut them over more of fsdp, tensor or stage. The largest: {named}"
        )


def listing(rows: Sequence[tuple[str, tuple, int]]) -> str:
    return "; ".join(
        f"{name} {list(shape)} {size / 1e9:.2f} GB" for name, shape, size in rows
    )


_TOTAL = re.compile(r"Used ([\d.]+[KMGTP]?) of ([\d.]+[KMGTP]?) hbm")
_SIZE = re.compile(r"Size: ([\d.]+[KMGTP]?)")
_SHAPE = re.compile(r"Shape: (\S+?)(?:\{[^}]*\})?\s")
_NAME = re.compile(r'Operator: op_name="([^"]*)"')


def refusal(text: str) -> str:
    """What the TPU compiler says of a program too large, in a sentence and a list."""
    total = _TOTAL.search(text)
    head = (
        f"memory: the step takes {total[1]} of {total[2]} on a device"
        if total
        else f"memory: {first_line(text)}"
    )
    rows = []
    for part in re.split(r"\n\s*\d+\.\s+", text)[1:]:
        size, shape, name = (p.search(part) for p in (_SIZE, _SHAPE, _NAME))
        if size:
            said = shape[1] if shape else "?"
            rows.append(f"{said} {size[1]} ({name[1] if name else 'unnamed'})")
    named = "; ".join(rows[:SHOWN])
    return f"{head}. The largest tensors: {named}" if rows else head


def first_line(error: object) -> str:
    return str(error).strip().splitlines()[0][:300]
