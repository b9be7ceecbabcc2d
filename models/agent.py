"""An agent that sees pictures through a frozen encoder and a waist.

    x = compress(encoder(picture)),  e = [x, join(x, task)],  z = waist(e),
    logits, value = policy(z)

(arXiv:2311.04193, Sec. 3, where e = join(x, task) alone). The encoder is frozen, random
and general; what follows learns, and policy and value read z alone. Convolutions do not
overlap (their stride is their size, or they are 1 x 1), so they are written as products
of patches, which a CPU runs many times faster inside a compiled loop.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from .bottleneck import Bottleneck, Waist
from .waists import WAISTS


class Frozen(nnx.Variable):
    """Neither learns nor changes."""


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """side: patches a side. patch: pixels a side. kinds: of things to ask for."""

    side: int = 5
    patch: int = 4
    kinds: int = 8
    actions: int = 5
    features: int = 32  # of a patch, frozen
    compressed: tuple[int, ...] = (16, 8)  # of a patch, learned
    joined: tuple[int, ...] = (16, 8)  # of a patch with the task, learned
    hidden: tuple[int, ...] = (128, 64)  # between z and logits

    @property
    def width(self) -> int:
        """Numbers in e and z."""
        return self.side**2 * (self.compressed[-1] + self.joined[-1])


class Decision(NamedTuple):
    logits: Float[Array, "*b actions"]
    value: Float[Array, "*b"]
    seen: Float[Array, "*b d"]  # e, before the waist
    waist: Waist


class Agent(nnx.Module):
    """Decides from one picture and the task; `waist` is any bottleneck of its width."""

    def __init__(self, config: AgentConfig, waist: Bottleneck, *, rngs: nnx.Rngs):
        def layers(*sizes: int) -> nnx.List:
            pairs = itertools.pairwise(sizes)
            return nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairs])

        he = jax.nn.initializers.he_normal()
        pixels = 3 * config.patch**2
        self.config = config
        self.encoder = Frozen(he(rngs.params(), (pixels, config.features), jnp.float32))
        self.compress = layers(config.features, *config.compressed)
        sizes = (config.kinds, config.kinds, 2)
        self.task = nnx.List(
            [nnx.Embed(n, config.compressed[-1], rngs=rngs) for n in sizes]
        )
        self.join = layers(2 * config.compressed[-1], *config.joined)
        self.policy = layers(config.width, *config.hidden)
        self.actor = nnx.Linear(config.hidden[-1], config.actions, rngs=rngs)
        self.critic = nnx.Linear(config.hidden[-1], 1, rngs=rngs)
        self.waist = waist

    def __call__(
        self,
        image: Float[Array, "*b height width 3"],
        task: Int[Array, "*b 3"],
        keys: Key[Array, "*b"] | None = None,
    ) -> Decision:
        """keys: for a waist that draws, one a picture; without them nothing is drawn.

        Raises: ValueError for a picture of another size.
        """
        seen = self.embed(image, task)
        draws = keys is not None and getattr(self.waist, "draws", False)
        waist = self.waist(seen, keys=keys) if draws else self.waist(seen)
        h = waist.z
        for layer in self.policy:
            h = nnx.relu(layer(h))
        return Decision(self.actor(h), self.critic(h)[..., 0], seen, waist)

    def embed(
        self, image: Float[Array, "*b height width 3"], task: Int[Array, "*b 3"]
    ) -> Float[Array, "*b d"]:
        """e: what the frozen encoder tells, compressed, with the task at each patch."""
        x = nnx.relu(patches(image - 0.5, self.config.patch) @ self.encoder[...])
        side = self.config.side
        if x.shape[-3:-1] != (side, side):
            raise ValueError(
                f"image: {image.shape[-3:]}, but its sides must be {side} patches of "
                f"{self.config.patch} pixels"
            )
        for layer in self.compress:
            x = nnx.relu(layer(x))
        asked = sum(table(task[..., i]) for i, table in enumerate(self.task))
        asked = jnp.broadcast_to(asked[..., None, None, :], x.shape)
        both = jnp.concatenate([x, asked], -1)
        *inner, final = self.join
        for layer in inner:
            both = nnx.relu(layer(both))
        both = final(both)
        e = jnp.concatenate([x, both], -1)
        return e.reshape(*e.shape[:-3], -1)


def patches(
    image: Float[Array, "*b height width c"], size: int
) -> Float[Array, "*b i j d"]:
    """Squares of size x size pixels, side by side, each as a row of numbers.

    Raises: ValueError where the picture does not divide into them.
    """
    *rows, height, width, channels = image.shape
    if height % size or width % size:
        raise ValueError(
            f"image: {height} x {width} pixels do not divide into patches of {size}"
        )
    cut = image.reshape(*rows, height // size, size, width // size, size, channels)
    return jnp.moveaxis(cut, -4, -3).reshape(
        *rows, height // size, width // size, size * size * channels
    )


class AgentParts(NamedTuple):
    graph: nnx.GraphDef
    init: Callable  # key -> (params, rest)


def agent_parts(
    config: AgentConfig, waist: Callable[..., Bottleneck] = WAISTS["none"]
) -> AgentParts:
    """The graph and start of an agent; all but the waist is drawn alike for any waist.

    waist: its factory, called as waist(width, rngs=...).
    """

    def build(key: jax.Array) -> Agent:
        own, rest = jax.random.split(key)
        layer = waist(config.width, rngs=nnx.Rngs(own))
        return Agent(config, layer, rngs=nnx.Rngs(rest))

    def init(key: jax.Array):
        _, params, rest = nnx.split(build(key), nnx.Param, ...)
        return nnx.as_pure(params), nnx.as_pure(rest)

    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))[0]
    return AgentParts(graph, init)
