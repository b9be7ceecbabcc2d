"""Attention: every form equals the definition, in values and in gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from narrows.models.kernels.attention import IMPLEMENTATIONS, attention
from narrows.models.kernels.attention.api import FEW_SCORES, MANY_BYTES, _pick

FAST = sorted(set(IMPLEMENTATIONS) - {"reference"})


def draw(shape, seed=0, dtype=jnp.float32):
    """query, key, value and the cotangent for shape = (b, t, s, n, k, h)."""
    b, t, s, n, k, h = shape
    rng = np.random.default_rng(seed)
    shapes = [(b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h)]
    return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def both(arrays, **options):
    """Output and the three gradients, concatenated as a list."""

    @jax.jit
    def run(query, key, value, cotangent):
        call = functools.partial(attention, **options)
        out, pull = jax.vjp(call, query, key, value)
        return [out, *pull(cotangent)]

    return run(*arrays)


def exact(arrays, **options):
    """The definition in float64, with the inputs as they were rounded."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        return [
            np.asarray(x) for x in both(wide, implementation="reference", **options)
        ]


def ids(b, length, documents):
    """Packed documents of uneven lengths; another cut for each row."""
    rng = np.random.default_rng(length)
    cuts = np.sort(rng.integers(0, length, (b, documents - 1)), axis=1)
    return jnp.asarray((np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1))


CASES = {
    "odd lengths": ((1, 77, 131, 3, 3, 8), {}),
    "causal": ((2, 192, 192, 2, 2, 16), {"is_causal": True}),
    "causal, odd": ((1, 201, 201, 2, 1, 24), {"is_causal": True}),
    "large blocks": ((1, 600, 700, 1, 1, 8), {"is_causal": True, "query_offset": 100}),
    "grouped": ((2, 70, 70, 6, 2, 8), {"is_causal": True}),
    "one key head": ((1, 65, 90, 4, 1, 8), {"scale": 0.3}),
    "one query": ((2, 1, 150, 2, 2, 8), {"is_causal": True, "query_offset": 99}),
    "offset by row": (
        (3, 10, 200, 2, 2, 8),
        {"is_causal": True, "query_offset": jnp.array([0, 77, 190])},
    ),
    "lengths": (
        (3, 70, 140, 2, 2, 8),
        {"key_value_seq_lengths": jnp.array([1, 65, 140])},
    ),
    "segments": (
        (2, 200, 200, 2, 1, 8),
        {"is_causal": True, "segment_ids": ids(2, 200, 5)},
    ),
    "segments of two": (
        (2, 90, 160, 2, 2, 8),
        {"segment_ids": (ids(2, 90, 3), ids(2, 160, 3))},
    ),
    "empty rows": (
        (2, 130, 70, 2, 2, 8),
        {
            "is_causal": True,
            "query_offset": -66,
            "key_value_seq_lengths": jnp.array([0, 50]),
        },
    ),
}


