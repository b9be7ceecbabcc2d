"""Saddle points over compressed links: differences from an anchor vanish at the end.

Paper: A. Beznosikov, P. Richtarik, M. Diskin, M. Ryabinin, A. Gasnikov, "Distributed
Methods with Compressed Communication for Solving Variational Inequalities, with
Theoretical Guarantees", arXiv:2110.03313, NeurIPS 2022 (no published code was found).
Its figures are curves; sizes asked for below are those of a reference run.
Claim: extragradient over compressed operators (CEG) stalls, for the operator of a
worker is not small at the solution. MASHA compresses differences from a rarely
exchanged anchor, converges linearly, and needs fewer numbers than extragradient (EG).

    python scripts/reproduce.py --system=masha

Expected: problem B to 1e-10 and below after 1e5 numbers a worker, where CEG ends above
1e-3; after 2e4 numbers MASHA is ahead of EG; a transformer trained against an adversary
reaches a lower robust loss than by EG at equal bits.
Hardware and time: two CPU cores; float64 but for the transformer; quick 3 minutes.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.data.bilinear import Bilinear, bilinear, operator
from narrows.optim.compressed_mean import PLAIN, Way, compressed_mean
from narrows.optim.extragradient import Method, extragradient, saddle
from narrows.optim.masha import masha
from narrows.optim.sparse import random_k, top_k
from narrows.parallel.state import simulate
from narrows.scripts import adversarial_text as text
from narrows.scripts.claims import Claim, Law, Ratio, Row, System
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="masha",
    title="Distributed Methods with Compressed Communication for Solving Variational "
    "Inequalities, with Theoretical Guarantees",
    paper="arXiv:2110.03313, NeurIPS 2022",
    room="optim/",
    module="narrows.optim.masha",
    summary="compressed extragradient on differences from a shared anchor",
)


class Arm(NamedTuple):
    link: str | None  # None: everything is sent whole
    anchored: bool = True
    both: bool = True  # directions are compressed


ARMS = {
    "method": Arm("masha2"),
    "MASHA1": Arm("plain"),
    "MASHA2 up": Arm("masha2", both=False),
    "MASHA1 up": Arm("plain", both=False),
    "EG": Arm(None, anchored=False),
    "CEG Rand-K": Arm("plain", anchored=False),
    "CEG Top-K": Arm("top", anchored=False),
    "CEG Top-K, EC": Arm("masha2", anchored=False),
}


def make(
    arm: str, of, *, part: float, tau: float, rate, workers: int, **options
) -> Method:
    """The arm's method; `part` of all numbers is sent in a compressed message."""
    link, anchored, both = ARMS[arm]
    way = PLAIN
    if link is not None:
        compressor = random_k(part) if link == "plain" else top_k(part)
        way = Way("plain" if link == "top" else link, compressor)
    down: dict[str, Any] = {"down": way} if both and link else {}
    mean = compressed_mean(way, workers=workers, **down)
    if not anchored:
        return extragradient(of, mean, rate=rate, **options)
    return masha(of, mean, rate=rate, tau=tau, workers=workers, **options)


WORKERS, SIDE, PART, TAU = 5, 25, 0.3, 0.7
RATES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2)  # over L, for every arm
BUDGETS = {"1e5": 1e5, "2e4": 2e4, "1e4": 1e4}  # numbers that a worker sends


@functools.cache
def on_bilinear(arm: str, steps: int):
    """(numbers sent up, |z - z*|^2 / |z*|^2) after every step, at every rate."""

    def run(problem, solution, smoothness, rate, seed):
        method = make(
            arm,
            operator,
            part=PART,
            tau=TAU,
            rate=rate / smoothness,
            workers=WORKERS,
            seed=seed,
        )
        go = simulate(
            lambda data, state: (0.0, method.step(data, state)),
            workers=WORKERS,
            axis_name="data",
        )

        def gap(z):
            return sum(jnp.sum((a - b) ** 2) for a, b in zip(z, solution, strict=True))

        def step(state, _):
            state = go(problem, state)[1]
            anchors = getattr(state, "anchors", jnp.int32(0))
            return state, (anchors, gap(state.z) / gap(jax.tree.map(jnp.zeros_like, z)))

        z = (jnp.zeros(SIDE), jnp.zeros(SIDE))
        state, (anchors, gaps) = jax.lax.scan(step, method.init(z), None, length=steps)
        each = 2 * SIDE * (1.0 if ARMS[arm].link is None else PART)
        each = each if ARMS[arm].anchored else 2 * each  # two operators a step
        sent = each * jnp.arange(1, steps + 1) + 2 * SIDE * anchors
        return sent, gaps, state.z

    return jax.jit(jax.vmap(run, in_axes=(None, None, None, 0, None)))


