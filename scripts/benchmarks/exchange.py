"""Whether compressed gradients pay on a link: predicted from it, then measured on it.

    python scripts/benchmark.py --suite=exchange                     # Linux, root
    python scripts/benchmark.py --suite=exchange --mesh=data=8       # your own devices
    python scripts/benchmark.py --suite=exchange --mesh=data=2 \
        --coordinator=host0:1234 --process_count=2 --process_id=0    # and your own link

A transformer learns real text by dense Adam and by compressed optimizers. For each link
the suite times messages of each topology; with the time of a step that sends nothing it
predicts every method's step, and the bandwidth below which the method pays. Then steps
are timed, methods taking turns. A method that is slower than dense Adam is said to
lose. Without --mesh, --processes processes are started, each in a network namespace
whose link passes --megabits (0: as it is); where namespaces are not permitted that is
said, and all is measured over loopback as it is. About 10 minutes on 2 CPU cores.
"""

import collections
import contextlib
import functools
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from narrows.scripts import command
from narrows.scripts.benchmarks.processes import Ask, started
from narrows.scripts.benchmarks.shaped_links import refusal, shaped_links
from narrows.scripts.benchmarks.timing import ratio
from rich.console import Console
from rich.table import Table

NAMES = (
    "adam",
    "one_bit_adam",
    "one_bit_lamb",
    "int8_adam",
    "four_bit_sgd",
    "top_k_sgd",
)
PORT = 29_417
TAIL = 10  # the last steps, whose mean loss is reported


def define(values: flags.FlagValues) -> None:
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    several = functools.partial(flags.DEFINE_list, flag_values=values)
    flags.DEFINE_string(
        "mesh", None, "exchange: of the devices at hand; default: own processes", values
    )
    several("megabits", ["0", "1000", "100", "10"], "exchange: rates; 0: as it is")
    several("methods", list(NAMES), "exchange: " + ", ".join(NAMES))
    integer("processes", 4, "exchange: to start", 2)
    integer("exchange_depth", 6, "exchange: blocks of the model; 6 has 10.8 M", 1)
    integer("exchange_rows", 8, "exchange: of 256 tokens, in all", 1)
    integer("learn_steps", 5, "exchange: whose loss is told; a fifth is dense", 2)
    flags.DEFINE_float(
        "longest",
        20.0,
        "exchange: seconds; a turn predicted to take longer is taken once",
        lower_bound=0.0,
        flag_values=values,
    )
    command.define_processes(values)


def measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    """A line for each method's loss, then for each link and each method on it.

    Of several processes that were started from outside, the first alone tells.
    """
    command.join_processes(f)
    if f.mesh is not None and jax.process_index():
        collections.deque(_measure(f, Console(quiet=True)), maxlen=0)
    else:
        yield from _measure(f, console)


def _measure(f: flags.FlagValues, console: Console) -> Iterator[dict[str, Any]]:
    if unknown := set(f.methods) - set(NAMES):
        raise ValueError(f"methods: {min(unknown)!r} is none of {', '.join(NAMES)}")
    methods = ["adam", *(name for name in f.methods if name != "adam")]
    with contextlib.ExitStack() as stack:
        ask, rates = _bench(f, console, stack)
        facts = ask("facts") | {"length": 256, "rows": f.exchange_rows}
        console.print(f"{facts['parameters']:,} parameters, {facts['workers']} workers")
        for name in methods:
            losses = ask("learn", method=name)
            found = {"kind": "loss", "method": name, "steps": len(losses)}
            found |= {"nats": float(np.mean(losses[-TAIL:])), **facts}
            console.print(f"{name}: {found['nats']:.3f} nats after {len(losses)} steps")
            yield found
        sent = {name: ask("sent", method=name) for name in methods}
        local = {name: ask("local", method=name, rounds=3) for name in methods}
        for megabits, shape in rates:
            shape()
            yield from _on_link(f, console, ask, megabits, sent, local, facts)


def _bench(f, console: Console, stack) -> tuple[Ask, Sequence[tuple[Any, Callable]]]:
    """Whom to ask, and the links with what makes each."""
    options = {"depth": f.exchange_depth, "rows": f.exchange_rows, "length": 256}
    options["steps"] = f.learn_steps
    as_is = (0.0, lambda: None)
    if f.mesh is not None:
        from narrows.scripts.benchmarks.exchange_steps import Bench

        bench = Bench(mesh=f.mesh, **options)
        return lambda job, **arguments: getattr(bench, job)(**arguments), [as_is]
    options["mesh"] = f"data={f.processes}"
    if f.exchange_rows % f.processes:
        raise ValueError(
            f"exchange_rows: {f.exchange_rows} do not divide over {f.processes} "
            "processes"
        )
    start = functools.partial(
        started, "narrows.scripts.benchmarks.exchange_steps:Bench", options
    )
    if reason := refusal():
        console.print(f"links cannot be shaped: {reason}; measured as they are")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ask = stack.enter_context(start([[]] * f.processes, f"127.0.0.1:{port}"))
        return ask, [as_is]
    links = stack.enter_context(shaped_links(f.processes))
    address = f"{links.addresses[0]}:{PORT}"
    ask = stack.enter_context(start(links.prefixes, address))
    rates = [float(x) for x in f.megabits]
    return ask, [(x, functools.partial(links.shape, x or None)) for x in rates]


