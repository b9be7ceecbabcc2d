"""Time a suite, ours beside its peer, in one alternating run.

    python scripts/benchmark.py --suite=train
    python scripts/benchmark.py --suite=train --peer=<checkout of karpathy/nanoGPT>

Prints how many times faster ours is, as a median over rounds with its quartiles, and
the share of the machine's matrix-product rate that ours attains. --record appends it to
`results/benchmark_<suite>.jsonl`. About 5 minutes on 2 CPU cores with the peer.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from narrows.scripts import command, results
from narrows.scripts.benchmarks import train
from rich.console import Console
from rich.table import Table

SUITES = {"train": train}


def main(argv: Sequence[str]) -> int:
    f = flags.FlagValues()
    flags.DEFINE_enum("suite", "train", list(SUITES), "what to time", flag_values=f)
    flags.DEFINE_string("peer", None, "folder of the peer's code", flag_values=f)
    flags.DEFINE_integer("rounds", 9, "turns of each side", 1, flag_values=f)
    flags.DEFINE_integer("calls", 3, "steps in a turn", 1, flag_values=f)
    flags.DEFINE_bool("record", False, "append to results_dir", flag_values=f)
    flags.DEFINE_string(
        "results_dir", str(results.RESULTS), "recorded lines", flag_values=f
    )
    command.parse(f, argv, __doc__)
    console = Console(highlight=False)
    suite = SUITES[f.suite]
    with command.bad_input():
        found = suite.measure(f.peer, rounds=f.rounds, calls=f.calls, console=console)
    table = Table("times as fast as", "median", "quartiles over rounds")
    for name, spread in found.items():
        if isinstance(spread, dict):
            quartiles = f"{spread['low']:.3f} to {spread['high']:.3f}"
            table.add_row(name, f"{spread['median']:.3f}", quartiles)
    console.print(table)
    if f.record:
        path = pathlib.Path(f.results_dir) / f"benchmark_{f.suite}.jsonl"
        record = {"suite": f.suite, **found, **results.provenance()}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        console.print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
