"""Prediction by KL between kernel estimates of p(y|x) and q(predicted|x).

The rival of the Cauchy-Schwarz prediction term that leaves its compression alone. The
form without x compares the laws of all labels and all predictions, and so cannot tell
which prediction belongs to which input: it is `divergences.kl_kde`, not an objective.
"""

from ..divergences import conditional_kl
from ..kernels import Width
from .cs_ib import cs_ib
from .protocol import Objective, Sample


def kl_kde(*, width_x: Width = 1.0, width_y: Width = 1.0) -> Objective:
    def prediction(s: Sample):
        return conditional_kl(s.x, s.y, s.predicted, width_x=width_x, width_y=width_y)

    return cs_ib(width_x=width_x)._replace(prediction=prediction)
