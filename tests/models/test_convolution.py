"""Convolutions: shapes are undone, sizes that do not halve raise, vision is local."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from narrows.models.convolution import Decoder, Encoder


@pytest.mark.parametrize("size", [(28, 28), (8, 12)])
def test_a_decoder_undoes_the_shape_of_an_encoder(size):
    encoder = Encoder(3, (4, 6), rngs=nnx.Rngs(0))
    decoder = Decoder((6, 4), 3, rngs=nnx.Rngs(1))
    x = jnp.ones((2, *size, 3))
    z = encoder(x)
    assert z.shape == (2, size[0] // 4, size[1] // 4, 6)
    assert decoder(z).shape == x.shape


def test_a_size_that_does_not_halve_is_refused():
    encoder = Encoder(1, (4, 4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiples of 4"):
        encoder(jnp.ones((1, 28, 30, 1)))


def test_a_position_sees_its_own_neighbourhood_alone():
    """Two 4x4 layers of stride 2 reach 10 pixels: a far corner changes nothing."""
    encoder = Encoder(1, (4, 4), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 1))
    slope = jax.grad(lambda x: encoder(x)[0, 0, 0].sum())(x)
    assert jnp.any(slope[0, :7, :7] != 0)
    assert jnp.all(slope[0, 7:] == 0)
    assert jnp.all(slope[0, :, 7:] == 0)
