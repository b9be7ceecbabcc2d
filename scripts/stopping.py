"""Stopping a run from outside: signals are noted, and obeyed between two updates."""

import contextlib
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT are appended while the context lasts."""
    stops: list[int] = []

    def note(number, _):
        stops.append(number)

    noted = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in noted}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def stop_asked(stops: list[int], done: int, *, every: int = 10) -> bool:
    """Whether any process was told to stop; several ask each other every tenth step."""
    if jax.process_count() == 1:
        return bool(stops)
    if done % every:
        return False
    with jax.transfer_guard("allow"):  # one number, asked for knowingly
        told = multihost_utils.process_allgather(np.array(max(stops, default=0)))
    if told.any() and not stops:
        stops.append(int(told.max()))
    return bool(told.any())
