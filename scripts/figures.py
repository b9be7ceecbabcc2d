"""Draw every figure of the manual from the recorded results; none is drawn by hand.

    python scripts/figures.py                          # all, into docs/figures/
    python scripts/figures.py --figure=normalized_gd

A figure is a function of the recorded rows of one system, named in the FIGURES table
of its file in `scripts/reproductions/`: a new figure needs no line here. A training run
is recorded whole: `--run=<workdir>` makes it the one that `main_job` shows. Seconds.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from narrows.scripts import claims, command, results
from narrows.scripts.benchmarks import collapse, exchange, outer
from narrows.scripts.runlog import draw_run, read_rows

FOLDER = results.ROOT / "docs" / "figures"
Draw = Callable[[Sequence[Any]], Figure]
RUNS: dict[str, Draw] = {  # of the lines of a file that is no reproduction's
    "benchmark_collapse": collapse.draw,
    "benchmark_exchange": exchange.draw,
    "benchmark_outer": outer.draw,
    "main_job": draw_run,
}


def table() -> dict[str, tuple[str, Draw]]:
    """Figure name -> the results file it shows and the function that draws it."""
    found: dict[str, tuple[str, Draw]] = {name: (name, RUNS[name]) for name in RUNS}
    for slug in claims.names():
        for name, draw in getattr(claims.load(slug), "FIGURES", {}).items():
            if name in found:
                raise ValueError(
                    f"figure {name!r} is in {found[name][0]}.py and {slug}.py: rename"
                )
            found[name] = slug, draw
    return found


def draw(name: str, results_dir: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write `<folder>/<name>.svg`; equal results give an equal file."""
    slug, function = table()[name]
    rows: Sequence[Any] = results.read(results_dir, slug)
    if name not in RUNS:
        rows = results.flat(rows)
    if not rows and name in RUNS:
        raise ValueError(
            f"figure {name} needs results/{slug}.jsonl: train, then give "
            "--run=<workdir>, or record the benchmark"
        )
    if not rows:
        raise ValueError(
            f"figure {name} needs results/{slug}.jsonl: run "
            f"python scripts/reproduce.py --system={slug} --record"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure = function(rows)
        FigureCanvasAgg(figure)
        figure.savefig(path, metadata={"Date": None})
    return path


def record_run(workdir: pathlib.Path, results_dir: pathlib.Path) -> None:
    """Copy a run's log, after one line that says what ran, where, from which commit."""
    origin = json.loads((workdir / "run.json").read_text())
    keep = ("commit", "dirty", "device", "versions", "mesh", "model", "flags")
    rows = [
        {name: origin[name] for name in keep},
        *read_rows(workdir / "metrics.jsonl"),
    ]
    rows[0]["flags"].pop("workdir")  # a path of the machine that ran it
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (results_dir / "main_job.jsonl").write_text(text)


def main(argv: Sequence[str]) -> int:
    f = flags.FlagValues()
    flags.DEFINE_string("figure", "all", "its name, or all", flag_values=f)
    flags.DEFINE_string(
        "results_dir", str(results.RESULTS), "recorded lines", flag_values=f
    )
    flags.DEFINE_string("out_dir", str(FOLDER), "where figures go", flag_values=f)
    flags.DEFINE_string("run", None, "a workdir to record as main_job", flag_values=f)
    command.parse(f, argv, __doc__)
    known = table()
    with command.bad_input():
        if f.run is not None:
            record_run(pathlib.Path(f.run), pathlib.Path(f.results_dir))
        if f.figure != "all" and f.figure not in known:
            raise ValueError(f"no figure {f.figure!r}; there are: {', '.join(known)}")
        for name in known if f.figure == "all" else [f.figure]:
            print(draw(name, pathlib.Path(f.results_dir), pathlib.Path(f.out_dir)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
