"""Checkpoints that any layout can read."""

from .inspect import Contents, Row, inspect
from .steps import CheckpointError, latest_step
from .store import Checkpoints

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Contents",
    "Row",
    "inspect",
    "latest_step",
]
