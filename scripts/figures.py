"""Draw every figure of the manual from the recorded results; none is drawn by hand.

    python scripts/figures.py                          # all, into docs/figures/
    python scripts/figures.py --figure=normalized_gd

A figure is a function of the recorded rows of one system, named in the FIGURES table
of its file in `scripts/reproductions/`: a new figure needs no line here. Seconds.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence

import matplotlib as mpl
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from narrows.scripts import claims, command, results

FOLDER = results.ROOT / "docs" / "figures"
Draw = Callable[[Sequence[results.Recorded]], Figure]


def table() -> dict[str, tuple[str, Draw]]:
    """Figure name -> the system it shows and the function that draws it."""
    found: dict[str, tuple[str, Draw]] = {}
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
    rows = results.flat(results.read(results_dir, slug))
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


def main(argv: Sequence[str]) -> int:
    f = flags.FlagValues()
    flags.DEFINE_string("figure", "all", "its name, or all", flag_values=f)
    flags.DEFINE_string(
        "results_dir", str(results.RESULTS), "recorded lines", flag_values=f
    )
    flags.DEFINE_string("out_dir", str(FOLDER), "where figures go", flag_values=f)
    command.parse(f, argv, __doc__)
    known = table()
    with command.bad_input():
        if f.figure != "all" and f.figure not in known:
            raise ValueError(f"no figure {f.figure!r}; there are: {', '.join(known)}")
        for name in known if f.figure == "all" else [f.figure]:
            print(draw(name, pathlib.Path(f.results_dir), pathlib.Path(f.out_dir)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
