"""The TPU kernels: interpreted against the definition, lowered, compiled for chips."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.reference import reference
from narrows.models.kernels.attention.tiles import FULL, PART, SKIP
from narrows.models.kernels.attention.tpu import default_blocks, fitted, tpu
from narrows.models.kernels.attention.tpu_schedule import read, schedule
from narrows.models.kernels.attention.tpu_tile import Tiling

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = Tiling(128, 128, 128, 128)
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def draw(b, t, s, n, k, h, v, dtype="float32"):
    """query, key, value and the two cotangents."""
    rng = np.random.default_rng(0)
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, v), (b, t, n, v)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return [*arrays, jnp.asarray(rng.standard_normal((b, t, n)), jnp.float32)]


def bounded(b, t, s, *, causal=False, window=None, lengths=None):
    rows = np.arange(t) + s - t
    high = np.full((b, t), s) if lengths is None else np.tile(lengths, (t, 1)).T
    high = np.minimum(high, np.maximum(rows + 1, 0)) if causal else high
    low = np.zeros((b, t)) if window is None else np.tile(rows - window, (b, 1))
    return Call(*(jnp.asarray(np.maximum(x, 0), jnp.int32) for x in (low, high)))


def random(shape, kind) -> Any:
    rng = np.random.default_rng(1)
    if kind == "mask":
        return jnp.asarray(rng.random(shape) < 0.6)
    if kind == "ids":
        return jnp.asarray(np.sort(rng.integers(0, 4, shape)), jnp.int32)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def differentiate(serve, arrays, call):
    """Both results, and gradients by query, key, value, bias and sinks."""
    query, key, value, d_out, d_log = arrays

    def run(query, key, value, bias, sinks):
        out, log = serve(query, key, value, call._replace(bias=bias, sinks=sinks))
        finite = jnp.where(jnp.isfinite(log), log, 0)  # -inf where nothing is seen
        loss = (out * d_out).sum(dtype=finite.dtype) + (finite * d_log).sum()
        return loss, (out, log)

    inputs = (query, key, value, call.bias, call.sinks)
    given = tuple(i for i, x in enumerate(inputs) if x is not None)
    gradients, results = jax.grad(run, given, has_aux=True)(*inputs)
    return [*results, *gradients]


def compare(arrays, call, spec, tolerance, **options):
    """Ours against the definition in float64 on the inputs as they were rounded."""
    serve = functools.partial(tpu, spec=spec, **{"interpret": True} | options)
    found = jax.jit(functools.partial(differentiate, serve))(arrays, call)
    with jax.enable_x64(True):

        def widen(x):
            wide = jnp.issubdtype(x.dtype, jnp.floating)
            return jnp.asarray(np.asarray(x, np.float64)) if wide else jnp.asarray(x)

        serve = functools.partial(reference, spec=spec)
        exact = jax.jit(functools.partial(differentiate, serve))
        wanted = exact(*jax.tree.map(widen, (arrays, call)))
        wanted = [np.asarray(x) for x in wanted]
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        x = np.asarray(x, np.float64)
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        x, y = (np.where(np.isneginf(z), 0, z) for z in (x, y))
        error = np.abs(x - y).max() / max(1, np.abs(y).max())
        assert error < tolerance, f"result {i}: {error}"


SPEC = Spec(0.2)
CASES = {
    "causal, grouped, odd, more rows than keys": (
        (1, 200, 150, 4, 2, 32, 32),
        bounded(1, 200, 150, causal=True),
        SPEC,
        {},
    ),
    "window, lengths, documents": (
        (2, 200, 260, 1, 1, 48, 80),
        bounded(2, 200, 260, causal=True, window=70, lengths=[260, 190])._replace(
            segments=(random((2, 200), "ids"), random((2, 260), "ids"))
        ),
        SPEC,
        {},
    ),
    "mask, bias, cap, sinks": (
        (2, 130, 140, 2, 1, 32, 32),
        bounded(2, 130, 140)._replace(
            mask=random((1, 2, 130, 140), "mask"),
            bias=random((1, 2, 130, 140), "bias"),
            sinks=random((2,), "sinks"),
        ),
        Spec(0.2, soft_cap=1.5),
        {},
    ),
    "mask by rows, bias by keys, dropout": (
        (2, 130, 140, 2, 2, 32, 32),
        bounded(2, 130, 140)._replace(
            mask=random((2, 1, 130, 1), "mask"),
            bias=random((1, 2, 1, 140), "bias"),
            dropout_key=jnp.array([1, 2], jnp.uint32),
        ),
        Spec(0.2, dropout_rate=0.3),
        {},
    ),
    "mask by keys, bias by rows, function": (
        (2, 130, 140, 2, 2, 32, 32),
        bounded(2, 130, 140)._replace(
            mask=random((2, 1, 1, 140), "mask"), bias=random((2, 1, 130, 1), "bias")
        ),
        Spec(0.2, sees=lambda rows, keys: (rows + keys) % 3 != 0),
        {},
    ),
    "cells, bias and mask of a head": (
        (1, 300, 260, 2, 1, 32, 32),
        bounded(1, 300, 260)._replace(
            kept=random((1, 2, 5, 2), "mask"),
            bias=random((1, 2, 1, 1), "bias"),
            mask=jnp.array([True, False])[None, :, None, None],
            sinks=random((2,), "sinks"),
        ),
        Spec(0.2, cell=(64, 256)),
        {},
    ),
    "two levels of tiles, chunks of rows": (
        (1, 400, 500, 1, 1, 32, 32),
        bounded(1, 400, 500, causal=True),
        SPEC,
        {"blocks": Tiling(256, 512, 256, 128, rows=256)},
    ),
    "wide heads": (
        (1, 128, 128, 1, 1, 256, 192),
        bounded(1, 128, 128, causal=True),
        Spec(0.06),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    """Differences are float32 rounding: relative 1e-5 of the largest entry."""
    shape, call, spec, options = CASES[case]
    compare(draw(*shape), call, spec, 1e-5, **{"blocks": SMALL} | options)


def test_bfloat16():
    """Weights are rounded to 8 bits before the second product, results after it."""
    arrays = draw(1, 140, 140, 2, 1, 64, 64, "bfloat16")
    call = bounded(1, 140, 140, causal=True)
    compare(arrays, call, Spec(0.125), 2e-2, blocks=SMALL)


def test_no_race_between_two_cores():
    """The interpreter that runs copies and cores as they are: no read before a copy
    has ended, nothing written by both cores."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    arrays = draw(1, 200, 200, 2, 1, 32, 32)
    call = bounded(1, 200, 200, causal=True)
    compare(arrays, call, SPEC, 1e-5, blocks=SMALL, interpret=params)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races: Any = interpret_pallas_call.races
    assert not races.races_found


