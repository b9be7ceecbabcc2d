"""A table of layouts, each with the loss curve of one device; also over processes.

    python -m narrows.scripts.layout_table RANK COUNT PORT SEED LAYOUT...

is one process of several: what `together` starts, and rank 0 prints its curves. A small
transformer learns 50 batches of text with AdamW, in float32. Programs are compiled
without most optimizations, which is a quarter of the work and changes no law.
"""

import contextlib
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from narrows.data.text import batches, load_corpus
from narrows.scripts.layout_curves import DECODER, LENGTH, ROWS, curve

STEPS = 50
TABLE = (  # up to 16 devices
    "data=8",
    "fsdp=8",
    "tensor=4",
    "seq=8",
    "stage=4",
    "data=2,fsdp=4",
    "data=2,tensor=4",
    "data=2,seq=4",
    "fsdp=2,stage=2",
    "seq=2,stage=4",
    "data=2,fsdp=2,tensor=2",
    "fsdp=2,tensor=2,seq=2",
    "data=2,tensor=2,stage=2",
    "data=2,seq=2,stage=2",
    "tensor=2,seq=2,stage=2",
    "data=2,tensor=2,seq=2,stage=2",
    "fsdp=2,tensor=2,seq=2,stage=2",
)
TOGETHER = ("data=4", "fsdp=2,tensor=2", "seq=2,stage=2", "tensor=2,stage=2")
PROCESSES = 4  # of one device each
PATIENCE = 900  # seconds


def text_curve(layout: str, seed: int, *, rounded: int | None = None) -> np.ndarray:
    """Loss of each of 50 steps on a layout, all processes together.

    Raises NotMeasured where there are too few devices; `rounded` as in `curve`.
    """
    stream = batches(load_corpus(), "train", batch_size=ROWS, seq_len=LENGTH, seed=seed)
    rows = itertools.islice(stream, STEPS)
    with _compiled_quickly():
        return curve(DECODER, layout, seed, steps=STEPS, batches=rows, rounded=rounded)


def farthest(found: np.ndarray, one: np.ndarray) -> float:
    """The largest relative difference of two curves."""
    return float(np.abs(found / one - 1).max())


def together(layouts: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """The curves of some layouts of PROCESSES devices, a process each, by loopback.

    RuntimeError, with what they said, if one fails or none answers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "1"}
    environment.pop("XLA_FLAGS", None)  # might be a second word on their number
    with tempfile.TemporaryDirectory() as folder:
        logs = [pathlib.Path(folder) / str(rank) for rank in range(PROCESSES)]
        running = []
        try:
            for rank, log in enumerate(logs):
                numbers = map(str, (rank, PROCESSES, port, seed))
                with log.open("w") as said:
                    command = [sys.executable, "-m", __name__, *numbers, *layouts]
                    running.append(
                        subprocess.Popen(
                            command, env=environment, stdout=said, stderr=said
                        )
                    )
            codes = [process.wait(PATIENCE) for process in running]
        except subprocess.TimeoutExpired:
            codes = [None]
        finally:
            for process in running:
                process.kill()
                process.wait()
        said = [log.read_text() for log in logs]
    if any(codes) or None in codes:
        raise RuntimeError(f"exit codes {codes}: " + "\n".join(t[-1000:] for t in said))
    found = json.loads(said[0].splitlines()[-1])
    return {layout: np.array(found[layout]) for layout in layouts}


@contextlib.contextmanager
def _compiled_quickly() -> Iterator[None]:
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def main(rank: str, count: str, port: str, seed: str, *layouts: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(rank))
    found = {layout: text_curve(layout, int(seed)).tolist() for layout in layouts}
    if int(rank) == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
