"""Large steps make logistic regression a perceptron; normalised, it is as fast as one.

Paper: A. Tyurin, arXiv:2412.08424, AAAI 2025 (no published code was found). Its figures
are curves without tables, so the claims below are its statements, and its bounds as
derived in `optim/normalized_gd.py`.
Claim: with a growing step gradient descent on the logistic loss (LR+GD) tends to the
batch perceptron, which is slower than the perceptron by the number of points n; divided
by the mean residual it needs R^2 / mu^2 iterations whatever n.

    python scripts/reproduce.py --system=normalized_gd

Expected: on the hard set with n = 1000, about n / 2 = 500 iterations of LR+GD against 2
to 4; on real pairs of classes fewer iterations than LR+GD at the same step.
Hardware and time: two CPU cores, float64; quick 2 minutes, full 6 minutes.
"""

import functools
import gzip
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from narrows.optim.normalized_gd import (
    LOGISTIC,
    PERCEPTRON,
    Separation,
    margin,
    normalize_by_loss,
    normalized_gd,
    online_perceptron,
    separate,
)
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
from sklearn import datasets

SYSTEM = System(
    slug="normalized_gd",
    title="From Logistic Regression to the Perceptron Algorithm: "
    "Exploring Gradient Descent with Large Step Sizes",
    paper="arXiv:2412.08424, AAAI 2025",
    room="optim/",
    module="narrows.optim.normalized_gd",
    summary="gradient of the logistic loss divided by the mean residual",
)
METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "method": normalized_gd,
    "LR+GD": optax.sgd,
    "over loss": lambda gamma: optax.chain(
        normalize_by_loss(), optax.scale_by_learning_rate(gamma)
    ),
    "over norm": lambda gamma: optax.chain(
        optax.normalize_by_update_norm(eps=0.0), optax.scale_by_learning_rate(gamma)
    ),
}
STEPS = (1.0, 1e2, 1e4)  # gamma, the same grid for every method; smaller: slower


@functools.partial(jax.jit, static_argnames=("arm", "perceptron"))
def _descend(z, gamma, cap, *, arm, perceptron):
    surrogate = PERCEPTRON if perceptron else LOGISTIC
    tx = METHODS[arm](gamma)
    one = functools.partial(separate, tx, surrogate=surrogate)
    return jax.vmap(lambda z, cap: one(z, max_steps=cap))(z, cap)


def descend(z, gamma: float, cap, arm: str, *, perceptron: bool = False) -> Separation:
    """`separate` in float64 over sets of one shape [sets, n, d], each with its cap."""
    cap = np.broadcast_to(np.asarray(cap, np.int32), len(z))
    with jax.enable_x64(True):
        done = _descend(
            np.asarray(z), np.float64(gamma), cap, arm=arm, perceptron=perceptron
        )
        return jax.tree.map(np.asarray, done)


@functools.partial(jax.jit, static_argnames="max_visits")
def mistakes(z, *, max_visits):
    return online_perceptron(z, max_visits=max_visits).mistakes


def hard_set(n: int, mu: float, turn: np.ndarray) -> np.ndarray:
    """n - 1 copies of one point and a last one almost opposite; margin mu, R = 1."""
    side = np.sqrt(1 - mu**2)
    z = np.tile([mu, side], (n, 1))
    z[-1, 1] = -side
    return z @ turn


