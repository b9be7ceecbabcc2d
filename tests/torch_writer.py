"""A writer of torch.save's archives, for tests: the opcodes that PyTorch 2 emits.

No PyTorch is needed, and what PyTorch never writes can be written too.
"""

import io
import pathlib
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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


def size(*n):
    return Call("torch Size", (n,))
