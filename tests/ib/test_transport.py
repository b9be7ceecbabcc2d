"""Laws of entropic transport: fixed points, marginals, limits, counts, derivatives."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.ib import sinkhorn_newton as sns
from narrows.ib.transport import plan, solve
from scipy.optimize import linear_sum_assignment, linprog


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def arrays(*of):
    return tuple(jnp.asarray(a) for a in of)


def random_problem(n=40, m=33, seed=0):
    rng = np.random.default_rng(seed)
    r, c = rng.random(n) + 0.1, rng.random(m) + 0.1
    return arrays(rng.random((n, m)), r / r.sum(), c / c.sum())


def assignment(n=300, seed=0):
    cost = np.random.default_rng(seed).random((n, n))
    return arrays(cost, np.ones(n) / n, np.ones(n) / n)


def smooth_line(n=300):
    t = np.linspace(0, 1, n)
    r = np.exp(-((t - 0.3) ** 2) / 0.02) + 1e-3
    c = np.exp(-((t - 0.7) ** 2) / 0.01) + np.exp(-((t - 0.2) ** 2) / 0.01) / 2 + 1e-3
    return arrays((t[:, None] - t) ** 2, r / r.sum(), c / c.sum())


def grid(side=14, seed=0):
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[np.linspace(0, 1, side)] * 2), -1).reshape(-1, 2)
    r, c = rng.random(side**2) + 0.1, rng.random(side**2) + 0.1
    return arrays(((at[:, None] - at) ** 2).sum(-1), r / r.sum(), c / c.sum())


@pytest.mark.parametrize(
    "options",
    [
        {"lam": "mass"},
        {"lam": 0.4, "halvings": 0},
        {"method": "sinkhorn", "halvings": None, "max_steps": 20_000},
        {"method": "sinkhorn", "relaxation": 1.5, "max_steps": 20_000},
    ],
)
@pytest.mark.parametrize("eta", [1.0, 500.0])
def test_the_fixed_point_is_that_of_a_long_sinkhorn_run(options, eta):
    cost, r, c = random_problem()
    slow = solve(cost, r, c, eta=eta, method="sinkhorn", max_steps=20_000)
    fast = solve(cost, r, c, eta=eta, **options)
    assert slow.converged
    assert fast.converged
    p, q = (plan(cost, t.x, t.y, eta=eta) for t in (slow, fast))
    np.testing.assert_allclose(q, p, atol=1e-11)
    np.testing.assert_allclose(q.sum(1), r, atol=1e-12)
    np.testing.assert_allclose(q.sum(0), c, atol=1e-12)
    assert np.ptp(fast.x - slow.x) < 1e-9 / eta * 1e2  # equal up to one shift
    np.testing.assert_allclose(fast.value, slow.value, rtol=1e-12, atol=1e-13)


def test_value_is_cost_plus_negative_entropy():
    cost, r, c = random_problem()
    t = solve(cost, 3 * r, 3 * c, eta=20.0)
    p = plan(cost, t.x, t.y, eta=20.0)
    primal = jnp.sum(p * cost) + jnp.sum(p * jnp.log(p)) / 20
    np.testing.assert_allclose(t.value, primal, rtol=1e-12)


def test_a_sharp_assignment_costs_what_the_best_one_does():
    """log n / eta: of the plan's entropy, log n is there in any assignment."""
    cost, r, c = assignment(40)
    best = cost[linear_sum_assignment(cost)].mean()
    for eta in (100.0, 1e3, 1e4):
        t = solve(cost, r, c, eta=eta, tol=1e-11)
        gap = jnp.sum(plan(cost, t.x, t.y, eta=eta) * cost) - best
        assert t.converged
        assert -1e-12 < gap <= math.log(40) / eta


def test_unequal_marginals_cost_what_the_linear_program_does():
    cost, r, c = random_problem()
    rows, columns = np.kron(np.eye(40), np.ones(33)), np.kron(np.ones(40), np.eye(33))
    exact = linprog(
        cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([r, c])
    ).fun
    for eta in (1e2, 1e3, 1e4):
        t = solve(cost, r, c, eta=eta)
        gap = jnp.sum(plan(cost, t.x, t.y, eta=eta) * cost) - exact
        assert t.converged
        assert -1e-12 < gap <= math.log(40 * 33) / eta


