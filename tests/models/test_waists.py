"""The contract of a bottleneck layer, asked of every waist in the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models.bottleneck import Bottleneck, Waist
from narrows.models.quantize.table import QUANTIZERS
from narrows.models.waists import WAISTS, make_waist

WIDTH = 8
OPTIONS: dict[str, dict] = {
    **{name: {"codes": 16, "window": 2} for name in QUANTIZERS},
    "codebook": {"codes": 16, "code_width": 4, "window": 2},
    "key_value": {"books": 3, "codes": 16, "code_width": 4, "window": 2},
    "concepts": {"names": 6, "window": 2},
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, WIDTH)), jnp.float32)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
MASK = jnp.asarray(np.random.default_rng(1).random((4, 6)) < 0.7)


# One of each kind: several indices, running averages, parameters, draws, losses of a
# position and between positions. The others pass through the same layer, and obey the
# laws of their own table on every run.
KINDS = (
    "none",
    "codebook",
    "key_value",
    "residual_vq",
    "lfq",
    "gumbel",
    "vib",
    "cs_ib",
)
PARAMS = [
    pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
    for name in sorted(WAISTS)
]


@pytest.fixture(scope="module", params=PARAMS)
def layer(request):
    def make():
        options = OPTIONS.get(request.param, {})
        return make_waist(request.param, WIDTH, rngs=nnx.Rngs(0), **options)

    state = quick_jit(lambda: nnx.as_pure(nnx.state(make())))()
    return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), state)


@quick_jit
def send(layer, x, mask=None):
    return layer(x, mask)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [(), (4,), (4, 6)])
def test_shapes_and_dtypes(layer, dtype, rows):
    assert isinstance(layer, Bottleneck)
    x = jax.ShapeDtypeStruct((*rows, WIDTH), dtype)
    out = jax.eval_shape(layer, x)
    assert isinstance(out, Waist)
    assert (out.z.shape, out.z.dtype) == (x.shape, x.dtype)
    assert (out.loss.shape, out.loss.dtype) == ((), jnp.float32)
    assert (out.bits.shape, out.bits.dtype) == (rows, jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out.stats))


def test_a_call_is_pure_and_an_update_is_not_part_of_it(layer):
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(layer)))
    one, two = send(layer, X, MASK), send(layer, X, MASK)
    for a, b in (
        *zip(*map(jax.tree.leaves, (one, two)), strict=True),
        *zip(*map(jax.tree.leaves, (before, nnx.state(layer))), strict=True),
    ):
        assert jnp.array_equal(a, b)


def test_masked_positions_change_nothing_but_their_own_z(layer):
    """Not even a NaN there changes a value or a gradient."""
    poisoned = jnp.where(MASK[..., None], X, jnp.nan)
    one, two = send(layer, X, MASK), send(layer, poisoned, MASK)
    assert jnp.array_equal(one.z[MASK], two.z[MASK])
    for a, b in zip(
        *(jax.tree.leaves((w.loss, w.bits, w.stats)) for w in (one, two)), strict=True
    ):
        assert jnp.all(jnp.isfinite(a))
        assert jnp.array_equal(a, b)
    assert jnp.all(jnp.where(MASK, one.bits > 0, one.bits == 0))

    def total(layer, x):
        out = layer(x, MASK)
        return out.loss + jnp.sum(jnp.where(MASK[..., None], out.z, 0))

    gradients = quick_jit(jax.grad(total, allow_int=True))(layer, poisoned)
    for gradient in jax.tree.leaves(gradients):
        if jnp.issubdtype(gradient.dtype, jnp.floating):
            assert jnp.all(jnp.isfinite(gradient))


def test_sums_and_loss_do_not_depend_on_the_cut(layer):
    whole = send(layer, X, MASK)
    halves = [send(layer, X[i : i + 2], MASK[i : i + 2]) for i in (0, 2)]
    sums = jax.tree.map(jnp.add, halves[0].stats, halves[1].stats)
    for a, b in zip(*map(jax.tree.leaves, (sums, whole.stats)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    counts = [MASK[:2].sum(), MASK[2:].sum()]
    weighted = sum(h.loss * n for h, n in zip(halves, counts, strict=True))
    if not getattr(layer, "coupled", False):  # a loss between positions takes them all
        np.testing.assert_allclose(weighted / MASK.sum(), whole.loss, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.concatenate([h.bits for h in halves]), whole.bits, rtol=1e-6
    )


def test_no_mask_is_a_mask_of_ones(layer):
    """Up to the order in which two programs add."""
    for a, b in zip(
        *map(jax.tree.leaves, (send(layer, X), send(layer, X, jnp.ones_like(MASK)))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_gradient_passes(layer):
    gradient = quick_jit(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x).z))))(X)
    assert jnp.all(jnp.abs(gradient).sum(-1) > 0)


def test_an_update_is_deterministic_and_reports_scalars(layer):
    stats = send(layer, X, MASK).stats
    one, two = nnx.clone(layer), nnx.clone(layer)
    said, again = one.update(stats), two.update(stats)
    assert said == again
    for value in said.values():
        assert (value.shape, value.dtype) == ((), jnp.float32)
    for a, b in zip(*(jax.tree.leaves(nnx.state(w)) for w in (one, two)), strict=True):
        assert jnp.array_equal(a, b)


def test_the_second_call_compiles_nothing(layer):
    @quick_jit
    def step(layer, x):
        out = layer(x)
        said = layer.update(out.stats)
        return nnx.as_pure(nnx.state(layer)), out.z, said

    graph, state = nnx.split(nnx.clone(layer))
    for _ in range(2):
        state, _, _ = step(nnx.merge(graph, state), X)
    assert step._cache_size() == 1  # pyright: ignore


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="waist: 'sieve', but allowed are none, code"):
        make_waist("sieve", 8, rngs=nnx.Rngs(0))
