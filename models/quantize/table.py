"""The table of quantisers: name -> how it is made, and how it becomes a waist.

A new quantiser is one file beside this one and one line here.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import optax
from flax import nnx

from .fsq import fsq, levels_for
from .grouped import grouped
from .gumbel import gumbel
from .layer import Quantize
from .lfq import lfq
from .protocol import Quantizer
from .random_projection import random_projection
from .residual import residual
from .simvq import simvq
from .updates import ema, gradient, revive, sphere
from .vq import vq


class Entry(NamedTuple):
    """make(width=, codes=, **options); without a width where the codes fix it."""

    make: Callable[..., Quantizer]
    code_width: int | None = None  # numbers in a code by default; None: codes fix it
    unit: bool = False  # as a waist, at unit mean square


def cosine_vq(width: int, codes: int) -> Quantizer:
    """Codes on the unit sphere, chosen by angle (arXiv:2110.04627, Sec. 3.2)."""
    return vq(width, codes, metric="cosine", rules=(ema(), revive(), sphere()))


def rotation_vq(width: int, codes: int) -> Quantizer:
    return vq(width, codes, estimator="rotation")


def gradient_vq(width: int, codes: int, *, learning_rate: float = 1e-2) -> Quantizer:
    """Codes learn by Adam on the codebook loss, dead ones are split off."""
    return vq(width, codes, rules=(gradient(optax.adam(learning_rate)), revive()))


def residual_vq(width: int, codes: int, *, stages: int = 4) -> Quantizer:
    return residual(*[vq(width, codes)] * stages)


def grouped_vq(width: int, codes: int, *, groups: int = 4) -> Quantizer:
    if width % groups:
        raise ValueError(f"groups: {groups}, but they must divide code_width={width}")
    return grouped(vq(width // groups, codes), groups)


def multi_head_vq(width: int, codes: int, *, heads: int = 4) -> Quantizer:
    if width % heads:
        raise ValueError(f"heads: {heads}, but they must divide code_width={width}")
    return grouped(vq(width // heads, codes), heads, shared=True)


def fsq_of(codes: int, **options) -> Quantizer:
    return fsq(levels_for(codes), **options)


def lfq_of(codes: int, **options) -> Quantizer:
    if codes < 2 or codes & (codes - 1):
        raise ValueError(f"codes: {codes}, but signs make a power of 2 of them")
    return lfq(codes.bit_length() - 1, **options)


def labels(width: int, codes: int, *, label_width: int = 16) -> Quantizer:
    return random_projection(width, codes, code_width=label_width)


QUANTIZERS: dict[str, Entry] = {
    "vq": Entry(vq, 16, unit=True),
    "rotation_vq": Entry(rotation_vq, 16, unit=True),
    "cosine_vq": Entry(cosine_vq, 16),
    "gradient_vq": Entry(gradient_vq, 16, unit=True),
    "residual_vq": Entry(residual_vq, 16, unit=True),
    "grouped_vq": Entry(grouped_vq, 16, unit=True),
    "multi_head_vq": Entry(multi_head_vq, 16, unit=True),
    "simvq": Entry(simvq, 16, unit=True),
    "fsq": Entry(fsq_of),
    "lfq": Entry(lfq_of),
    "random_projection": Entry(labels, 64),
    "gumbel": Entry(gumbel, 16),
}


def make_quantizer(
    name: str, *, codes: int = 1024, code_width: int | None = None, **options
) -> Quantizer:
    """A quantiser by its name, of `codes` codes for each index (fsq: about as many).

    >>> make_quantizer("residual_vq", codes=256).capacity
    32.0
    """
    if name not in QUANTIZERS:
        raise ValueError(
            f"quantizer: {name!r}, but allowed are {', '.join(QUANTIZERS)}"
        )
    entry = QUANTIZERS[name]
    if entry.code_width is None:
        if code_width is not None:
            raise ValueError(
                f"code_width: {code_width}, but the codes of {name} fix it"
            )
        return entry.make(codes=codes, **options)
    width = entry.code_width if code_width is None else code_width
    return entry.make(width=width, codes=codes, **options)


def quantized(
    width: int,
    *,
    name: str,
    window: int = 32,
    weights: dict[str, float] | None = None,
    rngs: nnx.Rngs,
    **options,
) -> Quantize:
    """A waist of `width` numbers by its quantiser's name."""
    return Quantize(
        width,
        make_quantizer(name, **options),
        unit=QUANTIZERS[name].unit,
        weights=weights,
        window=window,
        rngs=rngs,
    )


WAISTS: dict[str, Callable[..., Quantize]] = {
    name: partial(quantized, name=name) for name in QUANTIZERS
}
