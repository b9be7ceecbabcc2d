"""The search finds the nearest code in any cut into blocks, and holds little."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.models.quantize.search import nearest, unit

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
RNG = np.random.default_rng(0)
X, CODES = RNG.normal(size=(3, 7, 5)), RNG.normal(size=(33, 5))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("rows", "block"), [(100, 100), (4, 8), (21, 33), (1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_the_nearest_in_float64(metric, rows, block, dtype):
    x, codes = jnp.asarray(X, dtype), jnp.asarray(CODES, dtype)
    a, b = (np.asarray(v, np.float64) for v in (x, codes))
    if metric == "cosine":
        a, b = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b))
    distance = ((a[..., None, :] - b) ** 2).sum(-1)
    search = functools.partial(nearest, metric=metric, rows=rows, block=block)
    index = jax.jit(search, compiler_options=QUICK)(x, codes)
    assert index.dtype == jnp.int32
    assert np.array_equal(index, distance.argmin(-1))


@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_ties_go_to_the_first(block):
    codes = jnp.asarray([[3.0, 3], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    x = jnp.asarray([[2.0, 0], [0.5, 0.5], [0, 2]])
    assert nearest(x, codes, block=block, rows=2).tolist() == [1, 1, 2]


@pytest.mark.parametrize("block", [2, 8])
def test_any_numbers_get_an_index_in_range(block):
    x = jnp.asarray([[jnp.nan, 0], [jnp.inf, -jnp.inf], [1e30, 1e30], [0, 0]])
    index = nearest(x, jnp.asarray(CODES[:5, :2]), block=block)
    assert jnp.all((index >= 0) & (index < 5))


def test_the_matrix_of_distances_is_never_whole():
    """At 65536 codes: an eighth of the matrix at most; it is a hundredth."""
    rows, codes = 4096, 65536
    x = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
    table = jax.ShapeDtypeStruct((codes, 16), jnp.float32)
    memory: Any = jax.jit(nearest).lower(x, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * codes * 4 / 100


def test_rows_over_devices_are_searched_where_they_lie():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(RNG.normal(size=(16, 64, 5)), jnp.float32)
    over = jax.device_put(x, NamedSharding(mesh, P("data")))
    search = jax.jit(functools.partial(nearest, rows=128, block=8))
    program = search.lower(over, CODES).compile()
    found = program(over, CODES)
    assert found.sharding.spec == P("data")
    assert jnp.array_equal(found, search(x, CODES))
    text = program.as_text() or ""
    assert "while" in text  # blocks are visited in a loop
    for moves in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert moves not in text


def test_unit_is_finite_at_zero_with_its_gradient():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: unit(x).sum())(x)))


def test_another_metric_is_refused():
    with pytest.raises(ValueError, match="metric: 'manhattan', but allowed are 'eucli"):
        nearest(jnp.zeros((1, 2)), jnp.zeros((2, 2)), metric="manhattan")  # type: ignore
