"""Every form of attention, values and gradients, against the definition in float64.

And the definition against loops in numpy. A form that runs on CPUs is one line of
`FORMS`; kernels that are interpreted here have files of their own.
"""

import functools
import time
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from narrows.models.kernels.attention import attention, dropout, tiles
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.reference import reference, visible
from narrows.models.kernels.attention.xla import blockwise, xla

FORMS = {
    "reference": reference,
    "xla": xla,
    "xla, blocks of 8 and 24": functools.partial(blockwise, blocks=(8, 24)),
}
FAST = [name for name in FORMS if name != "reference"]

SIZES = ("b", "t", "s", "n", "k", "h", "v")
WORDS = np.array([7, 11], np.uint32)


def call_of(
    b, t, s, n, *, causal=None, window=None, lengths=None, seed=0, **arrays
) -> Call:
    """Bounds by position, and random arrays in the shapes that are asked for."""
    rng = np.random.default_rng(seed)
    rows = np.arange(t)[None]
    low, high = np.zeros((b, t)), np.full((b, t), s)
    if causal is not None:
        high = np.minimum(high, rows + 1 + causal)
    if window is not None:
        low = np.maximum(low, rows - window)
    if lengths is not None:
        high = np.minimum(high, np.reshape(lengths, (-1, 1)))
    given: dict[str, Any] = {}
    for name, shape in arrays.items():
        if name == "segments":  # how many documents
            given[name] = tuple(
                np.sort(rng.integers(0, shape, (b, length)), 1).astype(np.int32)
                for length in (t, s)
            )
        elif name in ("mask", "kept"):
            given[name] = rng.random(shape) < 0.6
        elif name == "dropout":
            given["dropout_key"] = WORDS
        else:
            given[name] = rng.standard_normal(shape).astype(np.float32)
    low, high = (np.clip(x, 0, s).astype(np.int32) for x in (low, high))
    return Call(low, high, **given)  # pyright: ignore[reportArgumentType]


def draw(sizes, seed=0, dtype=np.float32):
    """query, key, value and the cotangents of output and log-sum-exp."""
    b, t, s, n, k, h, v = sizes
    rng = np.random.default_rng(seed)
    shapes = [(b, t, n, h), (b, s, k, h), (b, s, k, v), (b, t, n, v), (b, t, n)]
    return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


@functools.partial(jax.jit, static_argnums=(0, 3))
def both(form, arrays, call, spec):
    """Output, log-sum-exp (0 where there is none) and every gradient."""
    query, key, value, d_out, d_logs = arrays

    def serve(query, key, value, bias, sinks):
        return form(query, key, value, call._replace(bias=bias, sinks=sinks), spec)

    (out, logs), pull = jax.vjp(serve, query, key, value, call.bias, call.sinks)
    gradients = pull((d_out, d_logs.astype(logs.dtype)))
    logs = jnp.where(jnp.isfinite(logs), logs, 0)
    return {"out": out, "logs": logs} | dict(
        zip(("query", "key", "value", "bias", "sinks"), gradients, strict=True)
    )


