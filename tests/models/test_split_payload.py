"""Numbers on a grid of few bits, and the bytes that carry them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.models.affine import Squeeze, dequantize, grid_of, quantize
from narrows.models.split_payload import HEADER, pack, payload_size, unpack

pytestmark = pytest.mark.usefixtures("quick_compilation")
RANGES = [(-1.0, 2.0), (0.5, 3.0), (-5.0, -1.0), (-1e-4, 1e-4), (0.0, 0.0)]


def numbers(low, high, shape=(5, 4, 3), seed=0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("low_high", RANGES)
def test_the_error_is_within_a_step_and_mostly_half_of_it(low_high, bits):
    x = numbers(*low_high)
    grid = grid_of(x, bits)
    q = np.asarray(quantize(x, grid))
    assert q.dtype == np.uint8
    assert q.max() <= 2**bits - 1
    error = np.abs(np.asarray(dequantize(q, grid), float) - x)
    step = float(grid.scale)
    assert error.max() <= step * (1 + 1e-6)
    inside = (q > 0) & (q < 2**bits - 1)  # ends are cut where zero was rounded
    assert (error[inside] <= step / 2 * (1 + 1e-5)).all()
    assert float(dequantize(np.uint8(grid.zero), grid)) == 0.0


def test_a_grid_for_each_picture_is_that_of_the_picture_alone():
    x = np.stack([numbers(-1, 2), numbers(-9, 1, seed=1)])
    grid = grid_of(x, 4, axes=(1, 2, 3))
    both = dequantize(quantize(x, grid), grid)
    for one, got in zip(x, both, strict=True):
        alone = grid_of(one, 4)
        assert jnp.array_equal(got, dequantize(quantize(one, alone), alone))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**31))
def test_what_arrives_is_what_was_quantised(bits, seed):
    """Bit for bit, in exactly the bytes that were declared."""
    x = numbers(-3, 2, (5, 3, 2), seed)
    payload = pack(x, bits=bits)
    assert len(payload) == payload_size(5, 3, 2, bits) == 7 + -(-30 * bits // 8)
    grid = grid_of(x, bits)
    expected = dequantize(quantize(x, grid), grid)
    assert np.array_equal(unpack(payload), expected)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p[:4], "4 bytes, fewer"),
        (lambda p: p[:-1], "but 5 x 4 x 3 numbers of 4 bits take 37"),
        (lambda p: p + b"x", "38 bytes"),
        (lambda p: b"\x24" + p[1:], "version 2"),
        (lambda p: b"\x19" + p[1:], "version 1 of 9"),
        (lambda p: HEADER.pack(0x14, 0, 4, 3, 1.0, 0), "at least one"),
        (lambda p: p[:4] + b"\x00\x7e" + p[6:], "make no grid"),
        (lambda p: p[:6] + b"\x10" + p[7:], "zero 16"),
    ],
)
def test_a_payload_that_is_none_is_refused(spoil, said):
    with pytest.raises(ValueError, match=said):
        unpack(spoil(pack(numbers(-1, 2), bits=4)))


@pytest.mark.parametrize(
    ("x", "bits", "said"),
    [
        (np.zeros((2, 2)), 8, "shape"),
        (np.full((1, 1, 1), np.nan), 8, "not finite"),
        (np.zeros((256, 1, 1)), 8, "256"),
        (np.zeros((1, 1, 1)), 9, "bits: 9"),
    ],
)
def test_what_cannot_be_packed_is_refused(x, bits, said):
    with pytest.raises(ValueError, match=said):
        pack(x, bits=bits)


def test_a_squeeze_passes_its_levels_and_no_others():
    layer = Squeeze(6, channels=2, bits=2, rngs=nnx.Rngs(0))
    layer.up.kernel[...] = jnp.eye(2, 6)
    x = jax.random.normal(jax.random.key(0), (500, 6))
    out = layer(x)
    assert len(np.unique(out.z[:, :2])) <= 4
    assert jnp.all(out.bits == 4)


def test_a_squeeze_follows_the_moments_of_what_it_sees():
    layer = Squeeze(6, channels=2, decay=0.0, rngs=nnx.Rngs(0))
    x = 3 + jax.random.normal(jax.random.key(0), (500, 6))
    layer.update(layer(x).stats)
    h = layer.down(x)
    np.testing.assert_allclose(layer.mean[...], h.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.square[...], (h**2).mean(0), rtol=1e-4)
    fine = layer(x).z
    exact = layer.up(h)
    assert float(jnp.abs(fine - exact).mean()) < 0.05
