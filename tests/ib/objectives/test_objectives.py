"""The table of objectives: whom gradients reach, limits, what each one bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.ib.channel import gaussian_kl, mixture_information
from narrows.ib.objectives.gaussian import (
    Covariances,
    information_curve,
    linear_information,
)
from narrows.ib.objectives.protocol import Sample, draw, loss_of
from narrows.ib.objectives.table import OBJECTIVES, make_objective


def sample_of(z, weights, y, key, *, detached=False, noise="own"):
    """A linear encoder with noise and a linear decoder on a small batch."""
    mean = z @ weights["code"]
    own = jnp.full(mean.shape, 0.5) + 0.1 * jnp.tanh(mean)
    scale = own if noise == "own" else jnp.asarray(0.7)
    code = draw(key, mean, scale)
    seen = jax.lax.stop_gradient(code) if detached else code
    back = (y @ weights["back"], jnp.ones(mean.shape))
    return Sample(z, y, seen @ weights["out"], code, mean, scale, back)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)
    y = jnp.sin(z[:, :1]) + 0.1
    shapes = {"code": (5, 3), "out": (3, 1), "back": (1, 3)}
    weights = {
        k: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32) for k, s in shapes.items()
    }
    return z, weights, y, jax.random.key(0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_is_a_float32_scalar_whose_gradient_reaches_what_it_trains(
    name, batch, quick_jit
):
    z, weights, y, key = batch
    objective = make_objective(name)

    def loss(weights, beta):
        options = {"detached": objective.detached, "noise": objective.noise}
        sample = sample_of(z, weights, y, key, **options)
        terms = loss_of(objective, sample, beta)
        return terms.loss, terms

    slope, terms = quick_jit(jax.grad(loss, has_aux=True))(weights, 0.3)
    for value in terms:
        assert (value.shape, value.dtype) == ((), jnp.float32)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(slope))
    assert np.all(np.abs(slope["code"]).sum(1) > 0)
    assert np.all(slope["out"] != 0)
    assert np.any(slope["back"] != 0) == objective.backward
    off = quick_jit(jax.grad(loss, has_aux=True))(weights, 0.0)[1]
    np.testing.assert_allclose(off.loss, off.prediction, rtol=1e-6)
    assert terms.compression > 0


def test_the_released_script_s_loss_is_a_sum_of_squares(batch):
    z, weights, y, key = batch
    sample = sample_of(z, weights, y, key)
    found = make_objective("squares_with_cs", width=2.0).prediction(sample)
    total = np.sum((np.asarray(y) - np.asarray(sample.predicted)) ** 2)
    np.testing.assert_allclose(found, total / (4 * np.log(2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "law"), [("square_nib", np.square), ("exp_nib", np.exp)]
)
def test_convex_forms_weigh_a_function_of_the_same_information(name, law, batch):
    z, weights, y, key = batch
    sample = sample_of(z, weights, y, key, noise="shared")
    plain, convex = make_objective("nib"), make_objective(name)
    information = plain.compression(sample)
    np.testing.assert_allclose(convex.compression(sample), information)
    assert convex.penalty is not None
    np.testing.assert_allclose(convex.penalty(sample), law(information), rtol=1e-6)


def test_a_detached_decoder_sends_the_encoder_no_error(batch, quick_jit):
    """hsic_greedy: the encoder's gradient does not depend on the decoder's weights."""
    z, weights, y, key = batch
    objective = make_objective("hsic_greedy")

    @quick_jit
    def slope(out):
        def loss(code):
            both = weights | {"code": code, "out": out}
            sample = sample_of(z, both, y, key, detached=True)
            return loss_of(objective, sample, 0.1).loss

        return jax.grad(loss)(weights["code"])

    np.testing.assert_array_equal(slope(weights["out"]), slope(3 * weights["out"]))


def test_bounds_hold_on_a_linear_gaussian_channel():
    """lower <= I(x;t) <= rate, and upper >= lower, where I is known in closed form."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3))
    weights, variance = rng.normal(size=(3, 2)), 0.5
    joint = Covariances(np.eye(3), np.eye(1), np.zeros((3, 1)))
    exact = linear_information(joint, weights, variance)[0]
    mean = jnp.asarray(x @ weights, jnp.float32)
    lower, upper = (
        float(mixture_information(mean, variance, bound=b)) for b in ("lower", "upper")
    )
    rate = float(gaussian_kl(mean, jnp.sqrt(jnp.asarray(variance))).mean())
    assert lower < exact < upper
    assert exact < rate
    assert upper <= np.log(2000)


