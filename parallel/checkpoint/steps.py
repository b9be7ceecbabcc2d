"""Which steps a directory holds complete, and what each says about itself."""

import json
import zlib
from typing import Any, NamedTuple

import numpy as np
from orbax.checkpoint import v1 as ocp

from .leaves import Record

FORMAT = 1
NAME = "state"  # of the one tree inside a step
MARKER = "commit_success.txt"  # Orbax writes it last, and so does the lazy engine
STREAMED = "header.json"  # of a step that the lazy engine wrote


class CheckpointError(ValueError):
    """A checkpoint that could not be written, or cannot be read."""


class Stored(NamedTuple):
    """An array as it lies in a streamed step, and how it was sharded."""

    shape: tuple[int, ...]
    dtype: np.dtype  # unsigned words
    sharding: str


class Header(NamedTuple):
    meta: dict[str, Any]
    metrics: dict[str, float]
    leaves: dict[str, Record]
    stored: dict[str, Any]  # shape, dtype and sharding of each leaf that has elements
    layout: dict[str, Any] | None  # logical shapes and patterns, see `resume.py`


def folder(directory: Any) -> ocp.path.Path:
    """`directory` as an absolute path; a bucket's address stays as it is."""
    path = ocp.path.Path(directory)
    return path if "://" in str(directory) else path.expanduser().absolute()


def complete_steps(directory: Any) -> list[int]:
    """The committed steps, ascending; temporary and half-deleted ones are left out.

    Orbax writes the marker before the rename which commits a step (on a bucket: after
    all else), so a folder named by a number that holds it is a complete step.
    """
    root = folder(directory)
    if not root.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in root.iterdir()
        if path.name.isdecimal()
        and str(int(path.name)) == path.name
        and (path / MARKER).exists()
    )


def latest_step(directory: Any) -> int | None:
    """The newest complete step in `directory`, None where there is none.

    Lists names only: no checkpoint is opened and no device is touched.
    """
    return max(complete_steps(directory), default=None)


def step_path(directory: Any, step: int | None) -> tuple[int, ocp.path.Path]:
    """Number and path of a complete step, the newest one for None."""
    steps = complete_steps(directory)
    if step is None and steps:
        step = steps[-1]
    if step is None or step not in steps:
        wanted = "no complete checkpoint" if step is None else f"no step {step}"
        raise CheckpointError(
            f"there is {wanted} in {folder(directory)}: it holds "
            + (f"steps {steps}, pass one of these" if steps else "none, start afresh")
        )
    return step, folder(directory) / str(step)


def unreadable(path: ocp.path.Path, why: str) -> CheckpointError:
    """The error for a broken step: where it lies, what is wrong, and the way out."""
    others = [step for step in complete_steps(path.parent) if str(step) != path.name]
    way_out = (
        f"pass step={others[-1]}, the newest other one" if others else "start anew"
    )
    return CheckpointError(
        f"checkpoint {path} cannot be read ({why}): delete that folder or {way_out}"
    )


def first_line(error: BaseException) -> str:
    """Type and first line of an error; storage errors go on for pages."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"


def pack(
    meta: dict, metrics: dict, leaves: dict[str, Record], **more: Any
) -> dict[str, Any]:
    """The header of a step as JSON, with a checksum since Orbax keeps none for it."""
    body = {"meta": meta, "metrics": metrics, "leaves": leaves, **more}
    body = json.loads(json.dumps(body))
    return {"format": FORMAT, "crc32": _crc32(body), **body}


def read_header(path: ocp.path.Path) -> Header:
    """What the step at `path` says of itself; CheckpointError if it is broken."""
    tree: dict[str, Any] | None = None
    try:
        if (path / STREAMED).exists():
            header: dict[str, Any] = json.loads((path / STREAMED).read_text())
        else:
            found = ocp.metadata(path, checkpointable_name=NAME)
            custom: Any = found.custom_metadata
            header, read = dict(custom or {}), found.metadata
            tree = dict(read or {})  # type: ignore
    except Exception as error:
        raise unreadable(path, first_line(error)) from error
    if not header:
        raise unreadable(path, "its header is missing or garbled")
    if (version := header.pop("format", None)) != FORMAT:
        raise unreadable(path, f"its format is {version}, this code reads {FORMAT}")
    if header.pop("crc32", None) != _crc32(header):
        raise unreadable(path, "its header does not have the checksum it was given")
    leaves = {
        name: Record(dtype, tuple(shape), bits)
        for name, (dtype, shape, bits) in header["leaves"].items()
    }
    if tree is None:
        tree = {
            name: Stored(tuple(shape), np.dtype(dtype), sharding)
            for name, (shape, dtype, sharding) in header["arrays"].items()
        }
    if {name for name, leaf in leaves.items() if 0 not in leaf.shape} != tree.keys():
        raise unreadable(path, "the list of its arrays is garbled")
    layout = header.get("layout")
    return Header(header["meta"], header["metrics"], leaves, tree, layout)


def _crc32(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
