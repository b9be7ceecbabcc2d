"""A trace of some updates, for TensorBoard's profile tab or Perfetto."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import jax


def profile_range(text: str | None, *, first: int, last: int) -> range:
    """Read "a:b", the updates a to b, which must lie in those that the run will make.

    first: updates made before; last: the run's last one. An empty range for None.
    Raises ValueError for anything else.
    """
    if text is None:
        return range(0)
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        raise ValueError(f"profile_steps: {text!r}, but write first:last, as in 10:13")
    if not first < int(start) <= int(stop) <= last:
        raise ValueError(
            f"profile_steps: {text!r}, but this run makes the updates {first + 1} to "
            f"{last}; choose first <= last among them"
        )
    return range(int(start), int(stop) + 1)


@contextlib.contextmanager
def tracing(updates: range, folder: pathlib.Path) -> Iterator[Callable]:
    """Gives `mark(done, state)`, to be called before each update and after the last."""
    running = False

    def mark(done: int, state) -> None:
        nonlocal running
        if running and done == updates[-1]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            running = False
        elif updates and done + 1 == updates[0]:
            jax.profiler.start_trace(folder)
            running = True

    try:
        yield mark
    finally:
        if running:  # stopped on the way: what there is, is kept
            jax.profiler.stop_trace()
