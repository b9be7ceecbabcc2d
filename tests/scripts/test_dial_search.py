"""One budget for every method: the same points and runs, choices by validation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.data.tables import friedman, split
from narrows.ib.objectives.table import make_objective
from narrows.scripts.bottleneck_study import Network, Shape, predict, stacked, task_of
from narrows.scripts.dial_search import (
    PLAIN,
    SEARCH,
    SWEEP,
    Method,
    at_half,
    search_dials,
    tuned,
)
from narrows.scripts.reproductions.cs_ib import METHODS, SCALES, TAILED

pytestmark = pytest.mark.usefixtures("quick_compilation")
RATES = (1e-3, 1e-2)
SHAPE = Shape(Network(width=8, code=3), batch=16, epochs=4)
QUIET = make_objective("cs_ib")


def widths(dials):
    return make_objective("cs_ib", width_x=dials.first, width_y=dials.second)


OURS = Method(widths, (0.01, 10.0), (0.5, 2.0), (0.5, 4.0))


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_search_at_the_same_points_within_their_ranges(name):
    method = METHODS[name]
    dials, ours = search_dials(method, RATES), search_dials(OURS, RATES)
    np.testing.assert_array_equal(dials.learning_rate, ours.learning_rate)
    np.testing.assert_array_equal(dials.beta == 0, [True] * PLAIN + [False] * 2)
    share = np.log(dials.beta[PLAIN:] / method.beta[0])
    share /= np.log(method.beta[1] / method.beta[0])
    other = np.log(ours.beta[PLAIN:] / 0.01) / np.log(1000)
    np.testing.assert_allclose(share, other)
    for values, (low, high) in (
        (dials.learning_rate, RATES),
        (dials.first, method.first),
        (dials.second, method.second),
    ):
        assert np.all((values >= low * (1 - 1e-9)) & (values <= high * (1 + 1e-9)))


@pytest.fixture(scope="module")
def tasks():
    parts = (split(friedman(200, seed=s), seed=s, rows=64) for s in (0, 1))
    return stacked([task_of(part, 10, 30) for part in parts])


def test_the_sweep_goes_on_where_the_search_validated_best(tasks):
    found = tuned(OURS, tasks, 3, RATES, SHAPE)
    runs, dials = found
    assert runs.valid.shape == (2, SEARCH + SWEEP) == dials.beta.shape
    best = np.asarray(runs.valid)[:, :SEARCH].argmin(1)
    for task, run in enumerate(best):
        for name in ("learning_rate", "first", "second"):
            values = getattr(dials, name)[task]
            assert np.all(values[SEARCH:] == values[run])
        np.testing.assert_allclose(
            dials.beta[task, SEARCH:], [0, 0.01, 0.1, 1, 10], rtol=1e-6
        )
        kept = runs.compression[task, SEARCH:]
        assert kept[-1] < kept[0]
    chosen = found.best()
    assert np.array_equal(chosen, np.asarray(runs.valid).argmin(1))
    plain = found.best(dials.beta == 0)
    assert np.all(np.take_along_axis(dials.beta, plain[:, None], 1) == 0)
    params = jax.tree.map(lambda a: a[1, chosen[1]], runs.params)
    error = predict(params, tasks.test_x[1], QUIET) - tasks.test_y[1]
    rmse = jnp.sqrt(jnp.square(error).mean())
    np.testing.assert_allclose(found.rmse(chosen)[1], rmse, rtol=1e-5)


def test_long_tails_are_judged_by_absolute_error(tasks):
    """A method without a penalty spends the same number of runs on learning rates."""
    shape = SHAPE._replace(absolute=True)
    found = tuned(TAILED["huber"], tasks, 0, RATES, shape)
    assert found.dials.beta.shape == (2, SEARCH + SWEEP)
    assert np.all(found.dials.beta == 0)
    for row in found.dials.learning_rate:
        assert len(set(np.round(row, 9))) >= SEARCH + SWEEP - 1
    best = found.best()
    params = jax.tree.map(lambda a: a[0, best[0]], found.runs.params)
    error = predict(params, tasks.valid_x[0], QUIET) - tasks.valid_y[0]
    said = found.runs.valid[0, best[0]]
    np.testing.assert_allclose(said, jnp.abs(error).mean(), rtol=1e-5)


def test_every_scale_leaves_room_for_a_digit():
    for scale in SCALES.values():
        assert scale.features >= scale.side**2
        assert scale.rows % scale.shape.batch == 0


def test_half_of_the_information_is_read_along_the_betas():
    information, rmse = np.array([8.0, 6, 2, 0]), np.array([1.0, 1.2, 2.0, 3.0])
    assert at_half(information, rmse) == pytest.approx(1.6)  # r = 0.25 and 0.75
    assert at_half(np.array([8.0, 7]), rmse[:2]) == 1.2  # half is never reached
