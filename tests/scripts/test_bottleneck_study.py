"""The study of regressors: runs that do not see each other, best epochs, attacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data.tables import friedman, split
from narrows.ib.objectives.table import make_objective
from narrows.scripts.bottleneck_study import (
    Shape,
    attack,
    attacked_mse,
    predict,
    task_of,
    train,
)
from narrows.scripts.reproductions import ib_bounds
from narrows.scripts.reproductions.cs_ib import at_half

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE = Shape(width=8, code=3, batch=16, epochs=6, learning_rate=1e-2, together=4)
BETAS = (0.0, 0.1, 10.0, 0.1)
VIB = make_objective("vib")


@pytest.fixture(scope="module")
def tasks():
    parts = split(friedman(200, seed=0), seed=0, rows=64)
    one = task_of(parts, 12, 30)
    return jax.tree.map(lambda leaf: np.stack([leaf, leaf[::-1]]), one)


@pytest.fixture(scope="module")
def runs(tasks):
    which, seeds = jnp.array([0, 0, 1, 1]), jnp.array([3, 3, 4, 3])
    return train(tasks, which, jnp.array(BETAS), seeds, shape=SHAPE, objective=VIB)


def test_a_run_does_not_depend_on_what_runs_beside_it(tasks, runs):
    """The last run, among others on another task, with other betas and seeds."""
    which, seeds = jnp.array([1, 1, 0, 1]), jnp.array([7, 8, 9, 3])
    betas = jnp.array((1.0, 0.5, 0.0, BETAS[3]))
    again = train(tasks, which, betas, seeds, shape=SHAPE, objective=VIB)
    for a, b in zip(*map(jax.tree.leaves, (again, runs)), strict=True):
        np.testing.assert_allclose(a[3], b[3], rtol=1e-5, atol=1e-6)
    assert not np.allclose(runs.test_mse[0], runs.test_mse[1])
    assert not np.allclose(again.test_mse[:3], runs.test_mse[:3])


def test_what_is_kept_is_the_epoch_that_validates_best(tasks, runs):
    params = jax.tree.map(lambda a: a[1], runs.params)
    for x, y, said in (
        (tasks.valid_x[0], tasks.valid_y[0], runs.valid_mse[1]),
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


def test_half_of_the_information_is_read_along_the_betas():
    information, rmse = np.array([8.0, 6, 2, 0]), np.array([1.0, 1.2, 2.0, 3.0])
    assert at_half(information, rmse) == pytest.approx(1.6)  # r = 0.25 and 0.75
    assert at_half(np.array([8.0, 7]), rmse[:2]) == 1.2  # half is never reached


def test_a_split_of_more_features_is_refused():
    with pytest.raises(ValueError, match="features: 4, but the split has 10"):
        task_of(split(friedman(40, seed=0), seed=0), 4, 10)


def test_networks_of_all_widths_are_one_program(quick_jit):
    """Padding learns nothing, and a padded network is the narrow one."""
    narrow, wide = ib_bounds.start(0, 4, 4), ib_bounds.start(0, 4, 8)
    assert ib_bounds.parameters(4) == sum(a.size for a in jax.tree.leaves(narrow))
    x, key, y = jnp.ones((3, 2)), jax.random.key(0), jnp.arange(3)

    def loss(params):
        return ib_bounds.cross_entropy(ib_bounds.logits_of(params, x, key)[0], y)

    value, slope = quick_jit(jax.value_and_grad(loss))(wide)
    np.testing.assert_allclose(quick_jit(loss)(narrow), value, rtol=1e-6)
    for (w, b), (v, _) in zip(slope["mean"], wide["mean"], strict=True):
        unused = np.all(v == 0, axis=0)
        assert np.all(w[:, unused] == 0)
        assert np.all(b[unused] == 0)