def random_set(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Margin at least 0.03 R: points mu_i w + sqrt(1 - mu_i^2) v_i in unequal crowds.

    The v_i, orthogonal to w, crowd round a few directions and their opposites: batch
    methods are slow where the many outvote the few.
    """
    w = rng.normal(size=d)
    w /= np.linalg.norm(w)
    crowds = rng.normal(size=(3, d))
    crowds = np.concatenate([crowds, -crowds])
    of = rng.choice(6, size=n, p=rng.dirichlet(np.full(6, 0.3)))
    v = crowds[of] + 0.3 * rng.normal(size=(n, d))
    v -= np.outer(v @ w, w)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    mu = rng.uniform(0.03, 0.3, size=(n, 1))
    return (mu * w + np.sqrt(1 - mu**2) * v) * 10 ** rng.uniform(-1, 1)


def random_sets(scale: str, seed: int) -> Iterator[Row]:
    """1000 random separable sets: the limit of large steps and both bounds."""
    del scale  # the whole protocol takes seconds
    rng = np.random.default_rng([seed, 1])
    shares = {"method": 0.0, "LR+GD": 0.0}
    gap, compared = 0.0, 0
    for n, d in itertools.product((5, 200), (3, 10)):
        z = np.stack([random_set(rng, n, d) for _ in range(250)])
        radius = np.linalg.norm(z, axis=2).max(axis=1)
        bound = (radius / np.array([margin(points) for points in z])) ** 2
        for arm, factor in (("method", 1), ("LR+GD", n)):
            cap = np.ceil(factor * bound).astype(np.int32) + 1
            done = descend(z, 1.0, cap, arm, perceptron=True)
            share = done.iterations / (factor * bound)
            shares[arm] = max(shares[arm], float(share.max()))
        worst, count = limit_gap(z / radius[:, None, None])
        gap, compared = max(gap, worst), compared + count
    yield Row("limit gap", gap)
    yield Row("iterates compared", compared)
    yield Row("share of bound", shares["method"])
    yield Row("share of bound", shares["LR+GD"], "LR+GD")


def limit_gap(z: np.ndarray, gamma: float = 1e8) -> tuple[float, int]:
    """max |th_t / gamma - u_t|, 30 iterates, while no margin is within 1e-5 of 0."""
    near = np.zeros(len(z), bool)
    gap, compared = 0.0, 0
    for t in range(1, 31):
        u = descend(z, 1.0, t, "LR+GD", perceptron=True)
        theta = descend(z, gamma, t, "LR+GD")
        apart = np.abs(theta.w / gamma - u.w).max(axis=1)
        gap = max(gap, float(apart[~near].max(initial=0.0)))
        compared += int((~near & (u.iterations == t)).sum())
        near |= (np.abs(np.einsum("snd,sd->sn", z, u.w)) < 1e-5).any(axis=1)
    return gap, compared


def hard_sets(scale: str, seed: int) -> Iterator[Row]:
    """Iterations on the hard set, turned at random, with mu drawn from 0.05 to 0.2."""
    rng = np.random.default_rng([seed, 2])
    mu = float(np.exp(rng.uniform(np.log(0.05), np.log(0.2))))
    turn = np.linalg.qr(rng.normal(size=(10, 10)))[0][:2]
    sizes = (10, 100, 1000) if scale == "quick" else (10, 100, 1000, 10_000)
    found = {arm: [] for arm in METHODS}
    for n in sizes:
        z = hard_set(n, mu, turn)
        for arm in METHODS:
            found[arm].append(int(descend([z], 1e4, 50_000, arm).iterations[0]))
            yield Row(f"iterations n={n}", found[arm][-1], arm)
        with jax.enable_x64(True):
            updates = int(mistakes(z, max_visits=100 * n))
        yield Row(f"iterations n={n}", updates, "online perceptron")
        yield Row("share of bound", found["method"][-1] * mu**2)
    for arm, runs in found.items():
        slope = float(np.polyfit(np.log(sizes), np.log(runs), 1)[0])
        yield Row("slope less one", slope - 1, arm)

    z = hard_set(100, mu, turn)
    for name, gamma in (("gamma=1", 1.0), ("gamma=1e4", 1e4)):
        end = descend([z], gamma, 200_000, "LR+GD")
        early = range(min(int(end.iterations[0]), 100))  # the peak comes early
        losses = [float(descend([z], gamma, t, "LR+GD").loss[0]) for t in early]
        yield Row("iterations", int(end.iterations[0]), name)
        yield Row("highest loss", max(losses), name)
        yield Row("loss at separation", float(end.loss[0]), name)


def pair(
    x: np.ndarray, y: np.ndarray, a: int, b: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` points of each of two classes, scaled, with a constant 1, times +-1."""
    chosen = np.concatenate(
        [rng.choice(np.flatnonzero(y == c), count, replace=False) for c in (a, b)]
    )
    x = x[chosen] - x[chosen].mean(axis=0)
    spread = x.std(axis=0)
    x = np.c_[x / np.where(spread > 0, spread, 1), np.ones(len(x))]
    z = x * np.repeat([1.0, -1.0], count)[:, None]
    return z / np.linalg.norm(z, axis=1).max()


def bundled_pairs(scale: str, seed: int) -> Iterator[Row]:
    """Pairs of classes of the sets that come with scikit-learn, 80 % of the points."""
    rng = np.random.default_rng([seed, 3])
    groups = []
    for name in ("iris", "wine", "breast_cancer", "digits"):
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        classes = range(5 if name == "digits" and scale == "quick" else y.max() + 1)
        count = int(0.8 * np.bincount(y).min())
        pairs = itertools.combinations(classes, 2)
        groups.append([pair(x, y, a, b, count, rng) for a, b in pairs])
    yield from compare(groups, cap=20_000 if scale == "paper" else 2_000)


def image_pairs(scale: str, seed: int) -> Iterator[Row]:
    """Pairs of classes of MNIST and Fashion-MNIST from --data_dir."""
    folder = DATA_DIR.get()
    sets = [folder / name for name in ("mnist", "fashion_mnist")] if folder else []
    if not sets or not all(path.is_dir() for path in sets):
        raise NotMeasured("mnist/ and fashion_mnist/ are not in --data_dir")
    rng = np.random.default_rng([seed, 4])
    groups = []
    for path in sets:
        x = idx(path / "train-images-idx3-ubyte.gz").reshape(60_000, -1) / 255.0
        y = idx(path / "train-labels-idx1-ubyte.gz")
        every = np.array(list(itertools.combinations(range(10), 2)))
        pairs = every if scale == "paper" else rng.choice(every, 2, replace=False)
        count = 5_000 if scale == "paper" else 500
        groups.append([pair(x, y, a, b, count, rng) for a, b in pairs])
    yield from compare(groups, cap=20_000 if scale == "paper" else 1_000)


def compare(groups: Sequence[Sequence[np.ndarray]], cap: int) -> Iterator[Row]:
    """Geometric mean of the iterations over separable pairs, at each step and best.

    Left out and counted: pairs that are not separable, and pairs whose margin is so
    narrow that R^2 / mu^2 exceeds 1e6. A run that meets the cap counts as the cap.
    """
    kept = []
    none = narrow = 0
    for group in groups:
        of_group = np.array([margin(z) for z in group])
        none += int((of_group == 0).sum())
        narrow += int(((of_group > 0) & (of_group < 1e-3)).sum())
        kept.append([z for z, mu in zip(group, of_group, strict=True) if mu >= 1e-3])
    yield Row("pairs", sum(map(len, kept)))
    yield Row("pairs not separable", none)
    yield Row("pairs too narrow", narrow)
    for arm in METHODS:
        means = []
        for gamma in STEPS:
            done = [descend(group, gamma, cap, arm) for group in kept if group]
            runs = np.concatenate([runs.iterations for runs in done])
            means.append(float(np.exp(np.log(runs).mean())))
            yield Row(f"iterations gamma={gamma:g}", means[-1], arm)
            yield Row(f"capped gamma={gamma:g}", int((runs == cap).sum()), arm)
        yield Row("iterations best gamma", min(means), arm)


def idx(path: pathlib.Path) -> np.ndarray:
    """An array in the IDX format of MNIST: bytes, big-endian sizes."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


CLAIMS = (
    Claim(
        "limit",
        "LR+GD with gamma = 1e8 follows the batch perceptron, to 1e-6",
        "theorem: LR+GD becomes the batch perceptron as gamma grows",
        Law("limit gap", 1e-6),
        random_sets,
    ),
    Claim(
        "bound",
        "the normalised limit separates 1000 random sets within R^2 / mu^2 iterations",
        "theorem: the perceptron's rate, free of n",
        Law("share of bound", 1.0),
        random_sets,
    ),
    Claim(
        "batch_bound",
        "the batch perceptron separates them within n R^2 / mu^2",
        "theorem: a rate worse by the factor n",
        Law("share of bound", 1.0, "LR+GD"),
        random_sets,
    ),
    Claim(
        "hard_bound",
        "with gamma = 1e4 it meets R^2 / mu^2 on the hard set at every n",
        "theorem: free of n",
        Law("share of bound", 1.0),
        hard_sets,
    ),
    Claim(
        "growth",
        "LR+GD's iterations grow like n on the hard set: log-log slope - 1 within 0.05",
        "lower bound: the complexity of LR+GD is suboptimal",
        Law("slope less one", 0.05, "LR+GD"),
        hard_sets,
    ),
    Claim(
        "faster",
        "normalised needs at most a tenth of LR+GD's iterations, hard set, n = 1000",
        "'much better theoretical guarantees'",
        Ratio("iterations n=1000", "method", "LR+GD", at_most=0.1),
        hard_sets,
    ),
    Claim(
        "faster_small",
        "the same at n = 10",
        "not claimed",
        Ratio("iterations n=10", "method", "LR+GD", at_most=1.0),
        hard_sets,
        note="The bound is free of n but not small: with ten points LR+GD needs about "
        "n / 2 = 5 iterations and the normalised method up to R^2 / mu^2.",
    ),
    Claim(
        "step",
        "LR+GD separates sooner with gamma = 1e4 than with gamma = 1",
        "larger steps converge faster",
        Ratio("iterations", "gamma=1e4", "gamma=1", at_most=1.0),
        hard_sets,
    ),
    Claim(
        "loss_on_the_way",
        "and its loss rises higher on the way, nats",
        "larger steps lead to higher losses: loss is no measure of progress",
        Ordering("highest loss", "gamma=1", "gamma=1e4"),
        hard_sets,
    ),
    Claim(
        "loss_at_separation",
        "and its loss is still higher when it separates, nats",
        "high loss can mean faster convergence",
        Ordering("loss at separation", "gamma=1", "gamma=1e4"),
        hard_sets,
        note="Not on this set: once all margins are positive, a step of 1e4 makes them "
        "so large that the loss vanishes. The loss is high only before.",
    ),
    Claim(
        "pairs_same_step",
        "normalised is faster at gamma = 100 on pairs of iris, wine, cancer and digits",
        "experiments on small separable tasks",
        Ratio("iterations gamma=100", "method", "LR+GD", at_most=1.0),
        bundled_pairs,
        note="Left out where not separable: iris versicolor against virginica.",
    ),
    Claim(
        "pairs_best_step",
        "and with each method's best gamma",
        "experiments on small separable tasks",
        Ratio("iterations best gamma", "method", "LR+GD", at_most=1.0),
        bundled_pairs,
    ),
    Claim(
        "images_same_step",
        "normalised is faster at gamma = 100 on pairs of MNIST and Fashion-MNIST",
        "not measured in the paper",
        Ratio("iterations gamma=100", "method", "LR+GD", at_most=1.0),
        image_pairs,
        scales=("full", "paper"),
        note="Two pairs a seed of each set, 500 points a class; runs stop at 1000 "
        "iterations, which favours the slower method.",
    ),
    Claim(
        "images_best_step",
        "and with each method's best gamma",
        "not measured in the paper",
        Ratio("iterations best gamma", "method", "LR+GD", at_most=1.0),
        image_pairs,
        scales=("full", "paper"),
    ),
)


def growth_figure(rows: Sequence[Recorded]) -> Figure:
    """Iterations to separation against n on the hard set, mean over seeds."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    scale = "full" if any(r.scale == "full" for r in rows) else "quick"
    for arm in (*METHODS, "online perceptron"):
        found: dict[int, list[float]] = {}
        for r in rows:
            if (r.arm, r.scale) == (arm, scale) and r.metric.startswith(
                "iterations n="
            ):
                found.setdefault(int(r.metric.split("=")[1]), []).append(r.value)
        sizes = sorted(found)
        label = "normalised LR+GD" if arm == "method" else arm
        label = f"gradient {arm}" if arm.startswith("over") else label
        line = "s:" if arm == "online perceptron" else "o-"  # may lie on another
        axes.loglog(sizes, [np.mean(found[n]) for n in sizes], line, label=label)
    axes.set(xlabel="points n", ylabel="iterations to separation")
    axes.legend()
    return figure


FIGURES = {"normalized_gd": growth_figure}
