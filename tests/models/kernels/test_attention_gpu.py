"""The Triton form: equal to the definition where it is interpreted, and it lowers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.gpu import Blocks, Tiling, _plan, gpu
from narrows.models.kernels.attention.reference import reference
from narrows.models.kernels.attention.tiles import FULL, PART

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = Blocks(*(Tiling(16, 16, 4, 2),) * 3)
# every kernel with tiles of its own
UNEQUAL = Blocks(Tiling(16, 32, 4, 2), Tiling(32, 16, 4, 2), Tiling(16, 16, 4, 2))


def bounds(b, t, s, low=0, high=None):
    """`low` and `high` of all rows from numbers or functions of the row."""
    rows = np.arange(t)
    high = s if high is None else high
    both = [x(rows) if callable(x) else np.full(t, x) for x in (low, high)]
    return {
        name: np.broadcast_to(np.clip(x, 0, s), (b, t)).astype(np.int32)
        for name, x in zip(("low", "high"), both, strict=True)
    }


def rng(*seed):
    return np.random.default_rng(seed)


def causal(offset=0):
    return lambda rows: rows + offset + 1


def ids(b, length):
    cuts = np.sort(rng(length).integers(0, length, (b, 3)), axis=1)
    return (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32)


# name: (b, t, s, n, k, h, v), arrays of the call, static facts, cuts. Features that do
# not touch one another share a case: compiling is what costs.
CASES = {
    "causal, odd, grouped": (
        (2, 45, 45, 4, 2, 20, 16),
        {"high": causal()},
        {"scale": 0.3},
        UNEQUAL,
    ),
    "window, empty rows, sinks": (
        (1, 50, 40, 4, 1, 16, 24),
        {
            "low": lambda rows: rows - 20,
            "high": causal(-5),
            "sinks": np.array([0.5, -1.0, 3.0, -np.inf]),
        },
        {},
        SMALL,
    ),
    "segments, mask of keys, one query head, dropout": (
        (2, 50, 40, 1, 1, 16, 16),
        {
            "segments": (ids(2, 50), ids(2, 40)),
            "mask": rng(2).random((2, 1, 1, 40)) < 0.6,
            "dropout_key": np.array([3, 4], np.uint32),
        },
        {"dropout_rate": 0.3},
        UNEQUAL,
    ),
    "mask, cells": (
        (2, 33, 35, 2, 2, 16, 16),
        {
            "mask": rng(1).random((2, 2, 33, 35)) < 0.6,
            "kept": rng(3).random((1, 2, 4, 2)) < 0.7,
        },
        {"cell": (10, 32)},
        SMALL,
    ),
    "a function, one query": (
        (2, 1, 70, 2, 1, 16, 16),
        {},
        {"sees": lambda rows, keys: (keys // 16 == 1) | (keys % 16 == rows + 3)},
        SMALL,
    ),
    "bias, causal": (
        (2, 33, 40, 2, 1, 16, 16),
        {"bias": rng(4).normal(size=(2, 2, 33, 40)), "high": causal(3)},
        {},
        UNEQUAL,
    ),
    "bias of heads, cap, dropout, negative scale": (
        (2, 33, 40, 2, 1, 16, 16),
        {
            "bias": rng(5).normal(size=(1, 2, 33, 40)),
            "dropout_key": np.array([5, 6], np.uint32),
        },
        {"soft_cap": 2.0, "dropout_rate": 0.1, "scale": -0.4},
        SMALL,
    ),
    "bias of keys, sinks": (
        (2, 20, 40, 2, 1, 16, 16),
        {"bias": rng(6).normal(size=(2, 1, 1, 40)), "sinks": rng(7).normal(size=2)},
        {},
        UNEQUAL,
    ),
    "one bias, sinks": (
        (1, 20, 40, 2, 1, 16, 16),
        {"bias": rng(8).normal(size=(1, 2, 1, 1)), "sinks": rng(7).normal(size=2)},
        {},
        SMALL,
    ),
}


def build(name, dtype=np.float32):
    """Operands, call, static facts and the cotangents of both results."""
    (b, t, s, n, k, h, v), arrays, static, _ = CASES[name]
    draw = rng(b, t, s).standard_normal
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, v), (b, t, n, v), (b, t, n)
    operands = [jnp.asarray(draw(shape), dtype) for shape in shapes]
    arrays = {**arrays}
    limits = {x: arrays.pop(x) for x in ("low", "high") if x in arrays}
    arrays |= bounds(b, t, s, **limits)
    for floating in {"bias", "sinks"} & arrays.keys():
        arrays[floating] = arrays[floating].astype(dtype)
    return operands, Call(**arrays), Spec(**{"scale": h**-0.5, **static})


def results(serve, operands, call, spec, wrap=jax.jit):
    """Both results, then the gradients of query, key, value, bias and sinks."""

    @wrap
    def run(query, key, value, d_out, d_log, call):
        def differentiable(query, key, value, bias, sinks):
            whole = call._replace(bias=bias, sinks=sinks)
            return serve(query, key, value, whole, spec)

        out, pull = jax.vjp(differentiable, query, key, value, call.bias, call.sinks)
        return [*out, *pull((d_out.astype(out[0].dtype), d_log.astype(out[1].dtype)))]

    call = jax.tree.map(jnp.asarray, call)
    return [None if x is None else np.asarray(x) for x in run(*operands, call)]


def exact(operands, call, spec):
    """The definition in float64 of the operands as they were rounded."""
    with jax.enable_x64(True):

        def widen(x):
            x = np.asarray(x)
            return jnp.asarray(x if x.dtype.kind in "iub" else x.astype(np.float64))

        return results(reference, *jax.tree.map(widen, (operands, call)), spec)


def compare(got, wanted, tolerance):
    names = "out", "logsumexp", "query", "key", "value", "bias", "sinks"
    for name, x, y in zip(names, got, wanted, strict=True):
        if y is None:
            continue
        assert x.shape == y.shape, name
        size = np.abs(y[np.isfinite(y)]).max(initial=1e-3)
        np.testing.assert_allclose(
            x.astype(np.float64), y, atol=tolerance * size, rtol=0, err_msg=name
        )


@pytest.mark.parametrize("name", CASES)
def test_equals_definition(name):
    """Float32 sums of less than 100 terms of order one."""
    operands, call, spec = build(name)
    serve = functools.partial(gpu, interpret=True, blocks=CASES[name][3])
    got = results(serve, operands, call, spec)
    compare(got, exact(operands, call, spec), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """Weights and gradients of scores are rounded once, sums are not."""
    name = "window, empty rows, sinks"
    operands, call, spec = build(name, dtype)
    got = results(functools.partial(gpu, interpret=True), operands, call, spec)
    assert [x.dtype for x in got if x is not None] == [
        *(dtype, np.float32),
        *(dtype, dtype, dtype, dtype),
    ]
    compare(got, exact(operands, call, spec), 2 * jnp.finfo(dtype).eps)


def test_what_nobody_sees_does_not_leak():
    """NaN in hidden keys, values and rows changes nothing; in seen ones it shows."""
    b, t, s, n, k, h, v = 1, 40, 48, 2, 1, 16, 16
    draw = rng(0).standard_normal
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, v), (b, t, n, v), (b, t, n)
    operands = [jnp.asarray(draw(shape), jnp.float32) for shape in shapes]
    # row 30 sees nothing, key 20 only rows from 20 on, keys from 40 on nobody
    limits = bounds(b, t, s, high=lambda rows: np.where(rows == 30, 0, rows + 1))
    call, spec = Call(**limits), Spec(scale=0.25)
    poison = jnp.nan
    worse = [
        operands[0].at[:, 30].set(poison),
        operands[1].at[:, 40:].set(poison),
        operands[2].at[:, 40:].set(-jnp.inf).at[:, 20].set(poison),
        *operands[3:],
    ]
    serve = functools.partial(gpu, interpret=True, blocks=SMALL)
    got, wanted = (results(serve, x, call, spec) for x in (worse, operands))
    out, log, d_query, d_key, d_value = got[:5]
    sees = np.isin(np.arange(t), [*range(20, 30), *range(31, 40)])
    assert np.isnan(out[:, sees]).all()
    np.testing.assert_array_equal(out[:, ~sees], wanted[0][:, ~sees])
    np.testing.assert_array_equal(log, wanted[1])
    np.testing.assert_array_equal(d_query[:, ~sees], wanted[2][:, ~sees])
    assert np.isfinite(d_value).all()
    assert np.isnan(d_query[:, sees]).any(-1).all()
    assert not d_key[:, 40:].any()
    assert not d_query[:, 30].any()
    assert not out[:, 30].any()


def test_plan_visits_what_the_table_says():
    table = jnp.asarray(rng(0).integers(0, 3, (2, 3, 5, 7)), jnp.int8)
    plan = jax.jit(_plan)(table)
    for place in np.ndindex(2, 3, 5):
        row, order = np.asarray(table[place]), np.asarray(plan.order[place])
        full, visited = int(plan.full[place]), int(plan.visited[place])
        assert sorted(order[:full]) == list(np.flatnonzero(row == FULL))
        assert sorted(order[full:visited]) == list(np.flatnonzero(row == PART))


def everything(t, n):
    """Arrays of every kind at once, as shapes."""
    struct = jax.ShapeDtypeStruct
    ids = struct((2, t), jnp.int32)
    return {
        "segments": (ids, ids),
        "mask": struct((2, 1, t, t), jnp.bool_),
        "kept": struct((1, n, t // 64, t // 64), jnp.bool_),
        "bias": struct((1, n, t, t), jnp.bfloat16),
        "sinks": struct((n,), jnp.float32),
        "dropout_key": struct((2,), jnp.uint32),
    }


LOWERED = {
    "64": ((2, 4096, 32, 32, 64), jnp.bfloat16, {}, {}),
    "96, odd": ((2, 4001, 16, 4, 96), jnp.float16, {}, {}),
    "128": ((4, 4096, 16, 16, 128), jnp.bfloat16, {}, {}),
    "256": ((1, 16384, 8, 8, 256), jnp.bfloat16, {}, {}),
    "float32": ((2, 2048, 16, 1, 128), jnp.float32, {}, {}),
    "one row": ((2, 1, 16, 16, 128), jnp.bfloat16, {}, {}),
    "all": (
        (2, 2048, 16, 4, 128),
        jnp.bfloat16,
        everything(2048, 16),
        {
            "cell": (64, 64),
            "soft_cap": 30.0,
            "dropout_rate": 0.1,
            "sees": lambda rows, keys: (rows // 512 == keys // 512) | (keys < 4),
        },
    ),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(name):
    """Every kernel becomes a Triton program on a machine that has no GPU."""
    (b, t, n, k, h), dtype, arrays, static = LOWERED[name]
    struct = jax.ShapeDtypeStruct
    call = Call(*(struct((b, t), jnp.int32),) * 2, **arrays)
    spec = Spec(scale=h**-0.5, **static)
    query, key = struct((b, t, n, h), dtype), struct((b, t, k, h), dtype)

    def step(query, key, value, call, d_out, d_log):
        def out(query, key, value, bias, sinks):
            whole = call._replace(bias=bias, sinks=sinks)
            return gpu(query, key, value, whole, spec)

        _, pull = jax.vjp(out, query, key, value, call.bias, call.sinks)
        return pull((d_out, d_log))

    allowed = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    exported = jax.export.export(
        jax.jit(step), platforms=["cuda"], disabled_checks=[allowed]
    )(query, key, key, call, query, struct((b, t, n), jnp.float32))
    text = exported.mlir_module()
    for kernel in ("forward", "queries", "keys") + ("bias",) * ("bias" in arrays):
        assert text.count(f'name = "attention_{kernel}"') == 1


def test_refuses_with_the_reason():
    struct = jax.ShapeDtypeStruct
    bound = struct((1, 32), jnp.int32)
    table = jnp.arange(32)

    def lower(h=16, dtype=jnp.float32, value_dtype=None, **static):
        x = struct((1, 32, 1, h), dtype)
        value = struct(x.shape, value_dtype or dtype)
        serve = functools.partial(gpu, spec=Spec(1.0, **static), interpret=True)
        return jax.eval_shape(serve, x, x, value, Call(bound, bound))

    assert lower()[1].shape == (1, 32, 1)
    for reason, arguments in {
        "float32, bfloat16 or float16": {"value_dtype": jnp.bfloat16},
        "not int32": {"dtype": jnp.int32},
        "at most 256": {"h": 257},
        "holds arrays": {"sees": lambda rows, keys: table[rows] == keys},
    }.items():
        with pytest.raises(NotImplementedError, match=reason):
            lower(**arguments)
