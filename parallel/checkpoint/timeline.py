"""How long checkpoints stop training: an exact timeline of copies, writes and gates.

Chunk i is copied once its save has been asked for, the chunk before is copied and the
buffer has room, and written once it is copied and the chunk before is written:

    copied_i = max(copied_(i-1), asked, written_(i-A)) + c / copy_rate
    written_i = max(written_(i-1), copied_i) + c / write_rate

for chunks of c bytes and a buffer of A of them. Training waits for the last copy before
an update (lazy), at the save (async), or there for the last write (sync). With room for
one save, lazy stops for max(0, T_copy - T_gradients), and no more at all if and only if
the disk takes a save within an interval (DataStates-LLM, arXiv:2406.10707).
"""

import math
from typing import Literal


def stalls(
    *,
    size: int,
    copy_rate: float,
    write_rate: float,
    gradients: float,
    update: float = 0.0,
    saves: int = 1,
    interval: int = 1,
    capacity: int | None = None,
    chunk: int = 2**24,
    engine: Literal["sync", "async", "lazy"] = "lazy",
) -> list[float]:
    """Seconds that training waits for each of `saves` saves of `size` bytes.

    Rates in bytes per second; gradients and update in seconds of one step; a save every
    `interval` steps. capacity: bytes of the buffer, by default room for one save.

    >>> stalls(size=100, copy_rate=50, write_rate=25, gradients=1.5, chunk=100)
    [0.5]
    """
    if engine not in ("sync", "async", "lazy"):
        raise ValueError(f"engine: {engine!r}, but allowed are sync, async and lazy")
    chunks = math.ceil(size / chunk)
    each = size / chunks
    room = int((size if capacity is None else capacity) / each + 1e-9)
    if room < 1:
        raise ValueError(f"capacity: {capacity} bytes hold no chunk of {each:g}")
    copied: list[float] = []
    written: list[float] = []
    now, waited = 0.0, []
    for _ in range(saves):
        for _ in range(chunks):
            i = len(copied)
            free = written[i - room] if i >= room else 0.0
            start = max(copied[-1] if copied else 0.0, now, free)
            copied.append(start + each / copy_rate)
            begin = max(written[-1] if written else 0.0, copied[-1])
            written.append(begin + each / write_rate)
        asked = now
        if engine == "sync":
            now = max(now, written[-1])
        elif engine == "async":
            now = max(now, copied[-1])
        stopped = now - asked
        now += gradients
        if engine == "lazy":
            stopped += max(0.0, copied[-1] - now)
            now = max(now, copied[-1])
        now += update + (interval - 1) * (gradients + update)
        waited.append(stopped)
    return waited
