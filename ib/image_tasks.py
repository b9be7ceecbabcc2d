"""Pairs of pictures whose information is known: numbers of a task, drawn one to one.

`uniform_margins` gives the numbers, in [0, 1] on each side; a smooth one-to-one drawing
changes the sample and not its information (arXiv:2305.08013, section 4). Pictures come
flattened, `side`^2 pixels a row, grey levels from 0 to 1.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from .tasks import Task, mapped, uniform_margins

LEAST = 0.25  # of the side, the least length of a rectangle's edge


def _pixels(side: int) -> Float[Array, " side"]:
    if side < 8:
        raise ValueError(f"side: {side} pixels, but it must be at least 8")
    return (jnp.arange(side) + 0.5) / side


def draw_blobs(u: Float[Array, "n 2"], side: int) -> Float[Array, "n pixels"]:
    """exp(-10 ((p - a)^2 + (q - b)^2)) at the pixel (p, q), centre (a, b)."""
    p = _pixels(side)
    a, b = (jnp.exp(-10 * jnp.square(p - c[:, None])) for c in u.T)
    return (a[:, :, None] * b[:, None]).reshape(len(u), -1)


def draw_rectangles(u: Float[Array, "n 4"], side: int) -> Float[Array, "n pixels"]:
    """The share of each pixel that the rectangle of two corners covers.

    On either axis it reaches from (1 - LEAST) u_1 over LEAST and a share u_2 of what is
    left: edges of more than a pixel can be told from the covered shares.
    """
    p = _pixels(side) * side - 0.5  # left edges, in pixels

    def covered(start, share):
        low = (1 - LEAST) * start
        high = low + LEAST + (1 - LEAST - low) * share
        ends = (jnp.clip(side * e[:, None] - p, 0, 1) for e in (high, low))
        return next(ends) - next(ends)

    a, b = covered(u[:, 0], u[:, 1]), covered(u[:, 2], u[:, 3])
    return (a[:, :, None] * b[:, None]).reshape(len(u), -1)


def blobs(information: float = 1.0, *, side: int = 16) -> Task:
    """Pairs of soft spots: two numbers a picture.

    Raises: ValueError for information < 0 or side < 8.

    >>> import jax
    >>> x, y = blobs(2.0).sample(jax.random.key(0), 3)
    >>> x.shape, float(x.max()) <= 1
    ((3, 256), True)
    """
    _pixels(side)
    return mapped(uniform_margins(2, information), lambda u: draw_blobs(u, side))


def rectangles(information: float = 1.0, *, side: int = 16) -> Task:
    """Pairs of rectangles without jagged edges: four numbers a picture.

    Raises as `blobs`.
    """
    _pixels(side)
    return mapped(uniform_margins(4, information), lambda u: draw_rectangles(u, side))


IMAGE_TASKS: dict[str, tuple[Callable[..., Task], int]] = {  # and numbers a picture
    "blobs": (blobs, 2),
    "rectangles": (rectangles, 4),
}
