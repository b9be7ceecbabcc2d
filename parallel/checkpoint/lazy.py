"""Checkpoints that are copied while gradients are computed, and cost no pause.

Between two updates the state does not change. So `save` only notes what is to be
copied; a thread copies it to a bounded host buffer while the device computes the next
gradients; each chunk goes to storage as soon as it is there, while later ones are still
being copied; and a step is committed in the background. Training waits at one place,
before the update that overwrites the state:

    grads, report = step.gradients(state, batch)      # the copies run here
    checkpoints.gate()                                # until none is left
    state, metrics = step.update(state, grads, report)

After DataStates-LLM (arXiv:2406.10707, Section 4); commit, layout and hashes are ours.
"""

import collections
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from .arena import Arena, Region, room_for
from .commit import Commit, Prepared
from .leaves import Record, fingerprint
from .resume import Arrangement
from .shards import Chunk, chunks_of, copies
from .steps import CheckpointError, Stored, first_line, pack
from .storage import open_array, words
from .store import Checkpoints


class Stall(NamedTuple):
    """Seconds of one saved step; the first two are what training has waited for."""

    step: int
    enqueue: float  # in `save`
    gate: float  # in `gate`
    copied: float  # from `save` until all was in the buffer
    committed: float  # from `save` until it was complete on disk; nan: it was dropped


class _Version:
    def __init__(self, step: int, leaves: dict[str, jax.Array], prints, body):
        self.step, self.prints, self.body = step, prints, body
        self.leaves: dict[str, jax.Array] | None = leaves  # None once they are copied
        self.copied, self.done = threading.Event(), threading.Event()
        self.dropped = self.committed = False
        self.error: BaseException | None = None
        self.begun = time.perf_counter()
        self.enqueue = self.gate = self.copy_time = 0.0
        self.commit_time = np.nan


