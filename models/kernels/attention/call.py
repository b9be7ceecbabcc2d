"""One attention call, brought to the one form that every implementation reads.

    serve(query, key, value, call, spec) -> (out, logsumexp)

`Call` holds arrays, which may change without compiling anew; `Spec` is compiled in.
Scores are formed in this order:

    s_ij = cap tanh((scale q_i . k_j + bias_ij) / cap)    (the cap where there is one)
    L_i  = log(sum over visible j of exp s_ij  +  exp sink)
    o_i  = sum over visible j of exp(s_ij - L_i) z_ij v_j    z = kept / (1 - rate)

A row that sees no key gives o = 0 and L = -inf (L = sink where there are sinks), and
no gradient. `serve` differentiates in query, key, value, bias and sinks, from
cotangents of both results; it raises NotImplementedError, with the reason, for what it
cannot take.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt32


class Call(NamedTuple):
    """Arrays of a call; a row sees the keys for which all that is given holds.

    A leading axis of bias, mask and kept that reads 1 stands for all.
    """

    low: Int[Array, "b t"]  # the first key a row may see
    high: Int[Array, "b t"]  # the key before which it stops; low >= high: sees none
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None  # equal ids
    mask: Bool[Array, "#b #n #t #s"] | None = None
    kept: Bool[Array, "#b #n tiles_t tiles_s"] | None = None  # cells of `Spec.cell`
    bias: Float[Array, "#b #n #t #s"] | None = None
    sinks: Float[Array, " n"] | None = None
    dropout_key: UInt32[Array, "2"] | None = None


class Spec(NamedTuple):
    """Static facts of a call."""

    scale: float
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    cell: tuple[int, int] | None = None  # rows and keys that one entry of `kept` spans
    sees: Callable | None = None  # (rows, keys) -> bool, elementwise on int32 indices
