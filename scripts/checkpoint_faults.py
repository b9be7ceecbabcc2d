"""Measures of what survives: killed runs, full disks, damaged files.

A measure is called as (scale, seed) by `scripts/reproduce.py`; see `claims.py`.
"""

import contextlib
import itertools
import logging
import os
import pathlib
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from narrows.parallel.checkpoint import ENGINES, CheckpointError, latest_step
from narrows.scripts.claims import Row
from narrows.scripts.kill_runs import killed_runs

# What dies, and how often a seed: quick, full. The random instants of five full seeds
# are 300.
KILLS = {
    "async": ("async", "any", 6, 30),
    "lazy": ("lazy", "any", 6, 30),
    "commit": ("lazy", "commit", 5, 20),
    "pair": ("lazy", "pair", 1, 4),
}


def killed(scale: str, seed: int) -> Iterator[Row]:
    """Runs killed at random instants, in a commit, and one process of two."""
    lost = 0
    for name, (engine, when, quick, full) in KILLS.items():
        kills = quick if scale == "quick" else full
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            try:
                killed_runs(path, kills=kills, seed=seed, engine=engine, when=when)
            except RuntimeError:
                lost += 1
        yield Row("kills", kills, name)
    yield Row("runs that lost a commit", lost)


def damaged(scale: str, seed: int) -> Iterator[Row]:
    """Every kind of fault in every engine: is it one sentence, and does the step
    before still load?"""
    del scale  # it is quick
    rng = np.random.default_rng(seed)
    state = {"x": jnp.asarray(rng.random(2**18), jnp.float32), "n": jnp.int32(seed)}
    silent = cases = 0
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # Orbax's threads log pages on their own account
    try:
        for engine, fault in itertools.product(ENGINES, FAULTS):
            with tempfile.TemporaryDirectory() as folder:
                cases += 1
                path = pathlib.Path(folder)
                silent += not _survived(path, engine, fault, state, rng)
    finally:
        logger.setLevel(level)
    yield Row("faults that were not named or survived", silent)
    yield Row("faults", cases)


def _survived(folder: pathlib.Path, engine: str, fault: str, state, rng) -> bool:
    run = folder / "run"
    options = {"chunk_bytes": 2**18} if engine == "lazy" else {}
    said = ""
    with ENGINES[engine](run, **options) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        newer = jax.tree.map(lambda x: x + 1, state)
        if fault == "disk full":
            try:
                with _full_disk():
                    checkpoints.save(2, newer, {})
                    checkpoints.wait()
            except CheckpointError as error:
                said = str(error)
            if latest_step(run) != 1 or "newest complete step is 1" not in said:
                return False
        else:
            checkpoints.save(2, newer, {})
    if fault != "disk full":
        FAULTS[fault](_largest(run / "2"), rng)
        try:
            got, _ = ENGINES[engine](run).restore(state)
        except CheckpointError as error:
            said = str(error)
            if "pass step=1, the newest other one" not in said:
                return False
        else:  # the fault met bytes that hold nothing, or it went unnoticed
            if not _same(got, newer):
                return False
    got, _ = ENGINES[engine](run).restore(state, step=1)
    return _same(got, state) and "\n" not in said


def _same(got: dict, wanted: dict) -> bool:
    return all(np.array_equal(got[name], wanted[name]) for name in wanted)


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """No file may grow beyond 128 KiB: a write fails as it does where there is no room,
    for the superuser too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _truncate(path: pathlib.Path, rng) -> None:
    os.truncate(path, int(rng.integers(path.stat().st_size)))


def _flip(path: pathlib.Path, rng) -> None:
    data = bytearray(path.read_bytes())
    # Not in the last bytes, which some formats leave unused.
    data[int(rng.integers(len(data) - 64))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def _largest(step: pathlib.Path) -> pathlib.Path:
    files = [path for path in step.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


FAULTS: dict[str, Callable] = {
    "disk full": lambda path, rng: None,
    "truncated": _truncate,
    "flipped": _flip,
    "gone": lambda path, rng: path.unlink(),
    "folder gone": lambda path, rng: shutil.rmtree(path.parent),
}
