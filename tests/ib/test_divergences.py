"""Laws of kernel divergences: closed forms, limits, float64 references, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from narrows.ib import dependence, kernels
from narrows.ib.divergences import (
    conditional_cs,
    conditional_cs_qmi,
    conditional_kl,
    cs_divergence,
    cs_qmi,
    kl_kde,
    mmd,
    normalized_cs_qmi,
)


def draw(seed=0, n=37, widths=(12, 3, 2)):
    """x, t and y that depend on each other; x wide enough for a matrix product."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, widths[0]))
    t = x[:, : widths[1]] + 0.3 * rng.normal(size=(n, widths[1]))
    y = np.sin(x[:, : widths[2]]) + 0.1 * rng.normal(size=(n, widths[2]))
    return x, t, y


def gram(a, b, width=1.0):
    """The kernel matrix, entry by entry."""
    return np.exp(-((a[:, None] - b) ** 2).sum(-1) / (2 * width**2))


def cs_of(x, y):
    k = gram(x, x).mean(), gram(y, y).mean(), gram(x, y).mean()
    return np.log(k[0]) + np.log(k[1]) - 2 * np.log(k[2])


def conditional_of(x, y, p):
    k = gram(x, x, 2.0)
    parts = [
        np.log(sum((k[j] * l[j]).sum() / k[j].sum() ** 2 for j in range(len(x))))
        for l in (gram(y, y), gram(p, p), gram(p, y))
    ]
    return parts[0] + parts[1] - 2 * parts[2]


def qmi_of(x, t):
    k, q, n = gram(x, x, 3.0), gram(t, t), len(x)
    one = np.ones(n)
    total = np.log(np.trace(k @ q) / n**2)
    total += np.log((one @ k @ one) * (one @ q @ one) / n**4)
    return total - 2 * np.log(one @ k @ q @ one / n**3)


def normalized_of(x, t):
    def own(k):
        mean = k.mean()
        row = (k.mean(1) ** 2).mean()
        return np.log((k * k).mean()) + 2 * np.log(mean) - 2 * np.log(row)

    return qmi_of(x, t) / np.sqrt(own(gram(x, x, 3.0)) * own(gram(t, t)))


def conditional_qmi_of(x, t, y):
    """The definition's three integrals, one point at a time."""
    k, q, m = gram(x, x, 3.0), gram(t, t), gram(y, y)
    a = b = c = 0.0
    for j in range(len(x)):
        s, w = m[j].sum(), m[j] / m[j].sum()
        a += (m[j] * k[j] * q[j]).sum() / s**2
        b += (w @ k @ w) * (w @ q @ w) / s
        c += (m[j] * k[j]).sum() * (m[j] * q[j]).sum() / s**3
    return np.log(a) + np.log(b) - 2 * np.log(c)


def mmd_of(x, y):
    return gram(x, x).mean() + gram(y, y).mean() - 2 * gram(x, y).mean()


def kl_of(y, p):
    return (np.log(gram(y, y).mean(1)) - np.log(gram(y, p).mean(1))).mean()


def conditional_kl_of(x, y, p):
    k = gram(x, x, 2.0)
    own, other = (k * gram(y, y)).sum(1), (k * gram(y, p)).sum(1)
    return (np.log(own) - np.log(other)).mean()


def hsic_of(x, t):
    n = len(x)
    h = np.eye(n) - 1 / n
    return np.trace(gram(x, x, 3.0) @ h @ gram(t, t) @ h) / n**2


X, T, Y = draw()
P = Y + 0.5 * np.random.default_rng(9).normal(size=Y.shape)
WIDE = {"width_x": 3.0}
CASES = {  # function of the library, its arguments, the slow reference
    "cs_divergence": (cs_divergence, {}, (Y, P[:30]), cs_of),
    "conditional_cs": (conditional_cs, {"width_x": 2.0}, (X, Y, P), conditional_of),
    "cs_qmi": (cs_qmi, WIDE, (X, T), qmi_of),
    "normalized_cs_qmi": (normalized_cs_qmi, WIDE, (X, T), normalized_of),
    "conditional_cs_qmi": (conditional_cs_qmi, WIDE, (X, T, Y), conditional_qmi_of),
    "mmd": (mmd, {}, (Y, P[:30]), mmd_of),
    "kl_kde": (kl_kde, {}, (Y, P[:30]), kl_of),
    "conditional_kl": (conditional_kl, {"width_x": 2.0}, (X, Y, P), conditional_kl_of),
    "hsic": (dependence.hsic, WIDE, (X, T), hsic_of),
}
BLOCKED = pytest.mark.parametrize("name", CASES)


