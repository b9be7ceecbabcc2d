"""A bounded host buffer that snapshots pass through, taken and given back in a ring."""

import threading
from typing import NamedTuple

import numpy as np

LINE = 64  # bytes; every region begins at a multiple, as vector instructions want


class Region(NamedTuple):
    start: int
    size: int
    view: np.ndarray  # uint8, of the arena's own memory

    @property
    def stop(self) -> int:
        return self.start + room_for(self.size)


def room_for(size: int) -> int:
    """Bytes that a region of `size` bytes takes: whole lines."""
    return -(-size // LINE) * LINE


class Arena:
    """`capacity` bytes (up to a whole line), made once; regions are whole, in order.

    A region that does not fit behind the newest one starts at 0, and the gap is lost
    until its turn. Regions may be given back in any order; their space becomes free in
    the order in which it was taken.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"arena: it must have at least 1 byte, got {capacity}")
        self.capacity = room_for(capacity)
        self._memory = np.empty(self.capacity, np.uint8)
        self._memory.fill(0)  # page faults now, not in the first snapshot
        self._live: dict[int, tuple[Region, bool]] = {}  # by start, oldest first
        self._changed = threading.Condition()
        self._closed = False

    @property
    def live(self) -> list[Region]:
        """Regions whose space is taken, oldest first."""
        with self._changed:
            return [region for region, _ in self._live.values()]

    def take(self, size: int) -> Region:
        """A region of `size` bytes; waits until there is room.

        Raises ValueError for one that will never fit, RuntimeError once closed.
        """
        if not 0 < size <= self.capacity:
            raise ValueError(
                f"arena: a region of {size} bytes does not fit into {self.capacity}; "
                "make the arena larger or the chunks smaller"
            )
        with self._changed:
            while (start := self._room(room_for(size))) is None and not self._closed:
                self._changed.wait()
            if self._closed or start is None:
                raise RuntimeError("arena: closed")
            region = Region(start, size, self._memory[start : start + size])
            self._live[start] = (region, False)
            return region

    def give_back(self, region: Region) -> None:
        with self._changed:
            self._live[region.start] = (region, True)
            while self._live and next(iter(self._live.values()))[1]:
                del self._live[next(iter(self._live))]
            self._changed.notify_all()

    def close(self) -> None:
        """Wake who waits for room."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _room(self, size: int) -> int | None:
        if not self._live:
            return 0
        oldest = next(iter(self._live.values()))[0].start
        newest = next(reversed(self._live.values()))[0]
        if newest.start < oldest:  # it has gone round
            return newest.stop if newest.stop + size <= oldest else None
        if newest.stop + size <= self.capacity:
            return newest.stop
        return 0 if size <= oldest else None
