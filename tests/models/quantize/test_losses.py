"""Each loss against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
from narrows.models.quantize import losses

RNG = np.random.default_rng(0)
X, Z = (jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32) for _ in range(2))


def test_commitment_and_codebook_pull_one_side_each():
    for loss, pulled in ((losses.commitment, 0), (losses.codebook, 1)):
        values, pull = jax.vjp(loss, X, Z)
        slopes = pull(jnp.ones(5))
        np.testing.assert_allclose(values, ((X - Z) ** 2).sum(-1), rtol=1e-6)
        np.testing.assert_allclose(
            slopes[pulled], (-1) ** pulled * 2 * (X - Z), rtol=1e-5
        )
        assert not slopes[1 - pulled].any()


def test_a_mean_of_nothing_is_nothing():
    assert losses.mean(X[:, 0], jnp.zeros(5)) == 0
    np.testing.assert_allclose(
        losses.mean(X[:, 0], jnp.asarray([1.0, 1, 0, 0, 0])), X[:2, 0].mean()
    )


def test_entropies_lie_between_certain_and_uniform():
    p = jnp.asarray([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_allclose(losses.entropy(p), [0, np.log(4)], atol=1e-6)
    assert jnp.all(jnp.isfinite(jax.grad(lambda p: losses.entropy(p).sum())(p + 1e-9)))
    np.testing.assert_allclose(losses.crowding(p, p[1]), [-np.log(4)] * 2, rtol=1e-6)
    logits = jnp.asarray([[50.0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(losses.divergence(logits), [np.log(4), 0], atol=1e-6)


def test_orthogonality_is_the_mean_squared_cosine_of_pairs():
    codes = jnp.asarray(RNG.normal(size=(7, 4)), jnp.float32)
    unit = codes / jnp.linalg.norm(codes, axis=-1, keepdims=True)
    pairs = (unit @ unit.T) ** 2 - jnp.eye(7)
    np.testing.assert_allclose(losses.orthogonality(codes), pairs.mean(), rtol=1e-4)
    np.testing.assert_allclose(losses.orthogonality(3 * jnp.eye(4)), 0, atol=1e-6)
