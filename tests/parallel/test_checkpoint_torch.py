"""Files of torch.save, of torch.distributed.checkpoint and of DeepSpeed, by hand.

The writer below emits the opcodes that PyTorch 2 does; no PyTorch is needed. Files that
PyTorch itself wrote are read in tests/scripts/test_convert_checkpoint.py.
"""

import io
import os
import pathlib
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from narrows.parallel.checkpoint.deepspeed_files import read_deepspeed
from narrows.parallel.checkpoint.distributed_files import read_distributed
from narrows.parallel.checkpoint.torch_files import read_torch, tensors
from narrows.parallel.checkpoint.unpickle import Stub, Tensor, loads

STORAGES = {
    "float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage",
    "float16": "HalfStorage", "bool": "BoolStorage",
}  # fmt: skip


class Call(NamedTuple):
    name: str  # "module attribute"
    args: tuple = ()
    state: Any = None


class New(NamedTuple):
    name: str
    state: Any


class Pid(NamedTuple):
    value: tuple


class Global(NamedTuple):
    name: str


class Strided(NamedTuple):
    storage: np.ndarray
    offset: int
    shape: tuple
    strides: tuple


def emit(x: Any, storages: list[np.ndarray]) -> bytes:
    """The opcodes of protocol 2 that put `x` on the stack."""

    def inner(value):
        return emit(value, storages)

    def named(name):
        return b"c" + name.replace(" ", "\n").encode() + b"\n"

    if isinstance(x, np.ndarray):
        strides = tuple(s // x.itemsize for s in x.strides)
        return inner(Strided(np.ascontiguousarray(x), 0, x.shape, strides))
    if isinstance(x, Strided):
        kind = Global(f"torch {STORAGES[str(x.storage.dtype)]}")
        key = next((i for i, s in enumerate(storages) if s is x.storage), None)
        if key is None:
            key = len(storages)
            storages.append(x.storage)
        pid = Pid(("storage", kind, str(key), "cpu", x.storage.size))
        rest = (x.offset, x.shape, x.strides, False, Call("collections OrderedDict"))
        return inner(Call("torch._utils _rebuild_tensor_v2", (pid, *rest)))
    if isinstance(x, Global):
        return named(x.name)
    if isinstance(x, Pid):
        return inner(x.value) + b"Q"
    if isinstance(x, Call):
        made = named(x.name) + inner(x.args) + b"R"
        return made if x.state is None else made + inner(x.state) + b"b"
    if isinstance(x, New):
        return named(x.name) + b")\x81" + inner(x.state) + b"b"
    if x is None or isinstance(x, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[x]
    if isinstance(x, int):
        return b"J" + struct.pack("<i", x)
    if isinstance(x, float):
        return b"G" + struct.pack(">d", x)
    if isinstance(x, str):
        return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
    if isinstance(x, tuple):
        return b"(" + b"".join(map(inner, x)) + b"t"
    if isinstance(x, list):
        return b"](" + b"".join(map(inner, x)) + b"e"
    if isinstance(x, dict):
        return b"}(" + b"".join(inner(k) + inner(v) for k, v in x.items()) + b"u"
    raise TypeError(type(x))


def program(x: Any) -> tuple[bytes, list[np.ndarray]]:
    storages: list[np.ndarray] = []
    return b"\x80\x02" + emit(x, storages) + b".", storages


def archive(x: Any, order: bytes = b"little", **more: Any) -> bytes:
    """What torch.save writes of `x`; more: further entries by name."""
    code, storages = program(x)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", more.pop("compression", zipfile.ZIP_STORED)) as made:
        made.writestr("archive/data.pkl", more.pop("code", code))
        made.writestr("archive/byteorder", order)
        for i, storage in enumerate(storages):
            made.writestr(f"archive/data/{i}", storage.tobytes())
        for name, data in more.pop("entries", {}).items():
            made.writestr(name, data)
    return out.getvalue()


def save(x: Any, path: pathlib.Path, **more: Any) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(archive(x, **more))
    return path


RNG = np.random.default_rng(0)


def bits(dtype: str, shape=(3, 4)) -> np.ndarray:
    """Random bits, so NaN payloads and negative zeros too."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if kind == np.bool_:
        return RNG.integers(0, 2, shape).astype(bool)
    raw = RNG.integers(0, 256, (*shape, kind.itemsize), dtype=np.uint8)
    return raw.view(kind).reshape(shape)


def assert_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", STORAGES)
def test_tensors_come_back_with_their_bits(tmp_path, dtype):
    x = bits(dtype)
    wide = np.ascontiguousarray(bits(dtype, (6, 5)))
    state = {
        "module": Call("collections OrderedDict", (), {"_metadata": {"version": 1}}),
        "a": x,
        "turned": Strided(x, 0, (4, 3), (1, 4)),
        "inside": Strided(wide, 7, (2, 3), (10, 1)),
        "scalar": x[0, :1].reshape(()),
        "empty": np.zeros((0, 3), x.dtype),
        "parameter": Call("torch._utils _rebuild_parameter", (x, True, {})),
        "nested": {"list": [1, 2.5, None, True, "text"], "x": x},
        "size": Call("torch Size", ((2, 3),)),
        "raw": Call("_codecs encode", ("\xff\0", "latin1")),
    }
    found = read_torch(save(state, tmp_path / "a.pt"))
    assert_bits(found["a"].read(), x)
    assert_bits(found["turned"].read(), x.T)
    inside = wide.ravel()[[7, 8, 9, 17, 18, 19]].reshape(2, 3)
    assert_bits(found["inside"].read(), inside)
    assert_bits(found["scalar"].read(), x[0, :1].reshape(()))
    assert found["empty"].read().shape == (0, 3)
    assert_bits(found["parameter"].read(), x)
    assert found["nested"]["list"] == [1, 2.5, None, True, "text"]
    assert (found["size"], found["raw"]) == ((2, 3), b"\xff\0")
    assert {"a", "nested.x", "parameter"} <= dict(tensors(found)).keys()


HOSTILE = {
    "command": ("posix system", ("touch {mark}",)),
    "evaluation": ("builtins eval", ("open('{mark}', 'w')",)),
    "old spelling": ("__builtin__ exec", ("open('{mark}', 'w')",)),
    "import": ("importlib import_module", ("os",)),
    "attribute": ("builtins getattr", (Global("torch Size"), "__init__")),
    "numpy": ("numpy.core.multiarray _reconstruct", ()),
    "inside torch": ("torch._utils _import_dotted_name", ("os.system",)),
    "loader": ("torch load", ("a",)),
    "dotted": ("collections OrderedDict.fromkeys", ("a",)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_every_other_global_is_refused_by_name_and_not_called(tmp_path, kind):
    name, args = HOSTILE[kind]
    mark = tmp_path / "mark"
    args = tuple(a.format(mark=mark) if isinstance(a, str) else a for a in args)
    path = save({"a": bits("float32"), "b": Call(name, args)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=name.replace(" ", r"\.")) as caught:
        read_torch(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_what_pickle_itself_makes_of_a_hostile_object_is_refused(tmp_path):
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        code = pickle.dumps({"x": Evil()}, protocol)
        path = save({}, tmp_path / "a.pt", code=code)
        with pytest.raises(ValueError, match=r"asks for (posix|nt)\.mkdir"):
            read_torch(path)
    assert not mark.exists()


def test_a_function_that_may_be_called_can_be_used_for_nothing_else():
    """No state is set on a function, a class, or an object that is shared."""
    size, ordered = b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"
    inert = b"cargparse\nNamespace\n"
    for code in (
        size + b"N}(X\x08\0\0\0__call__K\1u\x86b.",  # (None, {"__call__": 1}), BUILD
        size + b"}(X\x09\0\0\0_functionK\1ub.",
        ordered + b"}(X\1\0\0\0aK\1ub.",
        inert + b"}(X\x0c\0\0\0__setstate__K\1ub.",
        inert + b"N}(X\x04\0\0\0nameK\1u\x86b.",
        size + b")\x81.",  # NEWOBJ of what is no class
        b"\x82\1.",  # the registry of extensions
        b"K\1r\xff\xff\xff\x7f.",  # a place of 2 GB
        b"X\5\0\0\0hello",  # no end
        b"Pnowhere\n.",  # data outside, where there is none
    ):
        with pytest.raises(ValueError, match="a pickle: "):
            loads(b"\x80\2" + code, source="a pickle")
    assert loads(b"\x80\2" + size + b"K\2K\3\x86\x85R.", source="") == (2, 3)


def test_globals_named_as_inert_are_stubs_that_do_nothing():
    code, _ = program({"rng": Call("numpy.random._pickle make", (1, 2), {"a": 3})})
    with pytest.raises(ValueError, match=r"numpy\.random\._pickle\.make"):
        loads(code, source="x")
    got = loads(code, source="x", inert=["numpy.random._pickle.make"])["rng"]
    assert isinstance(got, Stub)
    assert (got.args, got["a"]) == ((1, 2), 3)
    with pytest.raises(ValueError, match=r"numpy\.random\._pickle\.make has no field"):
        got["b"]


def persistent(*pid):
    return Call("torch._utils _rebuild_tensor_v2", (Pid(pid), 0, (1,), (1,), False, {}))


X = np.ones((2, 3), np.float32)
FLOAT = Global("torch FloatStorage")
BROKEN = {
    "beyond": ({"a": Strided(X, 1, (2, 3), (3, 1))}, {}, "leaves its storage"),
    "larger": ({"a": Strided(X, 0, (9, 9), (0, 0))}, {}, "leaves its storage"),
    "backwards": ({"a": Strided(X, 5, (2,), (-1,))}, {}, "has strides"),
    "no storage": ({"a": persistent("storage", FLOAT, "9", "cpu", 1)}, {}, "'9' is mi"),
    "key": ({"a": persistent("storage", FLOAT, "../0", "cpu", 1)}, {}, "persistent id"),
    "pid": ({"a": persistent("module", "os", "x", "y", 1)}, {}, "persistent id"),
    "big-endian": ({"a": X}, {"order": b"big"}, "big-endian"),
    "compressed": ({"a": X}, {"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    "upwards": ({"a": X}, {"entries": {"archive/../../x": b"1"}}, "leaves the archive"),
    "absolute": ({"a": X}, {"entries": {"/etc/x": b"1"}}, "leaves the archive"),
    "two pickles": ({"a": X}, {"entries": {"b/data.pkl": b"N."}}, "one <name>/data"),
    "no pickle": ({"a": X}, {"code": b"not a pickle"}, "cannot be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_archive_is_named(tmp_path, kind):
    state, more, sentence = BROKEN[kind]
    path = save(state, tmp_path / "a.pt", **more)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_torch(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path.parent / "x").exists()


def test_a_cut_or_altered_file_is_named(tmp_path):
    x = bits("float32", (64, 64))
    path = save({"a": x}, tmp_path / "a.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.pt: no archive of torch\.save"):
        read_torch(path)
    at = whole.index(x.tobytes()) + 1000
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="'archive/data/0' has other bytes"):
        read_torch(path)["a"].read()
    path.write_bytes(pickle.dumps({"old": 1}))
    with pytest.raises(ValueError, match=r"before 1\.6 must be saved anew"):
        read_torch(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_torch(path)


# torch.distributed.checkpoint

META = "torch.distributed.checkpoint.metadata "
INFO = "torch.distributed.checkpoint.filesystem _StorageInfo"


def size(*n):
    return Call("torch Size", (n,))


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


# DeepSpeed

GROUPS = (("a", "b"), ("c",))


def write_deepspeed(folder: pathlib.Path, ranks, world, stage) -> None:
    """`ranks`: {name: array} for each tensor-parallel rank."""
    folder = folder / "global_step7"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("global_step7")
    for rank, mine in enumerate(ranks):
        shapes = [{name: size(*mine[name].shape) for name in group} for group in GROUPS]
        half = {name: x.astype(ml_dtypes.bfloat16) for name, x in mine.items()}
        model = {"module": half, "param_shapes": shapes, "global_steps": 7}
        files = [f"mp_rank_{rank:02}_model_states.pt"]
        if stage == 3:
            prefix = [f"zero_pp_rank_{n}_mp_rank_{rank:02}" for n in range(world)]
            files = [f"{p}_model_states.pt" for p in prefix]
        for file in files:
            save(model, folder / file)
        for n in range(world) if stage else ():
            parts = []
            for group in GROUPS:
                arrays = [mine[name].ravel() for name in group]
                if stage == 3:  # each over the ranks
                    padded = [np.pad(a, (0, -a.size % world)) for a in arrays]
                    cut = [a.reshape(world, -1)[n] for a in padded]
                    parts.append(np.concatenate(cut))
                else:
                    flat = np.concatenate(arrays)
                    flat = np.pad(flat, (0, -flat.size % (2 * world)))
                    parts.append(flat.reshape(world, -1)[n])
            key = "fp32_flat_groups" if stage == 3 else (
                "single_partition_of_fp32_groups"
            )  # fmt: skip
            scaler = Call("deepspeed.runtime.fp16.loss_scaler LossScaler", (), {"a": 1})
            state = {key: parts, "zero_stage": stage, "loss_scaler": scaler}
            name = f"bf16_zero_pp_rank_{n}_mp_rank_{rank:02}_optim_states.pt"
            save({"optimizer_state_dict": state}, folder / name)


def rank_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 5), "b": (4,), "c": (2, 3, 3)}
    return {name: rng.normal(size=s).astype("f4") for name, s in shapes.items()}


@pytest.mark.parametrize(
    ("ranks", "world", "stage"),
    [(1, 1, 1), (1, 4, 2), (2, 3, 1), (1, 3, 3), (2, 4, 3), (2, 0, 0)],
)
def test_masters_of_deepspeed_come_together(tmp_path, ranks, world, stage):
    """The float32 of ZeRO's buffers; without any, the weights of the model."""
    mine = [rank_of(i) for i in range(ranks)]
    write_deepspeed(tmp_path, mine, world, stage)
    found = read_deepspeed(tmp_path)
    assert (found.ranks, found.step) == (ranks, 7)
    for rank, arrays in enumerate(mine):
        for name, x in arrays.items():
            want = x if stage else x.astype(ml_dtypes.bfloat16)
            key = f"{name}/{rank}" if ranks > 1 else name
            assert isinstance(found.tensors[key], Tensor)
            assert_bits(found.tensors[key].read(), want)
    assert len(found.tensors) == 3 * ranks


def test_a_deepspeed_folder_that_is_not_whole_is_named(tmp_path):
    write_deepspeed(tmp_path, [rank_of(0), rank_of(1)], 2, 2)
    folder = tmp_path / "global_step7"
    gone = folder / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    data = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ValueError, match=r"of data ranks \[1\] are there"):
        read_deepspeed(tmp_path)
    gone.write_bytes(data)
    (folder / "mp_rank_00_model_states.pt").rename(folder / "x.pt")
    with pytest.raises(ValueError, match=r"ranks \[1\], but they must be mp_rank_00"):
        read_deepspeed(folder)
    (folder / "x.pt").rename(folder / "mp_rank_00_model_states.pt")
    key = "single_partition_of_fp32_groups"
    short = {"optimizer_state_dict": {key: [np.ones(2, "f4"), np.ones(2, "f4")]}}
    save(short, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match=r"group 0 has 19 elements.*hold \[2, 10\]"):
        read_deepspeed(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere', which is no folder"):
        read_deepspeed(tmp_path)
