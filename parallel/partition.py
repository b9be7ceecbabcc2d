"""Cutting a row of layers into contiguous cells of balanced cost."""

from collections.abc import Sequence
from itertools import accumulate


def by_cumulative_cost(costs: Sequence[float], cells: int) -> list[int]:
    """Layers in each cell by the rule of GPipe's authors; one pass, not optimal.

    Layer i, with cumulative cost C_i (its own included) of a total C, goes to cell
    min(floor(cells C_i / C), cells - 1) (lingvo `core/gpipe.py`).

    Raises ValueError where a cell stays empty, as beside a layer that dominates.

    >>> by_cumulative_cost([1, 1, 1, 1, 4], 2)
    [3, 2]
    """
    _check(costs, cells)
    total = sum(costs)
    sizes = [0] * cells
    for reached in accumulate(costs):
        sizes[min(int(cells * reached / total), cells - 1)] += 1
    if empty := [cell for cell, size in enumerate(sizes) if not size]:
        raise ValueError(
            f"cells: {cells} cells over costs {list(costs)} leave cell {empty[0]} "
            "without layers by the cumulative rule; take fewer cells, or `balanced`"
        )
    return sizes


def balanced(costs: Sequence[float], cells: int) -> list[int]:
    """Layers in each cell such that the dearest cell is as cheap as can be.

    best[j][i], the least cost of the dearest of j cells over the first i layers, is
    min over l of max(best[j - 1][l], sum(costs[l:i])).

    >>> balanced([1, 1, 1, 1, 4], 2)
    [4, 1]
    """
    _check(costs, cells)
    reached = [0, *accumulate(costs)]
    count = len(costs)
    best = [[float("inf")] * (count + 1) for _ in range(cells + 1)]
    cut = [[0] * (count + 1) for _ in range(cells + 1)]
    best[0][0] = 0
    for j in range(1, cells + 1):
        for i in range(j, count + 1):
            options = (
                (max(best[j - 1][last], reached[i] - reached[last]), last)
                for last in range(j - 1, i)
            )
            best[j][i], cut[j][i] = min(options)
    sizes, end = [], count
    for j in range(cells, 0, -1):
        sizes.append(end - cut[j][end])
        end = cut[j][end]
    return sizes[::-1]


def cost_of(costs: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """The cost of each cell."""
    ends = list(accumulate(sizes))
    return [sum(costs[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def _check(costs: Sequence[float], cells: int) -> None:
    if not 1 <= cells <= len(costs):
        raise ValueError(
            f"cells: {cells}, but {len(costs)} layers fill 1 to {len(costs)} cells"
        )
    if min(costs) < 0 or sum(costs) <= 0:
        raise ValueError(f"costs: {list(costs)} must be >= 0 and not all 0")
