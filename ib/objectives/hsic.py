"""HSIC bottleneck, as a regulariser of a trained network and in place of its gradient.

    hsic:          squared error + beta (HSIC(x,t) - labels HSIC(y,t))
    hsic_greedy:   -nHSIC(y,t) + beta nHSIC(x,t), and a decoder that only reads t

(Wang et al. 2021, arXiv:2106.02734, Eq. 7; Ma, Lewis and Kleijn 2020, arXiv:1908.01580,
Eq. 5, with the weight on the other term.) Widths are 5 sqrt(features) by default.
"""

from ..dependence import hsic as dependence
from ..dependence import nhsic
from ..kernels import Width, per_feature
from .protocol import Objective, Sample, squared_error

WIDTH = per_feature(5.0)


def hsic(
    *, labels: float = 1.0, width_x: Width | None = None, width_t: Width | None = None
) -> Objective:
    """labels: weight of HSIC(y,t) beside HSIC(x,t). width_x: of inputs and labels."""
    of_x, of_t = (WIDTH if width is None else width for width in (width_x, width_t))

    def measure(a, s: Sample):
        return dependence(a, s.code, width_x=of_x, width_t=of_t, mask=s.mask)

    def compression(s: Sample):
        return measure(s.x, s)

    def penalty(s: Sample):
        return measure(s.x, s) - labels * measure(s.y, s)

    return Objective(
        squared_error, compression, "", penalty=penalty if labels else None
    )


def hsic_greedy(*, epsilon: float = 1e-5) -> Objective:
    """The encoder learns by dependence alone; the decoder fits squared error."""

    def measure(a, s: Sample):
        return nhsic(a, s.code, width_x=WIDTH, width_t=WIDTH, epsilon=epsilon)

    def prediction(s: Sample):
        return squared_error(s) - measure(s.y, s)

    def compression(s: Sample):
        return measure(s.x, s)

    return Objective(prediction, compression, "", detached=True)
