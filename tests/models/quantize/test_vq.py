"""The estimators pass on the code, and the gradient that they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.quantize.vq import ESTIMATORS, nearest_code, vq

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
CODES = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)
PULL = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)


def pulled(estimator, x=X, codes=CODES):
    def value(x):
        return jnp.sum(PULL * nearest_code(x, codes, estimator=estimator).z)

    return jax.jit(jax.grad(value))(x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_code_passes_bit_for_bit(estimator):
    found = nearest_code(X, CODES, estimator=estimator)
    assert jnp.array_equal(found.z, CODES[found.index])
    np.testing.assert_allclose(
        found.commitment, jnp.sum((X - found.z) ** 2, -1), rtol=1e-6
    )


def test_straight_through_passes_the_gradient_as_it_is():
    assert jnp.array_equal(pulled("straight"), PULL)


def test_the_rotation_turns_x_to_its_code_and_gradients_with_it():
    """Built anew in float64: the rotation in the plane of x and z, identity beside."""
    chosen = np.asarray(nearest_code(X, CODES).z, np.float64)
    rows = zip(np.asarray(X), chosen, PULL, pulled("rotation"), strict=True)
    for x, z, pull, got in rows:
        v, u = x / np.linalg.norm(x), z / np.linalg.norm(z)
        cosine = v @ u
        side = u - cosine * v
        side /= np.linalg.norm(side)
        sine = u @ side
        turn = np.eye(4) + (cosine - 1) * (np.outer(v, v) + np.outer(side, side))
        turn += sine * (np.outer(side, v) - np.outer(v, side))
        turn *= np.linalg.norm(z) / np.linalg.norm(x)
        np.testing.assert_allclose(turn @ x, z, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(turn.T @ pull, got, rtol=1e-4, atol=1e-5)


def test_a_rotation_without_a_direction_is_finite():
    codes = jnp.asarray([[0.0, 0, 0, 0], [5, 5, 5, 5]])
    x = jnp.zeros((6, 4)).at[1].set(1.0)
    assert jnp.all(jnp.isfinite(pulled("rotation", x, codes)))
    opposite = pulled("rotation", -CODES[:1] * jnp.ones((6, 1)), CODES[:1])
    assert jnp.all(jnp.isfinite(opposite))


def test_the_commitment_pulls_x_alone():
    def loss(x, codes):
        return nearest_code(x, codes).commitment.sum()

    to_x, to_codes = jax.grad(loss, (0, 1))(X, CODES)
    np.testing.assert_allclose(to_x, 2 * (X - nearest_code(X, CODES).z), rtol=1e-5)
    assert not to_codes.any()


def test_what_is_not_to_be_had_is_said():
    with pytest.raises(ValueError, match="estimator: 'magic', but allowed are stra"):
        nearest_code(X, CODES, estimator="magic")
    with pytest.raises(ValueError, match="vq: width=0, codes=4, but both"):
        vq(0, 4)
