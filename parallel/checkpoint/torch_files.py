"""Tensors out of the files that `torch.save` writes, without PyTorch.

Such a file is a zip archive, nothing in it compressed: `<root>/data.pkl`, a pickle of
the containers in which each tensor names a storage, and `<root>/data/<key>`, the bytes
of a storage. The pickle is read by `unpickle.py`, which executes nothing; a storage is
mapped from the file and its checksum compared when a tensor of it is first read.
"""

import io
import pathlib
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from .unpickle import DTYPES, DType, Storage, Tensor, loads


def read_torch(path: Any, *, inert: Collection[str] = ()) -> Any:
    """What a file of `torch.save` holds; see `unpickle.loads` for `inert`.

    Raises ValueError for a global that is not read, by name, for an archive with
    compressed entries or paths that leave it, and for one that is broken.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    with path.open("rb") as file:
        data = np.memmap(file, np.uint8, mode="r")
        return read_archive(file, data, source=str(path), inert=inert)


def read_bytes(data: np.ndarray, *, source: str, inert: Collection[str] = ()) -> Any:
    """The same from bytes in memory."""
    return read_archive(io.BytesIO(data.tobytes()), data, source=source, inert=inert)


def read_archive(
    file: BinaryIO, data: np.ndarray, *, source: str, inert: Collection[str]
) -> Any:
    """The archive in `file`, whose bytes `data` has too."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            root = _check_entries(archive, entries, len(data))
            program = archive.read(f"{root}/data.pkl")
            order = f"{root}/byteorder"
            if order in entries and archive.read(order) != b"little":
                raise ValueError("its numbers are big-endian")
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{source}: no archive of torch.save ({error}); a file of PyTorch before "
            "1.6 must be saved anew"
        ) from error
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{source}: {error}") from error

    def storage(pid: Any) -> Storage:
        kind, key, size = _persistent(pid)
        info = entries.get(f"{root}/data/{key}")
        if info is None:
            raise ValueError(f"storage {key!r} is missing in the archive")
        dtype = np.dtype(DTYPES[kind]) if kind else None
        width = dtype.itemsize if dtype else 1
        if size * width != info.file_size:
            raise ValueError(
                f"storage {key!r} has {info.file_size} bytes, but {size} elements of "
                f"{kind or 'untyped'}"
            )
        return Storage(dtype, size, lambda: _bytes_of(info, data, source, checked))

    checked: set[str] = set()
    return loads(program, storage, source=source, inert=inert)


def tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dicts, under its keys joined by dots."""
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{prefix}.{key}" if prefix else str(key))


def _check_entries(archive, entries: Mapping[str, zipfile.ZipInfo], size: int) -> str:
    """The folder inside the archive; ValueError for entries torch does not write."""
    if len(entries) != len(archive.infolist()):
        raise ValueError("two entries of the archive have one name")
    for name, info in entries.items():
        parts = pathlib.PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or ".." in parts or "\0" in name:
            raise ValueError(f"the entry {name!r} leaves the archive")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"the entry {name!r} is compressed or encrypted")
        if info.file_size > size:
            raise ValueError(f"the entry {name!r} is larger than the file")
    roots = [name[: -len("/data.pkl")] for name in entries if _is_pickle(name)]
    if len(roots) != 1:
        raise ValueError("the archive does not hold one <name>/data.pkl")
    return roots[0]


def _is_pickle(name: str) -> bool:
    return re.fullmatch(r"[^/]+/data\.pkl", name) is not None


def _persistent(pid: Any) -> tuple[str, str, int]:
    """dtype (or "" for bytes), key and size of ("storage", dtype, key, device, size)"""
    if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
        _, kind, key, _, size = pid
        named = isinstance(key, str) and re.fullmatch("[0-9]+", key) is not None
        if isinstance(kind, DType) and named and type(size) is int and size >= 0:
            return kind.name, key, size
    raise ValueError(f"a persistent id that torch does not write: {str(pid)[:100]}")


def _bytes_of(info, data: np.ndarray, source: str, checked: set[str]) -> np.ndarray:
    """The bytes of an entry as a view; ValueError if they are not those saved."""
    head = bytes(data[info.header_offset : info.header_offset + 30])
    start = info.header_offset + 30
    start += int.from_bytes(head[26:28], "little")  # its name
    start += int.from_bytes(head[28:30], "little")  # its extra field
    found = np.asarray(data[start : start + info.file_size])
    broken = head[:4] != b"PK\3\4" or found.size != info.file_size
    if not broken and info.filename not in checked:
        crc = 0
        for at in range(0, found.size, 2**24):
            crc = zlib.crc32(found[at : at + 2**24].data, crc)
        broken = crc != info.CRC
        checked.add(info.filename)
    if broken:
        raise ValueError(
            f"{source}: {info.filename!r} has other bytes than were saved: the file "
            "is damaged"
        )
    return found
