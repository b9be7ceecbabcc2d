"""The table of estimators of I(X; Y) from pairs of rows, with what each promises.

A new estimator is one file beside this one and one line here. `kde_lower` and
`kde_upper` take a code and its noise, `critics` take scores, `conditional` a third
variable: they have no line.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxtyping import Array

from .binning import binned
from .estimate import LOWER, NEITHER, Estimate
from .fitted import fitted
from .gaussian import gaussian, gaussian_copula
from .kozachenko_leonenko import kl_information
from .ksg import ksg, mixed_ksg
from .renyi import matrix_renyi
from .sliced import sliced


def _on(names: str, *dims: int) -> frozenset[tuple[str, int]]:
    return frozenset((name, dim) for name in names.split() for dim in dims)


# Tasks of `ib.tasks` at their defaults and features a side, at 2000 rows: where 85 % of
# 50 intervals held the truth and at most a tenth was flagged, on the samples that these
# were chosen on and on others (results).
NORMAL = _on("gaussian", 1, 2, 5)
COPULA = _on("gaussian half_cube uniform_margins", 1, 2, 5)
NEAR = _on("gaussian", 1, 2)
NEAR |= _on("student uniform_margins half_cube mixture discrete_continuous", 1)
ENTROPIES = _on("gaussian", 1, 2, 5) | _on("half_cube", 1, 5)
ENTROPIES |= _on("student uniform_margins", 1) | _on("spiral", 5)


class Row(NamedTuple):
    estimator: Callable[[Array, Array, Array], Estimate]  # of key, x, y
    direction: int  # of the bound, where the premise holds
    premise: str
    covers: frozenset[tuple[str, int]] = frozenset()  # there the value is I(X; Y)
    negative: bool = True  # may be below 0
    shannon: bool = True  # False: a quantity of its own


def _keyless(estimator: Callable[[Array, Array], Estimate]):
    return lambda key, x, y: estimator(x, y)


def _fit(bound: str):
    return partial(fitted, bound=bound)


ESTIMATORS: dict[str, Row] = {
    "gaussian": Row(_keyless(gaussian), NEITHER, "jointly normal", NORMAL),
    "gaussian_copula": Row(_keyless(gaussian_copula), NEITHER, "normal copula", COPULA),
    "ksg": Row(_keyless(ksg), NEITHER, "density smooth, few features", NEAR),
    "mixed_ksg": Row(_keyless(mixed_ksg), NEITHER, "atoms or smooth, few", NEAR),
    "kl": Row(
        _keyless(kl_information), NEITHER, "density smooth, few features", ENTROPIES
    ),
    "binned": Row(_keyless(binned), LOWER, "cells are filled"),
    "matrix_renyi": Row(
        _keyless(matrix_renyi),
        NEITHER,
        "one n, one width",
        negative=False,
        shannon=False,
    ),
    "sliced": Row(sliced, LOWER, "one-dimensional laws smooth", shannon=False),
    "dv": Row(_fit("dv"), LOWER, "exp(I) well below rows held out"),
    "mine": Row(_fit("mine"), LOWER, "as dv"),
    "nwj": Row(_fit("nwj"), LOWER, "none, on average"),
    "infonce": Row(_fit("infonce"), LOWER, "none, on average"),
    "flo": Row(_fit("flo"), LOWER, "none, on average"),
    "smile": Row(_fit("smile"), NEITHER, "scores rarely clipped"),
    "club": Row(_fit("club"), NEITHER, "q fits; an upper bound for the true q"),
    "leave_one_out": Row(_fit("leave_one_out"), NEITHER, "as club"),
    "vub": Row(_fit("vub"), NEITHER, "as club"),
}


def make_estimator(name: str) -> Callable[[Array, Array, Array], Estimate]:
    """estimator(key, x, y) by its name in the table, with its default settings.

    Raises: ValueError for a name that is not in the table.
    """
    if name not in ESTIMATORS:
        raise ValueError(
            f"estimator: {name!r}, but allowed are {', '.join(ESTIMATORS)}"
        )
    return ESTIMATORS[name].estimator
