"""Links: one recursion whose rows keep their papers' promises.

Problem Q has n clients f_i(x) = 1/2 sum_j a_ij (x_j - c_ij)^2 of unlike curvature and
minima, so that every client's gradient at the solution is far from zero.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.optim.compression import identity
from narrows.optim.compressors import make_compressor
from narrows.optim.links import LINKS, Link, init_link, make_link, receive, send
from narrows.optim.quantizers import blocks
from narrows.optim.sparse import random_k, top_k

few = settings(max_examples=5, deadline=None, derandomize=True, database=None)
WIDTH = 24
SENT_BY = {"delta": top_k(1 / 6), "omega": random_k(1 / 6), None: top_k(1 / 6)}
MEMBERS = [n for n in LINKS if n != "difference"]


def link_of(name, shape=(WIDTH,)):
    return make_link(name, SENT_BY[LINKS[name].needs], shape)


@functools.cache
def sequence(name, steps):
    """Send signals one after the other: states, estimates, and the receiver's."""
    link = link_of(name)

    def run(signals, h):
        def step(carry, xs):
            state, there = carry
            i, g = xs
            payload, est, state = send(link, jax.random.key(i), state, g)
            sent = link.compressor.decode(payload, g.shape)
            heard, there = receive(link, there, sent)
            return (state, there), (est, heard, state, there)

        start = init_link(link, (WIDTH,), h)
        carry = start, start.h
        return jax.lax.scan(step, carry, (jnp.arange(steps), signals))[1]

    return jax.jit(run)


def signals(seed, steps):
    return jax.random.normal(jax.random.key(seed), (steps, WIDTH))


@pytest.mark.parametrize("name", list(LINKS))
@few
@given(seed=st.integers(0, 99))
def test_what_was_sent_and_what_is_kept_are_all_that_came_in(name, seed):
    g = signals(seed, 12)
    ests, _, states, _ = sequence(name, 12)(g, jnp.zeros(WIDTH))
    missing = np.asarray(jnp.cumsum(g - ests, 0))
    if isinstance(states.e, tuple):
        assert not LINKS[name].numbers(0.5)[0]  # no eta, and no memory spent on it
    else:
        # Each step rounds e once, to within half a unit of its largest value.
        size = float(jnp.abs(states.e).max() + jnp.abs(g).max())
        np.testing.assert_allclose(states.e, missing, atol=40 * 1.2e-7 * size)


@pytest.mark.parametrize("name", list(LINKS))
def test_the_receiver_mirrors_the_sender_bit_for_bit(name):
    ests, heard, states, there = sequence(name, 12)(signals(3, 12), jnp.ones(WIDTH))
    np.testing.assert_array_equal(ests, heard)
    jax.tree.map(np.testing.assert_array_equal, states.h, there)


@pytest.mark.parametrize("name", list(LINKS))
def test_an_uncompressed_link_gives_the_signal(name):
    numbers = LINKS[name].numbers(1.0 if LINKS[name].needs == "delta" else 0.0)
    link = Link(identity(), *numbers)
    state = init_link(link, (WIDTH,))
    for i, g in enumerate(signals(1, 4)):
        _, est, state = send(link, jax.random.key(i), state, g)
        np.testing.assert_allclose(est, g, atol=1e-6)
        if link.eta:
            np.testing.assert_allclose(state.e, 0, atol=1e-6)


@few
@given(seed=st.integers(0, 99))
def test_a_constant_signal_is_learned(seed):
    """EF21: |h - g|^2 shrinks by 1 - delta a step. EControl: e -> 0 and h -> g."""
    g = jnp.broadcast_to(signals(seed, 1), (400, WIDTH))
    delta = 1 / 6
    _, _, ef21, _ = sequence("ef21", 400)(g, jnp.zeros(WIDTH))
    gaps = np.asarray(jnp.sum((ef21.h - g) ** 2, -1), np.float64)
    bound = (1 - delta) ** np.arange(1, 401) * float(jnp.sum(g[0] ** 2))
    assert (gaps <= bound * (1 + 1e-5) + 1e-12).all()
    _, _, control, _ = sequence("econtrol", 400)(g, jnp.zeros(WIDTH))
    np.testing.assert_allclose(control.h[-1], g[0], atol=1e-4)
    np.testing.assert_allclose(control.e[-1], 0, atol=1e-3)
    # Classic feedback has the right mean, and errors within 4 (1 - delta) / delta^2.
    ests, _, classic, _ = sequence("feedback", 400)(g, jnp.zeros(WIDTH))
    last = np.asarray(classic.e[-1])
    np.testing.assert_allclose(ests.mean(0) - g[0], -last / 400, atol=1e-5)
    squares = jnp.sum(classic.e**2, -1)
    assert squares.max() <= 4 * (1 - delta) / delta**2 * jnp.sum(g[0] ** 2)


@pytest.mark.parametrize("name", list(LINKS))
def test_scaling_all_signals_scales_all_states(name):
    one = sequence(name, 12)(signals(2, 12), jnp.zeros(WIDTH))
    two = sequence(name, 12)(1024 * signals(2, 12), jnp.zeros(WIDTH))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(1024 * a, b), one, two)


