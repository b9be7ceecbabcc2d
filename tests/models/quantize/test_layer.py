"""A quantiser as a waist: in a transformer at any depth, in a convolutional encoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models.language_model import model_parts
from narrows.models.quantize.fsq import fsq
from narrows.models.quantize.grouped import product
from narrows.models.quantize.layer import Quantize
from narrows.models.quantize.lfq import lfq
from narrows.models.quantize.table import QUANTIZERS, WAISTS
from narrows.models.quantize.vq import vq
from narrows.models.transformer import TransformerConfig

CONFIG = TransformerConfig(vocab_size=16, depth=1, width=32, heads=2)
DEPTHS = [(name, 0) for name in QUANTIZERS] + [("residual_vq", 1), ("gumbel", 1)]
KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
X = jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), jnp.float32)


@quick_jit
def send(layer, x, mask=None):
    return layer(x, mask)


@pytest.mark.parametrize(("name", "waist_at"), DEPTHS)
def test_any_serves_at_any_depth_of_a_transformer(name, waist_at):
    """Traced: a step of training with a mask, and the waist's own step."""
    parts = model_parts(CONFIG, name, waist_at=waist_at)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 8), jnp.bool_)
    batch = {"tokens": tokens, "targets": tokens, "mask": mask}

    def step(key, batch):
        params, rest = parts.init(key)

        def total(params):
            out = parts.loss(params, rest, batch, key)
            return out.total, out.stats

        slope, stats = jax.grad(total, has_aux=True)(params)
        return params, slope, rest, *parts.advance(params, rest, stats)

    params, slope, rest, after, report = jax.eval_shape(step, KEY, batch)
    assert jax.tree.structure(params) == jax.tree.structure(slope)
    for a, b in zip(*map(jax.tree.leaves, (rest, after)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert {"waist_usage", "waist_entropy", "waist_perplexity"} <= report.keys()
    assert all(v.shape == () and v.dtype == jnp.float32 for v in report.values())


class Autoencoder(nnx.Module):
    """Images of 8 x 8 to 4 x 4 positions, through a waist, and back."""

    def __init__(self, name: str, *, rngs: nnx.Rngs):
        shape = {"kernel_size": (3, 3), "strides": 2, "rngs": rngs}
        self.down = nnx.Conv(1, 16, **shape)
        self.waist = WAISTS[name](16, codes=16, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 1, **shape)

    def __call__(self, images):
        waist = self.waist(jax.nn.gelu(self.down(images)))
        return self.up(waist.z), waist


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_a_convolutional_encoder_learns_through_it(name):
    rng = np.random.default_rng(0)
    ramps = rng.normal(size=(64, 2, 1, 1, 1)) * np.linspace(-1, 1, 8)[:, None]
    images = jnp.asarray(ramps[:, 0] + ramps[:, 1].swapaxes(1, 2), jnp.float32)
    model = Autoencoder(name, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(carry, rate):
        params, rest = carry

        def loss(params):
            model = nnx.merge(graph, params, rest)
            out, waist = model(images)
            error = jnp.mean((out - images) ** 2)
            return error + 0.25 * waist.loss, (error, waist)

        slope, (error, waist) = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - rate * g, params, slope)
        model = nnx.merge(graph, params, rest)
        said = model.waist.update(waist.stats)
        rest = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
        return (params, rest), (error, waist.bits.mean(), said["waist_entropy"])

    start = nnx.as_pure(params), nnx.as_pure(rest)
    # the encoder rests while the window fills, so that traffic is stationary
    rates = jnp.where(jnp.arange(100) < 60, 0.3, 0.0)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, rates))
    _, (errors, bits, entropy) = run(start)
    assert errors[-1] < 0.6 * errors[0]
    # traffic is nearly stationary: bits are the entropy, and half a count for each code
    np.testing.assert_allclose(bits[-1], entropy[-1], rtol=0.05)
    assert bits[-1] <= model.waist.capacity


def test_bits_are_added_over_indices_and_counted_apart():
    """Two indices; the window's frequencies of each, by numpy."""
    layer = Quantize(6, product(vq(2, 4), fsq((5, 3))), window=2, rngs=nnx.Rngs(0))
    assert layer.capacity == pytest.approx(2 + np.log2(15))
    assert send(layer, X).bits == pytest.approx(layer.capacity)
    seen, said = [], {}
    for shift in (0.0, 1.0, 2.0):
        out = send(layer, X + shift)
        said = layer.update(out.stats)
        seen.append(np.asarray(out.codes))
    bits, entropy, used = 0.0, 0.0, 0
    out = send(layer, X)
    latest = np.asarray(out.codes)
    for place, size in enumerate(layer.quantizer.sizes):
        chosen = np.concatenate([c[:, place] for c in seen[-2:]])
        count = np.bincount(chosen, minlength=size)
        smooth = (count + 0.5) / (count + 0.5).sum()
        bits = bits - np.log2(smooth)[latest[:, place]]
        share = count[count > 0] / count.sum()
        entropy -= (share * np.log2(share)).sum()
        used += (count > 0).sum()
    np.testing.assert_allclose(out.bits, bits, rtol=1e-5)
    assert float(said["waist_entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert float(said["waist_perplexity"]) == pytest.approx(
        2 ** (entropy / 2), rel=1e-5
    )
    assert float(said["waist_usage"]) == pytest.approx(used / 19)


def test_a_start_puts_codes_where_data_lie():
    layer = Quantize(6, vq(4, 8), unit=True, rngs=nnx.Rngs(0))
    mask = jnp.arange(40) < 30
    before = send(layer, X, mask).loss
    layer.start(KEY, jnp.where(mask[:, None], X, jnp.nan), mask)
    assert send(layer, X, mask).loss < 0.5 * before


def test_weights_are_given_by_name():
    twice = {"entropy": 0.0, "crowding": 0.0, "commitment": 2.0}
    layer = Quantize(6, lfq(3), weights=twice, rngs=nnx.Rngs(0))
    z = layer._inward(X)
    np.testing.assert_allclose(
        layer(X).loss, 2 * ((jnp.abs(z) - 1) ** 2).sum(-1).mean(), rtol=1e-5
    )
    with pytest.raises(
        ValueError, match=r"weights: \['taste'\] are no losses of the qua"
    ):
        Quantize(6, lfq(3), weights={"taste": 1.0}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="window: 0 steps"):
        Quantize(6, lfq(3), window=0, rngs=nnx.Rngs(0))
