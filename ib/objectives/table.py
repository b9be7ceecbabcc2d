"""The table of objectives: name -> factory(**options) of an Objective.

A new objective is one file beside this one and one line here.
"""

from collections.abc import Callable

from .ceb import ceb
from .cs_ib import cs_ib, squares_with_cs
from .dib import dib
from .hsic import hsic, hsic_greedy
from .kl_kde import kl_kde
from .nib import exp_nib, nib, square_nib
from .protocol import Objective
from .vib import vib

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "cs_ib": cs_ib,
    "squares_with_cs": squares_with_cs,
    "vib": vib,
    "nib": nib,
    "square_nib": square_nib,
    "exp_nib": exp_nib,
    "hsic": hsic,
    "hsic_greedy": hsic_greedy,
    "dib": dib,
    "ceb": ceb,
    "kl_kde": kl_kde,
}


def make_objective(name: str, **options) -> Objective:
    """An objective by its name in the table.

    >>> make_objective("vib").noise
    'own'
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective: {name!r}, but allowed are {', '.join(OBJECTIVES)}"
        )
    return OBJECTIVES[name](**options)
