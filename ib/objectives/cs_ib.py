"""Cauchy-Schwarz information bottleneck (Yu et al., ICLR 2024).

    D_CS(p(y|x); q(predicted|x)) + beta I_CS(x; code)

No Gaussian decoder and no variational bound is assumed: both terms are closed forms of
kernels (Prop. 1 and 2). The script released with the paper trains another loss: its
labels are vectors, whose broadcasting leaves one row in every kernel matrix, and what
is called a divergence there is the sum of squared errors over width^2 ln 2. It is here
as `squares_with_cs`, by what it does.
"""

import math
from typing import Literal

from ..divergences import conditional_cs, cs_qmi, normalized_cs_qmi
from ..kernels import Width, spread
from .protocol import Objective, Sample, squared_error


def cs_ib(
    *,
    width_x: Width = 1.0,
    width_y: Width = 1.0,
    width_t: Width | None = None,
    normalized: bool = True,
    over: Literal["space", "inputs"] = "space",
) -> Objective:
    """The paper's loss on standardised inputs and labels.

    width_t: of codes; None is their `spread`, for codes have no scale of their own.
    normalized: weigh I(x;t) / sqrt(I(x;x) I(t;t)) as the trainer does, not I(x;t).
    over: "space" as in the paper, "inputs" to let all rows count alike: see
        `divergences.conditional_cs`.
    """
    of_t = spread() if width_t is None else width_t
    measure = normalized_cs_qmi if normalized else cs_qmi

    def prediction(s: Sample):
        widths = {"width_x": width_x, "width_y": width_y}
        return conditional_cs(s.x, s.y, s.predicted, over=over, **widths)

    def compression(s: Sample):
        return measure(s.x, s.code, width_x=width_x, width_t=of_t, mask=s.mask)

    return Objective(prediction, compression, "" if normalized else "nats")


def squares_with_cs(*, width: float = 1.0) -> Objective:
    """The released script's loss: sum |y - predicted|^2 / (width^2 ln 2) + beta nI."""

    def prediction(s: Sample):
        return squared_error(s) * s.y.shape[0] / (width**2 * math.log(2))

    def compression(s: Sample):
        return normalized_cs_qmi(s.x, s.code, width_x=width, width_t=width, mask=s.mask)

    return Objective(prediction, compression, "")
