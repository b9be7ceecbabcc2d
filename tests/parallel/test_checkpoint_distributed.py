"""Folders of torch.distributed.checkpoint, written by hand."""

import pathlib

import numpy as np
import pytest
from narrows.parallel.checkpoint.distributed_files import read_distributed
from torch_writer import (
    Call,
    Global,
    New,
    archive,
    assert_bits,
    bits,
    program,
    size,
)

META = "torch.distributed.checkpoint.metadata "
INFO = "torch.distributed.checkpoint.filesystem _StorageInfo"


def write_distributed(folder: pathlib.Path, state, cuts, *, change=None) -> None:
    """Tensors in boxes, each an archive of its own inside the file of its rank."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {}
    described, storage = {}, {}
    for name, x in state.items():
        chunks = []
        for number, box in enumerate(cuts(name, x)):
            part = np.array(x[tuple(slice(*edge) for edge in box)], order="C")
            file, blob = f"__{number % 2}_0.distcp", archive(part)
            start = len(files.get(file, b""))
            files[file] = files.get(file, b"") + blob
            offset = tuple(edge[0] for edge in box)
            chunk = {"offsets": size(*offset), "sizes": size(*part.shape)}
            chunks.append(New(META + "ChunkStorageMetadata", chunk))
            index = {"fqn": name, "offset": size(*offset), "index": number}
            storage[New(META + "MetadataIndex", Frozen(index))] = New(
                INFO, {"relative_path": file, "offset": start, "length": len(blob)}
            )
        layout = Call("torch.serialization _get_layout", ("torch.strided",))
        kind = Global(f"torch {x.dtype}")
        entry = {
            "properties": New(META + "TensorProperties", (kind, layout, False, 0, 0)),
            "size": size(*x.shape),
            "chunks": chunks,
        }
        described[name] = New(META + "TensorStorageMetadata", entry)
    described["epoch"] = New(META + "BytesStorageMetadata", {"a": 1})
    whole = {"state_dict_metadata": described, "storage_data": storage}
    if change:
        change(whole, files)
    (folder / ".metadata").write_bytes(program(New(META + "Metadata", whole))[0])
    for file, data in files.items():
        (folder / file).write_bytes(data)


class Frozen(dict):
    def __hash__(self):
        return id(self)


def in_four(name, x):
    """Uneven boxes: halves of the rows, and of the columns where there are any."""
    if not x.ndim:
        return [()]
    rows = [(0, 1), (1, x.shape[0])]
    if x.ndim == 1:
        return [(r,) for r in rows]
    return [(r, c) for r in rows for c in [(0, 3), (3, x.shape[1])]]


def state_in_boxes():
    return {
        "model.w": bits("float32", (5, 7)),
        "model.b": bits("bfloat16", (6,)),
        "model.n": bits("int64", ()),
    }


def test_boxes_of_a_distributed_checkpoint_make_up_its_tensors(tmp_path):
    state = state_in_boxes()
    write_distributed(tmp_path, state, in_four)
    found = read_distributed(tmp_path)
    assert found.keys() == state.keys()
    for name, x in state.items():
        assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype)
        assert_bits(found[name].read(), x)


def _first(whole):
    return next(iter(whole["storage_data"].values())).state


WRONG = {
    "a box is missing": (
        lambda whole, files: (
            whole["state_dict_metadata"]["model.w"].state["chunks"].pop()
        ),
        "16 elements of 'model.w'",
    ),
    "a place is missing": (
        lambda whole, files: whole["storage_data"].popitem(),
        "does not say where 'model.n/0' lies",
    ),
    "the path leaves": (
        lambda whole, files: _first(whole).update(relative_path="../x.distcp"),
        r"'\.\./x\.distcp' is not the name of a file",
    ),
    "the path is absolute": (
        lambda whole, files: _first(whole).update(relative_path="/etc/passwd"),
        "'/etc/passwd' is not the name of a file",
    ),
    "a file is missing": (
        lambda whole, files: files.pop("__1_0.distcp"),
        "'__1_0.distcp' is missing",
    ),
    "a file is short": (
        lambda whole, files: files.update({"__0_0.distcp": b"PK"}),
        "is not in it",
    ),
    "transformed": (
        lambda whole, files: _first(whole).update(transform_descriptors=["zstd"]),
        "compressed or encrypted",
    ),
    "hostile": (
        lambda whole, files: whole.update(planner_data=Call("os system", ("true",))),
        r"asks for os\.system",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_distributed_checkpoint_that_is_not_whole_is_named(tmp_path, kind):
    change, sentence = WRONG[kind]
    write_distributed(tmp_path, state_in_boxes(), in_four, change=change)
    with pytest.raises(ValueError, match=sentence):
        [tensor.read() for tensor in read_distributed(tmp_path).values()]
