"""The information bottleneck of jointly Gaussian variables, exactly, in nats.

Chechik, Globerson, Tishby and Weiss 2005 (JMLR 6): a noisy linear encoder is optimal,
and with l_i the eigenvalues of Sigma_{x|y} Sigma_x^-1

    I(x;t) = 1/2 sum_i log((b - 1)(1 - l_i) / l_i),
    I(t;y) = I(x;t) - 1/2 sum_i log(b (1 - l_i))           over i with b > 1 / (1 - l_i)

(Eq. 31, 32), b the inverse price of a nat of I(x;t). The check of all the others.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Covariances(NamedTuple):
    x: Float[np.ndarray, "d d"]
    y: Float[np.ndarray, "k k"]
    xy: Float[np.ndarray, "d k"]

    @property
    def x_given_y(self) -> Float[np.ndarray, "d d"]:
        return self.x - self.xy @ np.linalg.solve(self.y, self.xy.T)


def information_curve(
    of: Covariances, rate: Float[np.ndarray, " r"]
) -> Float[np.ndarray, " r"]:
    """The largest I(t;y) of any code with I(x;t) = rate, both in nats, float64.

    Raises: ValueError for a rate below 0, or covariances that are not positive.

    >>> joint = Covariances(np.eye(1), np.eye(1), np.array([[0.8]]))
    >>> float(information_curve(joint, np.array([50.0]))[0].round(6))  # I(x;y)
    0.510826
    """
    rate = np.asarray(rate, np.float64)
    if np.any(rate < 0):
        raise ValueError(f"rate: {rate.min()}, but information is at least 0 nats")
    whole = np.block([[of.x, of.xy], [of.xy.T, of.y]])
    if np.linalg.eigvalsh(whole).min() <= 0:
        raise ValueError("of: the joint covariance is not positive definite")
    values = np.sort(np.linalg.eigvals(np.linalg.solve(of.x, of.x_given_y).T).real)
    values = values[values < 1 - 1e-9]  # the rest of x says nothing of y
    found = np.zeros_like(rate)
    for k in range(1, len(values) + 1):  # k directions pass from their critical b on
        of_k = values[:k]
        offset = np.log((1 - of_k) / of_k).sum()
        b = 1 + np.exp((2 * rate - offset) / k)
        passes = b >= 1 / (1 - of_k[-1])
        at = rate - 0.5 * (k * np.log(b) + np.log(1 - of_k).sum())
        found = np.where(passes, at, found)
    return found


def linear_information(
    of: Covariances, weights: Float[np.ndarray, "d e"], variance: float
) -> tuple[float, float]:
    """I(x;t) and I(t;y) in nats of t = x weights + N(0, variance I), in float64."""
    weights = np.asarray(weights, np.float64)
    noise = variance * np.eye(weights.shape[1])

    def log_det(covariance):
        return np.linalg.slogdet(weights.T @ covariance @ weights + noise)[1]

    total = log_det(of.x)
    own = weights.shape[1] * np.log(variance)
    return float(total - own) / 2, float(total - log_det(of.x_given_y)) / 2
