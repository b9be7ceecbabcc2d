"""FSQ and LFQ: index <-> code is one to one, in every dtype; entropies are exact."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.quantize import lfq as lookup_free
from narrows.models.quantize import losses
from narrows.models.quantize.fsq import LEVELS, fsq
from narrows.models.quantize.lfq import Use, lfq
from narrows.models.quantize.protocol import State

CASES = {
    "fsq": fsq((8, 6, 5)),
    "fsq symmetric": fsq((2, 5, 8, 4), symmetric=True),
    "fsq clip": fsq((7, 5, 4), bound="clip"),
    "fsq clip symmetric": fsq((3, 2), bound="clip", symmetric=True),
    "lfq": lfq(7),
}


def all_indices(q):
    return jnp.arange(q.sizes[0], dtype=jnp.int32)[:, None]


@pytest.mark.parametrize("name", CASES)
def test_index_and_code_are_one_to_one(name):
    q = CASES[name]
    codes = q.decode(State(), all_indices(q))
    assert len(np.unique(codes, axis=0)) == q.sizes[0]
    assert jnp.all(jnp.abs(codes) <= 1)
    if "symmetric" in name or name == "lfq":
        mirrored = np.unique(-codes, axis=0)
        np.testing.assert_allclose(mirrored, np.unique(codes, axis=0), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_every_code_is_reached(name, dtype):
    """From bfloat16 inputs too: a grid of each number's range reaches all levels."""
    q = CASES[name]
    codes = np.asarray(q.decode(State(), all_indices(q)))
    each = jnp.asarray(np.linspace(-4, 4, 401), dtype)  # grid of one number
    if "clip" in name:
        each = each / 4
    reached = []
    for place in range(q.width):
        x = jnp.zeros((401, q.width), dtype).at[:, place].set(each)
        out = q.quantize(q.init(jax.random.key(0)), x)
        reached.append(np.unique(np.asarray(q.decode(State(), out.indices))[:, place]))
    assert [len(r) for r in reached] == [len(np.unique(c)) for c in codes.T]
    # numbers are rounded apart, so that any combination of levels is reached as well
    assert np.prod([len(r) for r in reached]) == q.sizes[0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_fsq_is_the_nearest_of_its_grid(symmetric):
    """Within the bounds, rounding each number is a search over the whole grid."""
    q = fsq((5, 4), symmetric=symmetric, bound="clip")
    grid = np.asarray(q.decode(State(), all_indices(q)))
    low, high = grid.min(0), grid.max(0)
    x = np.random.default_rng(0).uniform(low, high, (200, 2)).astype(np.float32)
    if not symmetric:
        # the paper stretches by eps and shifts even levels: undo both
        count = np.array([5, 4])
        offset = np.where(count % 2, 0.0, 0.5)
        reach = (count - 1) * 1.001 / 2
        sent = (x * (count // 2) + offset) / reach - offset / reach
    else:
        sent = x
    out = q.quantize(State(), jnp.asarray(sent))
    nearest = ((x[:, None] - grid) ** 2).sum(-1).argmin(-1)
    assert np.mean(out.indices[:, 0] == nearest) == 1


def test_the_gradient_of_fsq_is_that_of_its_bound():
    q = fsq((5, 5))
    x = jnp.asarray([[0.3, -1.2]])
    slope = jax.grad(lambda x: q.quantize(State(), x).z.sum())(x)
    expected = (1 - jnp.tanh(x) ** 2) * 4 * 1.001 / 2 / 2
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_levels_make_about_as_many_codes_as_asked():
    for bits, levels in LEVELS.items():
        assert abs(np.log2(np.prod(levels)) - bits) < 0.15


@pytest.mark.parametrize("levels", [(), (1, 5), (2, 5), (64,) * 6])
def test_levels_that_do_not_work_raise(levels):
    with pytest.raises(ValueError, match="levels: "):
        fsq(levels)


D, TEMPERATURE = 5, 1.5
X = jnp.asarray(np.random.default_rng(1).normal(size=(12, D)), jnp.float32)


def explicit(x):
    """p(code | x) of all codes, in the order of their indices."""
    signs = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=D)))
    return jax.nn.softmax(2 * x @ signs.T / TEMPERATURE)


def test_lfq_codes_are_the_rows_of_signs_in_order():
    q = lfq(D)
    rows = np.array(list(itertools.product([-1.0, 1.0], repeat=D)))
    assert np.array_equal(q.decode(State(), all_indices(q)), rows)


def test_entropies_equal_those_of_the_whole_table():
    p = explicit(X)
    np.testing.assert_allclose(
        lookup_free.sample_entropy(X, TEMPERATURE), losses.entropy(p), rtol=1e-4
    )
    keep = jnp.asarray(np.arange(12) < 9, jnp.float32)
    np.testing.assert_allclose(
        lookup_free.batch_entropy(X, TEMPERATURE, keep),
        losses.entropy(p[:9].mean(0)),
        rtol=1e-4,
    )


def test_crowding_has_value_and_gradient_of_the_batch_entropy():
    """With the batch's own mean as the running one; any cut gives the same sum."""
    q = lfq(D, temperature=TEMPERATURE, decay=0.0)
    state = q.init(jax.random.key(0))
    state, _ = q.update(state, q.quantize(state, X).stats)

    def ours(x):
        return q.quantize(state, x).losses["crowding"]

    def exact(x):
        return -lookup_free.batch_entropy(x, TEMPERATURE)

    for a, b in zip(*(jax.value_and_grad(f)(X) for f in (ours, exact)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_lfq_never_holds_positions_times_codes():
    q, rows = lfq(16), 512
    state = State(memory=Use(jax.ShapeDtypeStruct((256, 256), jnp.float32)))  # type: ignore
    x = jax.ShapeDtypeStruct((rows, 16), jnp.float32)

    def loss(x, state):
        return sum(q.quantize(state, x).losses.values())

    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, state).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < rows * 2**16 * 4 / 8
