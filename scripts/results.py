"""Recorded measurements: one JSON line per call of a measure in `results/<slug>.jsonl`.

A line holds the rows of one (measure, scale, seed) together with all that is needed to
run it again: command, commit, whether the code differed from it, device and versions.
Seconds stand apart from the rows, so that two runs of one seed compare equal.
"""

import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
from narrows.scripts.claims import SCALES, Claim, Row, Verdict

ROOT = pathlib.Path(__file__).parents[1]  # of the checkout
RESULTS = ROOT / "results"
PACKAGES = ("jax", "numpy", "scipy", "optax", "scikit-learn")


class Recorded(NamedTuple):
    """A row together with the call it came from: what a figure reads."""

    metric: str
    value: float
    arm: str
    seed: int
    scale: str
    measurement: str


class Judged(NamedTuple):
    """A claim's verdict on the recorded results, and where they came from."""

    scale: str
    verdict: Verdict
    commits: tuple[str, ...]
    device: str


def provenance() -> dict[str, Any]:
    """Commit, dirty (Python files differ from it), device and versions.

    Commit and dirty are None where the code is no git checkout.
    """
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "*.py")
    device = jax.devices()[0]
    return {
        "commit": commit,
        "dirty": None if changed is None else bool(changed),
        "device": f"{device.device_kind}, {os.cpu_count()} cores {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
    }


def line(
    *,
    slug: str,
    measurement: str,
    scale: str,
    seed: int,
    rows: Iterable[Row],
    seconds: float,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """The record of one call of a measure; `origin` is its `provenance()`."""
    return {
        "system": slug,
        "measurement": measurement,
        "scale": scale,
        "seed": seed,
        "rows": [[row.metric, row.arm, _written(float(row.value))] for row in rows],
        "seconds": round(seconds, 3),
        "command": f"python scripts/reproduce.py --system={slug} --scale={scale} "
        f"--seed={seed} --seeds=1",
        **origin,
    }


def append(folder: pathlib.Path, record: dict[str, Any]) -> None:
    """One write of one line: a killed run leaves whole calls behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{record['system']}.jsonl", "a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read(folder: pathlib.Path, slug: str) -> list[dict[str, Any]]:
    """All records of a system, oldest first; none if nothing was recorded."""
    path = folder / f"{slug}.jsonl"
    return (
        [json.loads(text) for text in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def rows_of(record: dict[str, Any]) -> list[Row]:
    return [Row(metric, float(value), arm) for metric, arm, value in record["rows"]]


def latest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest record of each (measurement, scale, seed)."""
    newest = {(r["measurement"], r["scale"], r["seed"]): r for r in records}
    return [newest[key] for key in sorted(newest)]


def flat(records: Iterable[dict[str, Any]]) -> list[Recorded]:
    """Every row of the newest records."""
    return [
        Recorded(*row[:2], row.arm, r["seed"], r["scale"], r["measurement"])
        for r in latest(records)
        for row in rows_of(r)
    ]


def judge(claim: Claim, records: Sequence[dict[str, Any]]) -> Judged | None:
    """The verdict at the largest scale recorded; None if never measured."""
    mine = [r for r in latest(records) if r["measurement"] == claim.measurement]
    for scale in reversed(SCALES):
        here = [r for r in mine if r["scale"] == scale and scale in claim.scales]
        if here:
            verdict = claim.criterion.verdict({r["seed"]: rows_of(r) for r in here})
            commits = dict.fromkeys(
                f"{r['commit']}{'+' if r['dirty'] else ''}" for r in here
            )
            return Judged(scale, verdict, tuple(commits), here[-1]["device"])
    return None


def status(judged: Judged | None) -> str:
    if judged is None:
        return "not measured"
    return f"{'holds' if judged.verdict.holds else 'falls short'} ({judged.scale})"


CELLS = ("ours", "95 % interval", "baseline", "verdict")


def cells(verdict: Verdict) -> tuple[str, str, str, str]:
    """A verdict as every table shows it, under the heads of CELLS."""
    ours = f"{verdict.mean:.4g} ± {verdict.deviation:.2g} (n={verdict.n})"
    interval = "{:.4g} to {:.4g}".format(*verdict.interval) if verdict.interval else ""
    baseline = "" if verdict.baseline is None else f"{verdict.baseline:.4g}"
    fails = "falls short" if verdict.n > 1 else "falls short (one seed, no interval)"
    return ours, interval, baseline, "holds" if verdict.holds else fails


def _written(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no nan, no inf


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", ROOT, *words], capture_output=True, text=True
        )
    except FileNotFoundError:  # a machine without git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