def solve(arm: str, problem: Bilinear, seed: int):
    """Of every rate in float64: a dictionary of the gap at each budget, and z."""
    steps = 1001 if arm == "EG" else 3600
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, (problem, problem.solution))
        smoothness, rates = jnp.asarray(problem.smoothness), jnp.asarray(RATES)
        run = on_bilinear(arm, steps)
        sent, gaps, z = jax.tree.map(
            np.asarray, run(*given, smoothness, rates, jnp.int32(seed))
        )
    gaps = np.where(np.isfinite(gaps), np.maximum(gaps, 1e-32), np.inf)
    found = {}
    for name, budget in BUDGETS.items():
        if (sent[:, -1] < budget).any():
            raise ValueError(f"{arm}: {steps} steps send less than {budget:g} numbers")
        last = (sent <= budget).sum(1) - 1
        found[name] = gaps[np.arange(len(RATES)), last]
    return found, z


def game(scale: str, seed: int) -> Iterator[Row]:
    """Problem B at the best of ten rates: gaps after 1e4 to 1e5 numbers a worker."""
    arms = [a for a in ARMS if scale != "quick" or a not in ("CEG Top-K, EC",)]
    rng = np.random.default_rng([seed, 1])
    problem = bilinear(rng, workers=WORKERS, d=SIDE)
    ends = {}
    for arm in arms:
        found, z = solve(arm, problem, seed)
        for name, gaps in found.items():
            yield Row(f"gap after {name}", float(gaps.min()), arm)
        yield Row("gap after 2e4 at 0.4 / L", found["2e4"][RATES.index(0.4)], arm)
        yield Row("best rate", RATES[found["1e4"].argmin()], arm)
        ends[arm] = np.concatenate([part[found["1e5"].argmin()] for part in z])
        if arm.startswith("CEG"):
            low = max(0.0, float(np.log10(1e-3 / found["1e5"].min())))
            yield Row("decades below 1e-3", low, arm)
    for arm in ("method", "MASHA1"):
        apart = float(np.abs(ends[arm] - ends["EG"]).max())
        yield Row("distance from EG's solution", apart, arm)


SENT_PART, TEXT_TAU = 0.1, 0.9
TEXT_RATES = (0.1, 0.3, 1.0)
TEXT_ARMS = ("method", "MASHA1", "EG", "CEG Top-K")


@functools.cache
def on_text(arm: str, steps: int, checks: int):
    """Anchors so far and parameters at `checks` moments, at each rate."""
    gradients = saddle(text.objective())

    def run(data, z, rate, seed):
        method = make(
            arm,
            gradients,
            part=SENT_PART,
            tau=TEXT_TAU,
            rate=rate,
            workers=text.WORKERS,
            seed=seed,
            project=lambda z: (z[0], text.in_ball(z[1])),
        )
        go = simulate(
            lambda data, state: (0.0, method.step(data, state)),
            workers=text.WORKERS,
            axis_name="data",
        )

        def between(state, _):
            state = jax.lax.fori_loop(
                0, steps // checks, lambda _, s: go(data, s)[1], state
            )
            return state, (getattr(state, "anchors", jnp.int32(0)), state.z[0])

        return jax.lax.scan(between, method.init(z), None, length=checks)[1]

    return jax.jit(jax.vmap(run, in_axes=(None, None, 0, None)))


