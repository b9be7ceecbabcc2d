"""Look into a checkpoint without its model, its mesh or an accelerator."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from .steps import Stored, read_header, step_path


class Row(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int  # of the whole array, uncompressed, without replicas
    sharding: str  # when it was saved: spec and mesh
    fingerprint: int  # of its values, the same in every layout


class Contents(NamedTuple):
    step: int
    meta: dict[str, Any]
    metrics: dict[str, float]
    rows: list[Row]  # sorted by name
    layout: dict[str, Any] | None  # logical shapes and patterns, where they differ


def inspect(directory: Any, step: int | None = None) -> Contents:
    """Names, shapes, dtypes, bytes, saved shardings and meta; the newest by default.

    Reads headers alone, no array. Raises CheckpointError for a step that is absent or
    whose header is broken.
    """
    step, path = step_path(directory, step)
    header = read_header(path)
    rows = []
    for name, leaf in sorted(header.leaves.items()):
        stored = header.stored.get(name)
        size, where = _bytes(stored), _layout(stored)
        rows.append(Row(name, leaf.shape, leaf.dtype, size, where, leaf.bits))
    return Contents(step, header.meta, header.metrics, rows, header.layout)


def _bytes(stored: Any) -> int:
    if stored is None:  # an array without elements, of which nothing is stored
        return 0
    bits = math.prod(stored.shape) * jax.dtypes.itemsize_bits(stored.dtype)
    return -(-bits // 8)


def _layout(stored: Any) -> str:
    if isinstance(stored, Stored):
        return stored.sharding
    saved: Any = getattr(stored, "sharding_metadata", None)
    if not hasattr(saved, "partition_spec"):
        return "one device" if saved is not None else "unknown"
    axes = zip(saved.axis_names, saved.shape, strict=True)
    mesh = ",".join(f"{axis}={size}" for axis, size in axes)
    return f"{PartitionSpec(*saved.partition_spec)} on {mesh}"
