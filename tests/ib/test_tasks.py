"""What tasks say they hold, against what their samples hold."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.ib import tasks


@pytest.mark.parametrize("name", tasks.TASKS)
def test_samples_are_seeded_and_paired(name):
    task = tasks.make_task(name, 3)
    (x, y), (again, _) = (task.sample(jax.random.key(4), 50) for _ in range(2))
    assert (x == again).all()
    assert x.shape == (50, 3)
    assert y.shape == (50, 1 if name == "labels" else 3)
    assert jnp.isfinite(x).all()
    assert jnp.isfinite(y).all()
    assert task.information > 0


def test_normal_sides_hold_what_their_covariance_says():
    x, y = tasks.gaussian(4, 1.5, pairs=2).sample(jax.random.key(0), 20_000)
    found = np.linalg.svd(np.asarray(x.T @ y) / len(x))[1]  # both sides are white
    held = -0.5 * np.log(1 - found**2).sum()
    # Of each of two pairs: d I / d rho = rho / (1 - rho^2), and the deviation of a
    # covariance of unit normals is sqrt((1 + rho^2) / n).
    square = -math.expm1(-1.5)
    deviation = math.sqrt(square * (1 + square) / 20_000) / (1 - square)
    assert abs(held - 1.5) < 4 * math.sqrt(2) * deviation
    assert found[2:].max() < 5 / math.sqrt(20_000)


def test_the_mean_log_density_ratio_of_t_rows_is_their_information():
    """Monte Carlo from densities written down anew, one feature a side."""
    from scipy import stats

    task = tasks.student(1, 0.5, dof=3.0)
    x, y = (np.asarray(a, np.float64) for a in task.sample(jax.random.key(1), 20_000))
    rho = math.sqrt(-math.expm1(-1))
    joint = stats.multivariate_t(shape=[[1, rho], [rho, 1]], df=3)
    ratio = joint.logpdf(np.concatenate([x, y], 1))
    ratio -= (stats.t.logpdf(x, 3) + stats.t.logpdf(y, 3))[:, 0]
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - task.information) < 4 * error


@pytest.mark.parametrize("noise", [0.2, 0.5, 1.3])
def test_noise_takes_the_entropy_of_a_trapezium(noise):
    """I = h(Y) - log(2 noise), h by quadrature over the density of the sum."""
    grid = np.linspace(-noise, 1 + noise, 200_001)
    inside = np.minimum(1, grid + noise) - np.maximum(0, grid - noise)
    density = np.maximum(inside, 1e-300) / (2 * noise)
    entropy = -(density * np.log(density)).sum() * (grid[1] - grid[0])
    assert tasks.additive_noise(1, noise=noise).information == pytest.approx(
        entropy - math.log(2 * noise), abs=1e-4
    )


def test_turning_keeps_lengths():
    plain = tasks.gaussian(2).sample(jax.random.key(2), 100)
    turned = tasks.spiral(2).sample(jax.random.key(2), 100)
    for a, b in zip(plain, turned, strict=True):
        assert jnp.allclose((a**2).sum(1), (b**2).sum(1), rtol=1e-5)
        assert not jnp.allclose(a, b, atol=0.1)


def test_mixture_holds_the_mean_log_ratio_of_its_density():
    task = tasks.mixture(1, correlation=0.8)
    x, y = (np.asarray(a, np.float64) for a in task.sample(jax.random.key(3), 20_000))
    laws = [
        np.exp(-(x**2 - 2 * r * x * y + y**2) / (2 * 0.36)) / (2 * math.pi * 0.6)
        for r in (0.8, -0.8)
    ]
    margins = np.exp(-(x**2 + y**2) / 2) / (2 * math.pi)
    ratio = np.log(np.mean(laws, 0) / margins)
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - task.information) < 4 * error
    assert abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]) < 0.03
    assert tasks.mixture(3, correlation=0.8).information == pytest.approx(
        3 * task.information
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: tasks.make_task("normal", 1), "task"),
        (lambda: tasks.gaussian(0), "dim"),
        (lambda: tasks.gaussian(2, -1.0), "information"),
        (lambda: tasks.gaussian(2, pairs=3), "pairs"),
        (lambda: tasks.student(1, dof=0.5), "dof"),
        (lambda: tasks.spiral(1), "dim"),
        (lambda: tasks.additive_noise(1, noise=0.0), "noise"),
        (lambda: tasks.labels(1, classes=1), "classes"),
        (lambda: tasks.discrete_continuous(1, values=1), "values"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()
