"""Bounds on the generalisation gap by what a code keeps of the input beyond the label.

Kawaguchi, Deng, Ji and Huang 2023 (arXiv:2305.18887): with an encoder fixed in advance
the gap is of order sqrt((I(X;Z|Y) + 1) / n) (Thm 1); for one that is learned on the
same n pairs, what its parameters keep of them joins under the root (Thm 2): `order`.

`code_bound` is a statement with all its constants, for a code of finitely many values,
proved as theirs is, by the few values that are typical for a label. Let p(z, y) be the
law of a deterministic code and the label, I = I(X;Z|Y) = H(Z|Y), and T the cells with
-log p(z|y) <= I + s: not more than |Y| exp(I + s). By Chernoff's bound the observed
share of a cell is below p - sqrt(2 p t / n) with probability exp(-t) at most; with
t = I + s + log(|Y| / delta) this happens in no cell of T with probability 1 - delta.
Then, for every loss l(z, y) in [0, highest], chosen by the data or not,

    gap <= highest (sum over T of sqrt(2 p(z, y) t / n) + P(not T)).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Bound(NamedTuple):
    value: float  # in the unit of the loss
    information: float  # I(X;Z|Y), nats
    slack: float  # s, nats: the one with the least value
    atypical: float  # P(not T)


def given_label(joint: Float[np.ndarray, "z y"]) -> float:
    """H(Z|Y) of p(z, y) in nats: I(X;Z|Y) of a code that is a function of X.

    Raises: ValueError where joint is no law.

    >>> round(given_label(np.full((4, 2), 1 / 8)), 6)  # log 4
    1.386294
    """
    joint = np.asarray(joint, np.float64)
    if joint.ndim != 2 or joint.min() < 0 or abs(joint.sum() - 1) > 1e-6:
        raise ValueError(
            f"joint: shape {joint.shape}, sum {joint.sum():g}, least {joint.min():g}, "
            "but it must be the law p(z, y) of codes and labels"
        )
    cells = joint > 0
    return float((joint[cells] * _surprise(joint)[cells]).sum())


def code_bound(
    joint: Float[np.ndarray, "z y"],
    n: int,
    *,
    delta: float = 0.05,
    highest: float = 1.0,
    chosen_among: float = 0.0,
) -> Bound:
    """The gap of a loss in [0, highest] is below the value, with probability 1 - delta.

    joint: p(z, y) of a deterministic code and the label. The loss may be any function
    of both that is found with the n pairs. chosen_among: log of the number of encoders
    that the same pairs chose the code from (a union bound), 0 for one fixed in advance.
    The threshold s is that with the least value; it depends on no data. float64.
    Raises: ValueError for no law, n below 1, delta outside (0, 1), or a number below 0.
    """
    if n < 1 or not 0 < delta < 1 or highest < 0 or chosen_among < 0:
        raise ValueError(
            f"code_bound: n={n}, delta={delta}, highest={highest}, chosen_among="
            f"{chosen_among}, but n must be 1 or more, delta in (0, 1), the others 0 "
            "or more"
        )
    information = given_label(joint)
    joint = np.asarray(joint, np.float64)
    labels = int((joint.sum(0) > 0).sum())
    surprise = _surprise(joint)
    cells = joint > 0
    best = Bound(highest, information, 0.0, 1.0)  # T empty: no gap is larger
    for threshold in np.unique(surprise[cells]):
        typical = cells & (surprise <= threshold)
        log_cells = threshold + np.log(labels / delta) + chosen_among
        roots = np.sqrt(2 * joint[typical] * log_cells / n).sum()
        left = float(joint[cells & ~typical].sum())
        value = float(highest * (roots + left))
        if value < best.value:
            best = Bound(value, information, float(threshold - information), left)
    return best


def order(
    information: Float[np.ndarray, " r"] | float,
    n: Float[np.ndarray, " r"] | float,
    parameters: Float[np.ndarray, " r"] | float = 0.0,
) -> Float[np.ndarray, " r"]:
    """sqrt((I(X;Z|Y) + I(encoder; S) + 1) / n), all in nats: what gaps are ranked by.

    >>> float(order(3.0, 4))
    1.0
    """
    return np.sqrt((np.asarray(information) + parameters + 1) / np.asarray(n))


def combined(
    information: Float[np.ndarray, " r"], parameters: Float[np.ndarray, " r"]
) -> Float[np.ndarray, " r"]:
    """Their sum over networks, the second brought to the mean of the first (Sec. 4).

    Parameters keep far more nats than a code does; unscaled, they alone would rank.
    Raises: ValueError where the parameter terms have mean 0 or less.
    """
    mean = float(np.mean(parameters))
    if not mean > 0:
        raise ValueError(f"parameters: mean {mean:g}, but it must be above 0")
    return information + parameters * (float(np.mean(information)) / mean)


def _surprise(joint: Float[np.ndarray, "z y"]) -> Float[np.ndarray, "z y"]:
    """-log p(z|y); inf where p(z, y) is 0."""
    label = np.broadcast_to(joint.sum(0), joint.shape)
    safe = np.where(joint > 0, joint, 1)
    return np.where(joint > 0, np.log(np.where(joint > 0, label, 1) / safe), np.inf)
