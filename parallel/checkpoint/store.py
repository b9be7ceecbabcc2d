"""Save and restore a state: asynchronous, atomic, and onto any mesh."""

import contextlib
import json
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from .leaves import differences, named, records
from .steps import (
    NAME,
    CheckpointError,
    complete_steps,
    first_line,
    folder,
    latest_step,
    pack,
    read_header,
    step_path,
    unreadable,
)


def _context() -> ocp.Context:
    """Storage options, chosen by measurement on 100 MB in 80 leaves (2 busy cores).

    Compression took a fifth longer to save and gained 7 % on random floats; a file for
    each chunk (no OCDBT) saved a third faster, but as 278 files in place of 10, which
    a network file system pays for. Replicated arrays are cut among the replicas only
    where a piece has 4 MiB: each cut compiles a slice for each device, which made the
    first save of a state of 20 small leaves 6 s longer.
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = True
    saving.use_compression = False
    saving.min_slice_bytes_for_replica_parallel = 2**22
    return context


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
    reader never disturbs a run. With several processes each calls every method; all
    arrays, scalars too, must then be global.
    """

    def __init__(self, directory: Any, *, keep: int = 3, best: str | None = None):
        self.directory = folder(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"directory must be a folder, got a file: {directory}")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._keep, self._best = keep, best
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
    ) -> None:
        """Begin to write `state` as `step`; returns once the arrays may be donated.

        The write to disk goes on behind; what it waits for is the write before, the
        arrays themselves and their fingerprints. `meta` is any JSON dictionary and
        comes back as JSON gives it. Raises CheckpointError if the write before failed
        (it names that step; this one is not begun), ValueError for a step not after
        the newest, a leaf that is not a jax array, `meta` that is not JSON, and
        `metrics` without the metric that `best` names.
        """
        self.wait()
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
        header = pack(meta, values, records(leaves))
        arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}
        if not arrays:
            raise ValueError("state must hold an array with elements, all are empty")
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
        self.wait()
        step, path = step_path(self.directory, step)
        header = read_header(path)
        for key, wanted in (expect or {}).items():
            stored = header.meta.get(key)
            if key not in header.meta or stored != json.loads(json.dumps(wanted)):
                raise ValueError(
                    f"expect[{key!r}] is {wanted!r}, but checkpoint {path} was saved "
                    f"with {stored!r}: resume with that, or save to another directory"
                )
        wanted = named(target)
        for name, leaf in wanted.items():
            _check_target(name, leaf)
        if unlike := differences(header.leaves, wanted):
            raise ValueError(
                f"checkpoint {path} does not fit the target; {unlike}: build the "
                "target from that run's model and optimizer, or pass another step"
            )
        shapes = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in wanted.items()
        }
        loaded = self._load(
            path, {n: s for n, s in shapes.items() if n in header.stored}
        )
        for name, shape in shapes.items():  # Orbax stores no array without elements
            if name not in loaded:
                loaded[name] = jnp.zeros(
                    shape.shape, shape.dtype, device=shape.sharding
                )
            # Keys come back under an equivalent sharding of another spelling, which a
            # compiled step would take for a new one.
            loaded[name] = jax.device_put(loaded[name], shape.sharding)
        found = records(loaded)
        if wrong := [name for name in loaded if found[name] != header.leaves[name]]:
            raise unreadable(
                path, f"other bits than were saved in {', '.join(wrong[:8])}"
            )
        leaves = [loaded[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(target), leaves), header.meta

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

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the first error is the one to see

    def _open(self) -> ocp.training.Checkpointer:
        """A writer; its making sweeps what a killed or failed write left behind."""
        keep = ocp.training.preservation_policies
        self._policy = _KeepBest(self._values(self._best) if self._best else {})
        policy: Any = keep.AnyPreservationPolicy(
            [keep.LatestN(self._keep), self._policy]
        )
        return ocp.training.Checkpointer(
            self.directory,
            context=_context(),
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

    def _load(self, path: ocp.path.Path, shapes: dict[str, Any]) -> dict[str, Any]:
        if not shapes:
            return {}
        try:
            with _context(), jax.transfer_guard("allow"):
                loaded: Any = ocp.load(path, shapes, checkpointable_name=NAME)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # no room on this machine: the checkpoint is not to blame
        except Exception as error:
            raise unreadable(path, first_line(error)) from error
        return dict(loaded)


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


def _check_target(name: str, leaf: Any) -> None:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        raise ValueError(
            f"target leaf {name!r} must say where to go, got {leaf!r} without a "
            "sharding: give jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
        )
    try:
        sharding.shard_shape(tuple(leaf.shape))
    except ValueError as error:
        raise ValueError(
            f"target leaf {name!r} of shape {tuple(leaf.shape)} cannot be split as "
            f"{sharding} says: choose a spec that divides it, or P()"
        ) from error
