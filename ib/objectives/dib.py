"""Deterministic information bottleneck by matrix entropy.

    squared error + beta I_a(x;t)

I_a is Renyi's matrix-based information of a batch, in bits: no noise, no bound (Yu,
Yu and Principe 2021, arXiv:2102.00533, Eq. 9).
"""

from ..dependence import matrix_information
from ..kernels import Width, spread
from .protocol import Objective, Sample, squared_error


def dib(
    *, alpha: float = 1.01, width_x: Width | None = None, width_t: Width | None = None
) -> Objective:
    """Widths None: the `spread` of inputs and codes. alpha = 2 takes no eigenvalues."""
    wide_x, wide_t = (spread() if w is None else w for w in (width_x, width_t))

    def compression(s: Sample):
        return matrix_information(
            s.x, s.code, width_x=wide_x, width_t=wide_t, alpha=alpha, mask=s.mask
        )

    return Objective(squared_error, compression, "bits")
