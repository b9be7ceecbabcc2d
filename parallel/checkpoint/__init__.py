"""Checkpoints that any layout can read."""

import functools

from .inspect import Contents, Row, inspect
from .lazy import LazyCheckpoints
from .patterns import Pattern
from .resume import Arrangement, Line, Restored, plan, summary
from .steps import CheckpointError, latest_step
from .store import Checkpoints

ENGINES = {  # how `--checkpoint` names them: what training waits for at a save
    "sync": functools.partial(Checkpoints, blocking=True),  # the disk
    "async": Checkpoints,  # the copy to the host
    "lazy": LazyCheckpoints,  # what of the copy outlasts the next gradients
}

__all__ = [
    "ENGINES",
    "Arrangement",
    "CheckpointError",
    "Checkpoints",
    "Contents",
    "LazyCheckpoints",
    "Line",
    "Pattern",
    "Restored",
    "Row",
    "inspect",
    "latest_step",
    "plan",
    "summary",
]
