"""Tensors out of a folder that `torch.distributed.checkpoint` wrote, as they are named.

`.metadata` is a pickle that says, for each tensor, which boxes of it lie where: file,
offset and length of an archive of its own. The boxes are the pieces of a layout map, so
a missing or overlapping one is an error before a number is read.
"""

import functools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from .layout import LayoutMap, Piece, Shape, check, union_one, whole_box
from .torch_files import read_bytes
from .unpickle import DTYPES, DType, Stub, Tensor, loads


def read_distributed(path: Any, *, inert: Collection[str] = ()) -> dict[str, Tensor]:
    """Every tensor of the folder by its name, read when asked for, a box at a time.

    Raises ValueError for what `unpickle.loads` refuses, for a tensor whose boxes do not
    make up its shape, and for a file that is missing, short or outside the folder.
    """
    folder = pathlib.Path(path)
    metadata = folder / ".metadata"
    if not metadata.is_file():
        raise ValueError(f"path: {folder} has no .metadata, which describes its files")
    source = str(metadata)
    found = loads(metadata.read_bytes(), source=source, inert=inert)
    if not isinstance(found, Stub) or not found.name.endswith(".Metadata"):
        raise ValueError(f"{source}: it describes no checkpoint")
    places: dict[tuple[str, Shape], Stub] = {
        (index["fqn"], tuple(index.get("offset") or ())): place
        for index, place in found["storage_data"].items()
    }
    read = {}
    for name, entry in found["state_dict_metadata"].items():
        if entry.name.endswith(".TensorStorageMetadata"):
            made = _boxes(name, entry, source)
            at = {s: places.get((name, offset)) for s, offset in made[1].items()}
            read[name] = _tensor(name, entry, made[0], at, folder, inert)
    return read


def _boxes(name: str, entry: Stub, source: str) -> tuple[LayoutMap, dict[str, Shape]]:
    """The map of a tensor's boxes, and their offsets by stored name."""
    shape, offsets = tuple(entry["size"]), {}
    stored, pieces = {}, []
    for number, chunk in enumerate(entry["chunks"]):
        offset, size = tuple(chunk["offsets"]), tuple(chunk["sizes"])
        key = f"{name}/{number}"
        box = tuple((o, o + n) for o, n in zip(offset, size, strict=True))
        stored[key], offsets[key] = size, offset
        pieces.append(Piece(name, box, key, whole_box(size)))
    try:
        layout = check(LayoutMap({name: shape}, stored, tuple(pieces), {}))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return layout, offsets


def _tensor(
    name: str,
    entry: Stub,
    layout: LayoutMap,
    places: Mapping[str, Stub | None],
    folder: pathlib.Path,
    inert: Collection[str],
) -> Tensor:
    properties = entry["properties"].state
    kind = properties[0] if isinstance(properties, tuple) and properties else None
    if not isinstance(kind, DType):
        raise ValueError(f"{folder}: the dtype of {name!r} is not among {[*DTYPES]}")
    dtype = np.dtype(DTYPES[kind.name])
    for key, place in places.items():
        if place is None:
            raise ValueError(f"{folder}: .metadata does not say where {key!r} lies")
        if place.get("transform_descriptors"):
            raise ValueError(f"{folder}: {key!r} is stored compressed or encrypted")
        _file(folder, place["relative_path"])

    def chunk(key: str) -> np.ndarray:
        place = places[key]
        assert place is not None
        found = _read(folder, place, key, inert)
        if (found.shape, found.dtype) != (layout.stored[key], dtype):
            raise ValueError(
                f"{folder}: {key!r} is {found.dtype}{found.shape}, but .metadata says "
                f"{dtype}{layout.stored[key]}"
            )
        return found

    read = functools.partial(union_one, name, chunk, layout)
    return Tensor(layout.logical[name], dtype, read)


def _read(folder: pathlib.Path, place: Stub, key: str, inert) -> np.ndarray:
    path = _file(folder, place["relative_path"])
    start, length = place["offset"], place["length"]
    whole = type(start) is int and type(length) is int and start >= 0 < length
    if not whole or start + length > path.stat().st_size:
        raise ValueError(f"{path}: {key!r} at {start}, {length} bytes, is not in it")
    data = np.memmap(path, np.uint8, mode="r")[start : start + length]
    tensor = read_bytes(data, source=f"{path} at {start}", inert=inert)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: {key!r} is no tensor")
    return tensor.read()


def _file(folder: pathlib.Path, name: Any) -> pathlib.Path:
    """The file of this folder; ValueError for a path that leaves it, or for none."""
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name:
        raise ValueError(f"{folder}: {name!r} is not the name of a file in the folder")
    if not (folder / name).is_file():
        raise ValueError(f"{folder}: the file {name!r} is missing")
    return folder / name
