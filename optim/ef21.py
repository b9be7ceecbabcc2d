"""Step sizes of EF21, from the clients' smoothness constants.

P. Richtarik, E. Gasanov, K. Burlachenko, "Error Feedback Reloaded: From Quadratic to
Arithmetic Mean of Smoothness Constants", ICLR 2024, arXiv:2402.10774. f = mean of f_i,
f_i is L_i-smooth, f is L-smooth, C is delta-contractive. The old analysis asks for
rate 1 / (L + L_QM xi), the new one for 1 / (L + L_AM xi), which can be larger by up to
sqrt(n), for the same algorithm.

EF21-W is `compressed_mean` over links "ef21" of signals g_i / w_i, with
weights=ef21_weights(L): for compressors with C(s x) = s C(x) the iterates are EF21's.
Its relatives are there too: EF21-PP is active=, EF21-BC a down-link "ef21", EF21-SGDM
the average of `compressed_sgd`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


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
    clients = np.asarray(clients)
    if not np.all(clients > 0):
        raise ValueError(
            f"clients: the least is {clients.min()}, but every constant must be above "
            "0; an over-estimate is safe"
        )
    return clients / np.mean(clients)


def clones(clients: np.ndarray) -> np.ndarray:
    """ceil(L_i / L_AM): copies of each client that even out the constants (Sec. 2).

    There are between n and 2 n copies in all.
    """
    return np.ceil(np.asarray(clients) / np.mean(clients) - 1e-9).astype(int)


def smoothness(
    gradient: Callable[[PyTree], PyTree],
    x: PyTree,
    key: PRNGKeyArray,
    *,
    steps: int = 50,
) -> Float[Array, ""]:
    """|H|, the largest absolute eigenvalue of the Hessian at x, by power iteration.

    From below: the estimate rises with every step, and after k steps it is short by
    about ln(d) / k of |H| at most (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. 13
    (1992), Theorem 3.1), so multiply by 1 + ln(d) / steps for a constant. It holds at x
    alone: of the logistic loss 0 has the largest Hessian, of others take several x.
    `gradient` is of one client; a step costs one Hessian-vector product.

    >>> a = jnp.array([1.0, 7.0])
    >>> round(float(smoothness(lambda x: a * x, jnp.zeros(2), jax.random.key(0))), 3)
    7.0
    """
    flat, unravel = ravel_pytree(x)

    def image(_, v):
        norm = jnp.linalg.norm(v)
        v = v / jnp.where(norm > 0, norm, 1)
        return ravel_pytree(jax.jvp(gradient, (x,), (unravel(v),))[1])[0]

    v = jax.random.normal(key, flat.shape, flat.dtype)
    return jnp.linalg.norm(lax.fori_loop(0, steps, image, v))
