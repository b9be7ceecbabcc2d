"""Measures of what checkpoints cost: time beside Orbax's own, and memory.

A measure is called as (scale, seed) by `scripts/reproduce.py`; see `claims.py`.
"""

import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from narrows.parallel.checkpoint import Arrangement, Checkpoints, Pattern
from narrows.parallel.checkpoint.resume import restore
from narrows.parallel.checkpoint.storage import orbax_context
from narrows.scripts.claims import Row
from narrows.scripts.conversion_peak import LEAF, conversion_peaks
from orbax.checkpoint import v1 as ocp

MIB = 2**20


def cost(scale: str, seed: int) -> Iterator[Row]:
    """Saves and restores over Orbax's own, medians of runs that take turns.

    Processor time of all threads, which other programs do not change, and time by the
    clock, in which Orbax and the fingerprints may use both cores.
    """
    mib, turns = (64, 5) if scale == "quick" else (512, 7)
    rng = np.random.default_rng(seed)
    shape = (8, mib * MIB // (4 * 4 * 8 * 256), 256)
    state = {f"blocks/{i}": jnp.asarray(rng.random(shape, "f4")) for i in range(4)}
    one = jax.devices()[0]
    state = jax.device_put(state, jax.sharding.SingleDeviceSharding(one))
    stages = Arrangement(
        {name: x.shape for name, x in state.items()},
        [Pattern("blocks/.*", "pipelined", {"stages": 2, "repeats": 2})],
    )
    wanted = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=state[name].sharding)
        for name, shape in stages.map().stored.items()
    }
    names = ("save orbax", "save ours", "orbax", "ours", "converted")
    clocks = {"": time.process_time, ", clock": time.perf_counter}
    seconds: dict[tuple[str, str], list[float]] = {
        (name, clock): [] for name in names for clock in clocks
    }

    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        checkpoints = Checkpoints(folder / "ours", keep=1)
        newest: Any = ocp.training.preservation_policies.LatestN(1)
        plain = ocp.training.Checkpointer(
            str(folder / "orbax"), context=orbax_context(), preservation_policy=newest
        )
        step = 0

        def save_ours():
            checkpoints.save(step, state, {})
            checkpoints.wait()

        def save_orbax():
            plain.save(step, state, force=True)

        calls = {
            "save orbax": save_orbax,
            "save ours": save_ours,
            "orbax": lambda: plain.load(step, state),
            "ours": lambda: restore(folder / "ours", state),
            "converted": lambda: restore(folder / "ours", wanted, layout=stages),
        }
        for step in range(turns + 1):  # the first compiles
            for kind in (names[:2], names[2:]):
                for name in rng.permutation(kind):
                    begun = {clock: now() for clock, now in clocks.items()}
                    jax.block_until_ready(calls[name]())
                    for clock, now in clocks.items() if step else ():
                        seconds[name, clock].append(now() - begun[clock])
        checkpoints.close()
        plain.close()
    middle = {key: float(np.median(times)) for key, times in seconds.items()}
    for clock in clocks:
        saving, orbax = middle["save ours", clock], middle["save orbax", clock]
        yield Row(f"save over Orbax{clock}", 1.0, "orbax")
        yield Row(f"save over Orbax{clock}", saving / orbax)
        for arm in names[2:]:
            ratio = middle[arm, clock] / middle["orbax", clock]
            yield Row(f"restore over Orbax{clock}", ratio, arm)


def memory(scale: str, seed: int) -> Iterator[Row]:
    """Peak of a conversion above what was resident and what it returns, in a process
    of its own: over the largest leaf and 200 MB."""
    peaks = conversion_peaks(256 if scale == "quick" else 2048)
    for way, extra in peaks.items():
        yield Row("peak over the bound", extra / (LEAF + 200e6), way)
        yield Row("peak above the result in MiB", extra / MIB, way)