def exact(arrays, call, spec):
    """The definition in float64, with the inputs as they were rounded."""

    def widen(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(np.asarray(x, np.float64 if floating else None))

    with jax.enable_x64(True):
        arrays, call = jax.tree.map(widen, (arrays, call))
        return jax.tree.map(np.asarray, both(reference, arrays, call, spec))


def check(form, arrays, call, spec, rounding=2.0**-24):
    """Equal to the definition but for `rounding` of each number.

    A gradient sums tens of products whose terms, scores and sums were rounded: 300
    roundings of the largest number leave a factor of five and more.
    """
    got, wanted = both(form, arrays, call, spec), exact(arrays, call, spec)
    for name, right in wanted.items():
        if right is None:
            continue
        if name in ("out", "query", "key", "value"):
            assert got[name].dtype == arrays[0].dtype
        bound = 300 * rounding * max(1.0, np.abs(right).max(initial=0))
        np.testing.assert_allclose(
            np.asarray(got[name], np.float64), right, rtol=0, atol=bound, err_msg=name
        )


def diagonal(rows, keys):
    return (rows + keys) % 3 > 0


# sizes, what the call holds, what is static; together they use everything
CASES: dict[str, tuple[tuple, dict, dict]] = {
    "causal": ((2, 50, 50, 4, 2, 16, 16), {"causal": 0}, {}),
    "no mask, odd": ((1, 37, 45, 3, 1, 5, 7), {}, {"scale": 0.3}),
    "offset, window, cap, sinks, full bias": (
        (2, 45, 70, 4, 2, 8, 6),
        {"causal": 20, "window": 5, "sinks": 4, "bias": (2, 4, 45, 70)},
        {"soft_cap": 1.5},
    ),
    "lengths, bias of heads, mask of keys, dropout": (
        (3, 33, 40, 2, 1, 8, 8),
        {
            "lengths": [0, 33, 40],
            "bias": (1, 2, 1, 1),
            "mask": (3, 1, 1, 40),
            "dropout": (),
        },
        {"dropout_rate": 0.3},
    ),
    "documents, bias of keys": (
        (2, 60, 60, 2, 2, 8, 8),
        {"causal": 0, "segments": 5, "bias": (2, 1, 1, 60)},
        {},
    ),
    "cells, bias of rows, cap": (
        (2, 50, 41, 2, 1, 8, 8),
        {"kept": (1, 2, 4, 5), "bias": (1, 1, 50, 1), "sinks": 2},
        {"cell": (16, 9), "soft_cap": 4.0},
    ),
    "function, mask": (
        (1, 40, 50, 2, 2, 8, 8),
        {"mask": (1, 2, 40, 50), "causal": 3},
        {"sees": diagonal},
    ),
    "one query": ((2, 1, 90, 4, 2, 8, 8), {"lengths": [3, 80]}, {}),
}


def case(name):
    sizes, given, static = CASES[name]
    b, t, s, n, *_, h, _ = sizes
    return sizes, call_of(b, t, s, n, **given), Spec(**({"scale": h**-0.5} | static))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["reference", FAST[-1]])
def test_equals_definition_in_float64(form, name):
    sizes, call, spec = case(name)
    check(FORMS[form], draw(sizes), call, spec)


