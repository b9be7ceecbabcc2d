"""Waists of a noisy code: honest bits, one loss on any devices, any model around."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from narrows.ib.channel import mixture_information
from narrows.models.convolution import Encoder
from narrows.models.information import BLIND, Information
from narrows.models.transformer import Transformer, TransformerConfig
from narrows.models.waists import make_waist

WIDTH = 12
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, WIDTH)), jnp.float32)


def layer_of(name, **options):
    options = {"code_width": 3, "rngs": nnx.Rngs(0)} | options
    return Information(WIDTH, objective=name, **options)


@pytest.mark.parametrize("name", ["vib", "cs_ib"])
def test_bits_bound_what_passes_from_above(name, quick_jit):
    """Their mean exceeds the mixture's lower bound on I(x;t), and falls.

    The prior learns its moments from sums, and no Gaussian prior does better.
    """
    layer = layer_of(name, decay=0.5)

    @quick_jit
    def step(layer, x):
        out = layer(x)
        layer.update(out.stats)
        return nnx.as_pure(nnx.state(layer)), out.bits.mean()

    graph, state = nnx.split(layer)
    found = []
    for _ in range(12):
        state, bits = step(nnx.merge(graph, state), X)
        found.append(float(bits))
    mean, scale = layer.channel(X.reshape(-1, WIDTH))
    scale = jnp.broadcast_to(scale, mean.shape)
    if name == "cs_ib":
        least = mixture_information(mean, scale[0, 0] ** 2, bound="lower") / jnp.log(2)
        assert found[-1] > float(least) > 0.5
    assert found[-1] < found[0]
    second = (mean**2 + scale**2).mean(0) - mean.mean(0) ** 2
    best = 0.5 * (jnp.log2(second) - jnp.log2(jnp.square(scale)).mean(0)).sum()
    np.testing.assert_allclose(found[-1], best, rtol=2e-2)


def test_more_noise_passes_fewer_bits():
    layer, found = layer_of("nib"), []
    for noise in (-2.0, 0.0, 2.0):
        layer.noise.set_value(jnp.float32(noise))
        layer.prior.set_value(
            layer.prior.get_value()._replace(
                variance=jnp.full(3, 1 + jax.nn.softplus(noise) ** 2)
            )
        )
        out = layer(X)
        found.append((float(out.bits.mean()), float(out.loss)))
    assert found[0] > found[1] > found[2]
    assert all(a[1] > b[1] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("name", ["vib", "nib", "cs_ib", "hsic", "dib"])
def test_eight_devices_weigh_the_global_batch(name, quick_jit):
    layer = layer_of(name)
    graph, state = nnx.split(layer)

    @quick_jit
    def slope(state, x):
        def loss(state):
            out = nnx.merge(graph, state)(x)
            return out.loss + jnp.square(out.z).mean()

        return jax.value_and_grad(loss, allow_int=True)(state)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    one, eight = slope(state, X), slope(state, jax.device_put(X, rows))
    for a, b in zip(*map(jax.tree.leaves, (one, eight)), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_transformer_and_a_convnet_carry_it():
    """Text [b, t, d] and feature maps [b, h, w, d]: bits for each position."""
    config = TransformerConfig(depth=2, width=WIDTH, heads=1, head_width=WIDTH)

    def text(tokens):
        waist = make_waist("cs_ib", WIDTH, code_width=3, rngs=nnx.Rngs(1))
        model = Transformer(config, waist=waist, rngs=nnx.Rngs(0))
        return jax.value_and_grad(lambda m: m(tokens).waist.loss, allow_int=True)(model)

    def pictures(x):
        waist = make_waist("vib", WIDTH, code_width=3, rngs=nnx.Rngs(1))
        return waist(Encoder(1, (4, WIDTH), rngs=nnx.Rngs(2))(x))

    loss, slope = jax.eval_shape(text, jnp.zeros((2, 8), jnp.int32))
    assert loss.shape == ()
    assert slope.waist.inward.kernel.shape == (WIDTH, 3)
    out = jax.eval_shape(pictures, jnp.ones((2, 8, 8, 1)))
    assert (out.z.shape, out.bits.shape) == ((2, 2, 2, WIDTH), (2, 2, 2))


def test_each_objective_of_a_waist_is_blind_to_labels(quick_jit):
    losses = quick_jit(lambda x: {name: layer_of(name)(x).loss for name in BLIND})(X)
    for name, loss in losses.items():
        assert loss > 0, name
    with pytest.raises(ValueError, match="objective: 'ceb', but a waist may"):
        layer_of("ceb")
    with pytest.raises(ValueError, match="code_width=0"):
        layer_of("vib", code_width=0)