def test_the_mixture_bound_saturates_at_the_logarithm_of_the_sample():
    apart = jnp.arange(16.0)[:, None] * 100
    for bound in ("upper", "lower"):
        found = mixture_information(apart, 1.0, bound=bound)
        np.testing.assert_allclose(found, np.log(16), rtol=1e-6)
    same = mixture_information(jnp.ones((16, 2)), 1.0)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    with pytest.raises(ValueError, match="bound: 'middle'"):
        mixture_information(apart, 1.0, bound="middle")


def gaussian_task():
    """x in 4 dimensions with unequal variances, y = a.x + noise."""
    rng = np.random.default_rng(3)
    root = rng.normal(size=(4, 4)) * 0.6 + np.eye(4)
    cov_x, a = root @ root.T, rng.normal(size=4)
    a /= np.sqrt(a @ cov_x @ a)
    xy = (cov_x @ a)[:, None]
    return Covariances(cov_x, np.array([[1.0 + 0.25]]), xy), a


def test_the_exact_curve_is_concave_bounded_and_above_every_linear_code():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(6, 6)) * 0.5 + np.eye(6)
    whole = root @ root.T
    joint = Covariances(whole[:4, :4], whole[4:, 4:], whole[:4, 4:])
    rates = np.linspace(0, 6, 200)
    curve = information_curve(joint, rates)

    def log_det(a):
        return np.linalg.slogdet(a)[1]

    total = 0.5 * (log_det(joint.x) + log_det(joint.y) - log_det(whole))
    assert abs(curve[0]) < 1e-12
    assert np.all(np.diff(curve) >= 0)
    assert np.all(np.diff(curve, 2) < 1e-9)
    assert total - 1e-2 < curve[-1] <= total
    for _ in range(200):
        weights = rng.normal(size=(4, 2)) * np.exp(rng.normal())
        rate, kept = linear_information(joint, weights, 1.0)
        assert kept <= information_curve(joint, np.array([rate]))[0] + 1e-9
    with pytest.raises(ValueError, match="rate: -1"):
        information_curve(joint, np.array([-1.0]))


def test_y_by_one_direction_has_the_textbook_curve():
    """I(t;y) = -1/2 log(1 - rho^2 (1 - exp(-2 I(x;t)))) for scalars."""
    rho, rates = 0.8, np.array([0.1, 0.5, 2.0])
    joint = Covariances(np.eye(1), np.eye(1), np.array([[rho]]))
    exact = -0.5 * np.log(1 - rho**2 * (1 - np.exp(-2 * rates)))
    np.testing.assert_allclose(information_curve(joint, rates), exact, rtol=1e-12)


@pytest.mark.parametrize("name", ["vib", "nib", "square_nib", "exp_nib"])
def test_training_reaches_the_exact_curve_of_gaussians(name, quick_jit):
    """Within 5 % of I(t;y) at equal I(x;t), both computed from the trained weights."""
    import optax

    joint, a = gaussian_task()
    objective = make_objective(name)
    root = jnp.asarray(np.linalg.cholesky(joint.x), jnp.float32)
    tx = optax.adam(2e-2)
    key = jax.random.key(0)
    start = {
        "code": 0.3 * jax.random.normal(key, (4, 1)),
        "out": jnp.ones((1, 1)),
        "scale": jnp.zeros(()),
    }

    def step(carry, key):
        weights, state = carry
        one, two, three = jax.random.split(key, 3)
        x = jax.random.normal(one, (128, 4)) @ root.T
        y = x @ jnp.asarray(a, jnp.float32)[:, None]
        y += 0.5 * jax.random.normal(two, y.shape)

        def loss(w):
            mean, scale = x @ w["code"], jax.nn.softplus(w["scale"])
            code = draw(three, mean, scale)
            sample = Sample(x, y, code @ w["out"], code, mean, scale)
            return loss_of(objective, sample, BETA[name]).loss

        updates, state = tx.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    keys = jax.random.split(key, 1500)
    run = quick_jit(lambda s: jax.lax.scan(step, (s, tx.init(s)), keys)[0][0])
    weights = run(start)
    variance = float(jax.nn.softplus(weights["scale"])) ** 2
    rate, kept = linear_information(joint, np.asarray(weights["code"]), variance)
    best = information_curve(joint, np.array([rate]))[0]
    assert rate > 0.3
    assert 0.95 * best < kept <= best + 1e-9


def bare(a):
    """A sample without noise."""
    return Sample(a, a, a, a, a)


BETA = {"vib": 0.15, "nib": 0.15, "square_nib": 0.08, "exp_nib": 0.04}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_objective("ibib"), "objective: 'ibib', but allowed are cs_ib"),
        (lambda: make_objective("exp_nib", eta=0.0), "eta: 0.0"),
        (
            lambda: loss_of(make_objective("vib"), bare(jnp.ones((4, 1))), 0.1),
            "scale: None",
        ),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
