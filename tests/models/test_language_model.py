"""The objective: sums over positions that count, whatever the cut of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.models.language_model import model_parts, token_nats
from narrows.models.transformer import TransformerConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
CONFIG = TransformerConfig(vocab_size=32, depth=2, width=32, heads=2)
OPTIONS = {"codes": 16, "code_width": 4}
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 32, (4, 10)), jnp.int32),
    "targets": jnp.asarray(RNG.integers(0, 32, (4, 10)), jnp.int32),
    "mask": jnp.asarray(RNG.random((4, 10)) < 0.7),
    "segment_ids": jnp.asarray(np.arange(10) >= RNG.integers(2, 8, (4, 1)), jnp.int32),
}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def parts():
    return model_parts(CONFIG, "codebook", waist_options=OPTIONS, waist_weight=0.5)


@pytest.fixture(scope="module")
def state(parts, quick_jit):
    """(params, rest)"""
    return quick_jit(parts.init)(KEY)


@pytest.fixture(scope="module")
def loss(parts, state, quick_jit):
    """Loss and gradient of a batch."""

    @quick_jit
    def run(batch):
        def total(params):
            out = parts.loss(params, state[1], batch, KEY)
            return out.total, out

        gradient, out = jax.grad(total, has_aux=True)(state[0])
        return out, gradient

    return run


def close(a, b, rtol=1e-5, atol=1e-5):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_token_nats_equal_optax_and_float64():
    logits = jnp.asarray(30 * RNG.normal(size=(4, 10, 32)), jnp.float32)
    logits = logits.at[..., -1].set(-jnp.inf)  # an impossible token, no target's
    targets = BATCH["targets"] % 31
    got = token_nats(logits, targets)
    wide = np.asarray(logits, np.float64)
    top = wide.max(-1)
    total = top + np.log(np.exp(wide - top[..., None]).sum(-1))
    expected = (
        total - np.take_along_axis(wide, np.asarray(targets)[..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        got,
        optax.softmax_cross_entropy_with_integer_labels(logits, targets),
        rtol=1e-5,
        atol=1e-5,
    )
    narrow = token_nats(logits.astype(jnp.bfloat16), targets)
    assert narrow.dtype == jnp.float32


def test_token_nats_have_the_gradient_of_softmax():
    logits = jnp.asarray(RNG.normal(size=(5, 32)), jnp.float32)
    targets = jnp.arange(5)
    gradient = jax.grad(lambda x: token_nats(x, targets).sum())(logits)
    expected = jax.nn.softmax(logits) - jax.nn.one_hot(targets, 32)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_batch_is_the_sum_of_its_rows(loss):
    """Loss, weight, sums, stats and gradient alike: float32 sums in another order."""
    whole = loss(BATCH)
    rows = [loss({k: v[i : i + 1] for k, v in BATCH.items()}) for i in range(4)]
    close(jax.tree.map(lambda *x: sum(x), *rows), whole, atol=1e-4)
    out = whole[0]
    assert float(out.weight) == int(BATCH["mask"].sum())
    assert float(out.total) == pytest.approx(
        float(out.sums["nats"] + 0.5 * out.sums["waist_loss"])
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(out))


def test_masked_positions_do_not_count(loss):
    """Nor do their tokens and targets, be they outside the vocabulary."""
    mask = BATCH["mask"]
    other = {
        "tokens": jnp.where(mask, BATCH["tokens"], 99),
        "targets": jnp.where(mask, BATCH["targets"], -1),
    }
    close(loss(BATCH | other), loss(BATCH), rtol=0, atol=0)


def test_a_batch_of_padding_is_nothing(loss):
    out, gradient = loss(BATCH | {"mask": jnp.zeros((4, 10), bool)})
    assert not any(bool(x.any()) for x in jax.tree.leaves((out, gradient)))


def test_an_update_moves_the_codebook_alone(parts, state, loss, quick_jit):
    params, rest = state
    stats = loss(BATCH)[0].stats
    new, said = quick_jit(parts.advance)(params, rest, stats)
    assert jax.tree.structure(new) == jax.tree.structure(rest)
    assert any(
        not jnp.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (new, rest)), strict=True)
    )
    assert sorted(said) == [
        "waist_entropy",
        "waist_perplexity",
        "waist_revived",
        "waist_usage",
    ]


def test_bits_of_an_open_waist_are_those_of_its_floats(quick_jit):
    parts = model_parts(CONFIG)
    shapes = jax.eval_shape(parts.init, KEY)
    params, rest = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    out = quick_jit(parts.loss)(params, rest, BATCH, KEY)
    assert float(out.sums["waist_bits"] / out.weight) == 32 * 32
    assert float(out.sums["waist_loss"]) == 0
    assert rest == {}
