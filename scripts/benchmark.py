"""Time a suite, ours beside its peers, in one alternating run.

    python scripts/benchmark.py --suite=train --peer=<checkout of karpathy/nanoGPT>
    python scripts/benchmark.py --suite=attention --lengths=512,2048 --widths=64
    python scripts/benchmark.py --suite=quantize --codes=1024
    python scripts/benchmark.py --suite=compressors
    python scripts/benchmark.py --suite=exchange --megabits=100
    python scripts/benchmark.py --suite=outer --outer_megabits=100
    python scripts/benchmark.py --suite=information --dims=1,2

Prints how many times faster ours is, as a median over rounds with its quartiles.
--record appends each line to `results/benchmark_<suite>.jsonl` as soon as it is
measured. A suite is one file of `benchmarks/`, which says what it times and how long
that takes.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from narrows.scripts import command, results
from narrows.scripts.benchmarks import (
    attention,
    attention_forms,
    collapse,
    compressors,
    exchange,
    information,
    outer,
    quantize,
    train,
)
from rich.console import Console

SUITES = {
    "attention": attention,
    "attention_forms": attention_forms,
    "collapse": collapse,
    "compressors": compressors,
    "exchange": exchange,
    "information": information,
    "outer": outer,
    "quantize": quantize,
    "train": train,
}


def main(argv: Sequence[str]) -> int:
    f = flags.FlagValues()
    flags.DEFINE_enum("suite", "train", list(SUITES), "what to time", flag_values=f)
    flags.DEFINE_integer("rounds", 9, "turns of each side", 1, flag_values=f)
    flags.DEFINE_integer("calls", 3, "calls in a turn", 1, flag_values=f)
    flags.DEFINE_bool("record", False, "append to results_dir", flag_values=f)
    flags.DEFINE_string(
        "results_dir", str(results.RESULTS), "recorded lines", flag_values=f
    )
    for module in SUITES.values():
        module.define(f)
    command.parse(f, argv, __doc__)
    console = Console(highlight=False)
    suite = SUITES[f.suite]
    path = pathlib.Path(f.results_dir) / f"benchmark_{f.suite}.jsonl"
    lines = []
    with command.bad_input():
        if f.record:
            path.parent.mkdir(parents=True, exist_ok=True)
        for line in suite.measure(f, console):
            lines.append(line)
            if f.record:
                record = {"suite": f.suite, **line, **results.provenance()}
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    console.print(suite.table(lines))
    if f.record:
        console.print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
