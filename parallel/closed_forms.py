"""What the papers say a layout costs: parameters, arithmetic, bytes, memory.

Symbols: b rows of a microbatch, s positions, h width, l layers, v vocabulary, z heads
of width a, n devices of an axis, m microbatches, p stages. Counts are of elements
where bytes are not named. Schedules have their own in `schedules.closed_form`.
"""

from collections.abc import Callable
from fractions import Fraction


def gpt_parameters(l: int, h: int, v: int, s: int) -> float:
    """12 l h^2 (1 + 13 / (12 h) + (v + s) / (12 l h)).

    (Narayanan et al. 2021, arXiv:2104.04473, Eq. 2.)
    """
    return 12 * l * h**2 * (1 + 13 / (12 * h) + (v + s) / (12 * l * h))


def gpt_flops(batch: int, s: int, l: int, h: int, v: int) -> float:
    """Of one step with all activations recomputed: 96 B s l h^2 (1 + ...).

    (arXiv:2104.04473, Eq. 3.) Forward, recomputed forward and backward.
    """
    return 96 * batch * s * l * h**2 * (1 + s / (6 * h) + v / (16 * l * h))


def training_days(tokens: float, parameters: float, devices: int, flops: float):
    """8 T P / (n X), X achieved operations a second (arXiv:2104.04473, Eq. 4)."""
    return 8 * tokens * parameters / (devices * flops) / 86400


def tensor_parallel_sent(b: int, s: int, h: int, n: int) -> Fraction:
    """A device sends for one layer, both ways: 8 b s h (n - 1) / n (Section 3.2)."""
    return Fraction(8 * b * s * h * (n - 1), n)


def batch_time(
    rows: int, b: int, p: int, time: Callable[[int], float | Fraction]
) -> float | Fraction:
    """(rows / b + p - 1) time(b), of one microbatch each (arXiv:2104.04473, Eq. 1).

    rows: of the batch on one pipeline, B / d.
    """
    return (Fraction(rows, b) + p - 1) * time(b)


def layer_memory(kind: str, b: int, s: int, h: int, z: int, n: int) -> float:
    """Elements a device keeps for one layer, Adam's states among them.

    tensor     MLP 32 h^2/n + 4 b s h/n + b s h,  attention 16 a z h/n + 4 b s z a/n
               + b z s^2/n + b s h
    sequence   MLP 32 h^2 + 5 b s h/n,  attention 16 a z h + 4 b s z a/n + b z s^2/n
               + b s h/n

    (Li et al. 2021, arXiv:2105.13120, Tables 1 and 2; scores are kept whole.)
    Raises ValueError for another kind, or more tensor-parallel devices than heads.
    """
    az, stream, scores = h, b * s * h, b * z * s**2 / n
    if kind == "sequence":
        return 32 * h**2 + 16 * az * h + (5 + 4 + 1) * stream / n + scores
    if kind != "tensor":
        raise ValueError(f"kind: {kind!r}, but allowed are 'tensor' and 'sequence'")
    if n > z:
        raise ValueError(f"n: {n} devices, but {z} heads lie over at most {z}")
    return (32 * h**2 + 16 * az * h) / n + 2 * stream + (4 + 4) * stream / n + scores
