"""Compositions: of any parts, and equal to the parts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.quantize.compose import parts_of
from narrows.models.quantize.fsq import fsq
from narrows.models.quantize.grouped import grouped, product
from narrows.models.quantize.gumbel import gumbel
from narrows.models.quantize.lfq import lfq
from narrows.models.quantize.residual import residual
from narrows.models.quantize.vq import vq

X = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), jnp.float32)
KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def fresh(q):
    """A state, and what the quantiser makes of X."""

    def run(x):
        state = q.init(KEY)
        return state, q.quantize(state, x)

    return jax.jit(run, compiler_options=QUICK)(X)


def test_a_residual_is_a_loop_over_what_is_left():
    q = residual(*[vq(4, 8)] * 3)
    (state, out), left, total = fresh(q), X, 0.0
    for i, part in enumerate(parts_of(state)):
        distance = jnp.sum((left[:, None] - part.memory.codes) ** 2, -1)
        assert jnp.array_equal(out.indices[:, i], distance.argmin(-1))
        chosen = part.memory.codes[distance.argmin(-1)]
        total += distance.min(-1).mean()
        left = left - chosen
    np.testing.assert_allclose(out.z, X - left, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.losses["commitment"], total, rtol=1e-5)


def test_a_gradient_passes_a_residual_once_and_pulls_at_every_stage():
    q = residual(*[vq(4, 8)] * 3)
    state, out = fresh(q)
    slope = jax.grad(lambda x: jnp.sum(jnp.cos(x) * q.quantize(state, x).z))
    slope, z = jax.jit(slope)(X), out.z
    np.testing.assert_allclose(slope, jnp.cos(X) - jnp.sin(X) * z, rtol=1e-5, atol=1e-6)
    pull = jax.jit(jax.grad(lambda x: q.quantize(state, x).losses["commitment"]))(X)
    left, expected = X, 0.0
    for i, part in enumerate(parts_of(state)):
        left = left - part.memory.codes[out.indices[:, i]]
        expected += 2 * left / len(X)
    np.testing.assert_allclose(pull, expected, rtol=1e-4, atol=1e-6)


def test_signs_that_shrink_halve_the_error_at_each_stage():
    x = jnp.asarray(np.random.default_rng(1).uniform(-2, 2, (50, 3)), jnp.float32)
    for stages in (1, 3, 6):
        q = residual(*[lfq(3)] * stages, shrink=0.5)
        error = jnp.abs(q.quantize(q.init(KEY), x).z - x).max()
        assert error <= 2.0 ** (1 - stages)


def test_a_start_of_a_residual_explains_more_at_each_stage():
    q = residual(*[vq(4, 4)] * 3)
    state = q.init(KEY)
    started = q.start(KEY, state, X)
    before, after = (q.quantize(s, X).losses["commitment"] for s in (state, started))
    assert after < 0.5 * before
    assert jax.tree.structure(started) == jax.tree.structure(state)


def test_a_product_is_its_parts_side_by_side():
    """Of parts of any kind and width."""
    parts = (vq(1, 4), fsq((5,)), gumbel(2, 6))
    q = product(*parts)
    state, out = fresh(q)
    place = 0
    for i, (part, own) in enumerate(zip(parts, parts_of(state), strict=True)):
        alone = part.quantize(own, X[:, place : place + part.width])
        assert jnp.array_equal(out.indices[:, i], alone.indices[:, 0])
        assert jnp.array_equal(out.z[:, place : place + part.width], alone.z)
        for name, value in alone.losses.items():
            np.testing.assert_allclose(out.losses[name], value, rtol=1e-6)
        place += part.width
    assert jnp.array_equal(q.decode(state, q.encode(state, X)), out.z)


def test_shared_heads_choose_from_one_codebook_and_teach_it_together():
    one = vq(2, 8)
    q = grouped(one, 2, shared=True)
    state = q.init(KEY)
    heads = X.reshape(20, 2)
    out, alone = q.quantize(state, X), one.quantize(state, heads)
    assert jnp.array_equal(out.indices.reshape(20, 1), alone.indices)
    np.testing.assert_allclose(
        out.losses["commitment"], 2 * alone.losses["commitment"], rtol=1e-6
    )
    for a, b in zip(*map(jax.tree.leaves, (out.stats, alone.stats)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    apart = grouped(one, 2)
    same = apart.quantize(apart.init(KEY)._replace(memory=(state.memory,) * 2), X)
    assert jnp.array_equal(same.z, out.z)


def test_a_residual_of_products_of_anything_composes():
    q = residual(product(fsq((3, 3)), vq(2, 4)), vq(4, 8))
    state, out = fresh(q)
    assert q.sizes == (9, 4, 8)
    assert jnp.array_equal(q.decode(state, out.indices), out.z)
    state, report = q.update(state, out.stats)
    assert report["revived"].shape == ()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"residual: widths \[2, 3\]"):
        residual(vq(2, 4), vq(3, 4))
    with pytest.raises(
        ValueError, match=r"weights: 'entropy' is 0\.1 in one part and 1"
    ):
        product(lfq(2), lfq(2, entropy_weight=1.0))
    with pytest.raises(ValueError, match="groups: 0, but it must be at least 1"):
        grouped(vq(2, 4), 0)
    with pytest.raises(ValueError, match="product: no parts"):
        product()
