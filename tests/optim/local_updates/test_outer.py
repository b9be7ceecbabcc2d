"""Outer steps: their traces by hand, and where they are stable."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.optim.local_updates.outer import (
    OUTERS,
    clipped_trace,
    gap_penalty,
    is_stable,
    make_outer,
    relative_gap,
    rms,
)

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(2)}


def test_rms_is_over_all_numbers_of_a_tree():
    numbers = np.array([0, 1, 2, 3, 4, 5, 2])
    assert rms(TREE) == pytest.approx(math.sqrt((numbers**2).mean()), rel=1e-6)


def test_the_gap_penalty_by_hand():
    """S_1 = 3, Lambda = 1; S_2 = (.9 .1 3 + .1 5) / (1 - .81), Lambda = 1 + 2 / S_2."""
    tx = gap_penalty(decay=0.9)
    state = tx.init(jnp.zeros(4))
    first, state = tx.update(jnp.full(4, 3.0), state, moved=jnp.float32(0))
    np.testing.assert_allclose(first, 3.0, rtol=1e-6)
    second, state = tx.update(jnp.full(4, 5.0), state, moved=jnp.float32(2))
    usual = (0.9 * 0.1 * 3 + 0.1 * 5) / (1 - 0.9**2)
    np.testing.assert_allclose(second, 5 / (1 + 2 / usual), rtol=1e-5)


def test_a_gap_is_never_below_one():
    for moved, usual in ((0, 0), (0, 1), (5, 0), (5, 1)):
        assert relative_gap(jnp.float32(moved), jnp.float32(usual)) >= 1


def test_what_the_clipped_trace_keeps_is_clipped():
    """Clip after every step: 0.9 x 1 - 0.5, not 0.9 x 4 - 0.5 clipped."""
    tx = clipped_trace(0.9, 1.0)
    state = tx.init(jnp.zeros(2))
    first, state = tx.update(jnp.array([4.0, -0.5]), state)
    np.testing.assert_allclose(first, [1.0, -0.5])
    second, _ = tx.update(jnp.array([-0.5, -0.25]), state)
    np.testing.assert_allclose(second, [0.4, -0.7], rtol=1e-6)


def rounds_on_a_quadratic(outer, contraction, rounds):
    """|x| after rounds that shrink x by 1 - rho; d is that of the round before."""

    def one(carry, _):
        x, waiting, state = carry
        d = contraction * x
        arrived = waiting if outer.stale else d
        moved, state = outer.tx.update(arrived, state, x, moved=jnp.zeros(()))
        return (x + moved, d, state), jnp.abs(x)

    x = jnp.ones(())
    start = x, jnp.zeros(()), outer.tx.init(x)
    return jax.lax.scan(one, start, None, length=rounds)[1]


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("stale", [True, False])
def test_the_stability_law_on_both_sides(momentum, stale):
    """5 % below the bound on kappa errors end, 5 % above it they grow."""
    contraction = 1 - (1 - 0.5 * 0.6) ** 12
    bound = 1 - momentum if stale else 2 * (1 + momentum)
    for factor, settles in ((0.95, True), (1.05, False)):
        rate = factor * bound / contraction
        if stale:
            options = {"clip": math.inf, "gap": lambda moved, usual: jnp.ones(())}
            outer = make_outer("co2", rate=rate, momentum=momentum, **options)
        else:
            outer = make_outer("slowmo", rate=rate, momentum=momentum)
        assert is_stable(rate, momentum, contraction, 1.0, stale=stale) == settles
        trace = rounds_on_a_quadratic(outer, contraction, 3000)
        late, early = trace[-50:].max(), trace[:50].max()
        assert (late < 1e-3 * early) if settles else not (late < 1e3 * early)


def test_a_penalty_brings_back_what_is_unstable():
    rate, momentum, contraction = 1.0, 0.5, 0.999
    assert not is_stable(rate, momentum, contraction, 1.0, stale=True)
    for penalty, settles in ((2.1, True), (1.9, False)):
        outer = make_outer(
            "co2",
            rate=rate,
            momentum=momentum,
            clip=math.inf,
            gap=lambda moved, usual, penalty=penalty: jnp.float32(penalty),
        )
        assert is_stable(rate, momentum, contraction, penalty, stale=True) == settles
        trace = rounds_on_a_quadratic(outer, contraction, 1500)
        assert (trace[-1] < 1e-3) if settles else (trace[-1] > 1e3)


@pytest.mark.parametrize("name", list(OUTERS))
def test_every_method_keeps_shapes_and_goes_downhill(name):
    outer = make_outer(name)
    state = outer.tx.init(TREE)
    step = jax.jit(lambda d, s, x: outer.tx.update(d, s, x, moved=jnp.float32(0)))
    updates, new = step(TREE, state, TREE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (updates, new)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (TREE, state)
    )
    assert optax.tree.vdot(updates, TREE) < 0


def test_bad_arguments_are_refused():
    for name, options, said in (
        ("local_sdg", {}, "outer: 'local_sdg', but allowed are local_sgd"),
        ("co2", {"rate": 0.0}, "rate: 0.0"),
        ("diloco", {"momentum": 1.0}, "momentum: 1.0"),
        ("local_sgd", {"momentum": 0.5}, "is slowmo"),
    ):
        with pytest.raises(ValueError, match=said):
            make_outer(name, **options)
