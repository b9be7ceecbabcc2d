"""The solver of sparse heads beside scikit-learn's: objective and CPU time."""

import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from narrows.models.concepts.sparse import elastic_net_path
from narrows.scripts.claims import Row
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

ALPHA = 0.99  # share of L1
TURNS = 3


def beside_saga(name: str, x, labels, strength: float, seed: int) -> Iterator[Row]:
    """Rows "head, NAME: ..." for features x [n, k], standardised here.

    SAGA stops where its weights change by less than a share of 1e-4, its default. Both
    solve in turns; the time is the CPU time of the process, ours over SAGA's.
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

    cold, _ = spent(ours)
    ratios = []
    for _ in range(TURNS):
        here, heads = spent(ours)
        there, fitted = spent(lambda: library.fit(z, labels))
        ratios.append(here / there)
    reached = objective(heads.weight[0], heads.bias[0], z, labels, strength)
    best = objective(fitted.coef_, fitted.intercept_, z, labels, strength)
    yield Row(f"head, {name}: objective", reached)
    yield Row(f"head, {name}: objective", best, "SAGA")
    yield Row(f"head, {name}: objective", best + 1e-5, "SAGA + 1e-5")
    yield Row(f"head, {name}: CPU time over SAGA's", float(np.median(ratios)))
    yield Row(f"head, {name}: CPU time over SAGA's", cold / there, "with compilation")


def spent(work: Callable):
    """Seconds of CPU time of the process, and what came."""
    start = time.process_time()
    result = jax.block_until_ready(work())
    return time.process_time() - start, result


def objective(weight, bias, z, labels, strength: float) -> float:
    """Mean cross entropy and elastic net, in nats, float64."""
    weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    logits = z @ weight.T + bias
    chosen = np.take_along_axis(logits, np.asarray(labels)[:, None], 1)[:, 0]
    net = ALPHA * np.abs(weight).sum() + (1 - ALPHA) * np.sum(weight**2)
    return float(np.mean(logsumexp(logits, axis=1) - chosen) + strength * net)
