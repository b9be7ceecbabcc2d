"""How a streamed step becomes complete everywhere, or not at all.

Every process writes its chunks into one temporary folder and then a file which says
that it has (prepared). Once all have, process 0 writes the header and the marker and
renames the folder to the step's number: that is the commit. A process that dies before
leaves a temporary folder, which the next run sweeps away.
"""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import time
from typing import Any

import jax
import numpy as np

from .steps import MARKER, STREAMED, complete_steps

TEMPORARY = ".lazy-tmp-"


class Prepared:
    """A step that is being written by this process."""

    def __init__(self, path: pathlib.Path, step: int):
        self.path, self.step = path, step
        self.arrays: dict[str, Any] = {}  # open, by leaf
        self.writes: list[Any] = []  # futures

    def abandon(self, error: BaseException | None) -> None:
        """Give it up: tell the other processes, or, if alone, remove the folder."""
        for future in self.writes:
            with contextlib.suppress(Exception):
                future.result()
        if jax.process_count() == 1:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                _put(self.path / f"failed-{jax.process_index()}", str(error))


class Commit:
    """Commits steps in one directory; made by every process, at the same time."""

    def __init__(self, directory: Any, keep: int, timeout: float):
        self.directory = pathlib.Path(directory)
        self.keep, self.timeout = keep, timeout
        self.rank, self.count = jax.process_index(), jax.process_count()
        token = np.uint32(secrets.randbits(32))
        if self.count > 1:
            from jax.experimental import multihost_utils

            token = multihost_utils.broadcast_one_to_all(token)
        self.token = f"{int(token):08x}"
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self._sweep()

    def begin(self, step: int) -> Prepared:
        path = self.directory / f"{step}{TEMPORARY}{self.token}"
        path.mkdir(exist_ok=True)
        return Prepared(path, step)

    def finish(
        self, prepared: Prepared, header: dict[str, Any], scores: dict[int, float]
    ) -> None:
        """Wait for all processes and commit; TimeoutError names who is missing."""
        final = self.directory / str(prepared.step)
        _put(prepared.path / f"prepared-{self.rank}", "")
        if self.rank == 0:
            self._all_prepared(prepared)
            _put(prepared.path / STREAMED, json.dumps(header))
            _put(prepared.path / MARKER, "")
            _sync(prepared.path)
            prepared.path.rename(final)
            _sync(self.directory)
            self._retire(scores)
        else:
            self._wait(
                lambda: final.exists() or self._failed(prepared), "process 0 to commit"
            )
            if not final.exists():
                raise RuntimeError(f"another process failed: {self._failed(prepared)}")

    def best(self, scores: dict[int, float]) -> int | None:
        steps = [s for s in complete_steps(self.directory) if s in scores]
        finite = [s for s in steps if np.isfinite(scores[s])]
        return min(finite, key=lambda s: (scores[s], s), default=None)

    def _all_prepared(self, prepared: Prepared) -> None:
        def missing() -> list[int]:
            names = {path.name for path in prepared.path.iterdir()}
            return [r for r in range(self.count) if f"prepared-{r}" not in names]

        self._wait(
            lambda: not missing() or self._failed(prepared),
            lambda: f"processes {missing()}",
        )
        if failed := self._failed(prepared):
            raise RuntimeError(f"another process failed: {failed}")

    def _failed(self, prepared: Prepared) -> str:
        with contextlib.suppress(OSError):
            found = sorted(prepared.path.glob("failed-*"))
            return f"{found[0].name}: {found[0].read_text()}" if found else ""
        return ""

    def _wait(self, ready, who) -> None:
        end = time.monotonic() + self.timeout
        while not ready():
            if time.monotonic() > end:
                said = who if isinstance(who, str) else who()
                raise TimeoutError(f"waited {self.timeout:g} s for {said}")
            time.sleep(0.005)

    def _retire(self, scores: dict[int, float]) -> None:
        """Remove all but the newest steps and the best; a rename first, so that none
        looks complete while it goes."""
        steps = complete_steps(self.directory)
        keep = {*steps[-self.keep :], self.best(scores)}
        for step in steps:
            if step not in keep:
                gone = self.directory / f"{step}{TEMPORARY}{self.token}"
                (self.directory / str(step)).rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        for pattern in (f"*{TEMPORARY}*", "*.orbax-checkpoint-tmp*"):
            for path in self.directory.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def _put(path: pathlib.Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
