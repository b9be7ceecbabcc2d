"""Laws of the plane: known layers, agreement of estimators, a recorder that waits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.ib import information_plane as plane
from narrows.ib.estimators.kde import kde_pair, kde_sampled


@pytest.fixture(scope="module")
def patterns():
    return jnp.array((np.arange(256)[:, None] >> np.arange(8)) & 1, jnp.float32)


def bits(pair):
    return [plane.BITS * float(e.value) for e in pair]


@pytest.mark.parametrize("name", plane.PLANE)
def test_layers_that_are_known(name, patterns):
    """A constant holds nothing, a copy all, the parity one bit and all of it the label.

    Kernels' bounds meet where codes are far apart against the noise, or equal.
    """
    key, y = jax.random.key(0), patterns.sum(1).astype(int) % 2
    constant = bits(plane.PLANE[name](key, jnp.ones((256, 3)), y))
    copy = bits(plane.PLANE[name](key, patterns, y))
    parity = bits(plane.PLANE[name](key, y[:, None].astype(jnp.float32), y))
    assert constant == pytest.approx([0, 0], abs=1e-4)
    assert copy == pytest.approx([8, 1], abs=1e-3)
    assert parity == pytest.approx([1, 1], abs=1e-3)


def test_saturated_units_share_the_outermost_cell():
    h = jnp.array([[1.0], [0.999], [-1.0], [-0.99]])
    x_t, _ = plane.bins(jax.random.key(0), h, jnp.zeros(4, int))
    assert float(x_t.value) == pytest.approx(math.log(2), abs=1e-6)


def test_scaled_bins_do_not_see_a_scale():
    h = jax.random.normal(jax.random.key(1), (200, 3))
    y = jnp.arange(200) % 2
    once, again = (
        bits(plane.scaled_bins(jax.random.key(0), s * h, y)) for s in (1.0, 8.0)
    )
    assert once == again


def test_draws_of_the_noise_lie_between_the_bounds_and_agree_with_a_long_average():
    h = jax.random.normal(jax.random.key(2), (80, 2))
    y, noise = jnp.arange(80) % 3, 0.1
    keys = jax.random.split(jax.random.key(3), 300)
    x_t, t_y = jax.vmap(lambda k: kde_sampled(k, h, noise, labels=y))(keys)
    t = np.asarray(h)[None] + math.sqrt(noise) * np.random.default_rng(0).normal(
        size=(300, 80, 2)
    )
    gaps = np.square(t[:, :, None] - np.asarray(h)).sum(-1)
    density = np.exp(-gaps / (2 * noise))
    own = np.exp(-np.square(t - np.asarray(h)).sum(-1) / (2 * noise))
    same = np.asarray(y)[:, None] == np.asarray(y)
    within = (density * same).sum(-1) / same.sum(1)
    wanted = np.log(own / density.mean(-1)).mean()
    wanted_y = np.log(within / density.mean(-1)).mean()
    assert float(x_t.value.mean()) == pytest.approx(wanted, abs=0.03)
    assert float(t_y.value.mean()) == pytest.approx(wanted_y, abs=0.03)
    low, high = (kde_pair(h, noise, y, bound=b) for b in ("lower", "upper"))
    assert low[0].value < wanted < high[0].value
    assert abs(high[1].value - wanted_y) < 0.25  # no bound: near
    with pytest.raises(ValueError, match="bound"):
        kde_pair(h, noise, y, bound="middle")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def test_outputs_of_every_module_by_path(patterns):
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    found = plane.layer_outputs(model, patterns)
    assert set(found) == {"", "first", "last"}
    assert jnp.array_equal(found["first"], model.first(patterns))
    assert jnp.array_equal(found[""], model(patterns))
    after = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, after))


def test_a_recorder_sees_what_a_call_by_hand_sees(patterns):
    """Also where the weights have moved on before anything was estimated."""
    y = patterns[:, 0].astype(int)
    model = Net(nnx.Rngs(1))
    recorder = plane.Recorder(patterns, y, steps=(0, 2), estimators=("bins", "noisy"))
    for step in range(3):
        recorder(step, model)
        model.first.kernel[...] = 0.5 * model.first.kernel[...]
    points = recorder.points()
    assert len(points) == 2 * 3 * 2
    assert {p.step for p in points} == {0, 2}
    fresh = Net(nnx.Rngs(1))
    h = plane.layer_outputs(fresh, patterns)["first"]
    wanted = bits(plane.bins(jax.random.key(0), h, y))
    (first,) = [p for p in points if p[:3] == (0, "first", "bins")]
    assert [first.x_t, first.t_y] == pytest.approx(wanted, abs=1e-5)
    (later,) = [p for p in points if p[:3] == (2, "first", "bins")]
    assert later.x_t < first.x_t  # a quarter of the weights: fewer cells


def test_gradients_of_batches_agree_or_not():
    g = np.random.default_rng(0).normal(1.0, 2.0, size=(50, 3, 4)).astype(np.float32)
    w = np.full((3, 4), 2.0, np.float32)
    found = plane.gradient_phase(jnp.asarray(g), jnp.asarray(w))
    mean, deviation = np.linalg.norm(g.mean(0)), np.linalg.norm(g.std(0))
    wanted = [mean / np.linalg.norm(w), deviation / np.linalg.norm(w), mean / deviation]
    assert [float(v) for v in found] == pytest.approx(wanted, rel=1e-5)


def test_steps_are_even_in_their_logarithm():
    steps = plane.log_steps(10_000, 9)
    assert steps[0] == 0
    assert steps[-1] == 10_000
    assert steps == tuple(sorted(set(steps)))
    ratios = np.diff(np.log(steps[2:]))
    assert np.ptp(ratios) < 0.2


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda h, y: plane.scaled_bins(None, h, y, width=0.0), "width"),
        (lambda h, y: plane.bins(None, h, y, count=0), "bins"),
        (lambda h, y: plane.noisy(None, h, y, noise=0.0), "noise"),
        (lambda h, y: plane.Recorder(h, y[:3], steps=(1,)), "labels"),
        (lambda h, y: plane.Recorder(h, y, steps=(1,), estimators=("x",)), "estima"),
        (lambda h, y: plane.log_steps(0, 3), "last"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call(jnp.ones((10, 2)), jnp.zeros(10, int))
