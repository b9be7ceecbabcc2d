"""Which groups of workers were at work: a step each, beside the run's checkpoints.

Between two meetings a process learns nothing of the others, so when one dies they go on
to the end of the round, wait there, and are ended by `--heartbeat_seconds`. Where each
had come is then in the workdir, and a run that goes on can say who was lost.
"""

import pathlib
from collections.abc import Callable

import jax

FOLDER = "groups"


def noting(workdir: pathlib.Path, *, active: bool) -> Callable[[int], None]:
    """A function that notes this process's step; one that does nothing for one process.

    `active`: whether processes work apart at all.
    """
    if not active or jax.process_count() == 1:
        return lambda done: None
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f"{jax.process_index()}-of-{jax.process_count()}"

    def note(done: int) -> None:
        mine.write_text(f"{done}\n")

    return note


def lost(workdir: pathlib.Path, count: int) -> str:
    """A sentence on groups that stopped before others did, for a run of `count` now.

    "" where nothing is noted or all came equally far. The notes are taken away, so that
    it is said once.
    """
    files = sorted((workdir / FOLDER).glob("*-of-*"))
    steps = {file.name: int(file.read_text().strip() or 0) for file in files}
    for file in files:
        file.unlink()
    last = max(steps.values(), default=0)
    behind = [name for name, step in steps.items() if step < last]
    if not behind:
        return ""
    said = ", ".join(f"{n.replace('-', ' ')} (at step {steps[n]})" for n in behind)
    return (
        f"lost: process {said}, while others came to step {last}; going on with {count}"
    )
