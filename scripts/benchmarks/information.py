"""Estimators of information on tasks with known answers: error, cover, flags, time.

    python scripts/benchmark.py --suite=information
    python scripts/benchmark.py --suite=information --estimators=ksg --dims=2 \\
        --samples=10000 --information_seeds=3 --peer_python=<venv>/bin/python

A line is one estimator on one task at one dimension and size, over seeds: mean error
and deviation in nats, how many of its 95 % intervals hold the truth, how many values
are flagged as not converged, and how many of those off by more than 3 standard errors.
Peers get the same samples: scikit-learn's neighbours (one feature a side), and bmi's
KSG where --peer_python names an interpreter with benchmark-mi. Times are processor time
of the peer over ours, seed by seed. The defaults take about 15 minutes on 2 CPU cores.
"""

import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Array
from narrows.ib.estimators.table import ESTIMATORS, make_estimator
from narrows.ib.tasks import TASKS, make_task
from narrows.scripts.benchmarks.timing import ratio
from rich.console import Console
from rich.table import Table
from sklearn.feature_selection import mutual_info_regression

PLAIN = ("gaussian", "gaussian_copula", "ksg", "mixed_ksg", "kl", "binned")
CRITICS = ("nwj", "infonce", "flo", "smile", "leave_one_out")
PEER = Path(__file__).with_name("bmi_peer.py")
PEERS_K = 4  # neighbours, as `ksg` takes
Found = tuple[Any, float]  # an Estimate or nats, and seconds of processor time
Side = Callable[[Array, np.ndarray, np.ndarray], Found]  # of key, x, y


def define(values: flags.FlagValues) -> None:
    several = functools.partial(flags.DEFINE_list, flag_values=values)
    several("estimators", [*PLAIN, *CRITICS], "information: " + ", ".join(ESTIMATORS))
    several("tasks", ["gaussian", "student", "half_cube", "mixture"], "information")
    several("dims", ["1", "2", "5"], "information: features a side")
    several("samples", ["500", "2000"], "information: rows")
    flags.DEFINE_integer(
        "information_seeds", 10, "information: samples", 2, flag_values=values
    )
    flags.DEFINE_integer(
        "information_draw",
        0,
        "information: which samples; declarations were chosen on 0, judged on others",
        0,
        flag_values=values,
    )
    flags.DEFINE_string(
        "peer_python", None, "information: with benchmark-mi", flag_values=values
    )


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    for name in f.estimators:
        make_estimator(name)
    for name in f.tasks:
        if name not in TASKS:
            raise ValueError(f"tasks: {name!r}, but allowed are {', '.join(TASKS)}")
    server = Server(f.peer_python) if f.peer_python else None
    for task_name in f.tasks:
        for dim in map(int, f.dims):
            if task_name == "spiral" and dim < 2:
                continue
            task = make_task(task_name, dim)
            for n in map(int, f.samples):
                console.print(f"{task_name}, {dim} a side, {n} rows")
                draw = jax.jit(task.sample, static_argnums=1)
                keys = jax.random.split(
                    jax.random.key(f.information_draw), f.information_seeds
                )
                samples = [jax.device_get(draw(key, n)) for key in keys]
                sides: dict[str, Side] = {
                    name: ours(name, samples[0]) for name in f.estimators
                }
                if server is not None:
                    sides["bmi"] = server
                if samples[0][1].shape[1] == 1 and dim == 1:
                    sides["scikit-learn"] = scikit
                place = {"task": task_name, "dim": dim, "rows": n}
                place |= {"truth": task.information, "seeds": f.information_seeds}
                place |= {"draw": f.information_draw}
                yield from lines(place, in_turn(sides, keys, samples))
    if server is not None:
        server.close()


