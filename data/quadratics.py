"""Clients of unlike curvature and minima, with every constant known.

f_i(x) = 1/2 sum_j a_ij (x_j - c_ij)^2 for n clients, f their mean: convex, separable,
and with the gradients of single clients far from zero at the solution of f. On it plain
compression and classic error feedback stall. Float64 numpy; arrays may be moved to JAX.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Quadratics(NamedTuple):
    a: Any  # [n, d], curvatures above 0
    c: Any  # [n, d], minima

    def gradients(self, x: Float[Any, "d"]) -> Float[Any, "n d"]:
        """Of every client."""
        return self.a * (x - self.c)

    def value(self, x: Float[Any, "d"]) -> Float[Any, ""]:
        return (self.a * (x - self.c) ** 2).sum(-1).mean() / 2

    @property
    def solution(self) -> Float[Any, "d"]:
        return (self.a * self.c).sum(0) / self.a.sum(0)

    @property
    def constants(self) -> Float[Any, "n"]:
        """L_i = max_j a_ij, the smoothness of every client."""
        return self.a.max(1)

    @property
    def smoothness(self) -> Float[Any, ""]:
        """L of the mean, max_j mean_i a_ij."""
        return self.a.mean(0).max()


def quadratics(
    rng: np.random.Generator,
    *,
    clients: int = 10,
    d: int = 50,
    heterogeneity: float = 1.0,
    spread: float = 2.0,
    constants: Float[np.ndarray, "n"] | None = None,
) -> Quadratics:
    """a_ij = exp(-U(0, spread)), c_ij = heterogeneity N(0, 1).

    With `constants` every a_i is scaled so that max_j a_ij is constants[i].

    >>> quadratics(np.random.default_rng(0), clients=3, d=4).gradients(0).shape
    (3, 4)
    """
    a = np.exp(-rng.uniform(0, spread, (clients, d)))
    if constants is not None:
        if len(constants) != clients:
            raise ValueError(
                f"constants: {len(constants)} of them for {clients} clients: give one "
                "for each"
            )
        a *= (np.asarray(constants) / a.max(1))[:, None]
    return Quadratics(a, heterogeneity * rng.normal(size=(clients, d)))
