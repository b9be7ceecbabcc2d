"""The table of waists: name -> factory(width, rngs=..., **options) of a layer.

A new waist is one file beside this one and one line here; every quantiser of
`quantize/table.py` is one already, and every objective of `information.py`.
"""

from collections.abc import Callable

from flax import nnx

from . import information
from .affine import Squeeze
from .bottleneck import Bottleneck, Open
from .codebook import Codebook
from .concepts.waist import ConceptWaist
from .key_value_waist import KeyValue
from .quantize import table
from .task_codebook import TaskCodebook

WAISTS: dict[str, Callable[..., Bottleneck]] = {
    "none": lambda width, *, rngs: Open(),
    "codebook": Codebook,
    "concepts": ConceptWaist,
    "task_codebook": TaskCodebook,
    "key_value": KeyValue,
    "squeeze": Squeeze,
    **table.WAISTS,
    **information.WAISTS,
}


def make_waist(name: str, width: int, *, rngs: nnx.Rngs, **options) -> Bottleneck:
    """A waist by its name in the table.

    >>> make_waist("codebook", 64, codes=256, rngs=nnx.Rngs(0)).capacity
    8.0
    """
    if name not in WAISTS:
        raise ValueError(f"waist: {name!r}, but allowed are {', '.join(WAISTS)}")
    return WAISTS[name](width, rngs=rngs, **options)
