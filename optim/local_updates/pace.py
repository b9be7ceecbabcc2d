"""How many steps hide an exchange: the time of a round, and the choice of its length.

With c seconds a step and s seconds an exchange, a round of H steps takes

    stale    max(H c, s)        the exchange runs beside the steps
    waited   H c + s

(Sun et al. 2024, arXiv:2401.16265, Sec. 3.1: full overlap where H c >= s).
"""

import math


def round_seconds(every: int, step: float, exchange: float, *, stale: bool) -> float:
    """Seconds of a round of `every` steps; `step` and `exchange` in seconds.

    >>> [round_seconds(10, 0.5, 3.0, stale=stale) for stale in (True, False)]
    [5.0, 8.0]
    """
    steps = every * step
    return max(steps, exchange) if stale else steps + exchange


def steps_to_hide(step: float, exchange: float, *, margin: float = 1.5) -> int:
    """The least H with H step >= margin exchange; the margin is for times that vary.

    Raises ValueError for a step that takes no time or a margin below 1.

    >>> steps_to_hide(0.5, 3.0)
    9
    """
    if not step > 0 or exchange < 0:
        raise ValueError(
            f"step: {step} s and exchange: {exchange} s, but a step takes time and an "
            "exchange no less than none"
        )
    if margin < 1:
        raise ValueError(f"margin: {margin}, but below 1 the exchange is not hidden")
    return max(1, math.ceil(margin * exchange / step - 1e-9))
