"""The key-value memory inside of a model: what its two phases keep and change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models.convolution import Encoder
from narrows.models.key_value_waist import KeyValue
from narrows.models.transformer import Transformer, TransformerConfig

X = jax.random.normal(jax.random.key(0), (4, 6, 8))


def a_layer(**options):
    options: dict[str, Any] = {
        "books": 3,
        "codes": 16,
        "code_width": 4,
        "window": 2,
    } | options
    return KeyValue(8, rngs=nnx.Rngs(0), **options)


def test_z_is_the_mean_of_the_values_beside_the_nearest_keys():
    layer = a_layer()
    out = layer(X)
    root = jnp.sqrt(jnp.mean(X**2, -1, keepdims=True))
    e = jnp.einsum("btd,cde->btce", X / root, layer.places[...])
    keys, values = layer.keys.get_value().codes, layer.values[...]
    away = jnp.sum((e[..., None, :] - keys) ** 2, -1)
    assert out.codes is not None
    assert jnp.array_equal(out.codes, away.argmin(-1))
    wanted = sum(values[j][out.codes[..., j]] for j in range(3)) / 3
    np.testing.assert_allclose(out.z, wanted, atol=1e-5)
    np.testing.assert_allclose(out.loss, away.min(-1).mean(), rtol=1e-4)
    assert jnp.array_equal(layer.decode(layer.encode(X)), out.z)
    assert layer.capacity == 12.0


def test_a_gradient_reaches_only_the_values_that_were_read():
    layer = a_layer(through=False)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def total(params, x):
        out = nnx.merge(graph, params, rest)(x)
        return jnp.sum(jnp.sin(out.z)) + out.loss

    slope, of_x = jax.grad(total, argnums=(0, 1))(params, X)
    read = np.zeros((3, 16), bool)
    read[np.arange(3), layer.encode(X)] = True
    moved = np.any(np.asarray(slope["values"][...]) != 0, -1)
    assert np.array_equal(moved, read)
    assert 0 < read.mean() < 1
    assert not np.any(of_x)  # a frozen encoder learns nothing


def test_frozen_keys_stay_and_later_only_written_cells_are_read():
    layer = a_layer()
    before = layer.keys.get_value().codes
    layer.update(layer(X).stats)
    followed = layer.keys.get_value().codes
    assert not jnp.array_equal(followed, before)
    layer.freeze()
    assert not layer.hits[...].any()
    said = layer.update(layer(X[:1]).stats)
    assert jnp.array_equal(layer.keys.get_value().codes, followed)
    assert layer.hits[...].sum() == 6 * 3
    assert 0 < said["waist_usage"] < 1
    layer.only_written = True
    hit = layer.hits[...] > 0
    assert hit[jnp.arange(3), layer.encode(10 * X)].all()
    own = jnp.arange(3), layer.encode(X[:1])
    layer.only_written = False
    assert jnp.array_equal(own[1], layer.encode(X[:1]))


def test_a_start_puts_keys_where_data_lie():
    layer, mask = a_layer(), jnp.ones((4, 6), bool).at[0].set(False)
    before = layer(X, mask).loss
    layer.start(jax.random.key(1), jnp.where(mask[..., None], X, jnp.nan), mask)
    assert layer(X, mask).loss < 0.1 * before  # 18 positions for 16 keys
    layer.update(layer(X, mask).stats)  # which does not shrink them
    assert layer(X, mask).loss < 0.1 * before


def test_it_serves_at_any_depth_and_on_maps_of_images():
    config = TransformerConfig(vocab_size=32, depth=2, width=8, heads=2, max_len=8)
    tokens = jnp.arange(12).reshape(2, 6)
    for depth in range(3):
        model = Transformer(config, waist=a_layer(), waist_at=depth, rngs=nnx.Rngs(1))
        out = jax.eval_shape(lambda m: m(tokens), model)
        assert out.logits.shape == (2, 6, 32)
        assert out.waist.codes.shape == (2, 6, 3)
    maps = Encoder(1, (4, 8), rngs=nnx.Rngs(2))(jnp.ones((2, 8, 12, 1)))
    codes = a_layer()(maps).codes
    assert codes is not None
    assert codes.shape == (2, 2, 3, 3)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="key_value: books=0, codes=16"):
        a_layer(books=0)