@st.composite
def calls(draw_):
    """Any features together, in odd sizes."""
    one = functools.partial(st.integers, 1)
    some = st.booleans()
    b, t, s, k = (draw_(x) for x in (one(2), one(40), one(40), one(2)))
    n, h, v = k * draw_(one(3)), draw_(one(9)), draw_(one(9))

    def shape():
        return tuple(1 if draw_(some) else size for size in (b, n, t, s))

    given: dict[str, Any] = {"seed": draw_(one(9))}
    spec: dict[str, Any] = {"scale": draw_(st.floats(0.1, 1.0))}
    optional = {
        "causal": lambda: draw_(st.integers(-5, 20)),
        "window": lambda: draw_(st.integers(0, 20)),
        "lengths": lambda: [draw_(st.integers(0, s)) for _ in range(b)],
        "segments": lambda: 4,
        "mask": shape,
        "bias": shape,
        "sinks": lambda: n,
    }
    given |= {name: make() for name, make in optional.items() if draw_(some)}
    if draw_(some):
        cell = spec["cell"] = draw_(one(20)), draw_(one(20))
        given["kept"] = (b, 1, -(-t // cell[0]), -(-s // cell[1]))
    if draw_(some):
        given["dropout"], spec["dropout_rate"] = (), 0.4
    if draw_(some):
        spec["soft_cap"] = 2.0
    if draw_(some):
        spec["sees"] = diagonal
    return (b, t, s, n, k, h, v), call_of(b, t, s, n, **given), Spec(**spec)


few = functools.partial(
    hypothesis.settings,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.mark.usefixtures("quick_compilation")
@hypothesis.given(calls())
@few(max_examples=8)
def test_blocks_equal_definition_whatever_the_features(drawn):
    sizes, call, spec = drawn
    check(FORMS[FAST[-1]], draw(sizes), call, spec)


def loops(query, key, value, call, spec):
    """The formulas of `call.py`, one weight at a time."""
    (b, t, n, _), s = query.shape, key.shape[1]
    out, logs = np.zeros((b, t, n, value.shape[-1])), np.full((b, t, n), -np.inf)
    keep = np.ones((b, n, t, s), bool)
    if call.dropout_key is not None:
        index = np.ix_(*map(np.arange, (b, n, t, s)))
        words = dropout.head_key(call.dropout_key, index[0], index[1])
        keep = np.asarray(dropout.keep(words, *index[2:], spec.dropout_rate))

    def at(x, *index):
        places = zip(x.shape, index, strict=True)
        return x[tuple(0 if size == 1 else i for size, i in places)]

    for i, r, m in np.ndindex(b, t, n):
        weights = {}
        for j in range(call.low[i, r], call.high[i, r]):
            seen = (
                call.segments is None
                or call.segments[0][i, r] == call.segments[1][i, j]
            )
            seen &= call.mask is None or at(call.mask, i, m, r, j)
            if call.kept is not None:
                seen &= at(call.kept, i, m, r // spec.cell[0], j // spec.cell[1])
            seen &= spec.sees is None or spec.sees(r, j)
            if not seen:
                continue
            score = spec.scale * query[i, r, m] @ key[i, j, m * key.shape[2] // n]
            score += 0 if call.bias is None else at(call.bias, i, m, r, j)
            cap = spec.soft_cap
            weights[j] = np.exp(score if cap is None else cap * np.tanh(score / cap))
        total = sum(weights.values())
        total += 0 if call.sinks is None else np.exp(np.float64(call.sinks[m]))
        logs[i, r, m] = np.log(total) if total else -np.inf
        for j, weight in weights.items():
            weight *= keep[i, m, r, j] / (1 - spec.dropout_rate)
            out[i, r, m] += weight / total * value[i, j, m * key.shape[2] // n]
    return out, logs


@pytest.mark.usefixtures("quick_compilation")
@hypothesis.given(calls())
@few(max_examples=6)
def test_definition_equals_loops(drawn):
    sizes, call, spec = drawn
    query, key, value, *_ = (np.asarray(x, np.float64) for x in draw(sizes))
    with jax.enable_x64(True):
        wide = [jnp.asarray(x) for x in (query, key, value)]
        got = jax.jit(reference, static_argnums=4)(*wide, call, spec)
        for x, y in zip(got, loops(query, key, value, call, spec), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)


def test_definition_has_true_gradients():
    """Against differences, with all that is differentiable; row 0 sees nothing."""
    call = call_of(1, 4, 5, 2, causal=-1, bias=(1, 1, 4, 5), sinks=2, dropout=())
    spec = Spec(0.7, soft_cap=2.0, dropout_rate=0.3)

    def serve(query, key, value, bias, sinks):
        arrays = call._replace(bias=bias, sinks=sinks)
        return reference(query, key, value, arrays, spec)

    operands = (*draw((1, 4, 5, 2, 1, 3, 3))[:3], call.bias, call.sinks)
    check_grads(jax.jit(serve), operands, order=1, modes=["rev"], eps=1e-2)


@pytest.mark.parametrize("name", FORMS)
def test_bfloat16(name):
    """Inputs are exact in bfloat16, so what is left is one rounding of the result and,
    in blocks, of weights and score gradients: each 2^-9 of terms of order one."""
    sizes, call, spec = case("offset, window, cap, sinks, full bias")
    arrays = draw(sizes, dtype=jnp.bfloat16)
    check(FORMS[name], arrays, call, spec, rounding=4 * 2.0**-9 / 300)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_hidden_may_be_anything(name):
    """NaN in keys, values and queries that nothing seen touches."""
    sizes = (2, 40, 40, 2, 1, 4, 4)
    spec = Spec(0.5, soft_cap=3.0)
    pad = np.arange(40) >= 29  # a document of its own, beside real ones in its block
    call = call_of(2, 40, 40, 2, causal=0, segments=1)
    call = call._replace(segments=(np.stack([pad, pad]).astype(np.int32),) * 2)
    arrays = draw(sizes)

    def fill(x, number):
        return jnp.where(pad.reshape(-1, *[1] * (x.ndim - 2)), number, x)

    def results(number):
        operands = [fill(x, number) for x in arrays[:3]]
        cotangents = [fill(x, 0) for x in arrays[3:]]  # a loss leaves padding out
        return both(FORMS[name], operands + cotangents, call, spec)

    clean, dirty = results(0), results(jnp.nan)
    for part in ("out", "logs", "query", "key", "value"):
        np.testing.assert_array_equal(dirty[part][:, :29], clean[part][:, :29])
    assert np.all(np.isnan(dirty["out"][:, 29:]))  # and what is seen is not hushed up
    # beyond the lengths nobody looks at all
    call = call_of(2, 40, 40, 2, lengths=[29, 29])
    hidden = [arrays[0], *(fill(x, jnp.inf) for x in arrays[1:3]), *arrays[3:]]
    chex.assert_tree_all_finite(both(FORMS[name], hidden, call, spec))


@pytest.mark.parametrize("name", FORMS)
def test_rows_that_see_nothing(name):
    """Zero, no logarithm, and nothing flows back through them, whatever the numbers."""
    sizes = (2, 50, 30, 2, 2, 8, 8)
    call = call_of(2, 50, 30, 2, causal=-40, lengths=[0, 30], bias=(1, 1, 50, 30))
    got = both(FORMS[name], [1e4 * x for x in draw(sizes)], call, Spec(1.0))
    assert not np.any(got["out"][0])
    assert not np.any(got["out"][1, :40])
    assert np.all(np.any(got["out"][1, 40:], axis=-1))
    assert not any(np.any(got[x][0]) for x in ("query", "key", "value"))
    chex.assert_tree_all_finite(got)
    _, logs = FORMS[name](*draw(sizes)[:3], call, Spec(1.0))
    assert np.all(logs[1, :40] == -np.inf)


@pytest.mark.parametrize("name", FORMS)
def test_segments_are_separate_documents(name):
    """Packing changes nothing: each document as if it were alone."""
    query, key, value, *_ = draw((1, 150, 150, 2, 2, 8, 8))
    call = call_of(1, 150, 150, 2, causal=0)
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (1, 150)), 1)
    call = call._replace(segments=(ids, ids))
    together, _ = FORMS[name](query, key, value, call, Spec(0.4))
    for document in range(4):
        (where,) = np.nonzero(ids[0] == document)
        length = len(where)
        at = slice(where[0], where[-1] + 1)
        seen = call_of(1, length, length, 2, causal=0)
        alone, _ = reference(query[:, at], key[:, at], value[:, at], seen, Spec(0.4))
        np.testing.assert_allclose(together[:, at], alone, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_lengths_of_every_block_size(name):
    """Where the form takes larger blocks, with rows that are left over."""
    sizes = (1, 300, 270, 1, 1, 8, 8)
    call = call_of(1, 300, 270, 1, causal=0, bias=(1, 1, 300, 270))
    check(FORMS[name], draw(sizes), call, Spec(0.4))


@hypothesis.given(calls(), st.sampled_from([(8, 8), (16, 5), (7, 30)]))
@few(max_examples=8)
def test_tiles_say_what_is_seen(drawn, blocks):
    """SKIP sees nothing, FULL sees all; exact where one thing alone decides."""
    (b, t, s, n, *_), call, spec = drawn
    table = jax.jit(lambda call: tiles.visits(call, spec, s, *blocks))(call)
    seen = np.broadcast_to(visible(call, spec, s), (b, n, t, s))
    table = np.broadcast_to(table, (b, n, *table.shape[2:]))
    for i, j in np.ndindex(table.shape[2:]):
        rows, keys = slice(i * blocks[0], None), slice(j * blocks[1], None)
        tile = seen[:, :, rows, keys][:, :, : blocks[0], : blocks[1]]
        kind = table[:, :, i, j]
        assert not np.any(tile.any((2, 3)) & (kind == tiles.SKIP))
        whole = tile.all((2, 3)) & ((j + 1) * blocks[1] <= s)
        assert not np.any(~whole & (kind == tiles.FULL))


def test_tiles_leave_out_what_bounds_and_masks_hide():
    causal = tiles.visits(call_of(1, 64, 64, 1, causal=0), Spec(1.0), 64, 16, 16)
    np.testing.assert_array_equal(causal[0, 0], np.tri(4) + np.tri(4, k=-1))
    window = call_of(1, 64, 64, 1, causal=0, window=16)
    table = tiles.visits(window, Spec(1.0), 64, 16, 16)[0, 0]
    assert np.sum(table > tiles.SKIP) == 4 + 3
    mask = np.kron(np.eye(4, dtype=bool), np.ones((16, 16), bool))[None, None]
    masked = call_of(1, 64, 64, 1)._replace(mask=mask)
    table = tiles.visits(masked, Spec(1.0), 64, 16, 16)[0, 0]
    np.testing.assert_array_equal(table, tiles.FULL * np.eye(4))


@pytest.mark.parametrize("given", [{"causal": 0}, {"segments": 8}, {"sinks": 2}])
def test_memory_is_linear_in_length(given):
    """Temporaries of the training step: 16 times the length, 16 times the bytes."""

    def temporary(t):
        arrays = [jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)] * 4
        arrays.append(jax.ShapeDtypeStruct((1, t, 2), jnp.float32))
        call = call_of(1, t, t, 2, **given)
        memory = both.lower(xla, arrays, call, Spec(0.3)).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary(32768) < 20 * temporary(2048)
    assert temporary(32768) < 4 * 32768 * 32768 / 64  # of one head's scores


def test_compiles_once_whatever_the_masks_hold():
    traces = 0

    @jax.jit
    def run(query, lengths, ids, mask, kept):
        nonlocal traces
        traces += 1
        call = call_of(2, 20, 20, 1)
        high = jnp.minimum(call.high, lengths[:, None])
        call = call._replace(high=high, segments=(ids, ids), mask=mask, kept=kept)
        return blockwise(query, query, query, call, Spec(1.0, cell=(5, 5)), (8, 8))[0]

    results = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        lengths, ids = rng.integers(1, 20, 2), rng.integers(0, 2, (2, 20))
        mask, kept = rng.random((2, 1, 20, 20)) < 0.5, rng.random((1, 1, 4, 4)) < 0.5
        query = jnp.ones((2, 20, 1, 4)) * jnp.arange(20.0)[:, None, None]
        results.append(run(query, lengths, ids, mask, kept))
    assert traces == 1
    assert not np.array_equal(results[0], results[1])


def test_dropout_keeps_the_share_it_says_and_is_fair():
    """Over 64 heads: the share kept, and the mean output is that without dropout."""
    sizes = (2, 16, 64, 32, 1, 4, 4)
    call = call_of(*sizes[:4], dropout=())
    query, key, value, *_ = draw(sizes)
    query = jnp.zeros_like(query)
    out, logs = xla(query, key, value, call, Spec(1.0, dropout_rate=0.3))
    np.testing.assert_allclose(logs, np.log(64), rtol=1e-6)  # the sum is not dropped
    plain = value.mean(1)[:, None]
    # 512 rows of each batch row: deviation of the mean sqrt(.3 / .7 / 64 / 512)
    np.testing.assert_allclose(
        out.reshape(2, -1, 4).mean(1), plain[:, 0, 0], atol=5 * 0.0037
    )
    # every row and head drops others: hardly two of the 1024 outputs are the same
    assert len(np.unique(np.round(out[..., 0], 5))) > 900


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_is_faster_than_the_plain_form(causal):
    """Processor time of a training step at 2,048 tokens, eight heads of 64."""
    arrays = draw((1, 2048, 2048, 8, 8, 64, 64))[:4]

    def step(call):
        def run(query, key, value, cotangent):
            out, pull = jax.vjp(call, query, key, value)
            return out, pull(cotangent)

        return jax.jit(run)

    sides = [
        step(functools.partial(attention, is_causal=causal)),
        step(functools.partial(jax.nn.dot_product_attention, is_causal=causal)),
    ]
    taken = [[], []]
    for _ in range(4):
        for run, times in zip(sides, taken, strict=True):
            before = time.process_time()
            jax.block_until_ready(run(*arrays))
            times.append(time.process_time() - before)
    ours, theirs = (min(times[1:]) for times in taken)
    assert ours < (0.3 if causal else 0.5) * theirs
