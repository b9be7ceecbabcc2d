"""Kill runs that save all the time, again and again, and see what the next one finds.

    python -m narrows.scripts.kill_runs DIRECTORY KILLS SEED ENGINE WHEN

Each run restores the newest step, whose fingerprints are checked, and adds 1 to an
array at every step. It dies by SIGKILL after its first commit: WHEN is "any" for a
random instant, "commit" for one of the boundaries of the commit (prepared, header
written, marker written, not yet renamed, renamed), "pair" for two processes of one run,
of which one dies at a random instant, and the other waits for it in vain. ENGINE is a
key of `parallel.checkpoint.ENGINES`; only "lazy" has a commit of its own to stop in.
The error, and exit code 1: a run that cannot go on, or a committed step that is gone.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.parallel.checkpoint import ENGINES, commit, latest_step

PATIENCE = 120  # seconds until a run must have saved something
BOUNDARIES = 5  # calls of `_put` and `_sync` in a commit


def killed_runs(
    directory: pathlib.Path,
    *,
    kills: int,
    seed: int | None,
    engine: str = "lazy",
    when: str = "any",
) -> int:
    """The newest step after so many kills; RuntimeError for anything that is lost."""
    path = os.pathsep.join(p for p in sys.path if p)
    flags = "--xla_force_host_platform_device_count=1"
    seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    arguments = (str(directory), str(kills), str(seed), engine, when)
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags}
    environment.pop("JAX_NUM_CPU_DEVICES", None)  # would be a second word on the same
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1])


def run(directory: str, engine: str, boundary: int | None = None, **options) -> None:
    """Save every step until killed; at `boundary` of a commit by this process itself"""
    mesh = jax.make_mesh((jax.device_count(),), ("a",), (AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("a")), NamedSharding(mesh, P())
    state = {
        "x": jnp.zeros(2**18, device=split),
        "step": jnp.zeros((), jnp.int32, device=whole),
    }
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with ENGINES[engine](directory, **options) as checkpoints:
        if checkpoints.latest is not None:
            state, meta = checkpoints.restore(state)
            if not int(state["step"]) == meta["step"] == checkpoints.latest:
                raise RuntimeError(f"step {checkpoints.latest} holds {meta}")
            x = np.asarray(state["x"].addressable_data(0))
            if not (x == meta["step"]).all():
                raise RuntimeError(f"step {meta['step']} mixes versions")
        first = int(state["step"])
        while True:
            if engine == "lazy":
                checkpoints.gate()
            state = bump(state)
            step = int(state["step"])
            if boundary is not None and step == first + 2:
                checkpoints.wait()  # one is committed, and the next one's are counted
                _die_at(boundary)
            checkpoints.save(step, state, {"step": step})


def _die_at(boundary: int) -> None:
    """From now on the `boundary`-th call of a commit's file operations is the last."""
    calls = iter(range(boundary + 1))

    def fatal(function: Callable) -> Callable:
        def counted(*arguments):
            if next(calls, boundary) == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return counted

    commit._put, commit._sync = fatal(commit._put), fatal(commit._sync)


def main(directory: str, kills: str, seed: str, engine: str, when: str) -> int:
    rng = np.random.default_rng(int(seed))
    newest = latest_step(directory) or 0
    for kill in range(int(kills)):
        if when == "pair":
            victims, others = _pair(directory, engine, kill % 2)
        else:
            boundary = int(rng.integers(BOUNDARIES)) if when == "commit" else None
            victims, others = [_forked(directory, engine, boundary)], []
        _until_saved(directory, newest, victims + others, when)
        if when != "commit":
            time.sleep(rng.uniform(0, 0.05))
        newest = max(newest, latest_step(directory) or 0)
        for process in victims:
            _kill(process, when != "commit")
        time.sleep(0.3 if others else 0.0)  # the other waits, or ends itself
        newest = max(newest, latest_step(directory) or 0)
        for process in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        after = latest_step(directory) or 0
        if after < newest:
            raise RuntimeError(f"step {newest} was committed, now {after} is newest")
        newest = after
    # What the last one left is read once more, by a run that is let go.
    last = _forked(directory, engine, None)
    _until_saved(directory, newest, [last], "any")
    _kill(last, True)
    return latest_step(directory) or 0


def _forked(directory: str, engine: str, boundary: int | None) -> int:
    """A run in a fork: it has the imports, and JAX has started no thread here."""
    child = os.fork()
    if not child:
        try:
            options = {"chunk_bytes": 2**17} if engine == "lazy" else {}
            run(directory, engine, boundary, **options)
        finally:
            os._exit(1)
    return child


def _pair(directory: str, engine: str, victim: int) -> tuple[list[int], list[int]]:
    """Two processes of one run, by a coordinator; the one to die, and the other."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            try:
                jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
                run(directory, engine)
            finally:
                os._exit(1)
        children.append(child)
    return [children[victim]], [children[1 - victim]]


def _until_saved(directory: str, newest: int, children: Sequence[int], when: str):
    """Wait for a step after `newest`; RuntimeError if a run ends before there is one"""
    end = time.monotonic() + PATIENCE
    while (latest_step(directory) or 0) <= newest:
        if when != "commit" and any(os.waitpid(c, os.WNOHANG)[0] for c in children):
            raise RuntimeError("the run died on its own")
        if time.monotonic() > end:
            raise RuntimeError("the run saves nothing")
        time.sleep(0.002)


def _kill(child: int, now: bool) -> None:
    """Kill a child, or see that it has killed itself."""
    if now:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError("the run died on its own")


if __name__ == "__main__":
    print("newest", main(*sys.argv[1:]))
