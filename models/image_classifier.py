"""A residual classifier of pictures in two parts, so that it can be split between them.

`Front` reads pictures at an eighth of their height and width, `Tail` goes on from there
to the logits and shows what its stages saw. Normalisation uses the batch's statistics
with train=True, and then its variables `mean` and `var` hold just those: whoever trains
averages them (`bottlefit.py` does). With train=False they are what is used.
"""

from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float

WIDTHS = (16, 16, 32, 32, 64)  # stem, two stages of the front, two of the tail


class Seen(NamedTuple):
    """What the tail made of the front's output."""

    third: Float[Array, "b t s c"]
    fourth: Float[Array, "b u v d"]
    logits: Float[Array, "b classes"]


class ConvNorm(nnx.Module):
    """Convolution without bias, then batch normalisation; `pad` on every side."""

    def __init__(self, i: int, o: int, kernel: int, *, stride=1, pad=0, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            i,
            o,
            (kernel, kernel),
            strides=stride,
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(o, momentum=0.0, rngs=rngs)

    def __call__(self, x, train: bool):
        return self.norm(self.conv(x), use_running_average=not train)


class Residual(nnx.Module):
    """Two 3x3 convolutions beside a shortcut, which is 1x1 where the shape changes."""

    def __init__(self, i: int, o: int, *, stride=1, rngs: nnx.Rngs):
        self.one = ConvNorm(i, o, 3, stride=stride, pad=1, rngs=rngs)
        self.two = ConvNorm(o, o, 3, pad=1, rngs=rngs)
        changes = stride > 1 or i != o
        self.short = ConvNorm(i, o, 1, stride=stride, rngs=rngs) if changes else None

    def __call__(self, x, train: bool):
        short = x if self.short is None else self.short(x, train)
        return nnx.relu(short + self.two(nnx.relu(self.one(x, train)), train))


class Front(nnx.Module):
    """Pictures [b, h, w, c] to [b, h / 8, w / 8, widths[2]], rounded up."""

    def __init__(self, inputs: int, widths: Sequence[int] = WIDTHS, *, rngs: nnx.Rngs):
        stem, first, second, *_ = widths
        self.stem = ConvNorm(inputs, stem, 3, stride=2, pad=1, rngs=rngs)
        self.first = Residual(stem, first, stride=2, rngs=rngs)
        self.second = Residual(first, second, stride=2, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], train: bool = False):
        return self.second(self.first(nnx.relu(self.stem(x, train)), train), train)


class Tail(nnx.Module):
    """From the front's output to the logits."""

    def __init__(self, classes: int, widths: Sequence[int] = WIDTHS, *, rngs: nnx.Rngs):
        *_, second, third, fourth = widths
        self.third = Residual(second, third, rngs=rngs)
        self.fourth = Residual(third, fourth, stride=2, rngs=rngs)
        self.head = nnx.Linear(fourth, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Seen:
        third = self.third(x, train)
        fourth = self.fourth(third, train)
        return Seen(third, fourth, self.head(fourth.mean((1, 2))))
