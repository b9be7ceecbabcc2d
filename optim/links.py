"""Links: one recursion, four numbers, by which a sequence of signals is sent.

Sender and receiver keep the same h; the sender keeps e. For a signal g

    u = eta e + g - a h;   D = C(u), the payload;   est = a h + D
    e' = e + g - est;      h' = h + alpha D

    name        eta      a  alpha      C           is
    plain       0        0  0          any         compression alone
    feedback    1        0  0          contractive error feedback, arXiv:1901.09847
    ef21        0        1  1          contractive EF21, arXiv:2106.05203
    econtrol    delta/2  1  1          contractive EControl, arXiv:2311.05645
    difference  1        1  1          contractive unstable; EControl's motive
    diana       0        1  1/(1+om.)  unbiased    DIANA, arXiv:1901.09269
    masha1      0        1  0          unbiased    MASHA1; h is set, arXiv:2110.03313
    masha2      1        0  0          contractive MASHA2: feedback on differences

What was sent and what is kept are all that came in: e' - e = g - est in every row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .compression import Compressor, Shape, wide


class Link(NamedTuple):
    compressor: Compressor
    eta: float  # of the kept error that is tried again
    a: float  # 1: what travels is the difference from h
    alpha: float  # how fast h follows


class LinkState(NamedTuple):
    """Float32 (float64 for float64 signals), in the shape of the signal; or ().

    () stands where the link does not need it.
    """

    e: Any  # not sent yet
    h: Any  # what the receiver expects


class Row(NamedTuple):
    numbers: Callable[[Any], tuple[float, float, float]]  # constant -> eta, a, alpha
    needs: str | None = None  # the constant that the compressor must promise


LINKS: dict[str, Row] = {
    "plain": Row(lambda _: (0.0, 0.0, 0.0)),
    "feedback": Row(lambda _: (1.0, 0.0, 0.0)),
    "ef21": Row(lambda delta: (0.0, 1.0, 1.0), "delta"),
    "econtrol": Row(lambda delta: (delta / 2, 1.0, 1.0), "delta"),
    "difference": Row(lambda delta: (1.0, 1.0, 1.0), "delta"),
    "diana": Row(lambda omega: (0.0, 1.0, 1 / (1 + omega)), "omega"),
    "masha1": Row(lambda omega: (0.0, 1.0, 0.0), "omega"),
    "masha2": Row(lambda delta: (1.0, 0.0, 0.0), "delta"),
}


def econtrol(eta: float) -> Row:
    """EControl that tries a part eta of its error again: 0 is EF21, 1 is unstable.

    The loop of e and h is damped for eta at most about delta (arXiv:2311.05645).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta}, but it must lie in [0, 1]")
    return Row(lambda _: (eta, 1.0, 1.0), "delta")


def make_link(name: str | Row, compressor: Compressor, shape: Shape) -> Link:
    """A row of the table, or one of your own, for signals of `shape`.

    Raises ValueError for a compressor that does not promise what the row needs: EF21
    over a sign of the rms scale, say, would diverge without a word.
    """
    if isinstance(name, str) and name not in LINKS:
        raise ValueError(f"link: {name!r}, but allowed are {', '.join(LINKS)}")
    row = LINKS[name] if isinstance(name, str) else name
    constant = getattr(compressor.promise(shape), row.needs) if row.needs else None
    if row.needs and constant is None:
        raise ValueError(
            f"compressor: promises no {row.needs} for shape {shape}, which the link "
            f"{name!r} needs; take another compressor, or compression.scaled of it"
        )
    return Link(compressor, *row.numbers(constant))


def init_link(
    link: Link, shape: Shape, h: Array | None = None, *, dtype: Any = jnp.float32
) -> LinkState:
    """Zeros, or `h` where the first signal has been exchanged whole."""
    zeros = jnp.zeros(shape, dtype if h is None else wide(h).dtype)
    return LinkState(
        e=zeros if link.eta else (),
        h=(zeros if h is None else wide(h)) if link.a else (),
    )


def send(
    link: Link,
    key: PRNGKeyArray,
    state: LinkState,
    g: Float[Array, "*s"],
    active: Bool[Array, ""] | bool = True,
) -> tuple[Any, Float[Array, "*s"], LinkState]:
    """(payload, est, state'). A sender that is not active sends C(0) = 0 and keeps all.

    All in float32, or in float64 if g is: the rounding of est stays in e.
    """
    g = wide(g)
    expected = link.a * state.h if link.a else jnp.zeros_like(g)
    rest = g - expected
    tried = rest + link.eta * state.e if link.eta else rest
    payload = link.compressor.encode(key, jnp.where(active, tried, 0.0))
    sent = link.compressor.decode(payload, g.shape)
    e = jnp.where(active, state.e + (rest - sent), state.e) if link.eta else ()
    h = state.h + link.alpha * sent if link.a else ()
    return payload, expected + sent, LinkState(e, h)


def receive(
    link: Link, h: Any, sent: Float[Array, "*s"]
) -> tuple[Float[Array, "*s"], Any]:
    """(est, h') at the receiver, of what the payload decoded to; bits as `send`'s."""
    if not link.a:
        return sent, ()
    return link.a * h + sent, h + link.alpha * sent
