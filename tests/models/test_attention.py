"""Attention as a module: positions, groups, norms; its kernel is tested apart."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models.attention import Attention, rotate, turns

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 6, 16)), jnp.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))
SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_width": 8}
OPTIONS: dict[str, Any] = {
    "qk_norm": False,
    "rotary": True,
    "causal": True,
    "bias": True,
    "residual_scale": 1.0,
    "dtype": jnp.float32,
}


def module(**options) -> Attention:
    """Every kernel and bias from one stream of normal numbers."""
    made = nnx.eval_shape(
        lambda: Attention(16, rngs=nnx.Rngs(0), **(SIZES | OPTIONS | options))
    )
    graph, state = nnx.split(made)
    rng = np.random.default_rng(1)
    leaves = {
        path: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def mixed(layer, x=X, positions=POSITIONS):
    out, cache = layer(x, positions=positions)
    assert cache is None
    return out


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x = RNG.normal(size=(2, 6, 3, 8)).astype(np.float32)
    positions = RNG.integers(0, 1000, (2, 6))
    angle = positions[..., None, None] * 10_000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], -1)
    got = rotate(jnp.asarray(x), *turns(jnp.asarray(positions), 8))
    # float32 angles near 1000 are off by 1000 * 2^-24
    np.testing.assert_allclose(got, expected, atol=3e-4)
    half = rotate(jnp.asarray(x, jnp.bfloat16), *turns(POSITIONS, 8))
    assert half.dtype == jnp.bfloat16


def test_rotary_attention_knows_distances_alone():
    np.testing.assert_allclose(
        mixed(module()), mixed(module(), positions=POSITIONS + 100), atol=1e-4
    )
    stretched = mixed(module(), positions=2 * POSITIONS)
    assert jnp.abs(stretched - mixed(module())).max() > 0.05
    blind = module(rotary=False)
    assert jnp.array_equal(mixed(blind), mixed(blind, positions=2 * POSITIONS))


@pytest.mark.parametrize("causal", [True, False])
def test_it_equals_its_formula_in_float64(causal):
    layer = module(rotary=False, causal=causal)
    out_bias = layer.out.bias
    assert out_bias is not None
    x = np.asarray(X, np.float64)

    def inward(part):
        kernel, bias = np.asarray(part.kernel[...]), np.asarray(part.bias[...])
        return np.einsum("btd,dnh->btnh", x, kernel) + bias

    query, key, value = inward(layer.query), inward(layer.key), inward(layer.value)
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8)
    if causal:
        scores = np.where(np.tri(6, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bnts,bsnh->btnh", weights, value)
    out = np.einsum("btnh,nhd->btd", heads, np.asarray(layer.out.kernel[...]))
    np.testing.assert_allclose(mixed(layer), out + np.asarray(out_bias[...]), atol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_keys_and_values(kv_heads):
    grouped, full = module(kv_heads=kv_heads), module()
    for name in ("query", "key", "value", "out"):
        source, target = getattr(grouped, name), getattr(full, name)
        kernel, bias = source.kernel[...], source.bias[...]
        if name in ("key", "value"):
            kernel = jnp.repeat(kernel, 4 // kv_heads, axis=1)
            bias = jnp.repeat(bias, 4 // kv_heads, axis=0)
        target.kernel[...], target.bias[...] = kernel, bias
    np.testing.assert_allclose(mixed(grouped), mixed(full), atol=1e-5)


@pytest.mark.parametrize("normed", [True, False])
def test_normed_queries_forget_their_length(normed):
    layer = module(qk_norm=normed, bias=False)
    before = mixed(layer)
    layer.query.kernel[...] = 10 * layer.query.kernel[...]
    layer.key.kernel[...] = 10 * layer.key.kernel[...]
    moved = jnp.abs(mixed(layer) - before).max()
    # the norm's epsilon of 1e-6 beside a mean square of about 4
    assert moved < 1e-4 if normed else moved > 0.1


def test_bfloat16_stays_near_float32():
    narrow = module(dtype=jnp.bfloat16, qk_norm=True)
    out = mixed(narrow, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact = mixed(module(qk_norm=True))
    error = jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2))
    assert error < 6 * 2**-8  # six roundings to eight bits in a row
