"""Laws of codes of a few numbers, of their errors, and of pictures that are drawn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.ib import image_tasks, lossy

KEY = jax.random.key(0)


def test_pca_finds_the_subspace_of_the_singular_vectors():
    x = np.random.default_rng(0).normal(size=(200, 40)) * 0.7 ** np.arange(40)
    code = lossy.pca(KEY, jnp.asarray(x, jnp.float32), 5)
    centred = x - x.mean(0)
    _, values, right = np.linalg.svd(centred, full_matrices=False)
    wanted = centred @ right[:5].T
    found = np.asarray(code.encode(jnp.asarray(x, jnp.float32)))
    assert np.abs(np.abs(found) - np.abs(wanted)).max() < 1e-2  # signs are free
    left = float(lossy.squared_error(code, jnp.asarray(x, jnp.float32)))
    assert left == pytest.approx((values[5:] ** 2).sum() / 200, rel=1e-3)


@pytest.mark.parametrize("name", ["pca", "random_projection"])
def test_linear_codes_are_orthonormal(name):
    x = jax.random.normal(KEY, (50, 12))
    code = lossy.CODES[name](KEY, x, 4)
    z = code.encode(x)
    assert jnp.allclose(code.encode(code.decode(z)), z, atol=1e-4)
    assert lossy.squared_error(lossy.CODES[name](KEY, x, 12), x) < 1e-8


def test_an_autoencoder_follows_a_curve_that_pca_cannot(quick_jit):
    """One number, winding through 16 features: two of PCA lose most of it."""
    u = jax.random.uniform(KEY, (600, 1))
    x = jnp.exp(-jnp.square(16 * u - jnp.arange(16)) / 8)  # a moving bump

    def errors(key, x):
        codes = lossy.autoencoder(key, x, 2, width=64, steps=1200), lossy.pca(key, x, 2)
        return [lossy.squared_error(code, x) for code in codes]

    curved, straight = quick_jit(errors)(KEY, x)
    assert curved < 0.5 * straight
    assert straight > 0.15 * jnp.square(x - x.mean(0)).sum(1).mean()


def test_noise_reaches_units_that_are_0_and_follows_the_layer():
    h = jnp.zeros((4000, 2)).at[:, 1].set(3.0)
    noise = lossy.inject(KEY, h, 0.1) - h
    rms = 3 / math.sqrt(2)
    assert jnp.allclose(noise.std(0), 0.1 * rms, rtol=0.05)
    assert lossy.inject(KEY, h.astype(jnp.bfloat16), 0.1).dtype == jnp.bfloat16
    slope = jax.grad(lambda h: lossy.inject(KEY, h, 0.1).sum())(h)
    assert jnp.allclose(slope, 1)  # none through the root mean square


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_gap_of_a_projection_is_within_its_bound(k):
    """L = A X + noise, all normal, in closed form; tight where spectra are equal."""
    rng, d, noise = np.random.default_rng(k), 6, 0.3
    for spectrum in (rng.gamma(1.0, size=d), np.ones(d)):
        turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
        total = (turn * (spectrum + noise)) @ turn.T
        basis = np.linalg.qr(rng.normal(size=(d, k)))[0]

        def information(columns, total=total):
            inside = columns.T @ total @ columns
            return (np.linalg.slogdet(inside)[1] - columns.shape[1] * np.log(noise)) / 2

        mse = np.trace(total) - np.trace(basis.T @ total @ basis)
        gap = information(np.eye(d)) - information(basis)
        bound = lossy.projection_gap(mse, d - k, noise) if k < d else 0.0
        assert gap <= bound + 1e-9
        if spectrum.max() == spectrum.min():
            assert gap == pytest.approx(bound, abs=1e-9)


def test_residual_entropy_is_that_of_the_normal_law():
    assert lossy.residual_entropy(3 * 0.5, 3) == pytest.approx(
        1.5 * math.log(2 * math.pi * math.e * 0.5)
    )
    uniform = math.log(1.0)  # of one number on [0, 1], variance 1/12
    assert uniform < lossy.residual_entropy(1 / 12, 1)


def test_spots_tell_their_centres():
    """log of the picture is a paraboloid: its slope gives the numbers back."""
    u = jax.random.uniform(KEY, (20, 2))
    x = jnp.log(image_tasks.draw_blobs(u, 16)).reshape(20, 16, 16)
    p = (jnp.arange(16) + 0.5) / 16
    for axis, along in ((0, x[:, :, 0]), (1, x[:, 0, :])):
        slope = (along[:, 9] - along[:, 8]) / (p[9] - p[8])
        middle = (p[9] + p[8]) / 2
        assert jnp.allclose(slope / 20 + middle, u[:, axis], atol=1e-3)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_rectangles_tell_their_corners(side):
    """Covered shares add up to the edges; their middles are weighted sums."""
    u = jax.random.uniform(KEY, (50, 4))
    x = image_tasks.draw_rectangles(u, side).reshape(50, side, side)
    low = 0.75 * u[:, 0]
    high = low + 0.25 + (0.75 - low) * u[:, 1]
    assert x.min() >= 0
    assert x.max() <= 1 + 1e-5
    profile = x.sum(2)
    edge = (profile / profile.max(1, keepdims=True)).sum(1) / side
    assert jnp.allclose(edge, high - low, atol=1e-4)
    area = x.sum((1, 2)) / side**2
    second = 0.75 * u[:, 2]
    other = 0.25 + (0.75 - second) * u[:, 3]
    assert jnp.allclose(area, (high - low) * other, atol=1e-4)


@pytest.mark.parametrize("name", image_tasks.IMAGE_TASKS)
def test_pictures_keep_what_their_numbers_hold(name):
    """The sample of the numbers, drawn: rows that differ before differ after."""
    make, numbers = image_tasks.IMAGE_TASKS[name]
    task = make(1.5)
    x, y = task.sample(KEY, 64)
    assert task.information == 1.5
    assert x.shape == y.shape == (64, 256)
    gaps = jnp.square(x[:, None] - x).sum(-1) + 10 * jnp.eye(64)
    assert gaps.min() > 1e-6
    assert numbers in (2, 4)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: lossy.pca(KEY, x, 0), "k"),
        (lambda x: lossy.random_projection(KEY, x, 4), "k"),
        (lambda x: lossy.autoencoder(KEY, x, 1, steps=0), "steps"),
        (lambda x: lossy.pca(KEY, x[:, 0], 1), "x: shape"),
        (lambda x: lossy.residual_entropy(0.0, 1), "mse"),
        (lambda x: lossy.projection_gap(1.0, 1, 0.0), "noise"),
        (lambda x: image_tasks.blobs(1.0, side=4), "side"),
        (lambda x: image_tasks.rectangles(-1.0), "information"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call(jnp.ones((10, 3)))
