"""A few sparse Newton steps finish what Sinkhorn takes thousands of scalings for.

Paper: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao and Ying,
arXiv:2401.12253, ICLR 2024 (no published code was found). Its figures are curves of the
error against iterations and seconds; settings here are from its text as we have it.
Claim: with eta = 1200, after some tens of scalings, Newton's method on a Hessian with a
few entries per row reaches machine accuracy in a handful of steps and less time.

    python scripts/reproduce.py --system=sinkhorn_newton_sparse

Expected: random costs, n = 500: about 8 Newton steps to 1e-10; at 1e-8 less than a
tenth of the time of plain Sinkhorn. Baselines: our own Sinkhorn, plain and
over-relaxed, and ott-jax with the best of eleven settings for each problem (log domain
or kernel; fixed and adaptive momentum; Anderson acceleration; annealing): kernel
products with momentum.
Hardware and time: two CPU cores, float64; quick 2 minutes, full 6 minutes.
"""

import functools
import gzip
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from narrows.ib.transport import plan, solve
from narrows.scripts.claims import (
    DATA_DIR,
    Claim,
    Law,
    NotMeasured,
    Ordering,
    Ratio,
    Row,
    System,
)
from narrows.scripts.results import Recorded

SYSTEM = System(
    slug="sinkhorn_newton_sparse",
    title="Accelerating Sinkhorn Algorithm with Sparse Newton Iterations",
    paper="arXiv:2401.12253, ICLR 2024",
    room="ib/",
    module="narrows.ib.transport",
    summary="entropic transport by Newton steps on a sparse part of the plan",
)
ETA = 1200.0
SIZE = 500  # of the random costs
TOLERANCES = {"quick": (1e-2, 1e-8)}  # by scale
ALL_TOLERANCES = (1e-2, 1e-5, 1e-8, 1e-11)
ONCE = 0.5  # seconds from which a run is timed once, not three times


class Solved(NamedTuple):
    x: jax.Array
    y: jax.Array
    iterations: jax.Array  # scalings and Newton steps


Run = Callable[[jax.Array, jax.Array, jax.Array, float], Solved]


def ours(**options) -> Run:
    def run(cost, r, c, tol):
        t = solve(cost, r, c, eta=ETA, tol=tol, **options)
        return Solved(t.x, t.y, t.sinkhorn_steps + t.newton_steps)

    return run


def ott(momentum: float, cap: int) -> Run:
    """ott-jax with its best settings: kernel products, over-relaxed."""
    try:
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import acceleration, sinkhorn
    except ImportError as error:
        raise NotMeasured("ott-jax is absent: install the extra [test]") from error

    @functools.partial(jax.jit, static_argnums=3)
    def run(cost, r, c, tol):
        solver = sinkhorn.Sinkhorn(
            threshold=tol,
            lse_mode=False,
            inner_iterations=10,
            max_iterations=cap,
            momentum=acceleration.Momentum(value=momentum),
        )
        g = geometry.Geometry(cost_matrix=cost, epsilon=1 / ETA)
        out = solver(linear_problem.LinearProblem(g, r, c))
        return Solved(out.f, out.g, out.n_iters)

    return run


@functools.cache
def arms(problem: str, scale: str) -> dict[str, Run]:
    """The method as published, as the library has it, and its rivals; each capped."""
    cap, ott_cap = (2_000, 500) if scale == "quick" else (20_000, 5_000)
    momentum = 1.5 if problem == "absolute" else 1.8  # 1.8 diverges there
    published = {
        "random": {"lam": 8 / SIZE, "warmup": 30, "halvings": 0},
        "squared": {"lam": "mass", "warmup": 50, "halvings": 0},
        "absolute": {"lam": "mass", "warmup": 200, "halvings": 0},
    }[problem]
    return {
        "method": ours(**published),
        "annealed": ours(),
        "sinkhorn": ours(method="sinkhorn", max_steps=cap),
        "over-relaxed": ours(method="sinkhorn", max_steps=cap, relaxation=momentum),
        "ott": ott(momentum, ott_cap),
    }


