"""The Hopper form: equal to the definition where it is interpreted, and it lowers.

The interpreter runs the warp-specialised kernels thread by thread, with their barriers
and copies, and looks for races. Where one warpgroup fails the others wait for ever, so
each case runs in a process with a time limit: `python <this file> <case> <results>`.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.hopper import hopper
from narrows.models.kernels.attention.reference import reference
from narrows.models.kernels.attention.tiles import FULL, PART, visits
from narrows.models.kernels.attention.warpgroups import TILE, tile_lists

SECONDS = 200

# name: (t, s, n, k, h), dtype, what is hidden, static facts, whether to differentiate
CASES = {
    "window, documents, empty rows": (
        (100, 256, 1, 1, 64),
        jnp.float16,
        {"window": 90, "documents": 2, "empty": 7},
        {},
        False,
    ),
    "causal, sinks, shared heads": (
        (100, 256, 2, 1, 64),
        jnp.bfloat16,
        {"offset": 136, "length": 246, "sinks": [0.5, -np.inf]},
        {},
        True,
    ),
    "all, 128": (
        (300, 290, 2, 2, 128),
        jnp.bfloat16,
        {"offset": 0, "length": 280, "documents": 3, "empty": 5, "sinks": [1.0, 3.0]},
        {"soft_cap": 2.0},
        True,
    ),
    "no sinks, half precision": (
        (128, 384, 2, 2, 64),
        jnp.float16,
        {"offset": 256, "empty": 3},
        {"scale": -0.2},
        True,
    ),
}
QUICK = list(CASES)[:2]


def inputs(name):
    """query, key, value, call, spec and both cotangents; hidden keys are no numbers."""
    (t, s, n, k, h), dtype, hidden, static, _ = CASES[name]
    rng = np.random.default_rng(len(name))
    shapes = [(1, t, n, h), (1, s, k, h), (1, s, k, h), (1, t, n, h)]
    query, key, value, d_out = (rng.standard_normal(x) for x in shapes)
    rows, length = np.arange(t), hidden.get("length", s)
    high = np.minimum(rows + 1 + hidden.get("offset", s), length)
    low = np.maximum(high - hidden["window"], 0) if "window" in hidden else 0 * high
    high[rows < hidden.get("empty", 0)] = 0
    key[:, length:], value[:, length:] = np.nan, np.inf
    segments = sinks = None
    if "documents" in hidden:
        segments = tuple(
            jnp.asarray(np.arange(x)[None] * hidden["documents"] // x) for x in (t, s)
        )
    if "sinks" in hidden:
        sinks = jnp.asarray(hidden["sinks"], jnp.float32)
    bounds = (jnp.asarray(x[None], jnp.int32) for x in (low, high))
    arrays = [jnp.asarray(x, dtype) for x in (query, key, value)]
    d_log = jnp.asarray(rng.standard_normal((1, t, n)), jnp.float32)
    call, spec = Call(*bounds, segments=segments, sinks=sinks), Spec(h**-0.5)
    return arrays, call, spec._replace(**static), (jnp.asarray(d_out, dtype), d_log)


def results(serve, arrays, call, spec, cotangents, differentiate):
    """Output, log-sum-exp and, if asked for, every gradient."""

    def run(arrays, sinks, cotangents):
        def out(arrays, sinks):
            return serve(*arrays, call._replace(sinks=sinks), spec)

        if not differentiate:
            return list(out(arrays, sinks))
        both, pull = jax.vjp(out, arrays, sinks)
        if serve is reference:  # an empty row has no gradient
            empty = jnp.isneginf(both[1])
            cotangents = (cotangents[0], jnp.where(empty, 0, cotangents[1]))
        d_arrays, d_sinks = pull(cotangents)
        return [*both, *d_arrays, *([] if sinks is None else [d_sinks])]

    return jax.jit(run)(arrays, call.sinks, cotangents)


def interpret(name, path):
    """Run a case in this process and save what came out."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    def serve(*operands):
        params = InterpretGPUParams(detect_races=True)
        return hopper(*operands, interpret=params, blocks=(64, 2))

    arrays = results(serve, *inputs(name), CASES[name][-1])
    races = interpret_pallas_call.get_races().races_found
    np.savez(path, *(np.asarray(x, np.float64) for x in arrays), races=races)


def exact(name):
    arrays, call, spec, cotangents = inputs(name)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
        wide[1:] = [jnp.where(jnp.isfinite(x), x, 0) for x in wide[1:]]
        cotangents = [jnp.asarray(np.asarray(x, np.float64)) for x in cotangents]
        found = results(reference, wide, call, spec, tuple(cotangents), CASES[name][-1])
        return [np.asarray(x) for x in found]


