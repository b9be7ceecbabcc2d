"""Files of torch.save, written by hand: what is read, and what is refused.

Files that PyTorch itself wrote are read in tests/scripts/test_convert_checkpoint.py.
"""

import os
import pickle
import zipfile

import numpy as np
import pytest
from narrows.parallel.checkpoint.torch_files import read_torch, tensors
from narrows.parallel.checkpoint.unpickle import Stub, loads
from torch_writer import (
    STORAGES,
    Call,
    Global,
    Pid,
    Strided,
    assert_bits,
    bits,
    program,
    save,
)


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
