"""A run's own record in its workdir: `run.json`, `metrics.jsonl`, TensorBoard, a figure.

`metrics.jsonl` has one row per update: step, split, loss (nats per token), then the
rest. Rows after the step that a run resumes from are dropped, so a stopped and resumed
run leaves the rows of one that never stopped.
"""

import json
import math
import pathlib
from typing import Any

import matplotlib
from tensorboardX import SummaryWriter

matplotlib.use("Agg")
from matplotlib import pyplot


class RunLog:
    """Appends rows; made on process 0 only."""

    def __init__(self, workdir: pathlib.Path, *, step: int):
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

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a log, oldest first; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_run(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss in bits per byte, and bits and usage at the waist, against the step."""
    train = [row for row in rows if row["split"] == "train"]
    checked = [row for row in rows if row["split"] == "validation"]
    steps = [row["step"] for row in train]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.2), layout="constrained"
    )
    left.plot(steps, [row["bits_per_byte"] for row in train], label="train", lw=1)
    left.plot(
        [row["step"] for row in checked],
        [row["bits_per_byte"] for row in checked],
        "o-",
        label="validation",
        ms=4,
    )
    left.set(xlabel="step", ylabel="bits per byte", ylim=(0, 8.5))
    left.legend(frameon=False)
    right.plot(steps, [row["waist_bits"] for row in train], lw=1)
    right.set(xlabel="step", ylabel="bits per position through the waist")
    if train and "waist_usage" in train[-1]:
        usage = right.twinx()
        usage.plot(steps, [100 * row["waist_usage"] for row in train], color="C2", lw=1)
        usage.set(ylabel="codes used in the window, %", ylim=(0, 105))
        usage.yaxis.label.set_color("C2")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    return nats_per_token / math.log(2) / bytes_per_token
