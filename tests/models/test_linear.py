"""Contraction with a kernel: the plain product, and JAX's own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.linear import contract, dot_general

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("x", "w", "axes"),
    [((5, 3), (3, 7), 1), ((2, 5, 3), (3, 2, 4), 1), ((2, 5, 2, 4), (2, 4, 3), 2)],
)
def test_values_and_gradients_are_those_of_tensordot(x, w, axes):
    x, w = normal(*x), normal(*w)
    weight = normal(*x.shape[:-axes], *w.shape[axes:])

    def loss(product):
        return lambda x, w: jnp.sum(jnp.sin(product(x, w, axes)) * weight)

    np.testing.assert_allclose(contract(x, w, axes), jnp.tensordot(x, w, axes), 1e-5)
    got = jax.grad(loss(contract), (0, 1))(x, w)
    expected = jax.grad(loss(jnp.tensordot), (0, 1))(x, w)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dtypes_are_the_callers():
    x, w = normal(4, 3, dtype=jnp.bfloat16), normal(3, 5, dtype=jnp.bfloat16)
    assert contract(x, w).dtype == jnp.bfloat16
    assert contract(x, w, 1, jnp.float32).dtype == jnp.float32
    grads = jax.grad(lambda x, w: contract(x, w, 1, jnp.float32).sum(), (0, 1))(x, w)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"w: \(4, 5\) against x \(2, 3\)"):
        contract(normal(2, 3), normal(4, 5))
    with pytest.raises(NotImplementedError, match="last dimensions of x"):
        dot_general(normal(3, 2), normal(3, 5), (((0,), (0,)), ((), ())))
    with pytest.raises(NotImplementedError, match="precision=highest"):
        dot_general(normal(2, 3), normal(3, 5), (((1,), (0,)), ((), ())), "highest")
