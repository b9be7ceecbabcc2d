"""The draw is that of the softmax, and a function of the position and the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.quantize.gumbel import gumbel

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


def test_codes_are_drawn_as_often_as_the_softmax_says():
    q = gumbel(3, 4)
    state = q.init(KEY)
    steps = jnp.arange(4000)

    def draw(step):
        moved = state._replace(memory=state.memory._replace(steps=step))
        return q.encode(moved, X)[:, 0]

    drawn = jax.jit(jax.vmap(draw))(steps)
    share = jax.nn.one_hot(drawn, 4).mean(0)
    expected = jax.nn.softmax(X @ state.params.logits)
    np.testing.assert_allclose(share, expected, atol=4 * (0.25 / 4000) ** 0.5)


def test_a_position_draws_the_same_wherever_it_lies():
    q = gumbel(3, 8)
    state = q.init(KEY)
    assert jnp.array_equal(q.encode(state, X)[::-1], q.encode(state, X[::-1]))
    later, _ = q.update(state, jnp.float32(6))
    padding, _ = q.update(state, jnp.float32(0))
    many = jnp.tile(X, (20, 1)) + jnp.arange(120)[:, None]
    assert not jnp.array_equal(q.encode(state, many), q.encode(later, many))
    assert jnp.array_equal(q.encode(state, many), q.encode(padding, many))


def test_without_noise_the_likeliest_passes():
    q = gumbel(3, 8, noise=0.0)
    state = q.init(KEY)
    likeliest = jnp.argmax(X @ state.params.logits, -1)
    assert jnp.array_equal(q.encode(state, X)[:, 0], likeliest)


def test_the_gradient_is_that_of_the_soft_choice():
    q = gumbel(3, 8, noise=0.0, temperature=0.7)
    state = q.init(KEY)

    def hard(x, params):
        return jnp.sum(jnp.sin(X) * q.quantize(state._replace(params=params), x).z)

    def soft(x, params):
        chosen = jax.nn.softmax(x @ params.logits / 0.7) @ params.codes
        return jnp.sum(jnp.sin(X) * chosen)

    slopes = (jax.grad(f, (0, 1))(X, state.params) for f in (hard, soft))
    for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_options_out_of_range_raise():
    with pytest.raises(ValueError, match=r"gumbel: temperature=0\.0"):
        gumbel(3, 4, temperature=0.0)
