"""What rare meetings save on slow links: steps a second beside data parallel training.

    python scripts/benchmark.py --suite=outer                     # Linux, root
    python scripts/benchmark.py --suite=outer --outer_mesh=data=8 # your own devices

A transformer learns real text on --outer_processes processes, each in a network
namespace whose link passes --outer_megabits (0: as it is). On each link a step and an
exchange are timed, the length H of a round follows (H steps take 1.5 exchanges, at
least 4), and every method runs rounds of H steps, taking turns; data parallel training
and 1-bit Adam, which exchange in every step, run single ones. Told are steps a second
over those of steps that meet nobody, and the exposed part of an exchange: what a round
takes beyond its steps, over an exchange. Without namespaces all is measured over
loopback as it is. A round on a slow link takes as long as 1.5 exchanges: minutes at
10 Mbit/s.
"""

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from narrows.optim.local_updates.pace import steps_to_hide
from narrows.scripts.benchmarks.processes import Ask, started
from narrows.scripts.benchmarks.shaped_links import refusal, shaped_links
from rich.console import Console
from rich.table import Table

DENSE, ONE_BIT = "data parallel", "one_bit_adam"
NAMES = ("co2", "diloco", "slowmo", "local_sgd", ONE_BIT)
MAKE = "narrows.scripts.benchmarks.outer_steps:Bench"
PORT = 29_418
LEAST = 4  # steps of a round, however fast the link


def define(values: flags.FlagValues) -> None:
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    several = functools.partial(flags.DEFINE_list, flag_values=values)
    flags.DEFINE_string(
        "outer_mesh", None, "outer: of devices at hand; default: own processes", values
    )
    several("outer_megabits", ["0", "1000", "100"], "outer: rates; 0: as it is")
    several("outer_methods", list(NAMES), "outer: " + ", ".join(NAMES))
    integer("outer_processes", 4, "outer: to start", 2)
    integer("outer_depth", 6, "outer: blocks of the model; 6 has 10.8 M", 1)
    integer("outer_rows", 8, "outer: of --outer_length tokens, in all", 1)
    integer("outer_length", 256, "outer: tokens of a row", 1)
    integer("outer_turns", 2, "outer: rounds of each method on a link", 1)


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    """A line for each method on each link."""
    if unknown := set(f.outer_methods) - set(NAMES):
        raise ValueError(
            f"outer_methods: {min(unknown)!r} is none of {', '.join(NAMES)}"
        )
    with contextlib.ExitStack() as stack:
        ask, rates = _bench(f, console, stack)
        facts = ask("facts") | {"rows": f.outer_rows, "length": f.outer_length}
        console.print(f"{facts['parameters']:,} parameters, {facts['workers']} workers")
        for megabits, shape in rates:
            shape()
            yield from _on_link(f, console, ask, {"megabits": megabits, **facts})


def _bench(f, console: Console, stack) -> tuple[Ask, Sequence[tuple[Any, Callable]]]:
    """Whom to ask, and the links with what makes each."""
    options = {"depth": f.outer_depth, "rows": f.outer_rows, "length": f.outer_length}
    as_is = (0.0, lambda: None)
    if f.outer_mesh is not None:
        from narrows.scripts.benchmarks.outer_steps import Bench

        bench = Bench(mesh=f.outer_mesh, **options)
        return lambda job, **arguments: getattr(bench, job)(**arguments), [as_is]
    count = f.outer_processes
    if f.outer_rows % count:
        raise ValueError(f"outer_rows: {f.outer_rows} do not divide over {count}")
    start = functools.partial(started, MAKE, options | {"mesh": f"data={count}"})
    if reason := refusal():
        console.print(f"links cannot be shaped: {reason}; measured as they are")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return stack.enter_context(start([[]] * count, f"127.0.0.1:{port}")), [as_is]
    links = stack.enter_context(shaped_links(count))
    address = f"{links.addresses[0]}:{PORT}"
    ask = stack.enter_context(start(links.prefixes, address))
    rates = [float(x) for x in f.outer_megabits]
    return ask, [(x, functools.partial(links.shape, x or None)) for x in rates]