@functools.cache
def compiled(problem: str, scale: str, size: int) -> None:
    """Calls every program once, on a problem that takes one block of scalings.

    From numpy, as the problems are: a weakly typed argument would compile another one.
    """
    even = jnp.asarray(np.full(size, 1 / size))
    flat = jnp.zeros((size, size)), even, even
    for run in arms(problem, scale).values():
        for tol in TOLERANCES.get(scale, ALL_TOLERANCES):
            jax.block_until_ready(run(*flat, tol))


def compare(problem: str, scale: str, cost, r, c) -> Iterator[Row]:
    """Error, iterations and time of each arm at each tolerance, sides in turn.

    Times are in units of plain Sinkhorn's at the same tolerance. An arm that stops at
    its cap is not run again: that run stands for the tighter tolerances too, where its
    time is a lower bound.
    """
    compiled(problem, scale, r.size)
    alive, done = dict(arms(problem, scale)), {}
    for tol in TOLERANCES.get(scale, ALL_TOLERANCES):
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in alive}
        solved = {}
        for _ in range(3):
            for name, run in alive.items():
                if seconds[name] and seconds[name][0][0] > ONCE:
                    continue
                wall, cpu = time.perf_counter(), time.process_time()
                solved[name] = jax.block_until_ready(run(cost, r, c, tol))
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                seconds[name].append((cpu, wall))
        for name, s in solved.items():
            p = plan(cost, s.x, s.y, eta=ETA)
            error = float(abs(p.sum(1) - r).sum() + abs(p.sum(0) - c).sum())
            cpu, wall = np.median(seconds[name], axis=0)
            done[name] = {
                "error": error,
                "iterations": float(s.iterations),
                "cpu time": float(cpu),
                "wall time": float(wall),
            }
            # ott looks at one marginal only: twice the tolerance counts as there.
            if not error < 2 * tol:
                del alive[name]
        for name, figures in done.items():
            for metric, value in figures.items():
                unit = done["sinkhorn"][metric] if "time" in metric else 1
                yield Row(f"{metric} at {tol:g}", value / unit, name)


def random_cost(seed: int):
    rng = np.random.default_rng([seed, 1])
    cost = jnp.asarray(rng.random((SIZE, SIZE)))
    even = jnp.asarray(np.full(SIZE, 1 / SIZE))
    return cost, even, even


def image_pair(seed: int, power: int):
    """Two digits as masses on 28 x 28 points, distances scaled to at most 1."""
    folder = DATA_DIR.get()
    path = folder / "mnist" / "train-images-idx3-ubyte.gz" if folder else None
    if path is None or not path.is_file():
        raise NotMeasured("mnist/ is not in --data_dir")
    raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16)
    rng = np.random.default_rng([seed, 2])
    pair = raw.reshape(-1, 784)[rng.choice(60_000, 2, replace=False)] / 255 + 0.01
    r, c = (jnp.asarray(image / image.sum()) for image in pair)
    at = np.stack(np.divmod(np.arange(784), 28), 1)
    cost = (np.abs(at[:, None] - at) ** power).sum(-1)
    return jnp.asarray(cost / cost.max()), r, c


def steps(scale: str, seed: int) -> Iterator[Row]:
    """Newton steps to 1e-10 by the entries kept, and what fifty times as many do."""
    del scale
    with jax.enable_x64(True):
        cost, r, c = random_cost(seed)
        for kept in (2, 4, 8, 15):
            t = solve(
                cost, r, c, eta=ETA, tol=1e-10, lam=kept / SIZE, warmup=30, halvings=0
            )
            arm = "method" if kept == 8 else f"lam={kept}/n"
            yield Row("newton steps", float(t.newton_steps), arm)
            yield Row("cg steps", float(t.cg_steps), arm)
            yield Row("iterations", float(t.sinkhorn_steps + t.newton_steps), arm)
            yield Row("error", float(t.error), arm)
        t = solve(cost, r, c, eta=ETA, tol=1e-12)
        yield Row("error", float(t.error), "to 1e-12")
        t = solve(cost, r, c, eta=ETA, tol=1e-10, method="sinkhorn", max_steps=10_000)
        yield Row("iterations", float(t.sinkhorn_steps), "sinkhorn")
        yield Row("error", float(t.error), "sinkhorn")