class LazyCheckpoints(Checkpoints):
    """As `Checkpoints`, but `save` returns at once; call `gate` before each update.

    arena_bytes: of the host buffer, by default the state's share of this process.
    when_busy: what a save does while an earlier one is not on disk: "wait" (both are
        kept; the gate waits for room in the buffer), "skip" (this one is left out) or
        "drop" (the earlier one is given up). The last two need a single process.
    chunk_bytes: at most so much is copied, and written, at a time.
    copy_rate, write_rate: limits in bytes per second, None for none.
    commit_timeout: seconds in which all processes must have written a step.

    Committed steps are those of `Checkpoints`, and either class reads both. `stalls`
    has a line for each finished save; `skipped` the steps that were left out or given
    up. Needs a file system in which a rename is atomic.
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep: int = 3,
        best: str | None = None,
        arena_bytes: int | None = None,
        when_busy: Literal["wait", "skip", "drop"] = "wait",
        chunk_bytes: int = 2**24,
        copy_rate: float | None = None,
        write_rate: float | None = None,
        commit_timeout: float = 600.0,
    ):
        if "://" in str(directory):
            raise ValueError(
                f"directory: {directory} is no file system, on which lazy checkpoints "
                "rely; take asynchronous ones there"
            )
        if when_busy not in ("wait", "skip", "drop"):
            raise ValueError(
                f"when_busy: {when_busy!r}, but allowed are 'wait', 'skip' and 'drop'"
            )
        if when_busy != "wait" and jax.process_count() > 1:
            raise ValueError(
                f"when_busy: {when_busy!r} needs a single process, for several may "
                "not agree which step is busy; take 'wait'"
            )
        super().__init__(directory, keep=keep, best=best)
        self._arena_bytes, self._when_busy = arena_bytes, when_busy
        self._chunk_bytes = chunk_bytes
        self._rates = copy_rate, write_rate
        self._timeout = commit_timeout
        self._arena: Arena | None = None
        self._versions: collections.deque[_Version] = collections.deque()
        self._to_copy: queue.Queue = queue.Queue()
        self._to_write: queue.Queue = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._commit: Commit | None = None
        self._scores: dict[int, float] = {}
        self.stalls: list[Stall] = []
        self.skipped: list[int] = []

    @property
    def best(self) -> int | None:
        """The complete step with the lowest metric, the earliest of equals."""
        if self._commit is None:
            return super().best
        return self._commit.best(self._scores)

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        *,
        metrics: dict[str, float] | None = None,
        layout: Arrangement | None = None,
    ) -> None:
        """Note `state` as `step`, to be copied before the next `gate` returns.

        Until then the arrays may not be donated. Raises as `Checkpoints.save`, and
        CheckpointError if a write before this one failed.
        """
        begun = time.perf_counter()
        self._settle()
        step, leaves, meta, values = self._checked(step, state, meta, metrics, layout)
        if self._versions and step <= self._versions[-1].step:
            raise ValueError(
                f"step must be after {self._versions[-1].step}, which is being saved, "
                f"got {step}"
            )
        if self._versions and self._when_busy != "wait":
            if self._when_busy == "skip":
                self.skipped.append(step)
                return
            for version in self._versions:
                version.dropped = True
        for name, leaf in leaves.items():
            if words_of := _unstorable(leaf):
                raise ValueError(f"leaf {name!r} of {words_of} cannot be streamed")
        self._start(leaves)
        self._scores[step] = values.get(self._best or "", np.inf)
        more = {"layout": layout.record()} if layout else {}
        with jax.transfer_guard("allow"):  # to save is to transfer, knowingly
            prints = _fingerprints(leaves)  # the device makes them before the gradients
        version = _Version(step, leaves, prints, (meta, values, more))
        self._versions.append(version)
        self._to_copy.put(version)
        version.enqueue = time.perf_counter() - begun
        self._blocked += version.enqueue

    def gate(self) -> None:
        """Wait until what was saved is copied and may be overwritten.

        Raises CheckpointError if a save failed.
        """
        begun = time.perf_counter()
        for version in list(self._versions):
            version.copied.wait()
            version.leaves = None
        waited = time.perf_counter() - begun
        if self._versions:
            self._versions[-1].gate += waited
        self._blocked += waited
        self._settle()

    def gated(self, step: Any) -> Callable:
        """The two halves of a training step, with the gate between them.

        A step that has none (`optim.local_updates`) waits before it as a whole.
        """
        if not hasattr(step, "gradients"):

            def whole(state, batch):
                self.gate()
                return step.fused(state, batch)

            return whole

        def run(state, batch):
            grads, report = step.gradients(state, batch)
            self.gate()
            return step.update(state, grads, report)

        return run

    def wait(self) -> None:
        """Block until all saves are complete; CheckpointError if one failed."""
        for version in list(self._versions):
            version.done.wait()
        self._settle()

    def close(self) -> None:
        """Finish all saves and end the threads; CheckpointError if one failed."""
        try:
            self.wait()
        finally:
            if self._threads:
                self._to_copy.put(None)
                for thread in self._threads:
                    thread.join()
                self._threads = []

    def _settle(self) -> None:
        """Book the finished versions; raise for one that failed."""
        while self._versions and self._versions[0].done.is_set():
            v = self._versions.popleft()
            if v.dropped and not v.committed:
                self.skipped.append(v.step)
            times = v.enqueue, v.gate, v.copy_time, v.commit_time
            self.stalls.append(Stall(v.step, *times))
            if v.error is not None:
                raise CheckpointError(
                    f"step {v.step} was not saved to {self.directory} "
                    f"({first_line(v.error)}); the newest complete step is "
                    f"{self.latest}: check that the folder is there, writable and has "
                    "room"
                ) from v.error

    def _start(self, leaves: dict[str, jax.Array]) -> None:
        if self._threads:
            return
        if self._commit is None:
            self._commit = Commit(self.directory, self._keep, self._timeout)
            if self._best:
                self._scores = self._values(self._best)
            most = self._chunk_bytes
            pieces = (c for leaf in leaves.values() for c in chunks_of(leaf, most))
            size = sum(room_for(chunk.bytes) for chunk in pieces)
            self._arena = Arena(self._arena_bytes or max(size, 1))
        self._threads = [
            threading.Thread(target=run, name=f"checkpoint-{name}", daemon=True)
            for name, run in (("copy", self._copy), ("write", self._write))
        ]
        for thread in self._threads:
            thread.start()

    def _copy(self) -> None:
        """Device to buffer, chunk by chunk, in the order of the saves."""
        while (version := self._to_copy.get()) is not None:
            try:
                for name, leaf in version.leaves.items():
                    self._copy_leaf(version, name, leaf)
            except BaseException as error:
                version.error = version.error or error
            version.copy_time = time.perf_counter() - version.begun
            version.copied.set()
            self._to_write.put((version, None, None, None))
            del version
        self._to_write.put(None)

    def _copy_leaf(self, version: _Version, name: str, leaf: jax.Array) -> None:
        assert self._arena is not None
        for chunk, source in copies(leaf, self._chunk_bytes):
            if version.dropped or version.error:
                return
            pace = time.perf_counter()
            region = self._arena.take(chunk.bytes)
            copy = region.view.view(words(leaf.dtype)).reshape(chunk.shape)
            np.copyto(copy, source)
            _keep_to(self._rates[0], chunk.bytes, pace)
            self._to_write.put((version, name, chunk, region))

    def _write(self) -> None:
        """Buffer to storage, then commit. Errors end the version, not the thread."""
        assert self._commit is not None
        assert self._arena is not None
        prepared: dict[int, Prepared] = {}
        while (item := self._to_write.get()) is not None:
            version, name, chunk, region = item
            handed_on = False  # the region: it comes back when it is written
            try:
                if not (version.dropped or version.error):
                    if version.step not in prepared:
                        prepared[version.step] = self._commit.begin(version.step)
                    if region is not None:
                        self._write_chunk(prepared[version.step], name, chunk, region)
                        handed_on = True
                    else:
                        self._finish(version, prepared[version.step])
            except BaseException as error:
                version.error = version.error or error
            if region is not None and not handed_on:
                self._arena.give_back(region)
            if region is None:
                gone = prepared.pop(version.step, None)
                if gone is not None and not version.committed:
                    gone.abandon(version.error)
                version.done.set()

    def _write_chunk(
        self, prepared: Prepared, name: str, chunk: Chunk, region: Region
    ) -> None:
        assert self._arena is not None
        pace = time.perf_counter()
        if name not in prepared.arrays:
            prepared.arrays[name] = open_array(
                prepared.path,
                name,
                shape=chunk.of,
                dtype=chunk.dtype,
                chunk=chunk.grid,
                create=True,
            ).result()
        _keep_to(self._rates[1], region.size, pace)
        source = region.view.view(chunk.dtype).reshape(chunk.shape)
        box = tuple(slice(start, stop) for start, stop in chunk.box)
        future = prepared.arrays[name][box].write(
            source, can_reference_source_data_indefinitely=True
        )
        prepared.writes.append(future.commit)
        arena = self._arena
        future.commit.add_done_callback(lambda _: arena.give_back(region))

    def _finish(self, version: _Version, prepared: Prepared) -> None:
        assert self._commit is not None
        for future in prepared.writes:
            future.result()
        prints, leaves = version.prints
        meta, values, more = version.body
        found = {
            name: Record(str(dtype), shape, int(bits))
            for (name, dtype, shape, _), bits in zip(
                leaves, jax.device_get(prints), strict=True
            )
        }
        arrays = {name: stored for name, _, _, stored in leaves if stored}
        header = pack(meta, values, found, arrays=arrays, **more)
        self._commit.finish(prepared, header, self._scores if self._best else {})
        version.committed = True
        version.commit_time = time.perf_counter() - version.begun


@jax.jit
def _all_fingerprints(leaves):
    # One program: programs with an all-reduce each can starve each other of threads
    # where devices are simulated on few cores.
    return [fingerprint(leaf) for leaf in leaves]


def _fingerprints(leaves: dict[str, jax.Array]):
    """The fingerprints, still being computed, and what else the header says."""
    facts = []
    for name, leaf in leaves.items():
        data = leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, leaf)
        stored = Stored(tuple(data.shape), words(leaf.dtype), _sharding_text(leaf))
        entry = (stored.shape, str(stored.dtype), stored.sharding)
        facts.append(
            (name, leaf.dtype, tuple(leaf.shape), entry if leaf.size else None)
        )
    return _all_fingerprints(list(leaves.values())), facts


def _sharding_text(leaf: jax.Array) -> str:
    sharding = leaf.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return "one device"
    axes = ",".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items())
    return f"{jax.sharding.PartitionSpec(*sharding.spec)} on {axes}"


def _unstorable(leaf: jax.Array) -> str:
    key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return "" if key or leaf.dtype.itemsize <= 8 else str(leaf.dtype)


def _keep_to(rate: float | None, size: int, since: float) -> None:
    if rate is not None:
        time.sleep(max(0.0, since + size / rate - time.perf_counter()))
