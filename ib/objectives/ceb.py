"""Conditional entropy bottleneck: squared error + beta KL(p(t|x); b(t|y)).

The mean KL bounds I(x;t|y), what the code holds of x beyond y, from above; b is an
encoder of labels, trained along (Fischer 2020, arXiv:2002.05379, Eq. 12).
"""

from ..channel import gaussian_kl
from .protocol import Objective, Sample, squared_error


def ceb() -> Objective:
    def compression(s: Sample):
        assert s.scale is not None  # loss_of has checked
        assert s.backward is not None
        return gaussian_kl(s.mean, s.scale, *s.backward).mean(where=s.mask)

    return Objective(squared_error, compression, "nats", noise="own", backward=True)
