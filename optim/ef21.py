"""Step sizes of EF21, from the clients' smoothness constants.

P. Richtarik, E. Gasanov, K. Burlachenko, "Error Feedback Reloaded: From Quadratic to
Arithmetic Mean of Smoothness Constants", ICLR 2024, arXiv:2402.10774. f = mean of f_i,
f_i is L_i-smooth, f is L-smooth, C is delta-contractive. The old analysis asks for
rate 1 / (L + L_QM xi), the new one for 1 / (L + L_AM xi), which can be larger by up to
sqrt(n), for the same algorithm.
"""

from typing import Literal

import numpy as np


def xi(delta: float) -> float:
    """(1 + sqrt(1 - delta)) / delta - 1, at most 2 / delta - 1; 0 without compression.

    >>> round(xi(0.1), 4)
    18.4868
    """
    if not 0 < delta <= 1:
        raise ValueError(f"delta: {delta}, but it must lie in (0, 1]")
    return (1 + (1 - delta) ** 0.5) / delta - 1


def ef21_rate(
    smoothness: float,
    clients: np.ndarray,
    delta: float,
    *,
    mean: Literal["arithmetic", "quadratic"] = "arithmetic",
) -> float:
    """The largest rate with a guarantee; `clients` holds the L_i (Theorem 3)."""
    means = {
        "arithmetic": np.mean(clients),
        "quadratic": np.sqrt(np.mean(np.square(clients))),
    }
    if mean not in means:
        raise ValueError(f"mean: {mean!r}, but allowed are {', '.join(means)}")
    return float(1 / (smoothness + means[mean] * xi(delta)))


def ef21_weights(clients: np.ndarray) -> np.ndarray:
    """n L_i / sum L: client i sends g_i over its weight; the mean weighs it back."""
    return np.asarray(clients) / np.mean(clients)


def clones(clients: np.ndarray) -> np.ndarray:
    """ceil(L_i / L_AM): copies of each client that even out the constants (Sec. 2).

    There are between n and 2 n copies in all.
    """
    return np.ceil(np.asarray(clients) / np.mean(clients) - 1e-9).astype(int)
