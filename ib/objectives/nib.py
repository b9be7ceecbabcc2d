"""Nonlinear information bottleneck and its convex relatives.

    squared error + beta h(I),   I = mixture bound of I(x;t),  t = mean(x) + scale noise

h(I) = I (Kolchinsky, Tracey and Wolpert, arXiv:1705.02436, Eq. 9), I^2 (Kolchinsky,
Tracey and Van Kuyk, arXiv:1808.07593, Eq. 6), exp(eta I) (Rodriguez Galvez, Thobaben
and Skoglund, arXiv:1911.11000): where labels are a function of inputs, a linear h
jumps between no and full compression, a strictly convex one reaches what lies between.
"""

import jax.numpy as jnp

from ..channel import mixture_information
from .protocol import Objective, Sample, squared_error


def _compression(s: Sample):
    assert s.scale is not None  # loss_of has checked
    return mixture_information(s.mean, jnp.square(s.scale), mask=s.mask)


def nib() -> Objective:
    """One learned scale of noise for all inputs and features."""
    return Objective(squared_error, _compression, "nats", noise="shared")


def square_nib() -> Objective:
    return nib()._replace(penalty=lambda s: jnp.square(_compression(s)))


def exp_nib(*, eta: float = 1.0) -> Objective:
    """Raises: ValueError for a number eta not above 0; a traced one is not checked."""
    if isinstance(eta, int | float) and eta <= 0:
        raise ValueError(f"eta: {eta}, but it must be above 0")
    return nib()._replace(penalty=lambda s: jnp.exp(eta * _compression(s)))