@pytest.mark.parametrize(
    "name",
    [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES],
)
def test_equals_the_definition(name, tmp_path):
    """No more off than the rounding of weights, errors and results explains."""
    path = tmp_path / "results.npz"
    # the interpreter's threads wait for one another: give them a thread each
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run(
        [sys.executable, __file__, name, str(path)],
        env=environment,
        timeout=SECONDS,
        check=True,
    )
    found, expected = np.load(path), exact(name)
    assert not found["races"]
    unit = float(jnp.finfo(CASES[name][1]).eps)
    for i, right in enumerate(expected):
        got = found[f"arr_{i}"]
        if i == 1:
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)
            continue
        # each of weight, error and result is rounded to half a unit: 2 leaves room
        bound = 2 * unit * max(np.abs(right).max(), 1e-3)
        np.testing.assert_allclose(got, right, rtol=0, atol=bound)


def lowered(h, dtype=jnp.bfloat16, n=4096, blocks=None, segments=False):
    """The training step at published shapes, for a GPU, on a machine without one."""
    x = jax.ShapeDtypeStruct((4, n, 2048 // h, h), dtype)
    shared = jax.ShapeDtypeStruct((4, n, 4, h), dtype)
    bounds = jax.ShapeDtypeStruct((4, n), jnp.int32)
    ids = (bounds, bounds) if segments else None

    def step(query, key, value, call):
        def loss(*arrays):
            out, logsumexp = hopper(*arrays, call, Spec(h**-0.5), blocks=blocks)
            return out.astype(jnp.float32).sum() + logsumexp.sum()

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    check = export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    exported = export.export(jax.jit(step), platforms=["cuda"], disabled_checks=[check])
    call = Call(bounds, bounds, segments=ids, sinks=None)
    return exported(x, shared, shared, call).mlir_module()


@pytest.mark.parametrize(
    ("h", "dtype", "segments"),
    [(64, jnp.bfloat16, False), (128, jnp.bfloat16, True), (128, jnp.float16, False)],
)
def test_lowers_for_a_gpu(h, dtype, segments):
    """Forward and both gradients, within the shared memory of a multiprocessor."""
    assert lowered(h, dtype, segments=segments).count("mosaic_gpu_v2") >= 3


def test_lowering_counts_shared_memory():
    """So that the test above says something: 8 stages would take 544 KB."""
    with pytest.raises(Exception, match=r"(?i)shared memory|smem"):
        lowered(128, blocks=(128, 8))


def test_tile_lists():
    """FULL tiles first, then PART, in order; none twice, none left out."""
    table = np.random.default_rng(0).integers(0, 3, (2, 3, 5, 7)).astype(np.int8)
    order, counts = map(np.asarray, tile_lists(jnp.asarray(table)))
    for at in np.ndindex(2, 3, 5):
        kinds = [np.flatnonzero(table[at] == kind) for kind in (FULL, PART)]
        assert list(counts[at]) == [len(x) for x in kinds]
        visited = np.concatenate(kinds)
        assert list(order[at][: len(visited)]) == list(visited)


def test_cases_visit_all_kinds_of_tiles():
    """The quick gradient case has whole tiles, cut tiles and tiles left out."""
    _, call, spec, _ = inputs(QUICK[1])
    assert {FULL, PART} <= set(np.asarray(visits(call, spec, 256, TILE, 128)).ravel())
    _, call, spec, _ = inputs(QUICK[0])
    assert {0, PART} <= set(np.asarray(visits(call, spec, 256, TILE, 64)).ravel())


@pytest.mark.parametrize(
    ("h", "dtype", "given", "static"),
    [
        (64, jnp.float32, {}, {}),
        (48, jnp.bfloat16, {}, {}),
        (256, jnp.bfloat16, {}, {}),
        (64, jnp.bfloat16, {"bias": jnp.zeros((1, 1, 64, 64))}, {}),
        (64, jnp.bfloat16, {"mask": jnp.ones((1, 1, 64, 64), bool)}, {}),
        (64, jnp.bfloat16, {"dropout_key": jnp.zeros(2, jnp.uint32)}, {}),
        (64, jnp.bfloat16, {}, {"sees": lambda rows, keys: rows >= keys}),
    ],
)
def test_refuses(h, dtype, given, static):
    x = jnp.zeros((1, 64, 1, h), dtype)
    bounds = jnp.zeros((1, 64), jnp.int32)
    with pytest.raises(NotImplementedError, match="hopper: "):
        hopper(x, x, x, Call(bounds, bounds, **given), Spec(1.0, **static))


if __name__ == "__main__":
    interpret(sys.argv[1], pathlib.Path(sys.argv[2]))
