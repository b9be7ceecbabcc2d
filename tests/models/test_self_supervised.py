"""Views show parts of their picture; the loss is that of telling pictures apart."""

import jax
import jax.numpy as jnp
import numpy as np
from narrows.models.self_supervised import contrast, contrastive_parts, views


def test_contrast_is_the_softmax_written_out():
    one, two = jax.random.normal(jax.random.key(0), (2, 5, 3))
    z = np.concatenate([one, two]).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    for i in range(5):
        wanted = 0.0
        for a, b in ((i, i + 5), (i + 5, i)):
            others = sum(np.exp(z[a] @ z[j] / 0.5) for j in range(10) if j != a)
            wanted -= np.log(np.exp(z[a] @ z[b] / 0.5) / others) / 2
        got = contrast(one, two, temperature=0.5)[i]
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_views_are_drawn_for_each_picture_and_show_parts_of_it():
    """Of a picture that grows from left to right, so does every part, or falls."""
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 16)[:, None], (64, 16, 16, 1))
    seen = jax.jit(views)(jax.random.key(1), ramp)
    assert seen.shape == ramp.shape
    across = np.diff(seen.mean((1, 3)), axis=1)
    rising = np.all(across > -1e-6, 1)
    assert np.all(rising | np.all(across < 1e-6, 1))
    assert 10 < rising.sum() < 54
    np.testing.assert_allclose(
        seen, np.broadcast_to(seen[:, :1], seen.shape), atol=1e-5
    )
    assert len(np.unique(seen.mean((1, 2, 3)).round(4))) > 50
    assert jnp.array_equal(jax.jit(views)(jax.random.key(1), ramp), seen)


def test_the_loss_is_of_two_views_drawn_by_the_key():
    """Of projections that know nothing all choices are alike: log(2b - 1) nats."""
    parts = contrastive_parts(1, (4, 8))
    params, rest = parts.init(jax.random.key(0))
    images = jax.random.randint(jax.random.key(1), (8, 8, 8, 1), 0, 256, jnp.uint8)

    @jax.jit
    def loss(params, key):
        return parts.loss(params, rest, {"images": images}, key)

    known = [loss(params, jax.random.key(i)) for i in (0, 0, 1)]
    assert known[0].total == known[1].total != known[2].total
    assert known[0].weight == 8
    blind = params | {"out": jax.tree.map(jnp.zeros_like, params["out"])}
    nats = loss(blind, jax.random.key(0)).total / 8
    np.testing.assert_allclose(nats, np.log(15), rtol=1e-5)
