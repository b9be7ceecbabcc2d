"""Save and restore a state: asynchronous, atomic, and onto any mesh."""

import contextlib
import json
import math
import operator
import time
from collections.abc import Callable
from typing import Any, Self

import jax
from orbax.checkpoint import v1 as ocp

from .leaves import named, records
from .resume import Arrangement, Restored, restore
from .steps import (
    NAME,
    CheckpointError,
    complete_steps,
    first_line,
    folder,
    latest_step,
    pack,
    read_header,
)
from .storage import orbax_context


class _KeepBest:
    """An Orbax preservation policy: the step with the lowest value so far.

    Orbax's own BestN reads a file of metrics in every step when a directory is opened
    and dies of one that is broken; these values come from headers that were checked.
    """

    def __init__(self, values: dict[int, float]):
        self.values = values

    def should_preserve(self, checkpoints, *, context):
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = _lowest({s: v for s, v in self.values.items() if s in steps})
        return [step == best for step in steps]


class Checkpoints:
    """The checkpoints of one run in one directory; use it with `with`.

    Keeps the newest `keep` steps and, where `best` names a metric (lower is better),
    the best step too. Nothing is created or swept before the first save, so that a
    reader never disturbs a run. With `blocking` a save returns when it is complete.
    With several processes each calls every method; all arrays, scalars too, must then
    be global.
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep: int = 3,
        best: str | None = None,
        blocking: bool = False,
    ):
        self.directory = folder(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"directory must be a folder, got a file: {directory}")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._keep, self._best, self._blocking = keep, best, blocking
        self._blocked = 0.0
        self._writer: ocp.training.Checkpointer | None = None
        self._policy = _KeepBest({})
        self._pending: tuple[int, Any] | None = None

    @property
    def steps(self) -> list[int]:
        """The complete steps, ascending; one that is still being written is not."""
        return complete_steps(self.directory)

    @property
    def latest(self) -> int | None:
        """The newest complete step."""
        return latest_step(self.directory)

    @property
    def best(self) -> int | None:
        """The complete step with the lowest metric, the earliest of equals."""
        if self._best is None:
            raise ValueError("best needs a metric: Checkpoints(..., best='its name')")
        if self._writer is None:
            return _lowest(self._values(self._best))
        complete = self.steps  # values of a step still being written do not count
        return _lowest({s: v for s, v in self._policy.values.items() if s in complete})

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        *,
        metrics: dict[str, float] | None = None,
        layout: Arrangement | None = None,
    ) -> None:
        """Begin to write `state` as `step`; returns once the arrays may be donated.

        The write to disk goes on behind; what it waits for is the write before, the
        arrays themselves and their fingerprints. `meta` is any JSON dictionary and
        comes back as JSON gives it. `layout` says which logical arrays the leaves hold,
        where they are not stored as they are. Raises CheckpointError if the write
        before failed (it names that step; this one is not begun), ValueError for a step
        not after the newest, a leaf that is not a jax array, `meta` that is not JSON,
        `metrics` without the metric that `best` names, and a layout of other leaves.
        """
        begun = time.perf_counter()
        self.wait()
        step, leaves, meta, values = self._checked(step, state, meta, metrics, layout)
        more = {"layout": layout.record()} if layout else {}
        header = pack(meta, values, records(leaves), **more)
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        try:
            writer = self._writer = self._writer or self._open()
            self._policy.values[step] = values.get(self._best or "", math.inf)
            with jax.transfer_guard("allow"):  # to save is to transfer, knowingly
                response = writer.save_async(
                    step,
                    arrays,
                    force=True,
                    custom_metadata=header,
                    checkpointable_name=NAME,
                )
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = (step, response)
        if self._blocking:
            self.wait()
        self._blocked += time.perf_counter() - begun

    def gated(self, step: Any) -> Callable:
        """The training step, of `make_step`, that goes with this way to save."""
        return step.fused

    def take_blocked(self) -> float:
        """Seconds in which saves have stopped their caller, since the last call."""
        blocked, self._blocked = self._blocked, 0.0
        return blocked

    def restore(
        self,
        target: Any,
        *,
        step: int | None = None,
        expect: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """State and meta of a step, the newest by default, in the layout of `target`.

        `target` is the same tree with a `jax.ShapeDtypeStruct` that has a sharding (or
        an array) for every leaf; the mesh that saved it plays no part. Names, dtypes
        and shapes must agree exactly: nothing is cast, left out or filled in. `expect`
        holds entries which `meta` must equal. Every leaf is checked against its stored
        fingerprint. Raises ValueError for a target or an expectation that does not
        fit, CheckpointError for a step that is absent or broken; writes nothing.
        """
        return self.resume(target, step=step, expect=expect)[:2]

    def resume(self, target: Any, **options: Any) -> Restored:
        """`restore` with a report, and the options of `resume.restore`: layout, ..."""
        self.wait()
        return restore(self.directory, target, **options)

    def wait(self) -> None:
        """Block until the last save is complete; CheckpointError if it failed."""
        if self._pending is None:
            return
        step, response = self._pending
        try:
            response.result()
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = None

    def close(self) -> None:
        """Finish the last save and free the threads; CheckpointError if it failed."""
        self.wait()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the first error is the one to see

    def _checked(self, step, state, meta, metrics, layout):
        """Step, leaves by name, meta as JSON and metrics; ValueError as `save` says."""
        step, newest = operator.index(step), self.latest
        if step < 0 or (newest is not None and step <= newest):
            raise ValueError(
                f"step must be at least 0 and after {newest}, the newest in "
                f"{self.directory}, got {step}: delete the later ones or save elsewhere"
            )
        leaves = named(state)
        for name, leaf in leaves.items():
            _check_array(name, leaf)
        try:
            meta = json.loads(json.dumps(dict(meta), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta must be a JSON dictionary: {error}") from error
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if metrics is not None and self._best not in (None, *values):
            raise ValueError(
                f"metrics must hold {self._best!r}, by which the best step is kept, "
                f"got {sorted(values)}"
            )
        if not any(leaf.size for leaf in leaves.values()):
            raise ValueError("state must hold an array with elements, all are empty")
        if layout is not None:
            layout.check({name: tuple(leaf.shape) for name, leaf in leaves.items()})
        return step, leaves, meta, values

    def _open(self) -> ocp.training.Checkpointer:
        """A writer; its making sweeps what a killed or failed write left behind."""
        keep = ocp.training.preservation_policies
        self._policy = _KeepBest(self._values(self._best) if self._best else {})
        policy: Any = keep.AnyPreservationPolicy(
            [keep.LatestN(self._keep), self._policy]
        )
        return ocp.training.Checkpointer(
            self.directory,
            context=orbax_context(),
            preservation_policy=policy,
            cleanup_tmp_directories=True,
        )

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """Give up the writer, whose list of steps is wrong now; the next one sweeps."""
        writer, self._writer, self._pending = self._writer, None, None
        if writer is not None:
            with contextlib.suppress(Exception):  # says the same once more
                writer.wait()
            with contextlib.suppress(Exception):
                writer.close()
        return CheckpointError(
            f"step {step} was not saved to {self.directory} ({first_line(error)}); the "
            f"newest complete step is {self.latest}: check that the folder is there, "
            "writable and has room"
        )

    def _values(self, metric: str) -> dict[int, float]:
        values = {}
        for step in self.steps:
            with contextlib.suppress(CheckpointError):  # a broken step is never best
                header = read_header(self.directory / str(step))
                values[step] = header.metrics.get(metric, math.inf)
        return values


def _lowest(values: dict[int, float]) -> int | None:
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    return min(finite, key=lambda step: (finite[step], step), default=None)


def _check_array(name: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array):
        raise ValueError(
            f"leaf {name!r} must be a jax array, got {type(leaf).__name__}: use "
            "jnp.asarray, or put it into meta"
        )
    if jax.process_count() > 1 and leaf.is_fully_addressable:
        raise ValueError(
            f"leaf {name!r} lives on this process alone: with several processes put it "
            "on the mesh, e.g. jax.device_put(x, NamedSharding(mesh, PartitionSpec()))"
        )