def random_costs(scale: str, seed: int) -> Iterator[Row]:
    with jax.enable_x64(True):
        yield from compare("random", scale, *random_cost(seed))


def squared_pairs(scale: str, seed: int) -> Iterator[Row]:
    with jax.enable_x64(True):
        yield from compare("squared", scale, *image_pair(seed, 2))


def absolute_pairs(scale: str, seed: int) -> Iterator[Row]:
    with jax.enable_x64(True):
        yield from compare("absolute", scale, *image_pair(seed, 1))


CLAIMS = (
    Claim(
        "machine_accuracy",
        "random costs: the marginals meet 1e-12",
        "converges to machine accuracy in a handful of Newton steps",
        Law("error", 1e-12, "to 1e-12"),
        steps,
    ),
    Claim(
        "newton_steps",
        "at most 15 Newton steps to 1e-10 with 8 / n of the entries, after 30 scalings",
        "n = 500, eta = 1200, uniform costs; its curves fall within some ten steps",
        Law("newton steps", 15),
        steps,
    ),
    Claim(
        "fewer_iterations",
        "scalings and steps together at most a fiftieth of Sinkhorn's scalings",
        "'orders of magnitude fewer iterations'",
        Ratio("iterations", "method", "sinkhorn", at_most=1 / 50),
        steps,
        note="A lower bound of the gap: Sinkhorn stops at 10,000 scalings, at about "
        "1e-6.",
    ),
    Claim(
        "sparsity",
        "with 2 / n of the entries convergence is slower than with 8 / n",
        "lam = 2 / n in the paper's text as we have it",
        Ordering("newton steps", "method", "lam=2/n"),
        steps,
        note="With 2 / n Newton's convergence is only linear.",
    ),
    Claim(
        "random_sinkhorn",
        "random costs to 1e-8: at most a tenth of plain Sinkhorn's CPU time",
        "time curves, n = 500",
        Ratio("cpu time at 1e-08", "method", "sinkhorn", at_most=0.1),
        random_costs,
        scales=("full", "paper"),
        note="Sinkhorn stops at 20,000 scalings, still above the tolerance.",
    ),
    Claim(
        "random_ott",
        "and at most a fifth of ott-jax's, tuned",
        "not measured in the paper",
        Ratio("cpu time at 1e-08", "method", "ott", at_most=0.2),
        random_costs,
    ),
    Claim(
        "random_relaxed",
        "and less than over-relaxed Sinkhorn's",
        "not measured in the paper",
        Ratio("cpu time at 1e-08", "method", "over-relaxed", at_most=1.0),
        random_costs,
        scales=("full", "paper"),
    ),
    Claim(
        "random_annealed",
        "the library's default, warmed up by annealing, costs at most the paper's",
        "not measured in the paper",
        Ratio("cpu time at 1e-08", "annealed", "method", at_most=1.0),
        random_costs,
    ),
    Claim(
        "random_loose",
        "to 1e-2 there is little to gain: at least half of plain Sinkhorn's CPU time",
        "its curves part only after the warm-up",
        Ratio("cpu time at 0.01", "method", "sinkhorn", at_least=0.5),
        random_costs,
    ),
    Claim(
        "squared_sinkhorn",
        "MNIST pairs, squared distances, to 1e-8: at most half of Sinkhorn's CPU time",
        "pairs of MNIST digits, squared l2",
        Ratio("cpu time at 1e-08", "method", "sinkhorn", at_most=0.5),
        squared_pairs,
    ),
    Claim(
        "squared_ott",
        "and at most half of ott-jax's, tuned",
        "not measured in the paper",
        Ratio("cpu time at 1e-08", "method", "ott", at_most=0.5),
        squared_pairs,
    ),
    Claim(
        "squared_relaxed",
        "and no more than over-relaxed Sinkhorn's",
        "not measured in the paper",
        Ratio("cpu time at 1e-08", "method", "over-relaxed", at_most=1.0),
        squared_pairs,
        note="More: on smooth masses a relaxation of 1.8 ends in a hundred scalings.",
    ),
    Claim(
        "squared_iterations",
        "its scalings and steps at most a fifth of Sinkhorn's scalings",
        "iteration curves, pairs of MNIST digits, squared l2",
        Ratio("iterations at 1e-08", "method", "sinkhorn", at_most=0.2),
        squared_pairs,
    ),
    Claim(
        "absolute_sinkhorn",
        "MNIST pairs, l1 distances, to 1e-8: less than Sinkhorn's CPU time",
        "pairs of MNIST digits, l1",
        Ratio("cpu time at 1e-08", "method", "sinkhorn", at_most=1.0),
        absolute_pairs,
        scales=("full", "paper"),
        note="The l1 plan has many optima, so many entries have to be kept.",
    ),
    Claim(
        "absolute_ott",
        "and at most half of ott-jax's, tuned",
        "not measured in the paper",
        Ratio("cpu time at 1e-08", "method", "ott", at_most=0.5),
        absolute_pairs,
        scales=("full", "paper"),
    ),
    Claim(
        "absolute_annealed",
        "annealed, less than over-relaxed Sinkhorn's",
        "not measured in the paper",
        Ratio("cpu time at 1e-08", "annealed", "over-relaxed", at_most=1.0),
        absolute_pairs,
        scales=("full", "paper"),
        note="Undecided over five pairs: a third on hard ones, more on easy ones.",
    ),
    Claim(
        "absolute_iterations",
        "its scalings and steps at most a fifth of Sinkhorn's scalings",
        "iteration curves, pairs of MNIST digits, l1",
        Ratio("iterations at 1e-08", "method", "sinkhorn", at_most=0.2),
        absolute_pairs,
    ),
)
ARMS = {
    "method": "SNS, as published",
    "annealed": "SNS, annealed warm-up",
    "sinkhorn": "Sinkhorn",
    "over-relaxed": "Sinkhorn, over-relaxed",
    "ott": "ott-jax, tuned",
}


def seconds_figure(rows: Sequence[Recorded]) -> Figure:
    """CPU time over plain Sinkhorn's against the tolerance; median over seeds."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    names = {
        "random_costs": "uniform costs, n = 500",
        "squared_pairs": "MNIST pairs, squared l2",
        "absolute_pairs": "MNIST pairs, l1",
    }
    for axes, (measurement, title) in zip(panels, names.items(), strict=True):
        full = [r for r in rows if r.measurement == measurement and r.scale == "full"]
        for arm, label in ARMS.items():
            at = {
                tol: _median(full, f"cpu time at {tol:g}", arm)
                for tol in ALL_TOLERANCES
            }
            at = {tol: x for tol, x in at.items() if x is not None}
            axes.loglog(list(at), list(at.values()), "o-", label=label)
        axes.invert_xaxis()
        axes.set(title=title, xlabel="marginal error asked for")
    panels[0].set_ylabel("CPU time over plain Sinkhorn's")
    panels[2].legend(fontsize="small")
    return figure


def _median(rows, metric, arm):
    found = [r.value for r in rows if r.metric == metric and r.arm == arm]
    return float(np.median(found)) if found else None


FIGURES = {"sinkhorn_newton_sparse": seconds_figure}
