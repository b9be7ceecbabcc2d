"""Measure the claims of a system and say which hold.

    python scripts/reproduce.py --list
    python scripts/reproduce.py --system=normalized_gd                  # 2 minutes
    python scripts/reproduce.py --system=normalized_gd --scale=full --record

`quick` ends within 2 minutes on two CPU cores, `full` within 30; `paper` is the whole
protocol. With --record each call of a measure becomes a line of `results/<slug>.jsonl`,
and calls recorded at this very commit are not repeated: a killed run goes on. A claim
holds only if it holds for the mean over seeds with its 95 % confidence interval.
Exit code: 0; 1 with --require when a measured claim falls short; 2 for a wrong flag.
"""

import pathlib
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags
from narrows.scripts import claims, command, results
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    flags.DEFINE_string("system", None, "which system to measure", flag_values=f)
    flags.DEFINE_bool("list", False, "list systems and what was recorded", f)
    flags.DEFINE_enum("scale", "quick", claims.SCALES, "how much to run", flag_values=f)
    flags.DEFINE_integer("seeds", 5, "number of seeds", lower_bound=1, flag_values=f)
    flags.DEFINE_integer("seed", 0, "first seed", lower_bound=0, flag_values=f)
    flags.DEFINE_bool("record", False, "append to results_dir, and resume from it", f)
    flags.DEFINE_bool("require", False, "exit 1 when a claim falls short", f)
    flags.DEFINE_string(
        "results_dir", str(results.RESULTS), "where lines are recorded", flag_values=f
    )
    flags.DEFINE_string(
        "data_dir", None, "larger data sets; default ../shared/data", flag_values=f
    )
    return f


def main(argv: Sequence[str], console: Console | None = None) -> int:
    f = define_flags()
    command.parse(f, argv, __doc__)
    console = console or Console(width=None if sys.stdout.isatty() else 132)
    folder = pathlib.Path(f.results_dir)
    with command.bad_input():
        if f.list == (f.system is not None):
            raise ValueError("give either --system=<slug> or --list")
        data_dir = data_folder(f.data_dir)
        if not f.list:
            claims.check(f.system)
    if f.list:
        console.print(listing(folder))
        return 0

    module = claims.load(f.system)
    token = claims.DATA_DIR.set(data_dir)
    try:
        seeds = range(f.seed, f.seed + f.seeds)
        records, missing = measure(
            module, f.scale, seeds, folder if f.record else None, console
        )
    finally:
        claims.DATA_DIR.reset(token)
    table, failed = verdicts(module, f.scale, records, missing)
    console.print(table)
    again = (
        f"again: python scripts/reproduce.py --system={f.system} --scale={f.scale} "
        f"--seed={f.seed} --seeds={f.seeds}"
    )
    console.print(again, markup=False, highlight=False, soft_wrap=True)
    return 1 if failed and f.require else 0


def data_folder(given: str | None) -> pathlib.Path | None:
    """The folder named, or ../shared/data where there is one, or None."""
    folder = pathlib.Path(given) if given else results.ROOT.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    if given:
        raise ValueError(f"--data_dir={given} is no folder: leave it out or name one")
    return None


def measure(
    module: ModuleType,
    scale: str,
    seeds: Sequence[int],
    folder: pathlib.Path | None,
    console: Console,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Call each distinct (measure, scale, seed) once: records, and what was missing."""
    slug = module.SYSTEM.slug
    due = {c.measurement: c for c in module.CLAIMS if scale in c.scales}
    now = results.provenance()
    known = {}
    if folder is not None and now["commit"] and not now["dirty"]:
        known = {
            (r["measurement"], r["seed"]): r
            for r in results.read(folder, slug)
            if r["scale"] == scale and r["commit"] == now["commit"] and not r["dirty"]
        }
    records, missing = [], {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(slug, total=len(due) * len(seeds))
        for name, claim in due.items():
            for seed in seeds:
                progress.update(task, description=f"{slug} {name} seed {seed}")
                if (name, seed) in known:
                    records.append(known[name, seed])
                elif name not in missing:
                    start = time.perf_counter()
                    try:
                        rows = list(claim.measure(scale, seed))
                    except claims.NotMeasured as reason:
                        missing[name] = str(reason)
                    else:
                        seconds = time.perf_counter() - start
                        record = results.line(
                            slug=slug,
                            measurement=name,
                            scale=scale,
                            seed=seed,
                            rows=rows,
                            seconds=seconds,
                            origin=now,
                        )
                        records.append(record)
                        if folder is not None:
                            results.append(folder, record)
                progress.advance(task)
    return records, missing


def verdicts(
    module: ModuleType,
    scale: str,
    records: Sequence[dict[str, Any]],
    missing: dict[str, str],
) -> tuple[Table, bool]:
    """The table of one run, and whether a measured claim fell short."""
    seconds = sum(record["seconds"] for record in records)
    table = Table(title=f"{module.SYSTEM.title}: {scale}, {seconds:.0f} s")
    for column in ("claim", "paper", "asked", *results.CELLS):
        table.add_column(column, overflow="fold")
    failed = False
    for claim in module.CLAIMS:
        judged = results.judge(claim, records) if scale in claim.scales else None
        text = escape(f"{claim.id}: {claim.text}")
        asked = escape(claim.paper), claim.criterion.asked
        if judged is None:
            reason = missing.get(claim.measurement, "not measured at this scale")
            table.add_row(text, *asked, "", "", "", escape(reason))
            continue
        failed |= not judged.verdict.holds
        cells = results.cells(judged.verdict)
        style = "green" if judged.verdict.holds else "red"
        table.add_row(text, *asked, *cells[:-1], f"[{style}]{cells[-1]}[/{style}]")
    return table, failed


def listing(folder: pathlib.Path) -> Table:
    """Every system with a reproduction and what its recorded results say."""
    table = Table(title="systems with a reproduction; the open ones: docs/systems.md")
    for column in ("slug", "room", "claim", "status"):
        table.add_column(column, overflow="fold")
    for slug in claims.names():
        module = claims.load(slug)
        records = results.read(folder, slug)
        for claim in module.CLAIMS:
            table.add_row(
                slug,
                escape(module.SYSTEM.room),
                escape(f"{claim.id}: {claim.text}"),
                results.status(results.judge(claim, records)),
            )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv))
