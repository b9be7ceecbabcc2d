"""What an objective sees of a batch, and what it is made of.

    loss = prediction + beta * penalty                       over encoders and decoders

The encoder gives the law of a code, N(mean, scale^2), and one draw of it; the decoder
gives predictions from the draw. Whoever owns the network makes a `Sample` of these and
calls `loss_of`: an objective knows arrays, never a model. Losses that compare the rows
of a batch with each other are defined on the batch they get: over devices that is the
global batch, as it is wherever jit shards the rows.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Sample(NamedTuple):
    """A batch as objectives see it; any float dtype, losses are float32 or wider."""

    x: Float[Array, "n d"]  # inputs, flattened
    y: Float[Array, "n k"]  # labels
    predicted: Float[Array, "n k"]
    code: Float[Array, "n e"]  # the draw that the decoder saw
    mean: Float[Array, "n e"]  # of the code's law given x
    scale: Float[Array, "n e"] | Float[Array, ""] | None = None  # None: no noise
    backward: tuple[Float[Array, "n e"], Float[Array, "n e"]] | None = None  # of y
    mask: Bool[Array, " n"] | None = None  # rows that count, for compressions alone


class Terms(NamedTuple):
    loss: Float[Array, ""]
    prediction: Float[Array, ""]
    compression: Float[Array, ""]


Term = Callable[[Sample], Float[Array, ""]]


class Objective(NamedTuple):
    """A prediction term and what is asked of the code.

    noise: what the encoder's law needs: "none", one scale "shared" by all, or a scale
        of its "own" for every input and feature.
    penalty: what beta weighs; None: the compression itself.
    detached: the decoder's gradient stops at the code.
    backward: needs an encoder of labels, b(code | y).
    """

    prediction: Term
    compression: Term
    unit: str  # of the compression: "nats", "bits" or "" for none
    noise: Literal["none", "shared", "own"] = "none"
    penalty: Term | None = None
    detached: bool = False
    backward: bool = False


def loss_of(objective: Objective, sample: Sample, beta: float | Array) -> Terms:
    """prediction + beta * penalty, and its parts.

    Raises: ValueError where the sample lacks the noise or the backward encoder that
    the objective needs, or has a mask, which no prediction term knows.
    """
    if sample.mask is not None:
        raise ValueError("mask: given, but prediction terms take all rows; drop them")
    if objective.noise != "none" and sample.scale is None:
        raise ValueError(
            f"scale: None, but the objective needs noise ({objective.noise}); give the "
            "scale of the code's law"
        )
    if objective.backward and sample.backward is None:
        raise ValueError("backward: None, but the objective needs b(code | y)")
    prediction, compression = (
        objective.prediction(sample),
        objective.compression(sample),
    )
    penalty = compression if objective.penalty is None else objective.penalty(sample)
    return Terms(prediction + beta * penalty, prediction, compression)


def squared_error(sample: Sample) -> Float[Array, ""]:
    """Mean over rows of |y - predicted|^2: a Gaussian decoder, up to constants."""
    error = sample.y.astype(jnp.float32) - sample.predicted
    return jnp.square(error).sum(-1).mean()


def draw(
    key: Array, mean: Float[Array, "n e"], scale: Array | None
) -> Float[Array, "n e"]:
    """One draw of the code, with gradients to mean and scale; mean itself without.

    >>> draw(jax.random.key(0), jnp.ones((2, 3)), None).shape
    (2, 3)
    """
    if scale is None:
        return mean
    return mean + scale * jax.random.normal(key, mean.shape, mean.dtype)
