"""The Triton form: equal to the definition where it is interpreted, and it lowers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.gpu import Blocks, Tiling, gpu
from narrows.models.kernels.attention.reference import reference

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


# name: (b, t, s, n, k, h, v), arrays of the call, static facts, cuts
CASES = {
    "full": ((2, 32, 48, 2, 2, 16, 16), {}, {}, SMALL),
    "odd": ((1, 37, 51, 3, 1, 24, 40), {}, {}, UNEQUAL),
    "one query": ((2, 1, 40, 2, 1, 16, 16), {}, {}, SMALL),
    "causal": ((1, 64, 64, 1, 1, 32, 32), {"high": causal()}, {}, SMALL),
    "causal, odd, grouped": (
        (2, 45, 45, 6, 2, 20, 16),
        {"high": causal()},
        {"scale": 0.3},
        UNEQUAL,
    ),
    "window": (
        (1, 70, 60, 2, 1, 16, 16),
        {"low": lambda rows: rows - 20, "high": causal(-5)},
        {},
        SMALL,
    ),
    "segments": (
        (2, 50, 40, 2, 1, 16, 16),
        {"segments": (ids(2, 50), ids(2, 40))},
        {},
        UNEQUAL,
    ),
    "mask": (
        (2, 33, 35, 4, 2, 16, 16),
        {"mask": rng(1).random((2, 4, 33, 35)) < 0.4},
        {},
        SMALL,
    ),
    "mask of keys": (
        (2, 33, 35, 2, 2, 16, 16),
        {"mask": rng(2).random((2, 1, 1, 35)) < 0.4, "high": causal()},
        {},
        UNEQUAL,
    ),
    "cells": (
        (1, 60, 70, 2, 1, 16, 16),
        {"kept": rng(3).random((1, 2, 6, 3)) < 0.5},
        {"cell": (10, 32)},
        SMALL,
    ),
    "a function": (
        (1, 40, 40, 1, 1, 16, 16),
        {},
        {"sees": lambda rows, keys: (rows // 8 == keys // 8) | (keys % 16 == 3)},
        SMALL,
    ),
    "bias": (
        (2, 33, 40, 2, 1, 16, 16),
        {"bias": rng(4).normal(size=(2, 2, 33, 40)), "high": causal(3)},
        {},
        UNEQUAL,
    ),
    "bias of heads": (
        (2, 33, 40, 2, 1, 16, 16),
        {"bias": rng(5).normal(size=(1, 2, 33, 40))},
        {"soft_cap": 2.0},
        SMALL,
    ),
    "bias of keys": (
        (2, 20, 40, 2, 1, 16, 16),
        {"bias": rng(6).normal(size=(2, 1, 1, 40)), "sinks": rng(7).normal(size=2)},
        {},
        UNEQUAL,
    ),
    "bias of rows": (
        (1, 20, 40, 2, 1, 16, 16),
        {"bias": rng(8).normal(size=(1, 1, 20, 1)), "sinks": rng(7).normal(size=2)},
        {"soft_cap": 3.0},
        SMALL,
    ),
    "one bias": (
        (1, 20, 40, 2, 1, 16, 16),
        {"bias": rng(8).normal(size=(1, 2, 1, 1)), "sinks": rng(7).normal(size=2)},
        {},
        SMALL,
    ),
    "sinks": (
        (2, 40, 40, 4, 2, 16, 16),
        {"sinks": np.array([0.5, -1.0, 3.0, -np.inf]), "high": causal(-6)},
        {},
        SMALL,
    ),
    "dropout": (
        (2, 40, 50, 4, 2, 16, 16),
        {"dropout_key": np.array([3, 4], np.uint32), "high": causal(9)},
        {"dropout_rate": 0.3},
        UNEQUAL,
    ),
    "all at once": (
        (2, 40, 50, 4, 2, 16, 32),
        {
            "low": lambda rows: rows - 30,
            "high": causal(2),
            "segments": (ids(2, 40), ids(2, 50)),
            "mask": rng(9).random((1, 1, 40, 50)) < 0.8,
            "bias": rng(10).normal(size=(1, 4, 40, 50)),
            "sinks": rng(11).normal(size=4),
            "dropout_key": np.array([5, 6], np.uint32),
        },
        {"dropout_rate": 0.1, "soft_cap": 4.0, "scale": -0.4},
        SMALL,
    ),
    "empty rows": ((1, 40, 24, 2, 1, 16, 16), {"high": causal(-20)}, {}, SMALL),
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


def results(serve, operands, call, spec):
    """Both results, then the gradients of query, key, value, bias and sinks."""

    @jax.jit
    def run(query, key, value, d_out, d_log, call):
        def differentiable(query, key, value, bias, sinks):
            whole = call._replace(bias=bias, sinks=sinks)
            return serve(query, key, value, whole, spec)

        out, pull = jax.vjp(differentiable, query, key, value, call.bias, call.sinks)
        return [*out, *pull((d_out.astype(out[0].dtype), d_log.astype(jnp.float32)))]

    call = jax.tree.map(jnp.asarray, call)
    return [None if x is None else np.asarray(x) for x in run(*operands, call)]


def exact(operands, call, spec):
    """The definition in float64 of the operands as they were rounded."""

    def serve(*given):
        out, log = reference(*given)
        return out, log.astype(jnp.float32)

    with jax.enable_x64(True):

        def widen(x):
            x = np.asarray(x)
            real = x.dtype.kind not in "iub"
            return jnp.asarray(x.astype(np.float64) if real else x)

        return results(serve, *jax.tree.map(widen, (operands, call)), spec)


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