def predict(
    sent: float, local: float, link: dict[str, dict[str, float]], topology: str
) -> float:
    """Seconds of a step: what it takes without sending, and its bytes over the link."""
    speed = link[topology]
    return local + speed["delay_s"] + sent / speed["bytes_s"]


def break_even(
    sent: Sequence[float], local: Sequence[float], efficiency: float = 1.0
) -> float:
    """Bytes a second of the dense exchange below which a method pays; inf: always.

    sent, local: of dense Adam and of the method. efficiency: how many bytes a second
    the method's topology sends for each of the dense one's.
    """
    saved, lost = sent[0] - sent[1] / efficiency, local[1] - local[0]
    if lost <= 0:
        return math.inf if saved > 0 else 0.0
    return max(saved, 0.0) / lost


def _on_link(f, console, ask, megabits, sent, local, facts):
    """The link's line, and one for each method: predicted, then measured."""
    from narrows.scripts.benchmarks.exchange_steps import METHODS

    link = ask("link")
    facts = {"megabits": megabits, **facts}
    yield {"kind": "link", **link, **facts}
    topology = {name: METHODS[name].topology for name in sent}
    said = {n: predict(sent[n], local[n], link, topology[n]) for n in sent}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sent}
    for turn in range(f.rounds):
        for name in sent:
            if turn == 0 or said[name] < f.longest:
                taken[name].append(ask("turn", method=name))
    seconds = {n: np.array([t["seconds"] for t in taken[n]]) for n in sent}
    for name in sent:
        kind = topology[name]
        efficiency = link[kind]["bytes_s"] / link["dense"]["bytes_s"]
        pair = (sent["adam"], sent[name]), (local["adam"], local[name])
        size = min(len(seconds[name]), len(seconds["adam"]))
        faster = ratio(seconds[name][:size], seconds["adam"][:size])
        even = 8e-6 * break_even(*pair, efficiency)
        line = {
            "kind": "step",
            "method": name,
            "sent_bytes": sent[name],
            "link_bytes": float(np.median([t["left"] for t in taken[name]])),
            "local_seconds": local[name],
            "predicted_seconds": said[name],
            "seconds": float(np.median(seconds[name])),
            "turns": len(taken[name]),
            "predicted_times_as_fast": said["adam"] / said[name],
            "times_as_fast": faster._asdict(),
            "break_even_megabits": None if math.isinf(even) else even,
            **facts,
        }
        if name != "adam" and faster.median < 1:
            console.print(f"{name} loses to dense Adam on this link")
        yield line


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Steps of each method over those of dense Adam, for each link."""
    made = Table("Mbit/s", "method", "MB sent", "times as fast as Adam", "quartiles")
    for column in ("predicted", "pays below, Mbit/s", "verdict"):
        made.add_column(column)
    losses = {x["method"]: x for x in lines if x["kind"] == "loss"}
    for line in lines:
        if line["kind"] != "step":
            continue
        found, even = line["times_as_fast"], line["break_even_megabits"]
        verdict = "pays" if found["median"] >= 1 else "loses"
        below = "any" if even is None else f"{even:,.0f}"
        if line["method"] == "adam":
            verdict = below = ""
        made.add_row(
            f"{line['megabits']:g}" if line["megabits"] else "as it is",
            line["method"],
            f"{line['sent_bytes'] / 1e6:.2f}",
            f"{found['median']:.2f}",
            f"{found['low']:.2f} to {found['high']:.2f}",
            f"{line['predicted_times_as_fast']:.2f}",
            below,
            verdict,
        )
    for name, line in losses.items():
        made.caption = (made.caption or "loss in nats:") + f" {name} {line['nats']:.3f}"
    return made


def draw(lines: Sequence[dict[str, Any]]) -> Figure:
    """How many times as fast as dense Adam, over the link's measured bandwidth."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    newest = {(x["megabits"], x.get("method")): x for x in lines if x["kind"] != "loss"}
    links = {rate: x for (rate, method), x in newest.items() if method is None}
    order = sorted(links, key=lambda rate: links[rate]["dense"]["bytes_s"])
    for name in NAMES:
        points = [
            (8e-6 * links[rate]["dense"]["bytes_s"], newest[rate, name])
            for rate in order
            if (rate, name) in newest
        ]
        if name == "adam" or not points:
            continue
        across = [x for x, _ in points]
        median, low, high = (
            np.array([line["times_as_fast"][part] for _, line in points])
            for part in ("median", "low", "high")
        )
        spread = np.maximum([median - low, high - median], 0)
        (drawn, *_) = axes.errorbar(
            across, median, spread, marker="o", label=name, capsize=2
        )
        predicted = [line["predicted_times_as_fast"] for _, line in points]
        axes.plot(across, predicted, ":", color=drawn.get_color())
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="bandwidth of the link, Mbit/s (dotted: predicted)")
    axes.set_ylabel("steps a second over dense Adam's")
    axes.legend()
    return figure
