"""What passes a Gaussian channel: closed forms, order of the bounds, classes."""

import jax.numpy as jnp
import numpy as np
import pytest
from narrows.ib.channel import sampled_information

WEIGHTS = np.array([[1.0, 0.3], [-0.4, 0.8], [0.2, 0.1]])
SCALE = 0.7
EXACT = 0.5 * np.linalg.slogdet(np.eye(2) + WEIGHTS.T @ WEIGHTS / SCALE**2)[1]


def channel(n, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    mean = (rng.normal(size=(n, 3)) + shift) @ WEIGHTS
    code = mean + SCALE * rng.normal(size=(n, 2))
    return [jnp.asarray(a, jnp.float32) for a in (code, mean, np.full((n, 2), SCALE))]


def test_the_mixture_converges_to_the_closed_form_and_jensen_stays_above(quick_jit):
    """Of few rows it is low, of many near; log n is the ceiling of the first alone."""
    of = quick_jit(sampled_information, static_argnames="bound")
    few = np.mean([float(of(*channel(8, seed=s))) for s in range(40)])
    many = float(of(*channel(4000)))
    above = float(of(*channel(4000), bound="jensen"))
    assert few < many
    assert abs(many - EXACT) < 0.05
    assert above > EXACT + 0.1
    code, mean, _ = channel(64)
    sharp = jnp.full((64, 2), 1e-4)
    near = mean + 1e-4 * (code - mean)
    np.testing.assert_allclose(of(near, mean, sharp), np.log(64), 1e-3)
    assert of(near, mean, sharp, bound="jensen") > 1e5


@pytest.mark.parametrize("bound", ["mixture", "jensen"])
def test_given_the_class_only_what_the_class_does_not_say_is_counted(bound, quick_jit):
    """Classes far apart: I(x;t|y) is that of one, I(x;t) has log 3 more."""
    of = quick_jit(sampled_information, static_argnames=("bound", "block"))
    parts = [channel(200, shift=20.0 * c, seed=c) for c in range(3)]
    code, mean, scale = (jnp.concatenate(p) for p in zip(*parts, strict=True))
    labels = jnp.repeat(jnp.arange(3), 200)
    given = float(of(code, mean, scale, labels=labels, bound=bound))
    alone = [float(of(*p, bound=bound)) for p in parts]
    np.testing.assert_allclose(given, np.mean(alone), rtol=1e-4)
    if bound == "mixture":
        whole = float(of(code, mean, scale, bound=bound))
        np.testing.assert_allclose(whole, given + np.log(3), rtol=1e-3)
    mixed = np.random.default_rng(0).permutation(600)
    rows = (code[mixed], mean[mixed], scale[mixed])
    again = of(*rows, labels=labels[mixed], bound=bound, block=100)
    np.testing.assert_allclose(again, given, rtol=1e-4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="bound: 'upper'"):
        sampled_information(*[jnp.ones((2, 1))] * 3, bound="upper")
