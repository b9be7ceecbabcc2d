"""The symmetric rule of the information plane: patterns on an icosahedron's vertices.

All 4096 subsets of the 12 vertices, each as likely as the others, and a label that
rotations do not change: it depends on the number k of points, of adjacent pairs e1 and
of antipodal pairs e3 alone. It is a threshold of a weighted power spectrum

    f = sum_{l=0..3} w_l sum_{i,j} P_l(cos angle(i, j)),

P_l Legendre's polynomials, i and j over the points of a pattern (the family of
Shwartz-Ziv and Tishby 2017, arXiv:1703.00810, section 3.1; the weights are ours: they
part the two labels with the widest margin).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.polynomial import legendre
from scipy.special import expit

# fmt: off
ADJACENT = ((0, 1), (0, 3), (0, 5), (0, 10), (0, 11), (1, 2), (1, 3), (1, 4), (1, 11),
            (2, 3), (2, 4), (2, 8), (2, 9), (3, 8), (3, 10), (4, 6), (4, 9), (4, 11),
            (5, 6), (5, 7), (5, 10), (5, 11), (6, 7), (6, 9), (6, 11), (7, 8), (7, 9),
            (7, 10), (8, 9), (8, 10))
# fmt: on
ANTIPODAL = ((0, 9), (1, 7), (2, 5), (3, 6), (4, 10), (8, 11))
WEIGHTS = (0.075, 0.75 + 0.075 * 5**0.5, 1.0, 0.75 - 0.075 * 5**0.5)
THRESHOLD = 10.7375  # in the middle between the labels, 0.0625 from either


class Rule(NamedTuple):
    x: Float[np.ndarray, "4096 12"]  # 0 or 1, float32; row n is n in binary digits
    y: Int[np.ndarray, " 4096"]  # 0 or 1


def patterns() -> Float[np.ndarray, "4096 12"]:
    """Row n holds the binary digits of n, the most significant first."""
    digits = np.arange(4096)[:, None] >> np.arange(11, -1, -1)
    return (digits & 1).astype(np.float32)


def counts(x: Float[np.ndarray, "n 12"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k, e1 and e3 of each row: points, adjacent pairs, antipodal pairs.

    >>> [int(a[0]) for a in counts(np.ones((1, 12)))]
    [12, 30, 6]
    """

    def pairs(of):
        first, second = np.array(of).T
        return (x[:, first] * x[:, second]).sum(1).astype(np.int64)

    return x.sum(1).astype(np.int64), pairs(ADJACENT), pairs(ANTIPODAL)


def symmetric_rule() -> Rule:
    """All patterns with their labels: 2118 ones, H(Y) = 0.99916 bits."""
    x = patterns()
    k, e1, e3 = counts(x)
    five, seven = e1 == 7, ~((e1 == 8) & (e3 == 2))
    six = (e1 >= 7) | ((e1 == 6) & (e3 == 0))
    y = np.select([k <= 4, k == 5, k == 6, k == 7], [False, five, six, seven], True)
    return Rule(x, y.astype(np.int64))


def power(x: Float[np.ndarray, "n 12"]) -> Float[np.ndarray, " n"]:
    """The weighted power spectrum f of each row, float64."""
    k, e1, e3 = counts(x)
    e2 = k * (k - 1) // 2 - e1 - e3
    cosines = np.array([1, 5**-0.5, -(5**-0.5), -1])
    kernel = legendre.legval(cosines, WEIGHTS)
    return np.stack([k, 2 * e1, 2 * e2, 2 * e3], 1) @ kernel


def soft_rule(gamma: float) -> Float[np.ndarray, "4096 2"]:
    """p(y | x) = sigmoid(gamma (f - threshold)) of label 1, and the rest of label 0.

    With a growing gamma it becomes `symmetric_rule`; at gamma = 66.1 I(X; Y) is
    0.99 bits, as in the paper. Raises: ValueError for gamma <= 0.
    """
    if gamma <= 0:
        raise ValueError(f"gamma: {gamma}, but it must be above 0")
    odds = gamma * (power(patterns()) - THRESHOLD)
    one = expit(odds)
    return np.stack([1 - one, one], 1)