def test_definition_row_by_row():
    """The definition itself, against loops in numpy."""
    query, key, value, _ = (np.asarray(x, np.float64) for x in draw((2, 5, 7, 4, 2, 3)))
    q_ids, k_ids = (
        np.array([[0, 0, 1, 1, 3]] * 2),
        np.array([[0, 0, 1, 1, 1, 2, 3]] * 2),
    )
    lengths = np.array([4, 7])
    out = np.zeros_like(query)
    for b, t, n in np.ndindex(query.shape[:3]):
        j = np.arange(7)
        see = (j < lengths[b]) & (j <= t + 1) & (k_ids[b] == q_ids[b, t])
        if see.any():
            scores = 0.7 * key[b, see, n // 2] @ query[b, t, n]
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ value[b, see, n // 2] / weights.sum()
    with jax.enable_x64(True):
        got = attention(
            jnp.asarray(query),
            jnp.asarray(key),
            jnp.asarray(value),
            scale=0.7,
            is_causal=True,
            query_offset=1,
            segment_ids=(jnp.asarray(q_ids), jnp.asarray(k_ids)),
            key_value_seq_lengths=jnp.asarray(lengths),
            implementation="reference",
        )
    np.testing.assert_allclose(got, out, atol=1e-14)
    assert not np.any(got[0, 4])  # its only key lies beyond the length


def test_definition_has_true_gradients():
    query, key, value, _ = draw((1, 4, 5, 2, 1, 3))
    call = functools.partial(
        attention,
        is_causal=True,
        query_offset=-1,  # the first row sees nothing
        implementation="reference",
    )
    check_grads(jax.jit(call), (query, key, value), order=1, modes=["rev"], eps=1e-2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", FAST)
def test_equals_definition(implementation, name):
    """Float32 sums of at most 700 terms of order one: 1e-5 leaves a factor of ten."""
    shape, options = CASES[name]
    arrays = draw(shape)
    got = both(arrays, implementation=implementation, **options)
    for x, y in zip(got, exact(arrays, **options), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_bfloat16(implementation):
    """Inputs are exact in bfloat16, so what is left is one rounding of the result and,
    in blocks, one of the weights: each 2^-9 of a sum of terms of order one."""
    shape, options = CASES["causal, odd"]
    arrays = draw(shape, dtype=jnp.bfloat16)
    got = both(arrays, implementation=implementation, **options)
    for x, y in zip(got, exact(arrays, **options), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, atol=4 * 2**-9 * np.abs(y).max()
        )


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_equals_jax(implementation):
    arrays = draw((2, 96, 96, 4, 2, 16))
    options = {"is_causal": True, "key_value_seq_lengths": jnp.array([50, 96])}
    got = both(arrays, implementation=implementation, **options)

    def run(query, key, value):
        call = functools.partial(jax.nn.dot_product_attention, **options)
        return call(query, key, value)

    out, pull = jax.vjp(run, *arrays[:3])
    for x, y in zip(got, [out, *pull(arrays[3])], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_segments_are_separate_documents(implementation):
    """Packing changes nothing: each document as if it were alone."""
    query, key, value, _ = draw((1, 150, 150, 2, 2, 8))
    packed = ids(1, 150, 4)
    call = functools.partial(attention, is_causal=True, implementation=implementation)
    together = call(query, key, value, segment_ids=packed)
    for document in range(4):
        (where,) = np.nonzero(np.asarray(packed[0]) == document)
        alone = call(query[:, where], key[:, where], value[:, where])
        np.testing.assert_allclose(together[:, where], alone, atol=1e-5)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_rows_that_see_nothing(implementation):
    """They give zero, and nothing flows back through them, whatever the numbers."""
    shape, options = CASES["empty rows"]
    arrays = [1e4 * x for x in draw(shape)]
    out, *grads = both(arrays, implementation=implementation, **options)
    assert not np.any(out[0])
    assert not np.any(out[1, :66])
    assert np.all(np.any(out[1, 66:], axis=-1))
    assert not any(np.any(g[0]) for g in grads)
    chex.assert_tree_all_finite([out, *grads])


@pytest.mark.parametrize("implementation", FAST)
def test_memory_is_linear_in_length(implementation):
    """Temporaries of the training step: twice the length, about twice the bytes."""

    def temporary(t):
        shapes = [jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)] * 4
        options = {"is_causal": True, "implementation": implementation}
        step = jax.jit(lambda *x: both(x, **options))
        memory = step.lower(*shapes).compile().memory_analysis()
        return memory.temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]

    assert temporary(2048) < 2.5 * temporary(1024)
    assert temporary(2048) < 4 * 2048 * 2048 / 2  # far less than one head's scores


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_runs_on_each_device_of_a_mesh(implementation):
    """Inside shard_map over batch and heads, the result and gradients of one device."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays = draw((2, 70, 70, 4, 2, 8))
    options = {"is_causal": True, "implementation": implementation}
    spec = P("data", None, "tensor", None)
    local = jax.shard_map(
        functools.partial(attention, **options),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
    )

    @jax.jit
    def run(query, key, value, cotangent):
        out, pull = jax.vjp(local, query, key, value)
        return [out, *pull(cotangent)]

    for x, y in zip(run(*arrays), both(arrays, **options), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_choice_follows_size():
    assert _pick(12, 1, 4096) == "reference"  # decoding
    assert _pick(1, 32, FEW_SCORES // 32) == "reference"
    assert _pick(12, 256, 256) == "xla"
    assert _pick(2**10, 1, MANY_BYTES) == "xla"  # memory decides


def test_no_keys_give_zero():
    query, key, value, _ = draw((2, 3, 0, 2, 1, 4))
    assert not np.any(attention(query, key, value))
    assert attention(query[:, :0], key, value).shape == (2, 0, 2, 4)


def test_says_what_is_wrong():
    query, key, value, _ = draw((2, 4, 6, 4, 2, 8))
    with pytest.raises(ValueError, match="multiple of the key's"):
        attention(query[:, :, :3], key, value)
    with pytest.raises(ValueError, match="value"):
        attention(query, key, value[:, :-1])
    with pytest.raises(ValueError, match="is_causal=True"):
        attention(query, key, value, query_offset=3)
    with pytest.raises(ValueError, match="segment_ids"):
        attention(query, key, value, segment_ids=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="'reference', 'xla'"):
        attention(query, key, value, implementation="fast")
