"""The table of compressors: name -> constructor, and rules from paths to them.

A new compressor is one file beside this one and one line here; its promise is tested
with those of all others.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from .compression import Compressor, identity
from .low_rank import low_rank
from .quantizers import blocks, natural, qsgd
from .signs import sign, terngrad
from .sparse import blocked_top_k, random_k, top_k

COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    "identity": identity,
    "top_k": top_k,
    "threshold_top_k": functools.partial(top_k, by="threshold"),
    "blocked_top_k": blocked_top_k,
    "random_k": random_k,
    "sign": sign,
    "rms_sign": functools.partial(sign, scale="rms"),
    "terngrad": terngrad,
    "qsgd": qsgd,
    "natural": natural,
    "int8": functools.partial(blocks, 8),
    "int4": functools.partial(blocks, 4, block=32),
    "random_int8": functools.partial(blocks, 8, stochastic=True),
    "low_rank": low_rank,
}


def make_compressor(name: str, **options: Any) -> Compressor:
    """A compressor by name.

    >>> from narrows.optim.compression import bits
    >>> bits(make_compressor("sign"), (100, 64))  # 6400 signs, 100 rows, a scale
    6536
    """
    if name not in COMPRESSORS:
        said = ", ".join(COMPRESSORS)
        raise ValueError(f"compressor: {name!r}, but allowed are {said}")
    return COMPRESSORS[name](**options)


Rules = Sequence[tuple[str, Compressor]]


def by_path(tree: PyTree, rules: Rules | Compressor) -> list[Compressor]:
    """The compressor of each leaf: of the first rule whose pattern matches its path.

    A path is `a/b/0`, matched whole; a lone compressor is for every leaf. Raises
    ValueError for a leaf that no rule matches: nothing is left dense in silence.
    """
    rules = [(".*", rules)] if isinstance(rules, Compressor) else list(rules)
    found = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        match = next((c for p, c in rules if re.fullmatch(p, name)), None)
        if match is None:
            raise ValueError(
                f"rules: none of {[pattern for pattern, _ in rules]} matches {name!r}; "
                "end with ('.*', identity()) to send the rest whole"
            )
        found.append(match)
    return found
