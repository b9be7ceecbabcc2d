"""Paths of layers over the information plane, time as colour: for several figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm


def draw_paths(
    axis: Axes, paths: Sequence[Sequence[tuple[float, float, float]]], *, h_y: float
) -> Any:
    """A line a layer through its points (step, I(X;T), I(T;Y)); one unit.

    The grey line is the bound of a Y that X determines, min(I(X;T), H(Y)). Gives what a
    colour bar of steps is made from; the last point bears the layer's number.
    """
    last = max((path[-1][0] for path in paths if path), default=1)
    norm = SymLogNorm(1, vmin=0, vmax=max(last, 1))
    reach = max((p[1] for path in paths for p in path), default=1)
    axis.plot([0, h_y, max(reach, h_y)], [0, h_y, h_y], color="0.7", zorder=0)
    coloured = None
    for number, path in enumerate(paths, 1):
        if not path:
            continue
        step, x_t, t_y = np.array(path, np.float64).T
        axis.plot(x_t, t_y, color="0.85", linewidth=0.8, zorder=1)
        coloured = axis.scatter(x_t, t_y, c=step, norm=norm, s=14, cmap="viridis")
        axis.annotate(str(number), (x_t[-1], t_y[-1]), fontsize=8)
    return coloured