def single(arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@BLOCKED
@pytest.mark.parametrize("block", [64, 10])
def test_the_value_is_the_definition_in_float64(name, block):
    """In float32 to 1e-5, whole or in blocks that do not divide the rows."""
    function, options, arrays, reference = CASES[name]
    found = jax.jit(lambda *a: function(*a, block=block, **options))(*single(arrays))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference(*arrays), rtol=2e-5, atol=2e-6)


@BLOCKED
def test_gradients_are_those_of_the_definition(name, quick_jit):
    """Of float32 in blocks, against differences of the float64 reference."""
    function, options, arrays, reference = CASES[name]
    which = tuple(range(len(arrays)))
    of = jax.grad(lambda *a: function(*a, block=10, **options), argnums=which)
    slopes = quick_jit(of)(*single(arrays))
    rng = np.random.default_rng(0)
    for i, slope in enumerate(slopes):
        step = rng.normal(size=arrays[i].shape) * 1e-4
        ends = [
            reference(*arrays[:i], arrays[i] + sign * step, *arrays[i + 1 :])
            for sign in (1, -1)
        ]
        exact, scale = (ends[0] - ends[1]) / 2e-4, np.linalg.norm(slope)
        found = (np.asarray(slope, np.float64) * step).sum() / 1e-4
        assert abs(found - exact) < 2e-4 * scale + 1e-6


def test_no_array_of_all_pairs_is_kept(quick_jit):
    """Memory of value and gradient, in blocks of 64, doubles with n; n^2 would be 4."""
    of = quick_jit(jax.value_and_grad(lambda a, b: cs_qmi(a, b, block=64)))
    taken = []
    for n in (4096, 8192):
        x = jax.ShapeDtypeStruct((n, 3), jnp.float32)
        memory = of.lower(x, x).compile().memory_analysis()
        taken.append(memory.temp_size_in_bytes)
    assert taken[1] / taken[0] < 2.2
    assert taken[1] < 8192**2 * 4 / 2


@pytest.mark.parametrize("dims", [1, 3])
def test_gaussians_have_their_closed_form(dims):
    """Samples of N(m, S) estimate D_CS of N(m, S + width^2 / 2 I), within 0.05."""
    rng = np.random.default_rng(dims)
    m, n = rng.normal(size=(2, dims)) * 0.7, 4000
    roots = rng.normal(size=(2, dims, dims)) * 0.5 + np.eye(dims)
    samples = [
        mean + rng.normal(size=(n, dims)) @ r for mean, r in zip(m, roots, strict=True)
    ]
    s = [r.T @ r + 0.5 * np.eye(dims) for r in roots]

    def log_det(a):
        return np.linalg.slogdet(a)[1]

    offset, total = m[0] - m[1], s[0] + s[1]
    exact = offset @ np.linalg.solve(total, offset) + log_det(total)
    exact -= 0.5 * (log_det(2 * s[0]) + log_det(2 * s[1]))
    found = jax.jit(cs_divergence)(*single(samples))
    assert abs(float(found) - exact) < 0.05


def test_information_of_a_bivariate_normal():
    """rho = 0.6, width 1: D_CS of the smoothed joint law from its product, 0.0464."""
    rho, n = 0.6, 4000
    joint = np.array([[1.5, rho], [rho, 1.5]])
    product = np.diag([1.5, 1.5])
    dets = [np.linalg.det(a) for a in (joint + product, 2 * joint, 2 * product)]
    exact = np.log(dets[0]) - 0.5 * np.log(dets[1] * dets[2])
    assert abs(exact - 0.0464) < 1e-4
    z = np.random.default_rng(0).multivariate_normal([0, 0], [[1, rho], [rho, 1]], n)
    found = jax.jit(cs_qmi)(*single((z[:, :1], z[:, 1:])))
    assert abs(float(found) - exact) < 0.01


def test_half_of_it_is_at_most_kl_between_gaussians():
    """The halved form; the squared form itself exceeds KL for N(0,1), N(32,100)."""
    rng = np.random.default_rng(0)
    m, a, b = rng.normal(size=2000) * 3, *np.exp(rng.normal(size=(2, 2000)))
    cs = m**2 / (a + b) + np.log(a + b) - 0.5 * np.log(4 * a * b)
    kl = 0.5 * (a / b + m**2 / b - 1 + np.log(b / a))
    assert np.all(0.5 * cs <= kl + 1e-12)
    far = 1000 / 101 + np.log(101) - 0.5 * np.log(400)
    assert far > 0.5 * (1 / 100 + 1000 / 100 - 1 + np.log(100))