def test_hidden_numbers_do_not_leak():
    """NaN in what nobody sees, and in keys that only later rows see."""
    query, key, value, d_out, d_log = draw(1, 200, 300, 1, 1, 32, 32)
    call = bounded(1, 200, 300, lengths=[150])
    call = call._replace(high=call.high.at[:, 190:].set(0))  # padded rows
    later = call._replace(high=call.high.at[:, :20].set(70))  # 70 on: not for them
    serve = jax.jit(
        lambda call, *arrays: differentiate(
            functools.partial(tpu, spec=SPEC, interpret=True, blocks=SMALL),
            arrays,
            call,
        )
    )
    clean = serve(call, query, key, value, d_out, d_log)
    spoiled = serve(
        call,
        query.at[:, 190:].set(jnp.nan),
        key.at[:, 150:].set(jnp.nan),
        value.at[:, 150:].set(jnp.inf),
        d_out.at[:, 190:].set(jnp.nan),
        d_log,
    )
    for x, y in zip(clean[:2], spoiled[:2], strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(clean[2:], spoiled[2:], strict=True):
        np.testing.assert_array_equal(x, y)
    out = serve(later, query, key, value.at[:, 100].set(jnp.nan), d_out, d_log)[0]
    seen = (np.arange(200) >= 20) & (np.arange(200) < 190)
    np.testing.assert_array_equal(np.isnan(out[0, :, 0, 0]), seen)


def test_lists_hold_each_visited_tile_once():
    """Also lines that hold none have a step; all begin and end once."""
    rng = np.random.default_rng(0)
    table = rng.choice([SKIP, PART, FULL], (2, 3, 4, 5)).astype(np.int8)
    table[0, 0, 1] = SKIP
    listed = schedule(jnp.asarray(table))
    assert listed.shape == (2, 3, 20)
    steps, held = np.asarray(listed.steps), np.asarray(listed.held)
    longest = 0
    for b, n in np.ndindex(2, 3):
        seen = np.zeros((4, 5), int)
        first, last, count = np.zeros(4, int), np.zeros(4, int), 0
        for step in range(20):
            at = read(steps, listed.shape, b, n, step)
            first[at.outer] += at.first
            last[at.outer] += at.last
            count += at.first or at.last or at.kind != SKIP
            if at.kind != SKIP:
                seen[at.outer, at.inner] += 1
                assert table[b, n, at.outer, at.inner] == at.kind
            if at.kind == PART:
                near = read(held, listed.shape, b, n, step)
                assert (near.outer, near.inner) == (at.outer, at.inner)
        np.testing.assert_array_equal(seen, table[b, n] != SKIP)
        assert (first == 1).all()
        assert (last == 1).all()
        longest = max(longest, count)
    assert int(listed.count) == longest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": jnp.bfloat16}, "all must be float32"),
        ({"width": 320}, "at most 256"),
        ({"sees": True}, "give them as mask"),
        ({"cell": (192, 96)}, "multiples of one another"),
    ],
)
def test_refusals_say_why(change, reason):
    width = change.get("width", 32)
    query, key, value, *_ = draw(1, 200, 200, 1, 1, width, width)
    value = value.astype(change.get("value", value.dtype))
    table = jnp.ones((8, 128), bool)
    sees = (lambda rows, keys: table) if "sees" in change else None
    call, cell = bounded(1, 200, 200), change.get("cell")
    with pytest.raises(NotImplementedError, match=reason):
        tpu(query, key, value, call, Spec(0.2, sees=sees, cell=cell), blocks=SMALL)


