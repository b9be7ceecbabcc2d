"""The public calls: what jax.nn takes and gives, choice, decoding, meshes, errors."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from narrows.models.attention import HEADS
from narrows.models.kernels.attention import (
    IMPLEMENTATIONS,
    Blocks,
    api,
    attention,
    decode_attention,
    merge,
)
from narrows.parallel.layout import BATCH, Layout, make_mesh, on_each_device
from narrows.parallel.wire import collectives

HERE = ("reference", "xla")  # what runs on a CPU


def draw(*shapes, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def coin(*shape):
    """Random booleans; the first key is always seen, so that no row is empty."""
    mask = np.random.default_rng(sum(shape)).random(shape) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


(BIAS, ROW_BIAS) = draw((2, 4, 20, 24), (4, 1, 24), seed=1)
# Every argument of jax.nn.dot_product_attention but `implementation`, [2, 20, 4, 8]
# queries against [2, 24, 2, 8] keys.
JAX_CALLS: list[dict[str, Any]] = [
    {},
    {"scale": 0.2, "is_causal": True},
    {"bias": BIAS},
    {"bias": ROW_BIAS, "mask": coin(2, 1, 1, 24)},
    {"mask": coin(20, 24), "is_causal": True},
    {"bias": BIAS[:1, :, :1], "mask": coin(4, 20, 24)},
    {"key_value_seq_lengths": jnp.array([5, 24])},
    {"query_seq_lengths": jnp.array([20, 3]), "is_causal": True},
    {"local_window_size": 3},
    {"local_window_size": (4, 0), "is_causal": True},
    {"local_window_size": (2, 5), "key_value_seq_lengths": jnp.array([24, 22])},
]


@pytest.mark.parametrize("implementation", HERE)
def test_takes_every_call_of_jax(implementation):
    """Output, residual and gradients, positional and named; rows that see are there.

    Both round in float32: 1e-5 leaves a factor of ten.
    """
    query, key, value, d_out = draw(
        (2, 20, 4, 8), (2, 24, 2, 8), (2, 24, 2, 8), (2, 20, 4, 8)
    )

    def results(call, options):
        call = functools.partial(call, return_residual=True)
        positional = options.get("bias"), options.get("mask")
        named = {k: x for k, x in options.items() if k not in ("bias", "mask")}

        def run(query, key, value):
            return call(query, key, value, *positional, **named)

        (out, logs), pull = jax.vjp(run, query, key, value)
        return out, logs, pull((d_out, jnp.zeros_like(logs)))

    @functools.partial(jax.jit, static_argnums=0)
    def all_of_them(call):
        return [results(call, options) for options in JAX_CALLS]

    ours = all_of_them(functools.partial(attention, implementation=implementation))
    theirs = all_of_them(jax.nn.dot_product_attention)
    for options, mine, right in zip(JAX_CALLS, ours, theirs, strict=True):
        asked = np.full((2, 20), True)
        if "query_seq_lengths" in options:
            asked = np.arange(20) < np.asarray(options["query_seq_lengths"])[:, None]
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(right), strict=True):
            if x.shape == (2, 20, 4):  # jax calls the logarithm of nothing -2e38
                x, y = np.asarray(x)[asked], np.asarray(y)[asked]
            np.testing.assert_allclose(x, y, atol=1e-5, err_msg=str(options.keys()))


@pytest.mark.parametrize("implementation", HERE)
def test_without_a_batch_axis(implementation):
    query, key, value = draw((20, 4, 8), (20, 2, 8), (20, 2, 8))
    call = functools.partial(attention, implementation=implementation)
    theirs = jax.nn.dot_product_attention(query, key, value, ROW_BIAS[..., :20])
    ours, logs = call(query, key, value, ROW_BIAS[..., :20], return_residual=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert logs.shape == (20, 4)
    ids = jnp.arange(20) // 7
    packed = call(query, key, value, segment_ids=ids)
    batched = call(query[None], key[None], value[None], segment_ids=ids[None])
    np.testing.assert_array_equal(packed, batched[0])


@pytest.mark.parametrize("implementation", HERE)
def test_masks_in_three_languages(implementation):
    """Cells, a function and an array that say the same give the same."""
    query, key, value = draw((2, 50, 2, 8), (2, 70, 2, 8), (2, 70, 2, 8))
    kept = np.asarray(coin(2, 1, 5, 3))
    array = np.kron(kept, np.ones((10, 30), bool))[..., :50, :70]
    call = functools.partial(attention, query, key, value)
    call = functools.partial(call, implementation=implementation)
    cells = call(mask=Blocks(jnp.asarray(kept), rows=10, keys=30))
    np.testing.assert_allclose(cells, call(mask=jnp.asarray(array)), atol=1e-6)
    window = call(mask=lambda rows, keys: abs(rows - keys) <= 6)
    np.testing.assert_allclose(window, call(local_window_size=6), atol=1e-6)


def test_offset_moves_mask_and_window():
    """The last rows alone, at their places, are the last rows of the whole."""
    query, key, value = draw((2, 40, 2, 8), (2, 40, 2, 8), (2, 40, 2, 8))
    options = {"is_causal": True, "local_window_size": (9, 0)}
    whole = attention(query, key, value, **options)
    for offset in (30, jnp.array([30, 30])):
        part = attention(query[:, 30:], key, value, query_offset=offset, **options)
        np.testing.assert_allclose(part, whole[:, 30:], atol=1e-6)


def test_dropout_is_the_same_in_every_form_and_for_every_kind_of_key():
    query, key, value = draw((2, 40, 2, 8), (2, 40, 2, 8), (2, 40, 2, 8))
    new, raw = jax.random.key(3), jax.random.PRNGKey(3)
    call = functools.partial(attention, query, key, value, dropout_rate=0.5)
    outs = [
        call(dropout_key=key, implementation=form)
        for key in (new, raw)
        for form in HERE
    ]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=1e-5)
    assert np.abs(call(dropout_key=jax.random.key(4)) - outs[0]).max() > 0.1
    other = call(dropout_key=jax.random.key(3, impl="rbg"))
    assert np.all(np.isfinite(other))
    plain = attention(query, key, value, dropout_rate=0.0, dropout_key=new)
    np.testing.assert_array_equal(plain, attention(query, key, value))


def test_choice_follows_size_and_device():
    short, long = jnp.zeros((1, api.SHORT, 1, 8)), jnp.zeros((1, 4096, 1, 8))
    assert api._order(short, short) == ["reference", "xla"]
    assert api._order(long, long)[0] == "xla"
    assert api._order(short[:, :1], long)[0] == "xla"  # decoding
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="hopper runs on cuda sm90"):
            attention(short, short, short, implementation="hopper")


def test_no_keys_give_zero():
    query, key, value = draw((2, 3, 2, 4), (2, 0, 1, 4), (2, 0, 1, 5))
    out, logs = attention(query, key, value, return_residual=True)
    assert out.shape == (2, 3, 2, 5)
    assert not np.any(out)
    assert np.all(logs == -np.inf)
    assert attention(query[:, :0], key, value).shape == (2, 0, 2, 5)


LOGS = st.one_of(st.floats(-50, 50), st.just(-np.inf))


@hypothesis.given(st.lists(LOGS, min_size=3, max_size=3))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=50)
def test_merge_is_associative_and_has_a_neutral_element(logs):
    parts = [
        (jnp.where(log == -np.inf, 0, out), jnp.float32(log))
        for out, log in zip(draw(*[(3,)] * 3), logs, strict=True)
    ]
    a, b, c = parts
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    nothing = jnp.zeros(3), jnp.float32(-np.inf)
    for x, y in zip(merge(*a, *nothing), a, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_merge_has_true_gradients_and_none_from_nothing():
    out1, out2, logs1, logs2 = draw((2, 3), (2, 3), (2,), (2,))
    check_grads(merge, (out1, logs1, out2, logs2), order=1, modes=["rev"], eps=1e-2)
    none = jnp.full(2, -jnp.inf)
    _, pull = jax.vjp(merge, jnp.zeros((2, 3)), none, jnp.zeros((2, 3)), none)
    assert all(np.all(np.isfinite(x)) for x in pull((out1, logs1)))


def test_parts_of_the_keys_merge_to_the_whole():
    """Values and gradients: so may a ring of devices."""
    query, key, value, d_out = draw(*[(2, 30, 2, 8)] * 4)

    def parts(query, key, value):
        offsets = (0, -10, -20)  # what a row sees of the keys from 0, 10 and 20 on
        pieces = [
            attention(
                query,
                key[:, -offset : 10 - offset],
                value[:, -offset : 10 - offset],
                is_causal=True,
                query_offset=offset,
                implementation="xla",
                return_residual=True,
            )
            for offset in offsets
        ]
        return functools.reduce(lambda x, y: merge(*x, *y), pieces)[0]

    whole = functools.partial(attention, is_causal=True, implementation="reference")
    for x, y in zip(
        *(
            (lambda out, pull: (out, *pull(d_out)))(*jax.vjp(f, query, key, value))
            for f in (jax.jit(parts), jax.jit(whole))
        ),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("splits", [None, 4])
def test_decoding_is_attention_of_the_last_position(implementation, splits):
    query, key, value, bias, sinks = draw(
        (3, 4, 8), (3, 60, 2, 8), (3, 60, 2, 5), (3, 4, 1, 60), (4,)
    )
    held = jnp.array([0, 7, 60])
    options = {"soft_cap": 2.0, "sinks": sinks, "return_residual": True}
    place = jnp.arange(60)
    seen = (place < held[:, None]) & (place >= held[:, None] - 10)
    wanted = attention(query[:, None], key, value, bias, seen[:, None, None], **options)
    # what the cache holds beyond is anything
    key, value = (
        jnp.where(place[:, None, None] < held.reshape(3, 1, 1, 1), x, jnp.nan)
        for x in (key, value)
    )
    got = decode_attention(
        query,
        key,
        value,
        bias=bias,
        key_value_seq_lengths=held,
        local_window_size=9,
        splits=splits,
        implementation=implementation,
        **options,
    )
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y[:, 0], atol=1e-5)
    with_axis = decode_attention(query[:, None], key, value, key_value_seq_lengths=7)
    assert with_axis.shape == (3, 1, 4, 5)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("layout", ["data=2,fsdp=4", "data=2,fsdp=2,tensor=2"])
def test_each_device_attends_alone(layout, implementation):
    """The result and gradients of one device, and nothing sent."""
    mesh = make_mesh(Layout.parse(layout))
    arrays = draw(*[(8, 30, 4, 8)] * 4)
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (8, 30)), 1))

    def run(wrap, query, key, value, d_out):
        call = wrap(
            lambda q, k, v, ids: attention(
                q, k, v, is_causal=True, segment_ids=ids, implementation=implementation
            )
        )
        out, pull = jax.vjp(lambda *x: call(*x, ids), query, key, value)
        return [out, *pull(d_out)]

    split = functools.partial(
        on_each_device, in_axes=(HEADS, HEADS, HEADS, (BATCH, None)), out_axes=HEADS
    )
    sharding = jax.sharding.NamedSharding(mesh, P(*HEADS))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in arrays]
        step = jax.jit(functools.partial(run, split)).lower(*placed).compile()
        got = step(*placed)
    assert not collectives(step, mesh)
    wanted = jax.jit(functools.partial(run, lambda call: call))(*arrays)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_inside_a_checked_map_over_devices():
    """Without `check_vma=False`: every loop says over which axes it varies, and a bias
    that all devices share gets the sum of its gradients."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays = draw(*[(2, 70, 4, 8)] * 3, (70, 70))
    spec = P("data", None, "tensor", None)
    call = functools.partial(attention, is_causal=True, implementation="xla")
    local = jax.shard_map(call, mesh=mesh, in_specs=(*[spec] * 3, P()), out_specs=spec)

    def step(call, *x):
        return jax.grad(lambda *x: (call(*x) ** 2).sum(), (0, 1, 2, 3))(*x)

    got, wanted = (jax.jit(functools.partial(step, f))(*arrays) for f in (local, call))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_says_what_is_wrong():
    query, key, value = draw((2, 4, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8))
    call = functools.partial(attention, query, key, value)
    wrong: list[tuple[str, Any]] = [
        ("multiple of the key's", lambda: attention(query[:, :, :3], key, value)),
        ("value", lambda: attention(query, key, value[:, :-1])),
        ("all without b", lambda: attention(query[0], key, value)),
        ("one floating dtype", lambda: attention(query, key, value.astype("bfloat16"))),
        ("give is_causal=True", lambda: call(query_offset=3)),
        (r"\(2,\)", lambda: call(is_causal=True, query_offset=jnp.arange(3))),
        ("segment_ids", lambda: call(segment_ids=jnp.zeros((2, 4), jnp.int32))),
        ("mask is float32", lambda: call(mask=jnp.ones((4, 6)))),
        ("bias has shape", lambda: call(bias=jnp.ones((3, 6)))),
        ("bias is int32", lambda: call(bias=jnp.ones((4, 6), jnp.int32))),
        ("table of cells", lambda: call(mask=Blocks(coin(2, 2), 4, 4))),
        ("at least 1", lambda: call(mask=Blocks(coin(1, 2), 0, 4))),
        ("key_value_seq_lengths", lambda: call(key_value_seq_lengths=jnp.ones(2))),
        ("query_seq_lengths", lambda: call(query_seq_lengths=jnp.arange(3))),
        ("soft_cap", lambda: call(soft_cap=0.0)),
        ("sinks", lambda: call(sinks=jnp.ones(2))),
        ("dropout_rate", lambda: call(dropout_rate=1.0)),
        ("dropout_key", lambda: call(dropout_rate=0.1)),
        ("'reference'", lambda: call(implementation="fast")),
        ("splits", lambda: decode_attention(query[:, 0], key, value, splits=4)),
        ("query has shape", lambda: decode_attention(query, key, value)),
    ]
    for message, bad in wrong:
        with pytest.raises(ValueError, match=message):
            bad()
    assert list(IMPLEMENTATIONS)[-1] == "reference"