def in_turn(
    sides: dict[str, Side], keys, samples
) -> dict[str, tuple[list[Any], np.ndarray]]:
    """What every side finds on every sample, and its seconds: sample by sample."""
    found = {name: [] for name in sides}
    for key, sample in zip(keys, samples, strict=True):
        for name, side in sides.items():
            found[name].append(side(key, *sample))
    return {
        name: ([value for value, _ in pairs], np.array([s for _, s in pairs]))
        for name, pairs in found.items()
    }


def lines(place: dict[str, Any], found) -> Iterator[dict[str, Any]]:
    """A line a side; peers' times are over those of our `ksg` on the same sample."""
    for name, (values, seconds) in found.items():
        line = place | {"estimator": name}
        if name in ESTIMATORS:
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *values)
            yield line | judged(stacked, place["truth"])
            continue
        line |= errors(np.array(values), place["truth"])
        if "ksg" in found:
            over = ratio(found["ksg"][1], seconds)
            line["peer_over_ksg_cpu"] = over._asdict()
        yield line


@functools.cache
def compiled(name: str, n: int, d: int, e: int):
    """One program for every task of these shapes."""
    shapes = [jax.ShapeDtypeStruct((n, k), np.float32) for k in (d, e)]
    return jax.jit(make_estimator(name)).lower(jax.random.key(0), *shapes).compile()


def ours(name: str, sample) -> Side:
    x, y = sample
    estimator = compiled(name, len(x), x.shape[1], y.shape[1])

    def run(key, x, y):
        start = time.process_time()
        found = jax.device_get(estimator(key, x, y))
        return found, time.process_time() - start

    return run


def errors(values: np.ndarray, truth: float) -> dict[str, Any]:
    return {
        "bias": float(np.mean(values) - truth),
        "error": float(np.mean(np.abs(values - truth))),
        "deviation": float(np.std(values, ddof=1)),
    }


def judged(found, truth: float) -> dict[str, Any]:
    """Errors, cover of the 95 % intervals, and what the flag says."""
    apart = np.abs(found.value - truth)
    wild = apart > 3 * found.standard_error
    flagged = ~found.converged
    return errors(found.value, truth) | {
        "covered": float(np.mean(apart <= 1.96 * found.standard_error)),
        "flagged": float(flagged.mean()),
        "wild": int(wild.sum()),
        "wild_flagged": int((wild & flagged).sum()),
    }


def scikit(key, x: np.ndarray, y: np.ndarray) -> Found:
    del key
    start = time.process_time()
    value = mutual_info_regression(x, y[:, 0], n_neighbors=PEERS_K, random_state=0)[0]
    return float(value), time.process_time() - start


class Server:
    """`bmi_peer.py` under another interpreter: a sample goes in, a value comes back."""

    def __init__(self, python: str):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [python, str(PEER), str(PEERS_K)], stdin=pipe, stdout=pipe, text=True
        )

    def __call__(self, key, x: np.ndarray, y: np.ndarray) -> Found:
        del key
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            np.savez(file, x=x, y=y)
            file.flush()
            self._process.stdin.write(file.name + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise ValueError("peer_python: it ended; has it benchmark-mi installed?")
        value, seconds = json.loads(line)
        return value, seconds

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def table(lines: Sequence[dict[str, Any]]) -> Table:
    made = Table("task", "a side", "rows", "truth", "estimator", "bias", "deviation")
    for column in ("covered", "flagged", "wild, flagged", "peer cpu over ksg"):
        made.add_column(column)
    for line in lines:
        cells = [line["task"], str(line["dim"]), str(line["rows"])]
        cells += [f"{line['truth']:.2f}", line["estimator"]]
        cells += [f"{line['bias']:+.3f}", f"{line['deviation']:.3f}"]
        if "covered" in line:
            cells += [f"{line['covered']:.2f}", f"{line['flagged']:.2f}"]
            cells += [f"{line['wild']}, {line['wild_flagged']}"]
        else:
            cells += [""] * 3
        over = line.get("peer_over_ksg_cpu")
        said = "{median:.2f} ({low:.2f} to {high:.2f})"
        cells.append("" if over is None else said.format(**over))
        made.add_row(*cells)
    return made
