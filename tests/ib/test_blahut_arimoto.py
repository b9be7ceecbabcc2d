"""Laws of the discrete bottleneck: descent, ends of the curve, the Gaussian limit."""

import numpy as np
import pytest
from narrows.ib import blahut_arimoto as ba
from narrows.ib.objectives.gaussian import Covariances, information_curve


def joint_of(seed, shape=(6, 3)):
    joint = np.random.default_rng(seed).gamma(0.5, size=shape)
    return joint / joint.sum()


@pytest.mark.parametrize("beta", [1.5, 5.0, 50.0])
def test_a_step_never_raises_the_functional(beta):
    joint = joint_of(0)
    encoder = np.random.default_rng(1).dirichlet(np.ones(4), size=6)
    values = []
    for _ in range(60):
        x_t, t_y = ba.both(joint, encoder)
        values.append(x_t - beta * t_y)
        encoder = ba.step(joint, encoder, beta)
    assert np.diff(values).max() < 1e-12
    assert values[-1] < values[0] - 1e-3


def test_a_fixed_point_obeys_the_equations_of_the_bottleneck():
    joint, beta = joint_of(2), 8.0
    encoder = np.random.default_rng(3).dirichlet(np.ones(6), size=6)
    for _ in range(5000):
        encoder = ba.step(joint, encoder, beta)
    p_x = joint.sum(1)
    encoder = encoder[:, p_x @ encoder > 1e-12]  # clusters that are still there
    p_t = p_x @ encoder
    given_t = (encoder.T @ joint) / p_t[:, None]
    for x in range(6):
        given_x = joint[x] / p_x[x]
        gaps = np.array([(given_x * np.log(given_x / g)).sum() for g in given_t])
        wanted = p_t * np.exp(-beta * gaps)
        assert encoder[x] == pytest.approx(wanted / wanted.sum(), abs=1e-6)


def test_ends_and_shape_of_the_curve():
    """0 below beta = 1, I(X; Y) in the limit, rising and concave between."""
    joint = joint_of(4)
    betas = np.concatenate([[0.3, 0.99], np.geomspace(1.1, 1e5, 30)])
    found = ba.curve(joint, betas)
    whole = ba.information(joint)
    assert found.t_y[:2].max() < 1e-12  # of rounding
    assert found.x_t[:2].max() < 1e-12
    assert found.t_y[-1] == pytest.approx(whole, abs=1e-4)
    assert np.diff(found.t_y).min() > -1e-6
    assert np.diff(found.x_t).min() > -1e-6
    assert (found.t_y <= np.minimum(found.x_t, whole) + 1e-12).all()
    slope = np.diff(found.t_y) / np.maximum(np.diff(found.x_t), 1e-12)
    moved = np.diff(found.x_t) > 1e-3
    assert np.diff(slope[moved]).max() < 1e-3


def test_a_function_of_x_has_the_corner_of_its_entropy():
    joint = np.zeros((5, 2))
    joint[[0, 1, 2, 3, 4], [0, 1, 1, 0, 1]] = [0.1, 0.2, 0.3, 0.2, 0.2]
    h_y = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))
    found = ba.curve(joint, np.array([0.9, 1.1, 100.0]))
    assert found.x_t == pytest.approx([0, h_y, h_y], abs=1e-9)
    assert found.t_y == pytest.approx([0, h_y, h_y], abs=1e-9)
    rate = ba.least_rate(found, np.array([0.0, h_y / 2, h_y, 2.0]), h_y)
    assert rate[:3] == pytest.approx([0, h_y / 2, h_y], abs=1e-9)
    assert np.isnan(rate[3])


def test_inputs_that_say_the_same_of_y_are_one():
    joint = joint_of(5)
    doubled = np.concatenate([joint * 0.25, joint * 0.75, np.zeros((1, 3))])
    small = ba.merged(doubled)
    assert small.shape == (6, 3)
    assert ba.information(small) == pytest.approx(ba.information(joint), abs=1e-12)


def test_fine_cells_of_a_normal_pair_have_the_gaussian_curve():
    """Closed form of Chechik et al. against the iteration over 25 cells."""
    rho, ticks = 0.8, np.linspace(-3.2, 3.2, 25)
    x, y = np.meshgrid(ticks, ticks, indexing="ij")
    joint = np.exp(-(x**2 - 2 * rho * x * y + y**2) / (2 * (1 - rho**2)))
    found = ba.curve(joint / joint.sum(), np.array([3.0, 6.0, 12.0]), steps=2000)
    of = Covariances(np.eye(1), np.eye(1), np.array([[rho]]))
    exact = information_curve(of, found.x_t)
    assert found.x_t.min() > 0.1
    assert found.t_y == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ba.curve(np.ones((2, 2)), np.ones(1)), "joint"),
        (lambda: ba.curve(np.array([[-0.5, 1.5]]), np.ones(1)), "joint"),
        (lambda: ba.curve(np.eye(2) / 2, np.array([0.0])), "betas"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()