def test_tiles_fit_the_call():
    assert fitted(Tiling(1024, 512, 512, 256), 1100, 40, None)[:2] == (640, 128)
    assert fitted(Tiling(1024, 512, 512, 256), 1100, 900, (96, 2048))[:2] == (768, 512)


def program(width, length, blocks, sharding=None):
    """The causal call with its gradients, and what it takes."""
    arrays = [
        jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16, sharding=sharding)
    ] * 4
    log = jax.ShapeDtypeStruct((1, length, 2), jnp.float32, sharding=sharding)
    row: Any = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)
    serve = functools.partial(tpu, spec=Spec(width**-0.5), blocks=blocks)
    run = jax.jit(lambda arrays, call: differentiate(serve, arrays, call))
    return run, ([*arrays, log], Call(row, row))


@pytest.mark.parametrize("case", CASES)
def test_lowers_for_tpus_where_there_is_none(case):
    """Blocks, layouts and operations are those that TPUs have."""
    shape, call, spec, options = CASES[case]
    blocks = options.get("blocks", SMALL)
    serve = functools.partial(tpu, spec=spec, blocks=blocks)
    run = jax.jit(lambda arrays, call: differentiate(serve, arrays, call))
    text = run.trace(draw(*shape), call).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.parametrize(
    ("chip", "width", "length"),
    [
        ("v5e", 64, 2048),
        pytest.param("v5p", 128, 2048, marks=pytest.mark.slow),
        pytest.param("v6e", 128, 4096, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_chips_that_are_not_there(chip, width, length):
    """Forward and backward with the blocks of the chip fit its fast memory."""
    pytest.importorskip("libtpu", reason="install the tpu extra to compile for TPUs")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip]
    ).devices
    one = jax.sharding.SingleDeviceSharding(devices[0])
    blocks = default_blocks(width, jnp.bfloat16, chip)
    run, arguments = program(width, length, blocks, one)
    text = run.lower(*arguments).compile().as_text() or ""
    assert "attention_forward" in text
    assert "attention_backward" in text