def bits_sent(arm: str, z, steps, anchors):
    """Both directions of a worker: compressed means, and whole ones for anchors."""
    link, anchored, _ = ARMS[arm]
    whole = compressed_mean(PLAIN, workers=text.WORKERS).sent_bits(z)
    mean = whole
    if link is not None:
        compressor = random_k(SENT_PART) if link == "plain" else top_k(SENT_PART)
        way = Way("plain" if link == "top" else link, compressor)
        mean = compressed_mean(way, way, workers=text.WORKERS).sent_bits(z)
    return (1 if anchored else 2) * mean * steps + whole * anchors


def adversarial(scale: str, seed: int) -> Iterator[Row]:
    """A transformer on four workers' text against a shared adversary of embeddings."""
    steps, checks = (120, 10) if scale == "quick" else (400, 20)
    data, other = text.deal(np.random.default_rng([seed, 2]))
    own = data.reshape(-1, text.LENGTH + 1)
    z, _ = text.start(jax.random.key(seed))
    moments = np.arange(1, checks + 1) * (steps // checks)
    first = float(text.losses_of(z[0][None], own)[0][0])
    curves = {}
    for arm in TEXT_ARMS:
        run = on_text(arm, steps, checks)
        anchors, flats = run(data, z, jnp.asarray(TEXT_RATES), jnp.int32(seed))
        robust = np.stack([text.losses_of(flat, own)[0] for flat in flats])
        best = int(np.argmin(np.where(np.isfinite(robust), robust, np.inf)[:, -1]))
        bits = bits_sent(arm, z, moments, np.asarray(anchors[best], float))
        curves[arm] = np.r_[0, bits], np.r_[first, robust[best]]
        against, clean = (float(x[-1]) for x in text.losses_of(flats[best], other))
        yield Row("robust loss, equal steps", float(robust[best, -1]), arm)
        yield Row("robust loss of other text", against, arm)
        yield Row("clean loss of other text", clean, arm)
        yield Row("best text rate", TEXT_RATES[best], arm)
        yield Row("megabits", bits[-1] / 1e6, arm)
        for at, loss in zip(bits, robust[best], strict=True):
            yield Row(f"curve {at / 1e6:.4g}", float(loss), arm)
    budget = min(bits[-1] for bits, _ in curves.values())
    for arm, (bits, losses) in curves.items():
        yield Row(
            "robust loss, equal bits", float(np.interp(budget, bits, losses)), arm
        )


CLAIMS = (
    *(
        Claim(
            name,
            f"{said} is below |z - z*|^2 / |z*|^2 = 1e-10 after 1e5 numbers a worker",
            "linear convergence; 8e-30 and 9e-30 in the reference run",
            Law("gap after 1e5", 1e-10, arm),
            game,
            note="Problem B: five workers, d = 50, K = 0.3 d both ways, tau = 0.7; the "
            "best of ten rates for every arm.",
        )
        for name, said, arm in (
            ("masha2", "MASHA2 (Top-K, feedback)", "method"),
            ("masha1", "MASHA1 (Rand-K)", "MASHA1"),
        )
    ),
    *(
        Claim(
            f"stall_{arm[4:].lower().replace('-', '_')}",
            f"extragradient over {arm[4:]} stays above 1e-3 at its best rate",
            paper,
            Law("decades below 1e-3", 0.0, arm),
            game,
        )
        for arm, paper in (
            ("CEG Rand-K", "compressed EG stalls; 1.7e-2 in the reference run"),
            ("CEG Top-K", "compressed EG stalls; 0.36 in the reference run"),
        )
    ),
    *(
        Claim(
            f"ahead_{name}",
            f"after 2e4 numbers {said} is nearer than EG, both at gamma = 0.4 / L",
            paper,
            Ratio("gap after 2e4 at 0.4 / L", arm, "EG", at_most=1e-6),
            game,
        )
        for name, said, arm, paper in (
            ("masha2", "MASHA2", "method", "4e-27 against 4e-14 in the reference run"),
            ("masha1", "MASHA1", "MASHA1", "3e-25 against 4e-14 in the reference run"),
        )
    ),
    *(
        Claim(
            f"ahead_best_{name}",
            f"and so it is after 1e4 with the best of ten rates for each, {said}",
            "MASHA needs fewer numbers than EG for one accuracy",
            Ratio("gap after 1e4", arm, "EG", at_most=1.0),
            game,
            note="Not so: EG bears gamma = 1 / L, compressed both ways MASHA 0.5 / L, "
            "which takes back what it saves. Each sends as much down as up.",
        )
        for name, said, arm in (
            ("masha2", "MASHA2", "method"),
            ("masha1", "MASHA1", "MASHA1"),
        )
    ),
    Claim(
        "ahead_up",
        "where only the way up is narrow, MASHA1 is nearer than EG, each at its best",
        "MASHA needs fewer numbers than EG for one accuracy",
        Ratio("gap after 1e4", "MASHA1 up", "EG", at_most=0.01),
        game,
        note="Compressed up, whole down; numbers sent up are counted.",
    ),
    *(
        Claim(
            f"same_{name}",
            f"{said} ends where extragradient does, to 1e-6 in every entry",
            "the solution",
            Law("distance from EG's solution", 1e-6, arm),
            game,
        )
        for name, said, arm in (
            ("masha2", "MASHA2", "method"),
            ("masha1", "MASHA1", "MASHA1"),
        )
    ),
    Claim(
        "two_sided",
        "compressed both ways MASHA2 is within ten times of one way, after 1e5",
        "both directions",
        Ratio("gap after 1e5", "method", "MASHA2 up", at_most=10.0),
        game,
        note="Both at the same numbers sent up; the other way sends everything down.",
    ),
    Claim(
        "text_bits",
        "a transformer against an adversary: less robust loss than by EG at equal bits",
        "ALBERT with adversarial training: faster at equal quality",
        Ratio("robust loss, equal bits", "method", "EG", at_most=0.9),
        adversarial,
        note="One block of width 32 on four workers' text; the adversary adds one "
        "delta to the embeddings of all rows. Top-K of a tenth, both ways counted.",
    ),
    Claim(
        "text_bits_masha1",
        "and by MASHA1",
        "the same",
        Ratio("robust loss, equal bits", "MASHA1", "EG", at_most=1.0),
        adversarial,
    ),
    Claim(
        "text_steps",
        "at equal steps its robust loss is at most a tenth above EG's",
        "equal quality",
        Ratio("robust loss, equal steps", "method", "EG", at_most=1.1),
        adversarial,
    ),
    Claim(
        "text_sent",
        "for at most a fifth of the bits",
        "less traffic",
        Ratio("megabits", "method", "EG", at_most=0.2),
        adversarial,
    ),
)


def gaps_figure(rows: Sequence[Recorded]) -> Figure:
    """Left: problem B at both budgets. Right: robust loss against bits."""
    scale = "full" if any(r.scale == "full" for r in rows) else "quick"
    rows = [r for r in rows if r.scale == scale]
    panels = 2 if any(r.measurement == "adversarial" for r in rows) else 1
    figure = Figure(figsize=(4.3 * panels, 3.6), layout="constrained")
    left, *others = figure.subplots(1, panels, squeeze=False)[0]
    arms = [a for a in ARMS if any(r.arm == a for r in rows)]
    names = {"method": "MASHA2"}
    for budget, mark in (("2e4", "o"), ("1e5", "x")):
        found = [
            [r.value for r in rows if (r.metric, r.arm) == (f"gap after {budget}", a)]
            for a in arms
        ]
        at = [i for i, values in enumerate(found) for _ in values]
        left.semilogy(at, np.concatenate(found), mark, label=f"{budget} numbers")
    labels = [names.get(a, a).replace(" ", "\n", 1) for a in arms]
    left.set_xticks(range(len(arms)), labels, fontsize=6)
    left.set(ylabel="|z - z*|² / |z*|²", title="problem B, best rate")
    left.legend(fontsize=7)
    for right in others:
        for arm in TEXT_ARMS:
            of = [r for r in rows if r.arm == arm and r.metric.startswith("curve ")]
            for seed in sorted({r.seed for r in of})[:1]:
                points = sorted(
                    (float(r.metric[6:]), r.value) for r in of if r.seed == seed
                )
                right.semilogx(*zip(*points, strict=True), label=names.get(arm, arm))
        right.set(xlabel="megabits a worker sends", ylabel="robust loss, nats a byte")
        right.set_title("transformer, seed 0")
        right.legend(fontsize=7)
    return figure


FIGURES = {"masha": gaps_figure}
