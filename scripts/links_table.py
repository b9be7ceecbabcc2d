"""What every link sends until it has solved one problem of unlike clients.

    python scripts/links_table.py        # results/econtrol.jsonl -> docs/compression.md

`bits_to_solution` measures, as a claim of `reproductions/econtrol.py`; the command
writes its recorded rows into the page, between two comments. Seconds.
"""

import functools
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from narrows.data.quadratics import Quadratics, quadratics
from narrows.optim.compressed_mean import Way, compressed_mean
from narrows.optim.compression import Compressor, bits, identity
from narrows.optim.sparse import random_k, top_k
from narrows.scripts import command, results
from narrows.scripts.claims import Row
from narrows.scripts.client_descent import descent

PAGE = results.ROOT / "docs" / "compression.md"
BEGIN, END = "<!-- links:begin -->", "<!-- links:end -->"
CLIENTS, D = 10, 50
RATES = tuple(2.0**-k for k in range(-1, 6))  # of every link
TARGET = 1e-8  # of |grad f|^2, over its start


class Sent(NamedTuple):
    link: str
    compressor: Compressor
    said: str


SENT = {
    "everything": Sent("plain", identity(), "float32"),
    "plain": Sent("plain", top_k(0.1), "Top-K of a tenth"),
    "plain, unbiased": Sent("plain", random_k(0.1), "Rand-K of a tenth"),
    "feedback": Sent("feedback", top_k(0.1), "Top-K of a tenth"),
    "ef21": Sent("ef21", top_k(0.1), "Top-K of a tenth"),
    "econtrol": Sent("econtrol", top_k(0.1), "Top-K of a tenth"),
    "difference": Sent("difference", top_k(0.1), "Top-K of a tenth"),
    "diana": Sent("diana", random_k(0.1), "Rand-K of a tenth"),
}


def gradient(x, client, key):
    del key
    a, c = client
    return a * (x - c)


@functools.cache
def _program(name: str, rounds: int):
    """|grad f|^2 over its start after every round, at every rate."""
    sent = SENT[name]
    way = Way(sent.link, sent.compressor)
    mean = compressed_mean(way, workers=CLIENTS, topology="gather")

    def run(a, c, rate):
        problem = Quadratics(a, c)

        def size(x):
            return jnp.sum(problem.gradients(x).mean(0) ** 2)

        go = descent(
            gradient,
            mean,
            clients=CLIENTS,
            rounds=rounds,
            record=lambda before, after: size(after.x),
        )
        start = jnp.zeros(D, a.dtype)
        return go((a, c), start, rate, jax.random.key(0)) / size(start)

    return jax.jit(jax.vmap(run, in_axes=(None, None, 0)))


def bits_to_solution(scale: str, seed: int) -> Iterator[Row]:
    """Kilobits that a client sends until |grad f|^2 is 1e-8 of its start, and then on.

    At the best of seven rates; infinity where no rate gets there and stays. The first
    gradients, which are exchanged whole, are counted for every link alike.
    """
    rounds = 2000 if scale == "quick" else 6000
    problem = quadratics(np.random.default_rng([seed, 6]), clients=CLIENTS, d=D)
    for name, sent in SENT.items():
        with jax.enable_x64(True):
            a, c = (jnp.asarray(x) for x in problem)
            sizes = np.asarray(_program(name, rounds)(a, c, jnp.asarray(RATES)))
        away = ~(sizes < TARGET)  # a NaN is away
        needed = np.where(away[:, -1], np.inf, rounds - away[:, ::-1].argmax(1))
        message = bits(sent.compressor, (D,))
        yield Row("kilobits to 1e-8", (32 * D + message * needed.min()) / 1e3, name)
        least = float(np.nanmin(np.where(np.isfinite(sizes), sizes, np.inf)[:, -1]))
        yield Row("where it ends", least, name)
        yield Row("bits a round", message, name)


def table(records: Sequence[results.Recorded]) -> list[str]:
    """Lines of the page."""
    scale = "full" if any(r.scale == "full" for r in records) else "quick"
    lines = [
        "| link | sends | bits a round | kilobits to 1e-8 | best end |",
        "| --- | --- | --- | --- | --- |",
    ]

    def values(metric, arm):
        return [
            r.value
            for r in records
            if (r.metric, r.arm, r.scale) == (metric, arm, scale)
        ]

    for name, sent in SENT.items():
        needed = values("kilobits to 1e-8", name)
        if not needed:
            raise ValueError(
                "results/econtrol.jsonl holds no bits_to_solution: run "
                "python scripts/reproduce.py --system=econtrol --record"
            )
        ends = math.exp(np.mean(np.log(values("where it ends", name))))
        count = f"{np.mean(needed):.1f}" if np.isfinite(needed).all() else "never"
        several = len(needed) > 1 and np.isfinite(needed).all()
        spread = f" ± {np.std(needed, ddof=1):.1f}" if several else ""
        message = f"{values('bits a round', name)[0]:.0f}"
        lines.append(
            f"| `{name}` | {sent.said} | {message} | {count}{spread} | {ends:.1e} |"
        )
    return lines


def write(page: pathlib.Path, lines: Sequence[str]) -> None:
    """Put the lines between the page's two comments."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name} lacks the comments {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    page.write_text("\n".join([head + BEGIN, "", *lines, "", END + rest.split(END)[1]]))


def main(argv: Sequence[str]) -> int:
    f = flags.FlagValues()
    flags.DEFINE_string(
        "results_dir", str(results.RESULTS), "recorded lines", flag_values=f
    )
    flags.DEFINE_string("page", str(PAGE), "the page to write into", flag_values=f)
    command.parse(f, argv, __doc__)
    with command.bad_input():
        records = results.flat(results.read(pathlib.Path(f.results_dir), "econtrol"))
        mine = [r for r in records if r.measurement == "bits_to_solution"]
        write(pathlib.Path(f.page), table(mine))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
