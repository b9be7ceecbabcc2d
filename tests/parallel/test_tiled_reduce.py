"""Sums in tiles: the same numbers, one reduction a tile, none of them waited for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from narrows.parallel import hlo
from narrows.parallel.tiled_reduce import finish, project, tiled_reduce
from narrows.parallel.wire import collectives, jaxpr_collectives

DEVICES = 4


@functools.cache
def mesh():
    return jax.make_mesh((DEVICES,), ("tensor",), axis_types=(AxisType.Auto,))


def sharded(tiles):
    """heads [rows, features] and weight [features, d], both cut along the features."""
    return jax.jit(
        jax.shard_map(
            lambda x, w: project(x, w, "tensor", tiles=tiles),
            mesh=mesh(),
            in_specs=(P(None, "tensor"), P("tensor", None)),
            out_specs=P(),
        )
    )


@functools.cache
def draw():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(24, 32)), rng.normal(size=(32, 16))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize("tiles", [1, 2, 6, 24])
def test_tiled_is_whole(tiles):
    """Each entry is the same sum of four numbers; only products may round apart."""
    x, w = draw()
    found = sharded(tiles)(x, w)
    np.testing.assert_allclose(found, sharded(1)(x, w), atol=2e-6)
    np.testing.assert_allclose(found, x @ w, atol=1e-5)


@pytest.mark.parametrize("tiles", [1, 3, 8])
def test_the_compiled_program_has_one_reduction_a_tile(tiles):
    x, w = draw()
    traced = sharded(tiles).trace(x, w)
    for found in (
        collectives(traced.lower().compile(), mesh()),
        jaxpr_collectives(traced.jaxpr),
    ):
        assert {c.kind for c in found} == {"all-reduce"}
        assert all(c.exact and c.bytes == 4 * 16 * 24 // tiles for c in found)
        assert sum(c.count for c in found) == tiles


def test_no_product_waits_for_a_reduction():
    """In the compiled turn of the loop neither of the two reaches the other."""
    text = sharded(4).trace(*draw()).lower().compile().as_text()
    assert text is not None
    module = hlo.Module(text)
    (turn,) = (
        ops
        for name, ops in module.computations.items()
        if name != module.entry and any(op.opcode == "all-reduce" for op in ops)
    )

    def before(op):
        """Names of all that an instruction of the turn needs, itself left out."""
        found = {x.name for x in module.operands(op)}
        return found.union(*(before(x) for x in module.operands(op)))

    (reduction,) = (op for op in turn if op.opcode == "all-reduce")
    (product,) = (
        op
        for op in turn
        if op.opcode in ("dot", "fusion", "custom-call") and "dot_general" in op.rest
    )
    assert product.name not in before(reduction)
    assert reduction.name not in before(product)


def test_the_gradient_is_that_of_the_whole():
    x, w = draw()

    def loss(tiles):
        return jax.grad(lambda x, w: jnp.sin(sharded(tiles)(x, w)).sum(), (0, 1))(x, w)

    for ours, whole in zip(loss(3), loss(1), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


def test_any_function_of_rows_is_tiled():
    """Attention and projection of the local heads at once, tile by tile."""
    rng = np.random.default_rng(1)
    heads, h, d, t = 8, 4, 16, 24
    q, k, v = (jnp.asarray(rng.normal(size=(t, heads, h)), jnp.float32) for _ in "qkv")
    w = jnp.asarray(rng.normal(size=(heads, h, d)), jnp.float32)

    def attend(q, k, v, w):
        out = jax.nn.dot_product_attention(q[None], k[None], v[None])[0]
        return jnp.einsum("tnh,nhd->td", out, w)

    run = jax.shard_map(
        lambda q, k, v, w: tiled_reduce(
            lambda rows: attend(rows, k, v, w), q, "tensor", tiles=3
        ),
        mesh=mesh(),
        in_specs=(*[P(None, "tensor")] * 3, P("tensor")),
        out_specs=P(),
    )
    np.testing.assert_allclose(jax.jit(run)(q, k, v, w), attend(q, k, v, w), atol=2e-5)


@given(
    tiles=st.integers(1, 50),
    compute=st.floats(0.001, 10),
    reduce=st.floats(0.001, 10),
)
def test_equal_tiles_take_what_the_formula_says(tiles, compute, reduce):
    found = finish([compute] * tiles, [reduce] * tiles)
    formula = compute + (tiles - 1) * max(compute, reduce) + reduce
    assert found == pytest.approx(formula)
    assert found <= tiles * (compute + reduce) * (1 + 1e-9)


@pytest.mark.parametrize("tiles", [0, 5, 25])
def test_tiles_that_do_not_divide_the_rows_are_refused(tiles):
    with pytest.raises(ValueError, match=f"tiles is {tiles}; it must divide the 24"):
        sharded(tiles)(*draw())
