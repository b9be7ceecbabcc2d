"""A saddle point with a known solution: the regularised bilinear game of m workers.

min_x max_y mean_m [x' A_m y + a_m' x + b_m' y] + lam/2 |x|^2 - lam/2 |y|^2. Its
operator F = (grad_x, -grad_y) is affine and lam-strongly monotone, and F_m(z*) is far
from zero for single workers. Float64 numpy; arrays may be moved to JAX.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Bilinear(NamedTuple):
    """Of all workers, with a leading axis, or of one."""

    A: Any  # [m, d, d]
    a: Any  # [m, d]
    b: Any  # [m, d]
    lam: Any  # [m], equal

    @property
    def solution(self) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d"]]:
        """(x*, y*): lam x + A y = -a and -A' x + lam y = b, of the means."""
        matrix, a, b, lam = (np.mean(part, 0) for part in self)
        eye = lam * np.eye(len(a))
        system = np.block([[eye, matrix], [-matrix.T, eye]])
        z = np.linalg.solve(system, np.concatenate([-a, b]))
        return z[: len(a)], z[len(a) :]

    @property
    def smoothness(self) -> float:
        """L of the mean operator: |lam + i s| over the singular values s of mean A."""
        largest = np.linalg.norm(np.mean(self.A, 0), 2)
        return float(np.hypot(np.mean(self.lam), largest))


def operator(
    z: tuple[Float[Any, "d"], Float[Any, "d"]], of: Bilinear
) -> tuple[Float[Any, "d"], Float[Any, "d"]]:
    """F_m(z) of one worker."""
    x, y = z
    return of.A @ y + of.a + of.lam * x, -(of.A.T @ x + of.b) + of.lam * y


def bilinear(
    rng: np.random.Generator, *, workers: int = 5, d: int = 25, lam: float = 0.1
) -> Bilinear:
    """A_m = G G' of spectral norm 1; G, a and b are normal; x and y have d entries.

    >>> bilinear(np.random.default_rng(0), d=3).A.shape
    (5, 3, 3)
    """
    g = rng.normal(size=(workers, d, d))
    matrices = g @ g.transpose(0, 2, 1)
    matrices /= np.linalg.norm(matrices, 2, axis=(1, 2))[:, None, None]
    a, b = rng.normal(size=(2, workers, d))
    return Bilinear(matrices, a, b, np.full(workers, lam))
