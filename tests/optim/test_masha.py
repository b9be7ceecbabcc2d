"""MASHA reaches saddle points where compressed extragradient stalls.

Problem B: mean_m x^T A_m y + a_m^T x + b_m^T y + (|x|^2 - |y|^2) / 20, A_m of norm 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data.bilinear import bilinear
from narrows.data.bilinear import operator as of_pair
from narrows.optim.compressed_mean import PLAIN, Way, compressed_mean
from narrows.optim.extragradient import extragradient, saddle
from narrows.optim.masha import masha
from narrows.optim.sparse import random_k, top_k
from narrows.parallel.state import simulate

WORKERS, D = 5, 25


def problem():
    made = bilinear(np.random.default_rng(0), workers=WORKERS, d=D)
    solution = np.concatenate(made.solution)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made), solution


def operator(z, data):
    return jnp.concatenate(of_pair((z[:D], z[D:]), data))


@functools.cache
def gap(name, *, anchored=True, both=True, steps=700):
    """|z - z*|^2 over |z*|^2 at the end."""
    data, solution = problem()
    way = {
        "masha1": Way("plain", random_k(0.3)),
        "masha2": Way("masha2", top_k(0.3)),
        "exact": PLAIN,
    }[name]
    down: Any = {"down": way} if both and name != "exact" else {}
    mean = compressed_mean(way, **down, workers=WORKERS)
    rate = 0.4 / 0.57
    method = masha(operator, mean, rate=rate, tau=0.7, workers=WORKERS)

    if not anchored:  # the operator itself is compressed, at both of its points
        method = extragradient(operator, mean, rate=rate)
    end = many(method, data, jnp.zeros(2 * D), steps)
    z = np.asarray(end.z, np.float64)
    return np.sum((z - solution) ** 2) / np.sum(solution**2)


def many(method, data, z, steps):
    go = simulate(
        lambda data, state: (0.0, method.step(data, state)),
        workers=WORKERS,
        axis_name="data",
    )
    start = method.init(z)
    return jax.jit(
        lambda s: jax.lax.fori_loop(0, steps, lambda _, s: go(data, s)[1], s)
    )(start)


@pytest.mark.parametrize("name", ["masha1", "masha2"])
def test_differences_from_an_anchor_vanish_at_the_solution(name):
    assert gap(name) < 1e-9
    assert gap(name, anchored=False) > 1e-4


def test_one_direction_alone_may_be_compressed():
    assert gap("masha1", both=False) < 1e-9


def test_without_compression_and_anchor_it_is_extragradient():
    data, _ = problem()
    mean = compressed_mean(PLAIN, workers=WORKERS)
    method = masha(operator, mean, rate=0.3, tau=0.0, workers=WORKERS)
    go = simulate(
        lambda d, s: (0.0, method.step(d, s)), workers=WORKERS, axis_name="data"
    )
    state = method.init(jnp.ones(2 * D))

    def whole(z):
        return jax.vmap(operator, in_axes=(None, 0))(z, data).mean(0)

    z = jnp.ones(2 * D)
    for _ in range(3):
        _, state = go(data, state)
        z = z - 0.3 * whole(z - 0.3 * whole(z))
        np.testing.assert_allclose(state.z, z, atol=1e-5)
    assert state.anchors == 3


@pytest.mark.parametrize("name", ["extragradient", "masha"])
def test_steps_stay_in_the_set(name):
    """On a box both end at the point that a small enough projected step keeps."""
    data, _ = problem()

    def box(z):
        return jnp.clip(z, -0.5, 0.5)

    if name == "masha":
        way = Way("masha2", top_k(0.3))
        mean = compressed_mean(way, down=way, workers=WORKERS)
        method = masha(operator, mean, rate=0.3, tau=0.7, workers=WORKERS, project=box)
    else:
        mean = compressed_mean(PLAIN, workers=WORKERS)
        method = extragradient(operator, mean, rate=0.3, project=box)
    z = many(method, data, jnp.zeros(2 * D), 1500).z
    slope = jax.vmap(operator, in_axes=(None, 0))(z, data).mean(0)
    assert jnp.abs(z).max() == 0.5
    np.testing.assert_allclose(z, box(z - 0.1 * slope), atol=1e-5)


def test_at_the_solution_masha_stands_still():
    """Differences from an anchor at z* are nothing, whatever the compressor draws."""
    with jax.enable_x64(True):
        made = bilinear(np.random.default_rng(1), workers=WORKERS, d=D)
        data = jax.tree.map(jnp.asarray, made)
        z = jnp.concatenate([jnp.asarray(x) for x in made.solution])
        way = Way("plain", random_k(0.3))
        mean = compressed_mean(way, down=way, workers=WORKERS)
        method = masha(operator, mean, rate=0.5, tau=0.7, workers=WORKERS)
        np.testing.assert_allclose(many(method, data, z, 20).z, z, atol=1e-13)


def test_what_feedback_keeps_is_what_the_iterate_lacks():
    """z' - rate (mean e' + owners' e') = z_h - rate (mean e + owners' e + exact)."""
    with jax.enable_x64(True):
        made = bilinear(np.random.default_rng(2), workers=WORKERS, d=D)
        data = jax.tree.map(jnp.asarray, made)
        way, rate, tau = Way("masha2", top_k(0.3)), 0.5, 0.7
        mean = compressed_mean(way, down=way, workers=WORKERS)
        method = masha(operator, mean, rate=rate, tau=tau, workers=WORKERS)

        def kept(state):
            e = state.mean.up.worker.per_worker_mean.e.mean(0)
            return e + state.mean.down.e.over_workers.reshape(-1)[: 2 * D]

        def each(z):
            return jax.vmap(operator, in_axes=(None, 0))(z, data)

        before = many(method, data, jnp.ones(2 * D), 7)
        after = many(method, data, jnp.ones(2 * D), 8)
        middle = tau * before.z + (1 - tau) * after.w - rate * after.whole
        exact = (each(middle) - each(after.w)).mean(0)
        np.testing.assert_allclose(
            after.z - rate * kept(after),
            middle - rate * (kept(before) + exact),
            atol=1e-13,
        )


def test_a_saddle_gives_its_operator():
    data, _ = problem()
    one = jax.tree.map(lambda x: x[0], data)

    def game(x, y, of):
        linear = x @ of.A @ y + of.a @ x + of.b @ y
        return linear + of.lam / 2 * (x @ x - y @ y)

    z = jnp.linspace(-1, 1, 2 * D)
    found = jnp.concatenate(saddle(game)((z[:D], z[D:]), one))
    np.testing.assert_allclose(found, operator(z, one), atol=1e-5)


def test_tau_is_a_chance():
    with pytest.raises(ValueError, match=r"tau: 1\.0"):
        masha(operator, compressed_mean(PLAIN, workers=2), rate=1.0, tau=1.0, workers=2)
