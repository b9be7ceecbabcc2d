"""A tiny run on real text that the tests of the commands share."""

import contextlib
import hashlib
import heapq
import pathlib
import shutil
import textwrap

import jax
import pytest
from narrows.scripts import train

TINY = (
    "--depth=2",
    "--width=32",
    "--heads=4",
    "--codes=32",
    "--code_width=8",
    "--seq_len=16",
    "--batch_size=8",
    "--steps=40",
    "--checkpoint_every=20",
    "--eval_every=20",
    "--eval_rows=16",
    "--nosample",
)


@pytest.fixture(scope="session")
def call(quickly):
    """`call(script, *arguments, ...)`: the exit code of its main, compiled cheaply."""

    def call(script, *arguments, devices: int | None = None) -> int:
        options = {} if devices is None else {"devices": jax.devices()[:devices]}
        with quickly():
            try:
                return script.main([script.__name__, *arguments], **options)
            except SystemExit as stop:
                return stop.code  # type: ignore[return-value], an integer in commands

    return call


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """A folder of real text, 50 kB in files."""
    folder = tmp_path_factory.mktemp("books")
    for module in (contextlib, heapq, pathlib, textwrap):
        assert module.__file__
        shutil.copy(module.__file__, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(books):
    """The flags of the shared run, but for its workdir."""
    return (*TINY, f"--data={books}")


@pytest.fixture(scope="session")
def finished(call, tiny, tmp_path_factory):
    """The workdir of a run of 40 steps on 8 devices that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    assert call(train, f"--workdir={workdir}", *tiny) == 0
    return workdir


@pytest.fixture(scope="session")
def listing():
    """`listing(folder)`: every path below it, with a hash of each file."""

    def listing(folder: pathlib.Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else ""
            for path in sorted(folder.rglob("*"))
        }

    return listing
