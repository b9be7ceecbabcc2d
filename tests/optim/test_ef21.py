"""EF21's step sizes: the arithmetic mean is safe, and faster as predicted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.optim.ef21 import clones, ef21_rate, ef21_weights, smoothness, xi
from narrows.optim.links import init_link, make_link, send
from narrows.optim.sparse import top_k

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
constants = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=20).map(np.array)


@few
@given(delta=st.floats(0.001, 1.0))
def test_xi_is_its_definition(delta):
    theta = 1 - (1 - delta) ** 0.5
    beta = (1 - delta) / theta
    assert xi(delta) == pytest.approx((beta / theta) ** 0.5, rel=1e-6, abs=1e-9)


@few
@given(clients=constants)
def test_weights_and_clones(clients):
    assert ef21_weights(clients).mean() == pytest.approx(1)
    copies, n = clones(clients), len(clients)
    total = copies.sum()
    assert n <= total <= 2 * n
    each = clients * total / n / copies  # the constant of one copy
    quadratic = np.sqrt((copies * each**2).sum() / total)
    assert quadratic <= 2**0.5 * clients.mean() * (1 + 1e-6)
    rates = [ef21_rate(1.0, clients, 0.1, mean=m) for m in ("arithmetic", "quadratic")]
    assert rates[0] >= rates[1] * (1 - 1e-9)


def rounds_needed(mean):
    """Of EF21 with Top-5 on ten quadratics, one of them a hundred times as curved."""
    rng = np.random.default_rng(0)
    n, d = 10, 50
    spread = np.where(np.arange(n) == n - 1, 100.0, 1.0)
    a = rng.uniform(0.1, 1, (n, d))
    a = a / a.max(1, keepdims=True) * spread[:, None]
    c = rng.normal(size=(n, d))
    rate = ef21_rate(a.mean(0).max(), spread, 0.1, mean=mean)
    a, c = jnp.asarray(a, jnp.float32), jnp.asarray(c, jnp.float32)
    link = make_link("ef21", top_k(0.1), (d,))

    @jax.jit
    def run():
        def step(carry):
            x, states, count, _ = carry
            g = a * (x - c)
            keys = jax.random.split(jax.random.key(0), n)
            _, ests, states = jax.vmap(functools.partial(send, link))(keys, states, g)
            return x - rate * ests.mean(0), states, count + 1, jnp.sum(g.mean(0) ** 2)

        x = jnp.zeros(d)
        states = jax.vmap(lambda g: init_link(link, g.shape, g))(a * (x - c))
        start = x, states, 0, jnp.float32(jnp.inf)
        small = 1e-5
        return jax.lax.while_loop(
            lambda s: (s[3] > small) & (s[2] < 30000), step, start
        )[2]

    return int(run()), rate


def test_the_new_rate_saves_the_predicted_rounds():
    old, old_rate = rounds_needed("quadratic")
    new, new_rate = rounds_needed("arithmetic")
    assert old < 30000
    assert old / new == pytest.approx(new_rate / old_rate, rel=0.15)
    assert new_rate > 2 * old_rate


def test_smoothness_is_the_largest_eigenvalue():
    """Of logistic losses at 0, tree-shaped parameters, one client and many at once."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(3, 40, 6)) * np.array([1, 2, 5])[:, None, None]
    points = jnp.asarray(points, jnp.float32)

    def loss(x, rows):
        margins = rows[:, :4] @ x["w"] + rows[:, 4:] @ x["v"]
        return jnp.logaddexp(0, -margins).mean()

    def constant(rows, key):
        zero = {"w": jnp.zeros(4), "v": jnp.zeros(2)}
        return smoothness(lambda x: jax.grad(loss)(x, rows), zero, key, steps=200)

    found = jax.vmap(constant)(points, jax.random.split(jax.random.key(0), 3))
    exact = [np.linalg.eigvalsh(p.T @ p / 160)[-1] for p in np.asarray(points)]
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    assert (found <= np.array(exact) * (1 + 1e-5)).all()  # from below
    flat = smoothness(lambda x: 0 * x, jnp.ones(3), jax.random.key(0))
    assert flat == 0  # and no NaN


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="delta: 0"):
        xi(0)
    with pytest.raises(ValueError, match="mean: 'geometric'"):
        ef21_rate(1.0, np.ones(2), 0.5, mean="geometric")  # pyright: ignore
    with pytest.raises(ValueError, match=r"clients: the least is 0\.0"):
        ef21_weights(np.array([0.0, 1.0]))