def _on_link(f, console, ask, facts) -> Iterator[dict[str, Any]]:
    pace = ask("pace", tries=3)
    every = max(LEAST, steps_to_hide(pace["step"], pace["meeting"]))
    console.print(
        f"{facts['megabits'] or 'unshaped'}: a step {pace['step']:.2f} s, an exchange "
        f"{pace['meeting']:.2f} s, rounds of {every}"
    )
    sides = {DENSE: 1} | dict.fromkeys(f.outer_methods, every)
    sides |= {ONE_BIT: 1} if ONE_BIT in sides else {}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    free = []  # steps that meet nobody, timed in every turn too
    for _ in range(f.outer_turns + 1):  # in the first nothing is on its way yet
        free.append(ask("pace", tries=1)["step"])
        for name, steps in sides.items():
            found[name].append(ask("round", method=name, every=steps, steps=steps))
    common = {"every": every, "step_seconds": float(np.median(free[1:])), **facts}
    common["exchange_seconds"] = pace["meeting"]
    for name, rounds in found.items():
        seconds = [r["seconds"] for r in rounds[1:]]
        yield _line(name, sides[name], seconds, common) | {
            "events": rounds[-1]["events"]
        }


def _line(method: str, steps: int, seconds: Sequence[float], common) -> dict[str, Any]:
    """Rates over the rate without meetings, and the exposed part, with their spread."""
    step, exchange = common["step_seconds"], common["exchange_seconds"]
    rate = [steps * step / s for s in seconds]
    exposed = [(s - steps * step) / exchange for s in seconds]
    return {
        "method": method,
        "steps": steps,
        "turns": len(seconds),
        "seconds": float(np.median(seconds)),
        "rate": _spread(rate),
        "exposed": _spread(exposed),
        **common,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = map(float, np.percentile(values, (25, 50, 75)))
    return {"low": low, "median": median, "high": high}


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Steps a second over those of steps that meet nobody, for each link."""
    made = Table("Mbit/s", "method", "steps a round", "rate", "exposed part")
    for line in lines:
        rate, exposed = line["rate"], line["exposed"]
        made.add_row(
            f"{line['megabits']:g}" if line["megabits"] else "as it is",
            line["method"],
            str(line["steps"]),
            f"{rate['median']:.2f} ({rate['low']:.2f} to {rate['high']:.2f})",
            f"{exposed['median']:.2f}",
        )
    return made


def draw(lines: Sequence[dict[str, Any]]) -> Figure:
    """Rates over the link; and, of the slowest link, a round of CO2 as it happened."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    newest = {(x["megabits"], x["method"]): x for x in lines}
    rates = sorted({rate for rate, _ in newest}, key=lambda r: r or np.inf)
    for name in (DENSE, *NAMES):
        points = [newest[r, name] for r in rates if (r, name) in newest]
        left.plot(
            [rates.index(x["megabits"]) for x in points],
            [x["rate"]["median"] for x in points],
            "o-",
            ms=4,
            label=name,
        )
    left.axhline(1, color="black", linewidth=0.8)
    left.set(yscale="log", ylabel="steps a second over those of no exchange")
    left.set_xticks(
        range(len(rates)), [f"{r:g} Mbit/s" if r else "as it is" for r in rates]
    )
    left.legend(frameon=False)
    slow = newest.get((rates[0], "co2"))
    for what, begin, end in slow["events"] if slow else ():
        row = {"step": 1, "exchange": 0}[what]
        right.barh(row, end - begin, left=begin, height=0.6, edgecolor="white", lw=0.4)
    right.set_yticks([0, 1], ["exchange", "steps"])
    right.set(xlabel="seconds", title=f"two rounds of CO2 at {rates[0]:g} Mbit/s")
    return figure
