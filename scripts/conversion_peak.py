"""Peak memory of a restore into another layout, in a process of its own.

    python -m narrows.scripts.conversion_peak save|WAY DIRECTORY MIB

WAY, of `WAYS`, says what becomes of the memory that the restoring process frees.

Leaves of 16 MiB, [4, n], are saved and brought to two stages of two blocks each.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from narrows.parallel.checkpoint import Arrangement, Checkpoints, Pattern
from narrows.parallel.host_memory import give_back_freed_memory, keep_freed_memory

MIB = 2**20
LEAF = 16 * MIB  # bytes


WAYS = {
    "given back": give_back_freed_memory,  # as scripts/convert_checkpoint.py does
    "kept": keep_freed_memory,  # as the other commands do, so that steps are faster
    "as malloc likes": lambda: True,
}


def conversion_peaks(mib: int) -> dict[str, int]:
    """Bytes beyond what was resident before the restore, and beyond its result, by way.

    RuntimeError if a process fails, or if there is no such malloc here.
    """
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for what in ("save", *WAYS):
            done = subprocess.run(
                [sys.executable, "-m", __name__, what, folder, str(mib)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            if what in WAYS:
                found = json.loads(done.stdout.splitlines()[-1])
                peaks[what] = found["peak"] - found["before"] - mib * MIB
    return peaks


def main(what: str, folder: str, mib: str) -> None:
    shapes = {f"blocks/{i}": (4, LEAF // 16) for i in range(int(mib) * MIB // LEAF)}
    if what == "save":
        numbered = enumerate(shapes.items())
        state = {name: jnp.full(shape, i, "f4") for i, (name, shape) in numbered}
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(0, state, {})
        return
    if not WAYS[what]():
        raise RuntimeError("malloc is not glibc's: its arenas cannot be set")
    stages = [Pattern("blocks/.*", "pipelined", {"stages": 2, "repeats": 2})]
    layout = Arrangement(shapes, stages)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=one)
        for name, shape in layout.map().stored.items()
    }
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    got = Checkpoints(folder).resume(target, layout=layout).state
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if float(got["blocks/3"][1, 1, 0, 5]) != 3:
        raise RuntimeError("blocks/3 does not hold its number")
    print(json.dumps({"before": before, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
