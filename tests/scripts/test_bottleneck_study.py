"""The study of regressors: runs that do not see each other, best epochs, attacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data.tables import friedman, split
from narrows.ib.objectives.protocol import loss_of
from narrows.ib.objectives.table import make_objective
from narrows.scripts import blob_study
from narrows.scripts.bottleneck_study import (
    Dials,
    Network,
    Shape,
    attack,
    attacked_mse,
    init,
    predict,
    sample,
    task_of,
    train,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE = Shape(Network(width=8, code=3), batch=16, epochs=6, together=4)
BETAS = (0.0, 0.1, 10.0, 0.1)
VIB = make_objective("vib")


def vib(dials):
    return VIB


def dials_of(betas, rates=1e-2):
    ones = jnp.ones(len(betas))
    return Dials(jnp.array(betas), rates * ones, ones, ones)


@pytest.fixture(scope="module")
def tasks():
    parts = split(friedman(200, seed=0), seed=0, rows=64)
    one = task_of(parts, 12, 30)
    return jax.tree.map(lambda leaf: np.stack([leaf, leaf[::-1]]), one)


@pytest.fixture(scope="module")
def runs(tasks):
    which, seeds = jnp.array([0, 0, 1, 1]), jnp.array([3, 3, 4, 3])
    return train(tasks, which, dials_of(BETAS), seeds, shape=SHAPE, method=vib)


def test_a_run_does_not_depend_on_what_runs_beside_it(tasks, runs):
    """The last run, among others on another task, with other betas and seeds."""
    which, seeds = jnp.array([1, 1, 0, 1]), jnp.array([7, 8, 9, 3])
    rates = jnp.array([1e-3, 1e-1, 1e-2, 1e-2])
    dials = dials_of((1.0, 0.5, 0.0, BETAS[3]), rates)
    again = train(tasks, which, dials, seeds, shape=SHAPE, method=vib)
    for a, b in zip(*map(jax.tree.leaves, (again, runs)), strict=True):
        np.testing.assert_allclose(a[3], b[3], rtol=1e-5, atol=1e-6)
    assert not np.allclose(runs.test_mse[0], runs.test_mse[1])
    assert not np.allclose(again.test_mse[:3], runs.test_mse[:3])


def test_what_is_kept_is_the_epoch_that_validates_best(tasks, runs):
    params = jax.tree.map(lambda a: a[1], runs.params)
    for x, y, said in (
        (tasks.valid_x[0], tasks.valid_y[0], runs.valid[1]),
        (tasks.test_x[0], tasks.test_y[0], runs.test_mse[1]),
    ):
        error = jnp.mean(jnp.square(predict(params, x, VIB) - y))
        np.testing.assert_allclose(error, said, rtol=1e-5)
    assert np.all(runs.epoch < SHAPE.epochs)
    assert runs.compression[2] < runs.compression[1] < runs.compression[0]


@pytest.mark.parametrize("steps", [1, 5])
def test_an_attack_keeps_to_its_radius_and_leaves_padding_alone(tasks, runs, steps):
    params = jax.tree.map(lambda a: a[0], runs.params)
    x, y = tasks.test_x[0], tasks.test_y[0]
    options = {"radius": 0.2, "step": 0.2 if steps == 1 else 0.05, "steps": steps}
    z = attack(params, jnp.asarray(x), y, VIB, **options)
    moved = np.abs(z - x)
    assert moved.max() <= 0.2 + 1e-6
    assert np.all(moved[:, 10:] == 0)
    before, after = (jnp.square(predict(params, a, VIB) - y).mean() for a in (x, z))
    assert after > before
    radii = jnp.array([0.0, 0.2])
    one = jax.tree.map(lambda a: a[:1], runs.params)
    said = attacked_mse(one, tasks, jnp.array([0]), radii, objective=VIB, steps=steps)[
        0
    ]
    np.testing.assert_allclose(said, [before, after], rtol=1e-4)


def test_an_input_far_from_all_others_leaves_a_loss_finite(tasks, quick_jit):
    """A thousand deviations away softplus is 0 in float32, and its logarithm -inf."""
    params = init(jax.random.key(0), 12, SHAPE.network, VIB)
    x = jnp.asarray(tasks.x[0]).at[0].set(1e5)

    def loss(params, beta):
        seen = sample(params, x, tasks.y[0], jax.random.key(1), VIB)
        return loss_of(VIB, seen, beta).loss

    value, slope = quick_jit(jax.value_and_grad(loss))(params, 0.0)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(slope))


def test_a_split_of_more_features_is_refused():
    with pytest.raises(ValueError, match="features: 4, but the split has 10"):
        task_of(split(friedman(40, seed=0), seed=0), 4, 10)


def test_networks_of_all_widths_are_one_program(quick_jit):
    """Padding learns nothing, and a padded network is the narrow one."""
    narrow, wide = blob_study.start(0, 4, 4), blob_study.start(0, 4, 8)
    assert blob_study.parameters(4) == sum(a.size for a in jax.tree.leaves(narrow))
    x, key, y = jnp.ones((3, 2)), jax.random.key(0), jnp.arange(3)

    def loss(params):
        return blob_study.cross_entropy(blob_study.logits_of(params, x, key)[0], y)

    value, slope = quick_jit(jax.value_and_grad(loss))(wide)
    np.testing.assert_allclose(quick_jit(loss)(narrow), value, rtol=1e-6)
    for (w, b), (v, _) in zip(slope["mean"], wide["mean"], strict=True):
        unused = np.all(v == 0, axis=0)
        assert np.all(w[:, unused] == 0)
        assert np.all(b[unused] == 0)
