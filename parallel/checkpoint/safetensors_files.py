"""Folders of safetensors files, one or several with an index, read and written.

The `safetensors` library checks headers: sizes, overlaps, holes and types. Here lie
the index and the rule that a folder is complete or not there.
"""

import contextlib
import functools
import json
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .layout import Shape
from .unpickle import Tensor

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_folder(path: Any) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the files that the index names.

    Arrays are read when asked for. Raises ValueError for a folder with neither, an
    index that names a file outside or is not true, and for a file that is broken.
    """
    folder = pathlib.Path(path)
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WHOLE).is_file():
            raise ValueError(f"path: {folder} holds neither {WHOLE} nor {INDEX}")
        return _tensors(folder / WHOLE)
    try:
        where = json.loads(index.read_text())["weight_map"]
        where = {str(name): str(file) for name, file in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: it has no weight_map ({error!r})") from error
    found: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        if pathlib.PurePath(file).name != file or "\\" in file:
            raise ValueError(f"{index}: {file!r} is not the name of a file beside it")
        if not (folder / file).is_file():
            raise ValueError(f"{index}: the file {file!r} is missing")
        held = _tensors(folder / file)
        said = {name for name, place in where.items() if place == file}
        if held.keys() != said:
            name = min(held.keys() ^ said)
            there = "holds" if name in held else "does not hold"
            raise ValueError(
                f"{index}: {file!r} {there} {name!r}, other than the index says"
            )
        found |= held
    return found


def write_folder(
    path: Any,
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    config: Mapping[str, Any],
    *,
    shard_bytes: int = 2**31,
) -> list[str]:
    """Write arrays of these shapes in `dtype`, and config.json; the files' names.

    A file has `shard_bytes` at most (but one array at least), and one file is in
    memory at a time. The folder appears when it is complete. ValueError if it exists.
    """
    folder = pathlib.Path(path)
    if folder.exists():
        raise ValueError(f"path: {folder} is there already; name a new folder")
    kind = np.dtype(dtype)
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * kind.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files = [WHOLE] if count == 1 else files
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    part.mkdir()
    try:
        for file, names in zip(files, shards, strict=True):
            arrays = {
                name: np.ascontiguousarray(read(name).astype(kind, copy=False))
                for name in names
            }
            save_file(arrays, part / file, metadata={"format": "pt"})
        if count > 1:
            where = {
                n: f for f, names in zip(files, shards, strict=True) for n in names
            }
            total = sum(int(np.prod(s)) for s in shapes.values()) * kind.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (part / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return files


@contextlib.contextmanager
def _opened(file: pathlib.Path):
    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file}: it cannot be read ({error})") from error


def _tensors(file: pathlib.Path) -> dict[str, Tensor]:
    found = {}
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118, it is no mapping
            view = opened.get_slice(name)
            kind = view.get_dtype()
            if kind not in DTYPES:
                raise ValueError(
                    f"{file}: {name!r} is of type {kind}; read are {', '.join(DTYPES)}"
                )
            shape = tuple(view.get_shape())
            read = functools.partial(_read, file, name)
            found[name] = Tensor(shape, np.dtype(DTYPES[kind]), read)
    return found


def _read(file: pathlib.Path, name: str) -> np.ndarray:
    with _opened(file) as opened:
        return opened.get_tensor(name)
