"""Operations of the matrix products in a compiled module, loops multiplied.

`compiled.cost_analysis()` counts the body of a loop once, so of a scanned trunk it sees
one layer. Here the products are read from the text with the lengths of the loops around
them; what they have more than once is added to what the compiler says.
"""

import math
import re
from typing import NamedTuple

from . import hlo

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_GROUPS = re.compile(r"batch_group_count=(\d+)")


class Products(NamedTuple):
    """Multiplications and additions of one device, each an operation."""

    all: int  # every loop as often as it runs
    once: int  # every loop body once, as `cost_analysis` counts
    exact: bool  # False: in a loop of unknown length (once) or a branch (as if taken)
    kernels: int  # runs of custom kernels, whose operations no text tells


def products(text: str) -> Products:
    """All `dot`s and `convolution`s (as TPU text writes dots) of a module's text."""
    module = hlo.Module(text)
    total, once, exact, kernels = 0, 0, True, 0
    for op, kind, times, sure, _ in module.runs(("dot", "convolution", "custom-call")):
        if kind == "custom-call":
            if 'custom_call_target="tpu_custom_call"' in op.rest:
                kernels += times
            continue
        count = operations(module, op)
        total, once = total + times * count, once + count
        exact &= sure
    return Products(total, once, exact, kernels)


def operations(module: hlo.Module, op: hlo.Instruction) -> int:
    """2 x the products of one `dot` or `convolution`.

    Raises ValueError for text that says not what is contracted.
    """
    result = math.prod(hlo.arrays(op)[0][1])
    left, right = (hlo.arrays(x)[0][1] for x in module.operands(op)[:2])
    if op.opcode == "dot":
        contracted = _CONTRACTED.search(op.rest)
        dims = [int(x) for x in contracted[1].split(",") if x] if contracted else []
        return 2 * result * math.prod(left[i] for i in dims)
    labels = _LABELS.search(op.rest)
    if labels is None:
        raise ValueError(f"text: no dimension labels in {op.name}({op.rest[:80]}")
    lhs, rhs, out = labels.groups()
    window = dict(
        field.split("=")
        for field in (_WINDOW.search(op.rest) or ("", ""))[1].split()
        if "=" in field
    )
    shape = hlo.arrays(op)[0][1]
    count = shape[out.index("b")] * shape[out.index("f")] * right[rhs.index("i")]
    if groups := _GROUPS.search(op.rest):
        count = count // int(groups[1]) if int(groups[1]) > 1 else count
    for axis in (letter for letter in out if letter.isdigit()):
        count *= _met(
            int(axis),
            left[lhs.index(axis)],
            right[rhs.index(axis)],
            shape[out.index(axis)],
            window,
        )
    return 2 * count


def _met(axis: int, length: int, kernel: int, outputs: int, window: dict) -> int:
    """Pairs of an output and a kernel position that meet an element of the input.

    So a batch dimension, which TPU text writes as a window over a dilated or padded
    input, counts once and not squared.
    """

    def field(name: str, default: str) -> str:
        parts = window.get(name, "").split("x")
        return parts[axis] if len(parts) > axis and parts[axis] else default

    stride = int(field("stride", "1"))
    low = int(field("pad", "0_0").split("_")[0])
    spread, apart = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    extent = (length - 1) * spread + 1
    met = 0
    for k in range(kernel):
        # output o meets position o * stride - low + k * apart of the dilated input
        first = k * apart - low
        met += sum(
            0 <= at < extent and at % spread == 0
            for at in range(first, first + stride * outputs, stride)
        )
    return met
