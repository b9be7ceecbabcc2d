"""Read what PyTorch pickled, and execute nothing.

A pickle is a program: it names globals and calls them. Here a name stands for an entry
of a table: a constructor of a plain container or a tensor that is written below, or a
`Stub`, which keeps what it was given and does nothing. Every other name is refused, and
no module is imported, so a hostile file can make containers, numbers, text and views of
its own bytes, and nothing else.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# Names of torch.save and of torch's storages -> numpy.
DTYPES: dict[str, Any] = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16, "int64": np.int64, "int32": np.int32,
    "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
    "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "complex64": np.complex64, "complex128": np.complex128,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
}  # fmt: skip
INERT = (  # classes whose objects lie beside the tensors; read as Stubs
    "argparse.Namespace",
    "builtins.dict",  # what a defaultdict makes
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "__builtin__.dict",
    "__builtin__.float",
    "__builtin__.int",
    "__builtin__.list",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "torch.device",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
)


class Stub:
    """An object of a class that is not here: its name, arguments and state."""

    __slots__ = ("args", "state")
    name = ""

    def __new__(cls, *args):
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state):
        self.state = state

    def __getitem__(self, field: str) -> Any:
        """A field of its state; ValueError if there is none."""
        if not isinstance(self.state, dict) or field not in self.state:
            raise ValueError(f"pickle: an object of {self.name} has no field {field!r}")
        return self.state[field]

    def get(self, field: str) -> Any:
        return self.state.get(field) if isinstance(self.state, dict) else None

    def __eq__(self, other):
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self):
        return hash((self.name, self._key()))

    def _key(self):
        state = self.state
        fields = tuple(sorted(state.items())) if isinstance(state, dict) else state
        return self.args, fields


class Storage(NamedTuple):
    """A run of numbers in the archive; `read` gives them, one axis."""

    dtype: np.dtype | None  # None: untyped, counted in bytes
    size: int
    read: Callable[[], np.ndarray]


class Tensor(NamedTuple):
    """An array in the archive that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class _Dict(dict):
    """An OrderedDict whose attributes (torch's `_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _Call:
    """A function that a pickle may call, and can do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a function has no state")


class DType(NamedTuple):
    name: str  # a key of DTYPES, or "" for untyped bytes


def loads(
    data: bytes,
    storage: Callable[[Any], Storage] | None = None,
    *,
    source: str,
    inert: Collection[str] = (),
) -> Any:
    """The containers, numbers, text, Tensors and Stubs of one pickle.

    storage: of a persistent id, where the pickle may hold tensors.
    source: what errors call the file.
    inert: more globals, "module.name", whose objects are read as Stubs.

    Raises ValueError for any other global, by name, and for a pickle that is broken.
    """
    _scan(data, source)
    reader = _Reader(data, storage, {*INERT, *inert})
    try:
        return reader.load()
    except _Refused as refused:
        raise ValueError(f"{source}: {refused}") from None
    except Exception as error:
        said = str(error).splitlines() or [""]
        raise ValueError(
            f"{source}: the pickle cannot be read ({type(error).__name__}: "
            f"{said[0][:200]})"
        ) from error


class _Refused(pickle.UnpicklingError):
    pass


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, storage, inert: Collection[str]):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._storage, self._inert = storage, inert
        self._made: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole not in self._made:
            self._made[whole] = self._find(whole)
        return self._made[whole]

    def _find(self, whole: str) -> Any:
        if whole in CALLS:
            return _Call(CALLS[whole])
        module, _, name = whole.rpartition(".")
        if module == "torch" and name in DTYPES:
            return DType(name)
        if module == "torch" and name in STORAGES:
            return DType(STORAGES[name])
        if whole == "torch.storage.UntypedStorage":
            return DType("")
        if whole in self._inert:
            return type(name, (Stub,), {"__slots__": (), "name": whole})
        raise _Refused(
            f"the pickle asks for {whole}, which is not read; only tensors and plain "
            "containers are. If you know what it is, pass it as inert, and what it "
            "holds is skipped"
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise _Refused("the pickle refers to data outside it")
        return self._storage(pid)


def _scan(data: bytes, source: str) -> None:
    """Refuse what would make the reader allocate far beyond the file's size."""
    try:
        for op, argument, _ in pickletools.genops(data):
            puts = op.name in ("PUT", "BINPUT", "LONG_BINPUT")
            if puts and int(argument or 0) > len(data):
                raise ValueError(f"it stores an object at place {argument}")
            if op.name.startswith("EXT"):
                raise ValueError("it refers to the registry of extensions")
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{source}: the pickle cannot be read ({said})") from error


def _rebuild_tensor(storage, offset, size, stride, *rest) -> Tensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise _Refused("a tensor is made of something that is no typed storage")
    return _view(storage, storage.dtype, storage.size, offset, size, stride)


def _rebuild_typed(storage, offset, size, stride, grad, hooks, dtype, *rest) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, DType):
        raise _Refused("a tensor is made of something that is no storage")
    kind = np.dtype(DTYPES[dtype.name])
    held = storage.size * (storage.dtype.itemsize if storage.dtype else 1)
    return _view(storage, kind, held // kind.itemsize, offset, size, stride)


def _view(storage: Storage, dtype, held: int, offset, size, stride) -> Tensor:
    """The strided view of a storage; ValueError if it leaves it."""
    whole = [offset, *size, *stride]
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in whole):
        raise _Refused(f"a tensor of size {size} has strides {stride}, from {offset}")
    shape, steps = tuple(size), tuple(stride)
    last = offset + sum((n - 1) * s for n, s in zip(shape, steps, strict=True))
    elements = math.prod(shape)
    if elements and (last >= held or elements > held):
        raise _Refused(
            f"a tensor of size {shape}, strides {steps} from {offset} leaves its "
            f"storage of {held} elements"
        )

    def read() -> np.ndarray:
        if not elements:
            return np.zeros(shape, dtype)
        flat = storage.read().view(dtype)
        bytes_ = tuple(s * dtype.itemsize for s in steps)
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, bytes_)

    return Tensor(shape, dtype, read)


def _encode(text: str | bytes, encoding: str = "latin1") -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused(f"text is encoded as {encoding!r}")
    return text.encode("latin1")


def _pairs(items=()) -> dict:
    return _Dict(items)


CALLS: Mapping[str, Callable] = {
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": lambda factory=None, items=(): _Dict(items),
    "collections.Counter": _pairs,
    "torch.Size": lambda size=(): tuple(size),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "_codecs.encode": _encode,
    **{
        f"{module}.{name}": make
        for module in ("builtins", "__builtin__")
        for name, make in (
            ("set", lambda items=(): set(items)),
            ("frozenset", lambda items=(): frozenset(items)),
            ("bytearray", _encode),
        )
    },
}
