"""The noisy network's own convolution and pooling are those of flax."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from narrows.scripts.noisy_network import halved, windows


def test_a_dense_layer_of_windows_is_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    layer = nnx.Conv(3, 5, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    assert layer.bias is not None
    ours = windows(x) @ layer.kernel[...].reshape(27, 5) + layer.bias[...]
    np.testing.assert_allclose(ours, layer(x), atol=1e-5)


def test_halving_leaves_out_an_odd_edge():
    x = jnp.arange(2 * 5 * 4 * 3.0).reshape(2, 5, 4, 3) % 17
    np.testing.assert_array_equal(halved(x), nnx.max_pool(x, (2, 2), (2, 2)))
