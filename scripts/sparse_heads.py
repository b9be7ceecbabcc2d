"""The solver of sparse heads beside scikit-learn's: objective and CPU time."""

from collections.abc import Iterator

import numpy as np
from narrows.models.concepts.sparse import elastic_net_path
from narrows.scripts.benchmarks.timing import alternate, ratio
from narrows.scripts.claims import Row
from rich.console import Console
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

ALPHA = 0.99  # share of L1
TURNS = 3


def beside_saga(name: str, x, labels, strength: float, seed: int) -> Iterator[Row]:
    """Rows "head, NAME: ..." for features x [n, k], standardised here.

    SAGA stops where its weights change by less than a share of 1e-4, its default. Both
    solve in turns, compiled before; the time is the CPU time of the process.
    """
    z = np.asarray(x, np.float64)
    z = (z - z.mean(0)) / np.maximum(z.std(0), 1e-6)
    library = LogisticRegression(
        C=1 / (len(z) * strength * (2 - ALPHA)),
        l1_ratio=ALPHA / (2 - ALPHA),
        solver="saga",
        max_iter=5000,
        random_state=seed,
    )

    def ours():
        return elastic_net_path(z, labels, [strength], alpha=ALPHA)

    head = ours()
    sides = {"ours": ours, "saga": lambda: library.fit(z, labels)}
    taken = alternate(sides, rounds=TURNS, calls=1, console=Console(quiet=True))
    reached = objective(head.weight[0], head.bias[0], z, labels, strength)
    best = objective(library.coef_, library.intercept_, z, labels, strength)
    at = f"head, {name}"
    yield Row(f"{at}: objective", reached)
    yield Row(f"{at}: objective", best, "SAGA")
    yield Row(f"{at}: objective above SAGA's", max(reached - best, 0.0))
    mine, saga = taken["ours"].cpu, taken["saga"].cpu
    yield Row(f"{at}: CPU time over SAGA's", ratio(saga, mine).median)


def objective(weight, bias, z, labels, strength: float) -> float:
    """Mean cross entropy and elastic net, in nats, float64."""
    weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    logits = z @ weight.T + bias
    chosen = np.take_along_axis(logits, np.asarray(labels)[:, None], 1)[:, 0]
    net = ALPHA * np.abs(weight).sum() + (1 - ALPHA) * np.sum(weight**2)
    return float(np.mean(logsumexp(logits, axis=1) - chosen) + strength * net)
