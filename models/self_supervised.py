"""An encoder of pictures that learns without labels, by telling pictures apart.

Two random views of each picture pass an encoder and a projection; each must be found
again from the other among all views of the batch (SimCLR, Chen et al. 2020,
arXiv:2002.05709, Eq. 1). The projection is thrown away afterwards.

The loss compares the rows of a batch with each other: it is that of the global batch
on any mesh under the automatic partitioner, but must not be cut into microbatches.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from .convolution import Encoder

SMALLEST = 0.3  # share of a picture's area that a view shows at least


class Projected(nnx.Module):
    """An encoder, and a projection of its mean over positions that serves the loss."""

    def __init__(
        self,
        inputs: int,
        channels: Sequence[int],
        *,
        width: int = 256,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(inputs, channels, rngs=rngs)
        self.hidden = nnx.Linear(channels[-1], width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b t s d"]:
        """Of pictures with values from 0 to 1: what is kept after training."""
        return nnx.relu(self.encoder(x))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
        pooled = self.features(x).mean((1, 2))
        return self.out(nnx.relu(self.norm(self.hidden(pooled))))


class Parts(NamedTuple):
    graph: nnx.GraphDef
    init: Callable  # key -> (params, rest)
    loss: Callable  # (params, rest, batch, key) -> ContrastiveLoss


class ContrastiveLoss(NamedTuple):
    """Sums over the batch's pictures, float32; see `parallel.step.Loss`."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    sums: dict[str, Array]
    stats: Any = ()


def views(
    key: jax.Array, x: Float[Array, "b h w c"], *, smallest: float = SMALLEST
) -> Float[Array, "b h w c"]:
    """A random part of each picture at full size, with other light and colour.

    At least `smallest` of the area, sides in proportions of 3:4 to 4:3, mirrored half
    of the time; contrast times 0.55 to 1.8, brightness off by at most 0.25, and of
    colour pictures saturation times 0 to 1.5 and each channel off by at most 0.1.
    """
    rows, height, width, channels = x.shape
    keys = iter(jax.random.split(key, 8))

    def uniform(low, high, *shape):
        return jax.random.uniform(next(keys), (rows, *shape), minval=low, maxval=high)

    mirrored = jax.random.bernoulli(next(keys), 0.5, (rows, 1, 1, 1))
    x = jnp.where(mirrored, x[:, :, ::-1], x)
    zoom = uniform(smallest, 1.0, 1) ** -0.5
    skew = jnp.exp(uniform(-0.5, 0.5, 1) * jnp.log(4 / 3))
    scale = jnp.maximum(jnp.concatenate([zoom * skew, zoom / skew], 1), 1.0)
    size = jnp.array([height, width], jnp.float32)
    shift = -uniform(0.0, 1.0, 2) * size * (scale - 1)

    def part(picture, scale, shift):
        return jax.image.scale_and_translate(
            picture, picture.shape, (0, 1), scale, shift, "linear", antialias=False
        )

    x = jax.vmap(part)(x, scale, shift)
    mean = x.mean((1, 2, 3), keepdims=True)
    x = (x - mean) * jnp.exp(uniform(-0.6, 0.6, 1, 1, 1)) + mean
    x = x + uniform(-0.25, 0.25, 1, 1, 1)
    if channels == 1:
        return x
    light = x.mean(-1, keepdims=True)
    x = light + (x - light) * uniform(0.0, 1.5, 1, 1, 1)
    return x + uniform(-0.1, 0.1, 1, 1, channels)


def contrast(
    one: Float[Array, "b p"], two: Float[Array, "b p"], *, temperature: float = 0.2
) -> Float[Array, " b"]:
    """-log of the chance to find one view from the other, in nats, float32.

    Softmax over the cosines, divided by `temperature`, of a view with all 2b - 1
    others; the mean over both views of a picture (arXiv:2002.05709, Eq. 1).
    """
    both = jnp.concatenate([one, two]).astype(jnp.float32)
    both = both * jax.lax.rsqrt(jnp.sum(both**2, -1, keepdims=True) + 1e-12)
    scores = both @ both.T / temperature
    scores = jnp.where(jnp.eye(len(both), dtype=bool), -jnp.inf, scores)
    goal = jnp.roll(jnp.arange(len(both)), len(one))
    nats = optax.softmax_cross_entropy_with_integer_labels(scores, goal)
    return nats.reshape(2, -1).mean(0)


def contrastive_parts(
    inputs: int, channels: Sequence[int], *, temperature: float = 0.2
) -> Parts:
    """Init and loss for `parallel.step`; a batch is {"images"} [b, h, w, c], uint8.

    `nnx.merge(graph, params, rest).encoder` is what was learned.

    >>> parts = contrastive_parts(1, (8, 16))
    >>> sorted(parts.init(jax.random.key(0))[0])
    ['encoder', 'hidden', 'norm', 'out']
    """

    def build(key: jax.Array) -> Projected:
        return Projected(inputs, channels, rngs=nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0))))

    def init(key: jax.Array):
        _, params, rest = nnx.split(build(key), nnx.Param, ...)
        return nnx.as_pure(params), nnx.as_pure(rest)

    def loss(params, rest, batch, key: jax.Array) -> ContrastiveLoss:
        model = nnx.merge(graph, params, rest)
        x = batch["images"].astype(jnp.float32) / 255
        one, two = (model(views(k, x)) for k in jax.random.split(key))
        total = contrast(one, two, temperature=temperature).sum()
        return ContrastiveLoss(total, jnp.float32(len(x)), {"nats": total})

    return Parts(graph, init, loss)