def test_dependence_of_independent_samples_falls_like_one_over_n():
    sizes, found = (50, 100, 200, 400, 800), []

    @jax.jit
    def mean_of(z):
        return jax.vmap(lambda pair: cs_qmi(pair[:, :1], pair[:, 1:]))(z).mean()

    for n in sizes:
        z = np.random.default_rng(n).normal(size=(16_000 // n, n, 2))
        found.append(float(mean_of(jnp.asarray(z, jnp.float32))))
    slope = np.polyfit(np.log(sizes), np.log(found), 1)[0]
    assert -1.1 < slope < -0.9


def test_prediction_term_is_0_for_what_it_cannot_tell_apart():
    x, y = single((X, Y))
    assert abs(float(conditional_cs(x, y, y))) < 1e-6
    shuffled = y[np.random.default_rng(0).permutation(len(Y))]
    assert abs(float(conditional_cs(x, y, shuffled, width_x=1e6))) < 1e-5
    assert float(conditional_cs(x, y, shuffled, width_x=2.0)) > 0.1


def test_a_narrow_width_of_x_leaves_correntropy():
    x, y, p = single((T, Y, P))
    found = conditional_cs(x, y, p, width_x=1e-3)
    each = np.exp(-((P - Y) ** 2).sum(1) / 2)
    np.testing.assert_allclose(found, -2 * np.log(each.mean()), rtol=1e-5)
    near = Y + 1e-2 * (P - Y)
    found = conditional_cs(x, y, jnp.asarray(near, jnp.float32), width_x=1e-3)
    square = ((near - Y) ** 2).sum(1).mean()
    np.testing.assert_allclose(found, square, rtol=1e-2)


@pytest.mark.parametrize(("over", "power"), [("space", 2), ("inputs", 1)])
def test_over_what_a_row_far_from_the_others_weighs_its_inverse_density(over, power):
    """By the definition; then one row apart beside seven that share their input."""
    k, cross = gram(X, X, 2.0), gram(P, Y)
    sums = [
        ((k * kernel).sum(1) / k.sum(1) ** power).sum()
        for kernel in (gram(Y, Y), gram(P, P), cross)
    ]
    exact = np.log(sums[0]) + np.log(sums[1]) - 2 * np.log(sums[2])
    found = conditional_cs(*single((X, Y, P)), width_x=2.0, over=over)
    np.testing.assert_allclose(found, exact, rtol=2e-5)

    x = jnp.zeros((8, 1)).at[7].set(100.0)
    y, p = jnp.zeros((8, 1)), jnp.full((8, 1), 0.5)
    slope = jax.grad(lambda p: conditional_cs(x, y, p, over=over))(p)[:, 0]
    expected = 7 if over == "space" else 1
    np.testing.assert_allclose(slope[7] / slope[0], expected, rtol=1e-4)


def test_an_integral_over_something_else_is_refused():
    with pytest.raises(ValueError, match="over: 'labels', but allowed are 'space'"):
        conditional_cs(*single((X, Y, P)), over="labels")


def test_what_lies_far_apart_stays_finite_and_pulls():
    """exp(-distance^2 / 2) is 0 in float32 here; its logarithm and slope are not."""
    y, p = single((Y, Y + 1e3))
    for function in (cs_divergence, kl_kde, lambda a, b: conditional_cs(a, a, b)):
        value, slope = jax.value_and_grad(lambda b, f=function: f(y, b))(p)
        assert np.isfinite(value)
        assert value > 1e5
        assert np.all(np.isfinite(slope))
        assert float(jnp.abs(slope).max()) > 1


def test_discrete_laws_have_theirs():
    """Points far apart: -log (p.q)^2 / (p.p q.q) of their frequencies."""
    p, q = np.array([5, 3, 2]), np.array([1, 1, 8])
    at = np.eye(3) * 100
    x, y = single((np.repeat(at, p, 0), np.repeat(at, q, 0)))
    exact = -np.log((p @ q) ** 2 / ((p @ p) * (q @ q)))
    np.testing.assert_allclose(cs_divergence(x, y), exact, rtol=1e-5)


def test_cauchy_schwarz_is_the_angle_whose_chord_is_mmd():
    y, p = single((Y, P))
    kyy, kpp, kyp = gram(Y, Y).mean(), gram(P, P).mean(), gram(Y, P).mean()
    cosine = kyp / np.sqrt(kyy * kpp)
    np.testing.assert_allclose(cs_divergence(y, p), -2 * np.log(cosine), atol=1e-5)
    chord = kyy + kpp - 2 * np.sqrt(kyy * kpp) * cosine
    np.testing.assert_allclose(mmd(y, p), chord, rtol=1e-4)


@pytest.mark.parametrize(
    "function",
    [cs_qmi, normalized_cs_qmi, dependence.hsic, dependence.matrix_information],
)
def test_masked_rows_change_nothing(function):
    mask = np.arange(len(X)) % 3 > 0
    x, t = single((X, T))
    poisoned = jnp.where(mask[:, None], t, jnp.nan)
    of = jax.value_and_grad(lambda b: function(x, b, mask=jnp.asarray(mask)))
    value, slope = of(poisoned)
    alone = function(x[mask], t[mask])
    np.testing.assert_allclose(value, alone, rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(slope))
    assert np.all(slope[~mask] == 0)


@pytest.mark.parametrize("name", ["conditional_cs", "normalized_cs_qmi", "hsic"])
def test_eight_devices_give_one_device_s_value_and_gradient(name):
    function, options, arrays, _ = CASES[name]
    arrays = [np.concatenate([a, a[:3] + 0.1]) for a in single(arrays)]  # 40 rows
    of = jax.jit(jax.value_and_grad(lambda *a: function(*a, **options)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    one, eight = of(*arrays), of(*(jax.device_put(a, rows) for a in arrays))
    assert len(eight[1].sharding.device_set) == 8
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_widths_follow_their_rules_and_pass_no_gradient():
    x = jnp.asarray(X, jnp.float32)
    pairs = np.sqrt(((X[:, None] - X) ** 2).sum(-1))[np.triu_indices(len(X), 1)]
    median = kernels.median(2.0, points=100)(x)
    np.testing.assert_allclose(median, 2 * np.sqrt(np.median(pairs**2)), rtol=1e-5)
    square = (X.var(0).sum() * 2) ** 0.5
    np.testing.assert_allclose(kernels.spread()(x), square, rtol=1e-5)
    assert kernels.median(floor=0.5)(jnp.ones((4, 2))) == 0.5
    for rule in (kernels.median(), kernels.spread()):
        assert not jnp.any(jax.grad(lambda a, r=rule: r(a))(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cs_divergence(jnp.ones(3), jnp.ones((3, 1))), r"x: shape \(3,\)"),
        (lambda: cs_qmi(jnp.ones((3, 1)), jnp.ones((4, 1))), "rows: {'x': 3, 't': 4}"),
        (lambda: mmd(jnp.ones((3, 1)), jnp.ones((3, 2))), "y: 2 features"),
        (lambda: mmd(*[jnp.ones((3, 1))] * 2, width=0.0), "width: 0.0, but"),
        (lambda: mmd(*[jnp.ones((3, 1))] * 2, block=0), "block: 0 rows"),
        (lambda: kernels.median(points=1), "median: factor=1.0"),
        (lambda: dependence.matrix_entropy(jnp.eye(2), alpha=1), "alpha: 1"),
        (lambda: dependence.nhsic(*[jnp.ones((3, 1))] * 2, epsilon=0), "epsilon: 0"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_matrix_entropy_and_normalised_hsic_equal_their_definitions():
    k, q = gram(X, X, 3.0) / len(X), gram(T, T) / len(X)

    def entropy(a, alpha):
        values = np.maximum(np.linalg.eigvalsh(a), 0)
        return np.log2((values**alpha).sum()) / (1 - alpha)

    for alpha in (1.01, 2.0):
        both = k * q * len(X)
        exact = entropy(k, alpha) + entropy(q, alpha) - entropy(both, alpha)
        found = dependence.matrix_information(*single((X, T)), alpha=alpha, **WIDE)
        np.testing.assert_allclose(found, exact, rtol=2e-3)
    n, epsilon = len(X), 1e-3
    h = np.eye(n) - 1 / n
    kept = [
        (h @ a @ h) @ np.linalg.inv(h @ a @ h + n * epsilon * np.eye(n))
        for a in (k * n, q * n)
    ]
    found = dependence.nhsic(*single((X, T)), epsilon=epsilon, **WIDE)
    np.testing.assert_allclose(found, np.trace(kept[0] @ kept[1]), rtol=1e-3)


def test_wide_kernels_keep_the_digits_of_dependence():
    """At width 100 HSIC is of order 1e-9; its sums are of order 1."""
    wide = {"width_x": 100.0, "width_t": 100.0}
    found = dependence.hsic(*single((X, T)), **wide)
    h = np.eye(len(X)) - 1 / len(X)
    exact = np.trace(gram(X, X, 100.0) @ h @ gram(T, T, 100.0) @ h) / len(X) ** 2
    np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_order_two_entropy_needs_no_eigenvalues():
    program = str(
        jax.make_jaxpr(lambda a: dependence.matrix_entropy(a, alpha=2))(X[:5, :5])
    )
    assert "eigh" not in program