@pytest.mark.parametrize("name", list(LINKS))
def test_who_takes_no_part_sends_nothing_and_keeps_all(name):
    link = link_of(name)
    state = init_link(link, (WIDTH,), jnp.ones(WIDTH))
    _, _, state = send(link, jax.random.key(0), state, signals(0, 1)[0])
    payload, est, same = send(link, jax.random.key(1), state, signals(1, 1)[0], False)
    assert not link.compressor.decode(payload, (WIDTH,)).any()
    jax.tree.map(np.testing.assert_array_equal, same, state)
    np.testing.assert_array_equal(est, link.a * state.h if link.a else jnp.zeros(WIDTH))


class Problem(NamedTuple):
    a: Any  # [n, d] curvatures
    c: Any  # [n, d] minima

    def gradients(self, x):
        return self.a * (x - self.c)

    @property
    def solution(self):
        return (self.a * self.c).sum(0) / self.a.sum(0)


def problem(seed, clients=10, d=30):
    rng = np.random.default_rng(seed)
    a = np.exp(-rng.uniform(0, 2, (clients, d)))
    c = 3 * rng.normal(size=(clients, d))
    return Problem(jnp.asarray(a, jnp.float32), jnp.asarray(c, jnp.float32))


@functools.cache
def descend(name, *, noise=0.0, rounds=2000, rate=0.1, ema=1.0):
    """Gap |x - x*|^2 at the end and its mean over the last half, by link."""
    compressor = blocks(4, block=8) if name == "int4" else top_k(0.1)
    link = make_link("plain" if name == "int4" else name, compressor, (30,))

    @jax.jit
    def run(p, key):
        def step(carry, i):
            x, v, states = carry
            g = p.gradients(x)
            g += noise * jax.random.normal(jax.random.fold_in(key, i), g.shape)
            v = (1 - ema) * v + ema * g
            keys = jax.random.split(jax.random.fold_in(key, -1 - i), len(g))
            _, ests, states = jax.vmap(functools.partial(send, link))(keys, states, v)
            x = x - rate * ests.mean(0)
            return (x, v, states), jnp.sum((x - p.solution) ** 2)

        g = p.gradients(jnp.zeros(p.a.shape[1]))
        states = jax.vmap(lambda g: init_link(link, g.shape, g))(g)
        start = jnp.zeros(p.a.shape[1]), g, states
        gaps = jax.lax.scan(step, start, jnp.arange(rounds))[1]
        return gaps[-1], gaps[rounds // 2 :].mean()

    return jax.jit(jax.vmap(run, in_axes=(0, None)))


def problems(count=6, **size):
    return jax.tree.map(
        lambda *x: jnp.stack(x), *(problem(i, **size) for i in range(count))
    )


def test_only_control_of_the_error_reaches_the_solution():
    """Without noise, by unlike clients: EF21 and EControl to rounding; classic feedback
    and compression alone stall; feeding all of the error back beside h diverges."""
    ends = {
        n: descend(n)(problems(), jax.random.key(0))[0]
        for n in ("ef21", "econtrol", "feedback", "plain", "difference")
    }
    assert ends["ef21"].max() < 1e-9
    assert ends["econtrol"].max() < 1e-9
    assert ends["feedback"].min() > 1e-5
    assert ends["plain"].min() > ends["feedback"].max()
    assert not (ends["difference"] < 1e20).any()


def test_control_averages_noise_over_clients_where_ef21_does_not():
    """arXiv:2311.05645: the noise floor falls with n; and the average of gradients
    before EF21 (SGDM, arXiv:2305.15155) helps it too."""
    floors = {}
    for label, name, ema in (
        ("econtrol", "econtrol", 1.0),
        ("ef21", "ef21", 1.0),
        ("sgdm", "ef21", 0.1),
    ):
        run = descend(name, noise=1.0, rate=0.02, ema=ema)
        for n in (4, 16):
            gap = run(problems(4, clients=n), jax.random.key(1))[1]
            floors[label, n] = float(gap.mean())
    for n in (4, 16):
        assert floors["econtrol", n] < 0.35 * floors["ef21", n]
        assert floors["sgdm", n] < 0.35 * floors["ef21", n]
    assert 2.5 < floors["econtrol", 4] / floors["econtrol", 16] < 6


def test_virtual_iterates_take_exact_steps():
    """y = x - gamma mean e obeys y' = y - gamma mean g, for every row that keeps e."""
    p, rate = problem(1), 0.05
    for name in ("feedback", "econtrol", "masha2"):
        link = make_link(name, top_k(0.1), (30,))
        states = jax.vmap(lambda _, link=link: init_link(link, (30,)))(p.a)
        x = jnp.zeros(30)
        for i in range(5):
            g = p.gradients(x)
            y = x - rate * states.e.mean(0)
            keys = jax.random.split(jax.random.key(i), len(g))
            _, ests, states = jax.vmap(functools.partial(send, link))(keys, states, g)
            x = x - rate * ests.mean(0)
            np.testing.assert_allclose(
                x - rate * states.e.mean(0), y - rate * g.mean(0), atol=1e-5
            )


def test_errors_say_what_is_needed():
    with pytest.raises(ValueError, match="allowed are plain"):
        make_link("ef14", top_k(), (3,))
    with pytest.raises(ValueError, match=r"promises no delta .* 'ef21' needs"):
        make_link("ef21", make_compressor("rms_sign"), (3,))
    with pytest.raises(ValueError, match=r"promises no omega .* 'diana' needs"):
        make_link("diana", top_k(), (3,))
