"""MASHA reaches saddle points where compressed extragradient stalls.

Problem B: mean_m x^T A_m y + a_m^T x + b_m^T y + (|x|^2 - |y|^2) / 20, A_m of norm 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.optim.compressed_mean import PLAIN, Way, compressed_mean
from narrows.optim.masha import masha
from narrows.optim.sparse import random_k, top_k
from narrows.parallel.state import simulate

WORKERS, D = 5, 25


def problem():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(WORKERS, D, D))
    a = g @ g.transpose(0, 2, 1)
    a /= np.linalg.norm(a, 2, axis=(1, 2))[:, None, None]
    data = {
        "A": a,
        "a": rng.normal(size=(WORKERS, D)),
        "b": rng.normal(size=(WORKERS, D)),
    }
    mean = {k: v.mean(0) for k, v in data.items()}
    system = np.block([[0.1 * np.eye(D), mean["A"]], [-mean["A"].T, 0.1 * np.eye(D)]])
    solution = np.linalg.solve(system, np.concatenate([-mean["a"], mean["b"]]))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), data), solution


def operator(z, data):
    x, y = z[:D], z[D:]
    down = data["A"] @ y + data["a"] + 0.1 * x
    up = data["A"].T @ x + data["b"] - 0.1 * y
    return jnp.concatenate([down, -up])


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

    def compressed_extragradient(data, carry):
        """The operator itself is compressed, at both of its points."""
        z, state, count = carry
        key = jax.random.fold_in(jax.random.key(0), count)
        first, state = mean.mean(operator(z, data), state, jax.random.fold_in(key, 0))
        second, state = mean.mean(
            operator(z - rate * first, data), state, jax.random.fold_in(key, 1)
        )
        return 0.0, (z - rate * second, state, count + 1)

    def anchored_step(data, state):
        return 0.0, method.step(data, state)

    start = jnp.zeros(2 * D)
    if anchored:
        worker, carry = anchored_step, method.init(start)
    else:
        worker, carry = compressed_extragradient, (start, mean.init(start), 0)
    go = simulate(worker, workers=WORKERS, axis_name="data")
    end = jax.jit(
        lambda c: jax.lax.fori_loop(0, steps, lambda _, c: go(data, c)[1], c)
    )(carry)
    z = np.asarray(end.z if anchored else end[0], np.float64)
    return np.sum((z - solution) ** 2) / np.sum(solution**2)


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


def test_tau_is_a_chance():
    with pytest.raises(ValueError, match=r"tau: 1\.0"):
        masha(operator, compressed_mean(PLAIN, workers=2), rate=1.0, tau=1.0, workers=2)
