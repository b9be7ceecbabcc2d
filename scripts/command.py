"""What the commands share: flags apart from absl's global ones, exit codes, processes.

Exit code 2 and one sentence on standard error for bad input; 0 for --help.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh
from narrows.parallel.host_memory import keep_freed_memory
from narrows.parallel.layout import Layout, make_mesh
from narrows.scripts.stopping import noted_signals


class BadInput(SystemExit):
    """One sentence for the person who called, then exit code 2."""

    def __init__(self, sentence: object):
        print(f"error: {' '.join(str(sentence).split())}", file=sys.stderr, flush=True)
        super().__init__(2)


@contextlib.contextmanager
def bad_input():
    """Turn what libraries say of bad arguments and files into a sentence.

    Wrap the set-up only: an error in the work itself keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("NARROWS_TRACEBACK"):
            raise
        raise BadInput(error) from error


def parse(values: flags.FlagValues, argv: Sequence[str], doc: str | None) -> None:
    """Read argv into the flags; print the help and exit 0, or refuse and exit 2.

    Also the moment to tell the allocator how a command uses memory: before any thread.
    """
    keep_freed_memory()
    flags.DEFINE_bool(
        "help", False, "show this text", short_name="h", flag_values=values
    )
    try:
        rest = values(argv)
    except flags.Error as error:
        raise BadInput(error) from error
    if values.help:
        print(doc, values.get_help(include_special_flags=False), sep="\n")
        raise SystemExit(0)
    if len(rest) > 1:
        raise BadInput(
            f"arguments: {rest[1:]}, but everything is given as --flag=value"
        )


def define_processes(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "coordinator",
        None,
        "host:port of process 0; SLURM and Cloud TPU are found by themselves",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_count", None, "with --coordinator", flag_values=values
    )
    flags.DEFINE_integer("process_id", None, "with --coordinator", flag_values=values)
    flags.DEFINE_integer(
        "heartbeat_seconds",
        100,
        "end this process so long after another was last heard of",
        lower_bound=1,
        flag_values=values,
    )


def join_processes(values: flags.FlagValues) -> None:
    """Start `jax.distributed` where the flags, SLURM or a TPU slice ask for it."""
    given = (values.coordinator, values.process_count, values.process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise BadInput(
                "coordinator: give --coordinator, --process_count and --process_id "
                f"together; they are {given}"
            )
        jax.distributed.initialize(
            *given, heartbeat_timeout_seconds=values.heartbeat_seconds
        )
    elif (
        int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    ) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize(heartbeat_timeout_seconds=values.heartbeat_seconds)


class Place(NamedTuple):
    """Where a training command works."""

    workdir: pathlib.Path  # absolute
    layout: Layout
    mesh: Mesh


def place_of(values: flags.FlagValues, devices: Sequence) -> Place:
    """What --workdir and --mesh say; ValueError for one that is missing or unfit."""
    if values.workdir is None:
        raise ValueError("workdir: give --workdir, where the run is kept")
    layout = Layout.parse(values.mesh, devices=len(devices))
    workdir = pathlib.Path(values.workdir).expanduser().absolute()
    return Place(workdir, layout, make_mesh(layout, devices))


def run_training(
    values: flags.FlagValues,
    argv: Sequence[str],
    doc: str | None,
    train: Callable[[flags.FlagValues, Sequence, list[int]], int],
    devices: Sequence | None,
) -> int:
    """`train(flags, devices, signals that came)` as argv says; the exit code.

    It trains on all devices of all processes unless some are given.
    """
    parse(values, argv, doc)
    with noted_signals() as stops:
        join_processes(values)
        return train(values, jax.devices() if devices is None else devices, stops)
