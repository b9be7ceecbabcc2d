"""Variational information bottleneck: squared error + beta KL(p(t|x); N(0, I)).

Alemi et al. 2017, arXiv:1612.00410, Eq. 17, with a Gaussian decoder of fixed variance.
"""

from ..channel import gaussian_kl
from .protocol import Objective, Sample, squared_error


def vib() -> Objective:
    """The encoder gives each input a mean and a scale of its own."""

    def compression(s: Sample):
        assert s.scale is not None  # loss_of has checked
        return gaussian_kl(s.mean, s.scale).mean(where=s.mask)

    return Objective(squared_error, compression, "nats", noise="own")
