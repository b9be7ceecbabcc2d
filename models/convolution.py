"""Small convolutional encoders and decoders of pictures, [b, height, width, channels].

Every layer of an encoder halves height and width, every layer of a decoder doubles
them, so `Decoder(channels=c[::-1])` undoes the shape of `Encoder(channels=c)`.
"""

from collections.abc import Callable, Sequence

from flax import nnx
from jaxtyping import Array, Float


class Encoder(nnx.Module):
    """4x4 convolutions of stride 2, with ReLU between them and none at the end."""

    def __init__(self, inputs: int, channels: Sequence[int], *, rngs: nnx.Rngs):
        convolution: Callable = nnx.Conv
        sizes = zip((inputs, *channels), channels, strict=False)
        self.layers = nnx.List(
            [convolution(i, o, (4, 4), strides=2, rngs=rngs) for i, o in sizes]
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b t s d"]:
        """Raises: ValueError where height or width does not halve in every layer."""
        factor = 2 ** len(self.layers)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"x: height and width are {x.shape[1:3]}, but must be multiples of "
                f"{factor}"
            )
        return _relu_between(self.layers, x)


class Decoder(nnx.Module):
    """4x4 transposed convolutions of stride 2; `channels` are inputs of its layers."""

    def __init__(self, channels: Sequence[int], outputs: int, *, rngs: nnx.Rngs):
        transposed: Callable = nnx.ConvTranspose
        sizes = zip(channels, (*channels[1:], outputs), strict=True)
        self.layers = nnx.List(
            [transposed(i, o, (4, 4), strides=(2, 2), rngs=rngs) for i, o in sizes]
        )

    def __call__(self, z: Float[Array, "b t s d"]) -> Float[Array, "b h w c"]:
        return _relu_between(self.layers, z)


def _relu_between(layers: Sequence[Callable], x):
    *inner, last = layers
    for layer in inner:
        x = nnx.relu(layer(x))
    return last(x)
