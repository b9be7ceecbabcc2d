"""Kill a run that saves all the time, again and again, and see what it finds.

    python -m narrows.scripts.kill_runs DIRECTORY KILLS [SEED]

Each run restores the newest step, whose fingerprints are checked, and adds 1 to an
array at every step. It dies by SIGKILL at a random instant after its first commit. The
error, and exit code 1: a run that cannot go on, or a committed step that is gone.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from narrows.parallel.checkpoint import LazyCheckpoints, latest_step


def killed_runs(directory: pathlib.Path, *, kills: int, seed: int | None) -> int:
    """The newest step after so many kills; RuntimeError for anything that is lost."""
    path = os.pathsep.join(p for p in sys.path if p)
    flags = "--xla_force_host_platform_device_count=1"
    arguments = [str(directory), str(kills), *([] if seed is None else [str(seed)])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, *arguments],
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1])


def run(directory: str) -> None:
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"x": jnp.zeros(2**18), "step": jnp.int32(0)}
    with LazyCheckpoints(directory, chunk_bytes=2**17) as checkpoints:
        if checkpoints.latest is not None:
            state, meta = checkpoints.restore(state)
            if not int(state["step"]) == meta["step"] == checkpoints.latest:
                raise RuntimeError(f"step {checkpoints.latest} holds {meta}")
            if not (np.asarray(state["x"]) == meta["step"]).all():
                raise RuntimeError(f"step {meta['step']} mixes versions")
        while True:
            checkpoints.gate()
            state = bump(state)
            step = int(state["step"])
            checkpoints.save(step, state, {"step": step})


def main(directory: str, kills: str, seed: str | None = None) -> int:
    rng = np.random.default_rng(None if seed is None else int(seed))
    newest = latest_step(directory) or 0
    for _ in range(int(kills)):
        # A fork has the imports, and JAX has started no thread here.
        child = os.fork()
        if not child:
            try:
                run(directory)
            finally:
                os._exit(1)
        end = time.monotonic() + 120
        while (latest_step(directory) or 0) <= newest:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError("the run died on its own")
            if time.monotonic() > end:
                raise RuntimeError("the run saves nothing")
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        newest = latest_step(directory) or 0
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = latest_step(directory) or 0
        if after < newest:
            raise RuntimeError(f"step {newest} was committed, now {after} is newest")
        newest = after
    return newest


if __name__ == "__main__":
    print("newest", main(*sys.argv[1:]))
