"""A run's own record in its workdir: `metrics.jsonl`, TensorBoard, a figure.

`metrics.jsonl` has one row per update: step, split, loss (nats per token), then the
rest. Rows after the step that a run resumes from are dropped, so a stopped and resumed
run leaves the rows of one that never stopped.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress, TextColumn, TimeRemainingColumn

COLUMNS = (
    *Progress.get_default_columns()[:2],
    TextColumn("{task.completed}/{task.total}"),
    TextColumn("{task.fields[bits]} bits/byte, waist {task.fields[waist]} bits"),
    TextColumn("{task.fields[speed]} tokens/s"),
    TimeRemainingColumn(),
)


class RunLog:
    """Appends rows; made on process 0 only."""

    def __init__(self, workdir: pathlib.Path, *, step: int):
        # Not above: it imports torch where there is one, seconds even for --help.
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= step]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        fresh.replace(self.path)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, loss: float, **rest: float) -> None:
        row = {"step": step, "split": split, "loss": loss, **rest}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in row.items():
            if name not in ("step", "split"):
                self.board.add_scalar(f"{split}/{name}", value, step)

    def draw(self) -> Figure:
        return draw_run(read_rows(self.path))

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a log, oldest first, without a last line that a kill cut short."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_run(rows: Sequence[dict[str, Any]]) -> Figure:
    """Loss in bits per byte, and bits and usage at the waist, against the step."""
    train = [row for row in rows if row.get("split") == "train"]
    checked = [row for row in rows if row.get("split") == "validation"]

    def curve(axes, rows, name, style="-", **options):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, **options)

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve(left, train, "bits_per_byte", label="train", lw=1)
    curve(left, checked, "bits_per_byte", "o-", label="validation", ms=4)
    left.set(xlabel="step", ylabel="bits per byte", ylim=(0, 8.5))
    left.legend(frameon=False)
    curve(right, train, "waist_bits", label="bits passed per position", lw=1)
    curve(right, train, "waist_entropy", label="entropy of the codes", lw=1)
    right.set_ylim(bottom=0)
    right.set(xlabel="step", ylabel="bits at the waist")
    right.legend(frameon=False, loc="lower right")
    return figure


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    return nats_per_token / math.log(2) / bytes_per_token
