"""Laws of the bounds by critics, with critics known exactly and with fitted ones."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.ib import tasks
from narrows.ib.estimators import critics
from narrows.ib.estimators.fitted import fitted

INFORMATION, N, SEEDS = 0.7, 256, 32
RHO = math.sqrt(-math.expm1(-2 * INFORMATION))


def log_ratio(x, y):
    """log p(y_j | x_i) - log p(y_j) of a normal pair, [n, n], and log p(y_j)."""
    rest = 1 - RHO**2
    given = -jnp.square(y.T - RHO * x) / (2 * rest) - math.log(2 * math.pi * rest) / 2
    alone = -jnp.square(y.T) / 2 - math.log(2 * math.pi) / 2
    return given - alone, alone


@pytest.fixture(scope="module")
def ratios():
    keys = jax.random.split(jax.random.key(0), SEEDS)
    x, y = jax.vmap(lambda k: tasks.gaussian(1, INFORMATION).sample(k, N))(keys)
    return jax.vmap(log_ratio)(x, y)


@pytest.mark.parametrize("name", ["donsker_varadhan", "infonce", "nwj", "smile"])
def test_true_scores_give_the_information_within_the_stated_error(name, ratios):
    """The optimal critic, 32 seeds: the mean, and errors of the size that is stated."""
    scores = ratios[0]  # best for nwj too, whose f is 1 + s
    found = jax.vmap(getattr(critics, name))(scores)
    error = found.value.std() / math.sqrt(SEEDS)
    slack = 0.02 if name in ("infonce", "smile") else 0.0  # of finite n, of the clip
    assert abs(found.value.mean() - INFORMATION) < 4 * error + slack
    stated = found.standard_error.mean() / found.value.std()
    assert 0.6 < stated < 1.7
    assert found.converged.all()


def test_upper_bounds_with_the_true_conditional(ratios):
    """CLUB is exp(2 I) - 1 for normal pairs: far above; leave-one-out is close."""
    log_q = ratios[0] + ratios[1]
    club = jax.vmap(critics.club)(log_q)
    close = jax.vmap(critics.leave_one_out)(log_q)
    wanted = math.expm1(2 * INFORMATION)
    assert abs(club.value.mean() - wanted) < 4 * club.value.std() / math.sqrt(SEEDS)
    assert abs(close.value.mean() - INFORMATION) < 0.05
    assert (club.direction == 1).all()
    assert (club.value + 2 * club.standard_error > INFORMATION).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_infonce_never_passes_log_n(scale):
    found = critics.infonce(scale * jnp.eye(50) + jnp.sin(jnp.arange(50)))
    assert found.value <= found.ceiling + 1e-6
    assert float(found.ceiling) == pytest.approx(math.log(50))
    # at scale 0 a bound far below 0, which the worst that has learned does not give
    assert bool(found.converged) == (-0.01 < found.value < 0.8 * math.log(50))


def test_bounds_equal_their_formulas_in_double_precision():
    s = np.random.default_rng(0).normal(size=(7, 7))
    apart = s[~np.eye(7, dtype=bool)]
    others = np.where(np.eye(7), 0, np.exp(s)).sum(0) / 6
    diagonal = np.diag(s)
    softmax = np.exp(diagonal) / np.exp(s).mean(1)
    wanted = {
        "donsker_varadhan": diagonal.mean() - np.log(np.exp(apart).mean()),
        "nwj": 1 + diagonal.mean() - np.exp(apart).mean(),
        "infonce": np.log(softmax).mean(),
        "smile": diagonal.mean() - np.log(np.exp(np.clip(apart, -1, 1)).mean()),
        "club": diagonal.mean() - apart.mean(),
        "leave_one_out": (diagonal - np.log(others)).mean(),
        "vub": diagonal.mean(),
    }
    for name, value in wanted.items():
        bound = getattr(critics, name)
        found = bound(s, clip=1.0) if name == "smile" else bound(s)
        assert float(found.value) == pytest.approx(value, abs=1e-5), name


def test_a_fitted_critic_stays_below_and_comes_near(quick_jit):
    """Rows that chose nothing judge it: at most 3 errors above, 2 seeds by vmap."""
    keys = jax.random.split(jax.random.key(1), 2)
    x, y = jax.vmap(lambda k: tasks.gaussian(1, 1.0).sample(k, 2400))(keys)
    run = partial(fitted, bound="nwj", width=32, batch=64, rounds=30, patience=4)
    found = quick_jit(jax.vmap(run))(keys, x, y)
    assert (found.value < 1.0 + 3 * found.standard_error).all()
    assert (found.value > 0.6).all()
    assert (found.direction == -1).all()
    hasty = quick_jit(partial(run, rounds=1))(keys[0], x[0], y[0])
    assert not hasty.converged  # it was still improving


def test_vub_is_above_by_the_divergence_of_the_margins(ratios):
    """With r of variance 4 instead of 1: KL(p; r) = (log 4 + 1/4 - 1) / 2."""
    wide = ratios[1] / 4 - math.log(4) / 2  # log N(y; 0, 4)
    wide += (1 / 4 - 1) * math.log(2 * math.pi) / 2
    found = jax.vmap(critics.vub)(ratios[0] + ratios[1] - wide)
    gap = (math.log(4) + 1 / 4 - 1) / 2
    error = found.value.std() / math.sqrt(SEEDS)
    assert abs(found.value.mean() - INFORMATION - gap) < 4 * error
    assert (found.direction == 1).all()


def test_mine_averages_the_denominator():
    """Its gradient is that of mean exp over the average, the average a constant."""
    s = jax.random.normal(jax.random.key(4), (6, 6))
    log_average = jnp.asarray(0.3)
    slope, new = jax.grad(critics.mine_loss, has_aux=True)(s, log_average)
    apart = ~np.eye(6, dtype=bool)
    now = np.exp(np.asarray(s))[apart].mean()
    average = 0.99 * math.exp(0.3) + 0.01 * now
    assert float(new) == pytest.approx(math.log(average), abs=1e-6)
    wanted = np.where(apart, np.exp(s) / 30 / average, -1 / 6)
    assert np.allclose(slope, wanted, atol=1e-6)


def test_flo_is_nwj_of_scores_that_normalise_themselves():
    """With the best u it is what InfoNCE is, and any other u gives less."""
    s = np.random.default_rng(1).normal(size=(40, 40))
    apart = np.where(np.eye(40), -np.inf, s - np.diag(s)[:, None])
    u = np.log(np.exp(apart).sum(1) / 39)
    values = [
        float(critics.nwj(s - (np.diag(s) + v)[:, None]).value)
        for v in (u, u + 0.3, u - 0.3)
    ]
    assert values[0] == pytest.approx(-u.mean(), abs=1e-5)
    assert values[0] > max(values[1:])


@pytest.mark.parametrize("bound", ["mine", "flo"])
def test_new_critics_learn(bound, quick_jit):
    x, y = tasks.gaussian(1, 1.0).sample(jax.random.key(5), 2400)
    run = partial(fitted, bound=bound, width=32, batch=64, rounds=40, patience=8)
    found = quick_jit(run)(jax.random.key(0), x, y)
    assert 0.6 < found.value < 1.0 + 3 * found.standard_error


def test_a_critic_that_more_rows_would_teach_says_so(quick_jit):
    """Five features a side at 600 rows: far too low, and flagged, where one is not."""
    run = quick_jit(partial(fitted, bound="nwj", width=32, batch=64, rounds=40))
    flags = []
    for seed in range(3):
        x, y = tasks.gaussian(5, 2.0).sample(jax.random.key(seed), 600)
        found = run(jax.random.key(seed), x, y)
        assert found.value < 2.0 - 0.3
        flags.append(bool(found.converged))
    assert sum(flags) <= 1


def test_a_fitted_conditional_is_no_bound(quick_jit):
    x, y = tasks.gaussian(1, 1.0).sample(jax.random.key(2), 800)
    run = partial(fitted, bound="leave_one_out", width=32, batch=64, rounds=30)
    found = quick_jit(run)(jax.random.key(0), x, y)
    assert found.direction == 0
    assert abs(found.value - 1.0) < 0.3


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: critics.nwj(jnp.ones((3, 4))), "scores"),
        (lambda x: critics.smile(jnp.ones((3, 3)), clip=0.0), "clip"),
        (lambda x: fitted(jax.random.key(0), x, x), "x: 20 rows"),
        (lambda x: fitted(jax.random.key(0), x, x, bound="mi"), "bound"),
        (lambda x: fitted(jax.random.key(0), x, x, rounds=0), "rounds"),
        (lambda x: fitted(jax.random.key(0), x, x, batch=1), "batch"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call(jnp.ones((20, 2)))
