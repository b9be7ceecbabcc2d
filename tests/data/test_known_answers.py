"""Problems with known answers: their constants and solutions are what they say."""

import numpy as np
import pytest
from narrows.data.bilinear import Bilinear, bilinear, operator
from narrows.data.quadratics import quadratics


def test_quadratics_know_their_gradients_constants_and_solution():
    rng = np.random.default_rng(0)
    wanted = np.array([1.0, 100.0, 3.0])
    p = quadratics(rng, clients=3, d=8, constants=wanted)
    np.testing.assert_allclose(p.constants, wanted)
    x, h = rng.normal(size=8), 1e-6
    slopes = [(p.value(x + h * e) - p.value(x - h * e)) / (2 * h) for e in np.eye(8)]
    np.testing.assert_allclose(p.gradients(x).mean(0), slopes, rtol=1e-6)
    np.testing.assert_allclose(p.gradients(p.solution).mean(0), 0, atol=1e-12)
    hessian = np.diag(p.a.mean(0))
    assert p.smoothness == pytest.approx(np.linalg.norm(hessian, 2))
    # Single clients are far from done there: that is what makes the problem hard.
    assert np.abs(p.gradients(p.solution)).max() > 0.1
    assert quadratics(rng, heterogeneity=0.0).c.any() == 0


def test_quadratics_want_a_constant_for_each_client():
    with pytest.raises(ValueError, match="constants: 2 of them for 3 clients"):
        quadratics(np.random.default_rng(0), clients=3, constants=np.ones(2))


def test_the_bilinear_game_knows_its_saddle_and_its_constant():
    p = bilinear(np.random.default_rng(0), workers=4, d=6)
    workers = [Bilinear(*(part[i] for part in p)) for i in range(4)]

    def whole(z):
        fs = [np.concatenate(operator((z[:6], z[6:]), w)) for w in workers]
        return np.mean(fs, 0)

    z = np.concatenate(p.solution)
    np.testing.assert_allclose(whole(z), 0, atol=1e-12)
    jacobian = np.stack([whole(z + e) - whole(z) for e in np.eye(12)], 1)
    assert p.smoothness == pytest.approx(np.linalg.norm(jacobian, 2))
    symmetric = (jacobian + jacobian.T) / 2
    np.testing.assert_allclose(symmetric, 0.1 * np.eye(12), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(p.A, 2, axis=(1, 2)), 1)