def test_on_a_line_it_sorts_as_eta_grows():
    """W2^2 of equal weights on a line is the mean square of sorted differences."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=40) / 4, rng.normal(size=40) / 2 + 1
    exact = np.mean((np.sort(a) - np.sort(b)) ** 2)
    cost, weight = arrays((a[:, None] - b) ** 2, np.ones(40) / 40)
    gaps = []
    for eta in (100.0, 1e3, 1e4):
        t = solve(cost, weight, weight, eta=eta, tol=1e-11, warmup=200)
        gaps.append(float(jnp.sum(plan(cost, t.x, t.y, eta=eta) * cost) - exact))
        assert t.converged
        assert 0 < gaps[-1] <= math.log(40) / eta
    assert gaps[2] < gaps[1] / 10 < gaps[0] / 100


def test_fifteen_newton_steps_or_fifty_times_as_many_scalings():
    cost, r, c = assignment()
    paper = {"eta": 1200.0, "tol": 1e-10, "warmup": 30, "halvings": 0, "max_steps": 15}
    fast = solve(cost, r, c, lam=8 / 300, **paper)
    assert fast.converged
    assert fast.sinkhorn_steps == 30
    assert 0 < fast.newton_steps <= 15
    fifty = 50 * int(fast.sinkhorn_steps + fast.newton_steps)
    slow = solve(cost, r, c, eta=1200.0, tol=1e-10, method="sinkhorn", max_steps=fifty)
    assert not slow.converged
    assert slow.error > 1e3 * 1e-10  # and far from it


def test_too_few_entries_leave_linear_convergence():
    cost, r, c = assignment()
    t = solve(cost, r, c, eta=1200.0, lam=2 / 300, warmup=30, halvings=0, max_steps=15)
    assert t.nnz <= 600
    assert 1e-7 < t.error < 1e-2


def test_smooth_plans_need_the_rule_by_mass():
    cost, r, c = smooth_line()
    options = {"eta": 1200.0, "warmup": 200, "halvings": 0, "max_steps": 15}
    few = solve(cost, r, c, lam=8 / 300, **options)
    enough = solve(cost, r, c, lam="mass", **options)
    assert not few.converged
    assert enough.converged
    assert 20 * 300 < enough.nnz < 80 * 300


def test_grids_converge_from_five_entries_a_row():
    cost, r, c = grid()
    n = r.size
    t = solve(cost, r, c, eta=1200.0, lam=5 / n, warmup=30, halvings=0, max_steps=20)
    assert t.converged
    assert t.nnz <= 5 * n


def test_rows_out_of_reach_of_each_other():
    """All of exp(-eta C) underflows: the log domain has to step in."""
    cost, r, c = random_problem()
    far = cost + 3 + np.arange(40)[:, None] / 10
    for method in ("sns", "sinkhorn"):
        t = solve(far, r, c, eta=500.0, method=method, tol=1e-11)
        u = solve(cost, r, c, eta=500.0, method=method, tol=1e-11)
        assert t.converged
        p, q = plan(far, t.x, t.y, eta=500.0), plan(cost, u.x, u.y, eta=500.0)
        np.testing.assert_allclose(p, q, atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 5), (33, 41)])
def test_compression_keeps_what_is_kept(shape):
    n, m = shape
    rng = np.random.default_rng(0)
    matrix, v, u = (jnp.asarray(rng.random(k)) + 0.1 for k in (shape, m, n))

    @jax.jit
    def both(kept):
        s = sns.compress(matrix, kept, n * m)
        dense = jnp.zeros(shape).at[s.row, s.column].add(s.value)
        return dense, sns.times(s, v, n), sns.transposed_times(s, u, m)

    for share in (0.0, 0.01, 0.3, 1.0):
        kept = rng.random(shape) < share
        expected = np.where(kept, matrix, 0)
        dense, forward, backward = both(kept)
        np.testing.assert_array_equal(dense, expected)
        np.testing.assert_allclose(forward, expected @ v, rtol=1e-13)
        np.testing.assert_allclose(backward, u @ expected, rtol=1e-13)


@pytest.mark.parametrize("capacity", [1, 50, 900])
def test_the_largest_entries_are_found_without_sorting(capacity):
    score = jnp.asarray(np.random.default_rng(0).normal(size=(30, 40))) * 20
    score = jnp.exp(score)
    level = sns.largest(score, capacity)
    assert jnp.sum(score >= level) <= capacity
    assert jnp.sum(score >= 0.97 * level) >= capacity or capacity == 900
    # and at most a few of 900 are missed for lying within 3 % of one another
    assert jnp.sum(score >= level) >= 0.97 * capacity


def test_products_touch_kept_entries_only():
    """A product holds no array beyond its nnz, so its work is linear in nnz."""
    n = 1000
    for nnz in (2000, 4000, 8000):
        at = jnp.zeros(nnz, jnp.int32)
        b = sns.Sparse(at, at, jnp.zeros(nnz))
        program = jax.make_jaxpr(
            lambda b, v: sns.transposed_times(b, sns.times(b, v, n), n)
        )(b, jnp.zeros(n))
        sizes = [math.prod(x.aval.shape) for e in program.eqns for x in e.outvars]
        assert max(sizes) == nnz


def test_the_ladder_pays_for_at_most_four_times_what_is_kept():
    n = m = 600
    ladder = sns.rungs(n, m, "mass")
    assert ladder[0] == 4 * (n + m)
    assert all(b == 4 * a for a, b in itertools.pairwise(ladder))
    assert ladder[-1] <= n * m // 8
    assert sns.rungs(n, m, 5 / n) == (5 * m,)


def test_a_direction_solves_its_system():
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.random((6, 4)) ** 8)
    d, e = p.sum(1), p.sum(0)
    g = rng.normal(size=10)
    g[6:] += (g[:6].sum() - g[6:].sum()) / 4  # of equal masses: solvable undamped
    for damping in (0.0, 0.1):
        full = np.block(
            [[np.diag(d) * (1 + damping), p], [p.T, np.diag(e) * (1 + damping)]]
        )
        dx, dy, steps = sns.direction(
            sns.scaled(p, d, e),
            d,
            e,
            jnp.asarray(g[:6]),
            jnp.asarray(g[6:]),
            damping,
            rtol=1e-13,
            max_steps=50,
        )
        assert steps <= 6
        left = full @ np.concatenate([dx, dy]) - g
        # Damped, the shift of the potentials is fixed and not solved for.
        np.testing.assert_allclose(left[:6], 0, atol=1e-10)
        np.testing.assert_allclose(left[6:] / e, (left[6:] / e)[0], atol=1e-10)
        assert damping or abs(left).max() < 1e-10


def test_the_value_differentiates_by_the_envelope_theorem():
    cost, r, c = random_problem(12, 9)
    rng = np.random.default_rng(1)

    def value(*at):
        return solve(*at[:3], eta=at[3], tol=1e-13).value

    at = (cost, r, c, 20.0)
    t = solve(cost, r, c, eta=20.0, tol=1e-13)
    gradients = jax.grad(value, argnums=(0, 1, 2, 3))(*at)
    np.testing.assert_allclose(gradients[0], plan(cost, t.x, t.y, eta=20.0), rtol=1e-9)
    np.testing.assert_array_equal(gradients[1], t.x)
    np.testing.assert_array_equal(gradients[2], t.y)
    for da in directions(rng, at):
        slope = sum(jnp.vdot(g, d) for g, d in zip(gradients, da, strict=True))
        np.testing.assert_allclose(slope, central(value, at, da), rtol=1e-6)


def test_plans_differentiate_by_the_implicit_function_theorem():
    """In both modes; and the value's second derivative is the plan's first."""
    cost, r, c = random_problem(12, 9)
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(12, 9))

    def found(*at):
        t = solve(*at[:3], eta=at[3], tol=1e-13)
        return jnp.vdot(plan(at[0], t.x, t.y, eta=at[3]), weight)

    def gradient(cost):
        return jax.grad(lambda a: solve(a, r, c, eta=20.0, tol=1e-13).value)(cost)

    at = (cost, r, c, 20.0)
    gradients = jax.grad(found, argnums=(0, 1, 2, 3))(*at)
    for da in directions(rng, at):
        slope = sum(jnp.vdot(g, d) for g, d in zip(gradients, da, strict=True))
        along = central(found, at, da)
        np.testing.assert_allclose(slope, along, rtol=1e-6)
        np.testing.assert_allclose(jax.jvp(found, at, da)[1], along, rtol=1e-6)
    _, second = jax.jvp(gradient, (at[0],), (jnp.asarray(weight),))
    np.testing.assert_allclose(second, gradients[0], atol=1e-10)


def directions(rng, at):
    """One change of each argument alone; marginals keep their mass and their sign."""
    for k, a in enumerate(at):
        da = rng.normal(size=np.shape(a))
        if k in (1, 2):
            da = (da - da.mean()) / 100
        yield tuple(jnp.asarray(da if i == k else 0.0 * b) for i, b in enumerate(at))


def central(f, at, da, h=1e-5):
    up, down = (f(*(a + s * d for a, d in zip(at, da, strict=True))) for s in (h, -h))
    return (up - down) / (2 * h)


def test_bins_of_no_mass_are_dropped():
    cost, r, c = random_problem(10, 8)
    full_r, full_c = arrays(np.insert(r, [0, 7], 0), np.insert(c, 3, 0))
    full = jnp.insert(np.insert(cost, [0, 7], -5.0, axis=0), 3, -5.0, axis=1)
    t, u = (solve(*a, eta=100.0) for a in ((full, full_r, full_c), (cost, r, c)))
    assert t.converged
    np.testing.assert_allclose(t.value, u.value, rtol=1e-12)
    np.testing.assert_array_equal(jnp.isneginf(t.x), full_r == 0)
    np.testing.assert_array_equal(jnp.isneginf(t.y), full_c == 0)
    p = plan(full, t.x, t.y, eta=100.0)
    np.testing.assert_array_equal(p.sum(1) == 0, full_r == 0)
    gradients = jax.grad(lambda *a: solve(*a, eta=100.0).value, argnums=(0, 1, 2))(
        full, full_r, full_c
    )
    assert all(jnp.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[1][full_r == 0], 0)


def test_single_precision_reaches_what_it_promises():
    cost, r, c = (jnp.asarray(a, jnp.float32) for a in random_problem())
    t = solve(cost, r, c, eta=20.0)
    assert t.value.dtype == t.x.dtype == jnp.float32
    assert t.converged
    assert t.error <= 1e-6
    # Where rounding wins, it says so and stops early.
    t = solve(cost, r, c, eta=1000.0)
    assert not t.converged
    assert t.error < 1e-4
    assert t.newton_steps < 50
    half = solve(cost.astype(jnp.bfloat16), r, c, eta=20.0)
    assert half.value.dtype == jnp.float32


def test_traced_calls_are_the_same_calls_and_compile_once():
    cost, r, c = random_problem(12, 9)
    both = jnp.stack([cost, cost**2])
    many = jax.jit(jax.vmap(lambda a: solve(a, r, c, eta=20.0).value))(both)
    one = [solve(a, r, c, eta=20.0).value for a in both]
    np.testing.assert_allclose(many, one, rtol=1e-11)
    with jax.no_tracing():
        solve(cost, r, c, eta=30.0, tol=1e-9, warmup=20, halvings=3)
    bad = jax.jit(lambda a: solve(a, r, c, eta=20.0))(both[0].at[0, 0].set(jnp.nan))
    assert not bad.converged


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"eta": 0.0}, "eta=0.0 must be positive"),
        ({"eta": [1.0, 2.0]}, r"eta has shape \(2,\): give one number"),
        ({"method": "newton"}, "method='newton': give one of sinkhorn, sns"),
        ({"r": np.ones(11) / 11}, r"shapes \(12, 9\), \(11,\) and \(9,\)"),
        ({"r": np.ones(12)}, "r sums to 12.0 and c to 1.0"),
        ({"c": np.full(9, np.nan)}, "c holds 9 entries that are NaN"),
        (
            {"r": np.eye(12)[0] - np.eye(12)[1]},
            "r must hold masses: its smallest is -1",
        ),
        ({"tol": 1e-16}, "tol=1e-16 is below what float64 can hold"),
        ({"lam": 2}, "lam=2: give"),
        ({"delta": 1.0}, "delta=1.0 must lie between"),
        ({"warmup": 0}, "warmup=0 must be at least 1"),
        ({"method": "sinkhorn", "relaxation": 2.0}, r"relaxation=2.0 must lie in"),
    ],
)
def test_what_cannot_be_solved_is_refused_with_a_sentence(change, sentence):
    cost, r, c = random_problem(12, 9)
    with pytest.raises(ValueError, match=sentence):
        solve(**{"cost": cost, "r": r, "c": c, "eta": 1.0} | change)


def test_single_precision_is_told_how_to_get_more():
    cost, r, c = (np.asarray(a, np.float32) for a in random_problem(12, 9))
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"float64 arrays under jax.enable_x64\(True\)"),
    ):
        solve(*arrays(cost, r, c), eta=1.0, tol=1e-12)
