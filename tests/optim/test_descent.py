"""Descent by links in float64: exact laws, and who reaches the solution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data.quadratics import Quadratics, quadratics
from narrows.optim.compressed_mean import PLAIN, Way, compressed_mean
from narrows.optim.compression import bits, identity, payload_of
from narrows.optim.compressors import make_compressor
from narrows.optim.links import econtrol, init_link, make_link, send
from narrows.optim.sparse import random_k, top_k
from narrows.parallel.state import simulate
from narrows.scripts.client_descent import descent

CLIENTS, D = 6, 20


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def gradient(x, client, key):
    del key
    a, c = client
    return a * (x - c)


def problem(seed=0):
    rng = np.random.default_rng(seed)
    return quadratics(rng, clients=CLIENTS, d=D, heterogeneity=3.0)


@functools.cache
def descend(link, compressor, rate=0.1, rounds=2000):
    """|grad|^2 and the largest error of the virtual step, at every round."""
    p = Quadratics(*(jnp.asarray(x) for x in problem()))

    def record(before, after):
        old, new = (s.mean.up.worker.per_worker_mean.e for s in (before, after))
        law = jnp.zeros(())
        if not isinstance(old, tuple):
            moved = after.x - rate * new.mean(0) - (before.x - rate * old.mean(0))
            law = jnp.abs(moved + rate * p.gradients(before.x).mean(0)).max()
        return jnp.sum(p.gradients(after.x).mean(0) ** 2), law

    mean = compressed_mean(Way(link, compressor), workers=CLIENTS, topology="gather")
    run = descent(gradient, mean, clients=CLIENTS, rounds=rounds, record=record)
    start = jnp.zeros(D)
    return jax.jit(run)(tuple(p), start, rate, jax.random.key(0))


TOP, RANDOM = top_k(0.2), random_k(0.2)
CONTROL = econtrol(0.2)


def test_a_damped_part_of_the_error_reaches_the_solution():
    """arXiv:2311.05645: exact at eta = delta, where feedback alone has a floor."""
    squares, law = descend(CONTROL, TOP)
    assert squares[-1] < 1e-26
    assert law.max() < 1e-13  # y = x - gamma mean e takes the step of the exact mean
    squares, law = descend("feedback", TOP)
    assert squares[-200:].min() > 1e-4
    assert law.max() < 1e-13


def test_all_of_the_error_overflows():
    assert not descend(econtrol(1.0), TOP)[0].max() < 1e50


def test_none_of_the_error_is_ef21():
    ours, theirs = descend(econtrol(0.0), TOP)[0], descend("ef21", TOP)[0]
    np.testing.assert_array_equal(ours, theirs)
    assert theirs[-1] < 1e-26


def test_diana_takes_the_variance_out_of_an_unbiased_compressor():
    """arXiv:1901.09269: differences vanish at the solution, and with them the noise."""
    assert descend("diana", RANDOM, 0.1)[0][-1] < 1e-24
    assert descend("plain", RANDOM, 0.1)[0][-200:].min() > 1e-2


@pytest.mark.parametrize("topology", ["gather", "two_phase", "dense"])
def test_known_signals_need_no_message(topology):
    """Where every h starts at the signals, the mean is exact and h stays."""
    signals = jax.random.normal(jax.random.key(0), (CLIENTS, D))
    weights = jnp.linspace(0.5, 1.5, CLIENTS)
    mean = compressed_mean(Way("ef21", TOP), workers=CLIENTS, topology=topology)
    state = mean.init(signals[0], first=signals, weights=weights)

    def worker(g, state):
        return mean.mean(g, state, jax.random.key(1), weights=weights)

    out, after = simulate(worker, workers=CLIENTS, axis_name="data")(signals, state)
    exact = (signals * weights[:, None]).mean(0)
    np.testing.assert_allclose(out, jnp.tile(exact, (CLIENTS, 1)), atol=1e-14)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), after, state
    )
    assert out.dtype == jnp.float64


@pytest.mark.parametrize("name", ["identity", "top_k", "blocked_top_k", "random_k"])
def test_double_precision_is_kept(name):
    c = make_compressor(name, **({} if name == "identity" else {"ratio": 0.5}))
    x = jax.random.normal(jax.random.key(0), (8,))
    assert x.dtype == jnp.float64
    out = c.decode(c.encode(jax.random.key(1), x), (8,))
    factor = 2 if name == "random_k" else 1
    np.testing.assert_array_equal(out, jnp.where(out == 0, 0, factor * x))
    assert out.dtype == jnp.float64
    values = max(
        leaf.dtype.itemsize
        for leaf in jax.tree.leaves(payload_of(c, (8,), jnp.float64))
    )
    assert values == 8
    assert bits(c, (8,)) < 8 * sum(
        leaf.nbytes for leaf in jax.tree.leaves(c.encode(jax.random.key(1), x))
    )


def test_a_link_remembers_in_the_signals_precision():
    link = make_link(CONTROL, TOP, (D,))
    g = jax.random.normal(jax.random.key(0), (D,))
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        wide = jnp.promote_types(dtype, jnp.float32)
        state = init_link(link, (D,), dtype=wide)
        _, est, state = send(link, jax.random.key(0), state, g.astype(dtype))
        assert {x.dtype for x in jax.tree.leaves((est, state))} == {jnp.dtype(wide)}


def test_whole_messages_of_doubles_are_counted_as_such():
    mean = compressed_mean(PLAIN, workers=4, topology="gather")
    single, double = (
        mean.sent_bits(jax.ShapeDtypeStruct((D,), dtype))
        for dtype in (jnp.float32, jnp.float64)
    )
    assert (single, double) == (3 * 32 * D, 3 * 64 * D)
    exact, _ = simulate(
        lambda g, s: mean.mean(g, s, jax.random.key(0)), workers=4, axis_name="data"
    )(jnp.ones((4, D)) / 3, mean.init(jnp.zeros(D)))
    np.testing.assert_array_equal(exact, jnp.ones((4, D)) / 3)
    assert identity().promise((D,)).delta == 1


def test_eta_is_a_part():
    with pytest.raises(ValueError, match=r"eta: 1\.5"):
        econtrol(1.5)
