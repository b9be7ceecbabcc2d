"""Attention over a cut sequence is attention: values, gradients, bytes, memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from narrows.models.kernels.attention import attention
from narrows.parallel import wire
from narrows.parallel.all_to_all_heads import (
    all_to_all_attention,
    linformer_attention,
)
from narrows.parallel.full_score_ring import full_score_attention
from narrows.parallel.ring_attention import Ring, ring_attention, ring_values
from narrows.parallel.sequence import Order, arrange, ascend, causal_work, positions

B, T, N, K, H = 2, 16, 8, 4, 4  # rows, length, heads of query and key, width
BLOCK = functools.partial(attention, return_residual=True)
ONLINE = functools.partial(ring_attention, block=BLOCK)
METHODS = {
    "online": ONLINE,
    "paper": full_score_attention,
    "transposed": functools.partial(full_score_attention, backward="transposed"),
    "heads": functools.partial(all_to_all_attention, block=BLOCK),
}


def mesh_of(parts):
    types = (AxisType.Auto,)
    return jax.make_mesh((parts,), ("seq",), types, devices=jax.devices()[:parts])


def operands(length=T, dtype=jnp.float32) -> Any:
    """Queries, keys, values, the output's cotangent, ids; the last fifth is padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = zip(keys, (N, K, K, N), strict=True)
    arrays = [jax.random.normal(k, (B, length, n, H), dtype) for k, n in heads]
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (B, length)), 1)
    ids[:, -length // 5 :] = -1
    return *arrays, jnp.asarray(ids, jnp.int32)


def over(parts, method, order: Order = "contiguous", check_vma=False, **options):
    """`method` on `parts` devices, as a function of whole arrays in ascending order."""

    def run(q, k, v, ids):
        def body(q, k, v, ids):
            call = dict(options, axis_name="seq", order=order, segment_ids=ids)
            return method(q, k, v, **call)

        spec = P(None, "seq")
        cut = jax.shard_map(
            body,
            mesh=mesh_of(parts),
            in_specs=spec,
            out_specs=spec,
            check_vma=check_vma,
        )
        moved = jax.tree.map(lambda x: arrange(x, order, parts), (q, k, v, ids))
        return ascend(cut(*moved), order, parts)

    return run


def whole(q, k, v, ids, *, is_causal):
    options = {"is_causal": is_causal, "segment_ids": ids}
    return attention(q, k, v, implementation="reference", **options)


def values_and_gradients(function, q, k, v, d_out, ids):
    out, pull = jax.vjp(lambda *x: function(*x, ids), q, k, v)
    return out, *pull(d_out)


CASES = [
    # every count, mask and order of the ring; each other method once causal and packed
    ("online", 1, True, True, "zigzag"),
    ("online", 2, True, False, "contiguous"),
    ("online", 2, True, True, "zigzag"),
    ("online", 4, False, True, "contiguous"),
    ("online", 4, True, False, "zigzag"),
    ("online", 8, True, True, "contiguous"),
    ("online", 8, True, True, "zigzag"),
    ("online", 8, False, False, "contiguous"),
    ("paper", 4, True, True, "contiguous"),
    ("paper", 8, False, False, "contiguous"),
    ("transposed", 4, True, True, "zigzag"),
    ("heads", 4, True, True, "zigzag"),
]


@pytest.mark.parametrize(("name", "parts", "is_causal", "packed", "order"), CASES)
def test_it_is_the_attention_of_one_device(
    quick_jit, name, parts, is_causal, packed, order
):
    q, k, v, d_out, ids = operands()
    ids = ids if packed else None
    many = over(parts, METHODS[name], order, is_causal=is_causal)
    got = quick_jit(functools.partial(values_and_gradients, many))(q, k, v, d_out, ids)
    one = functools.partial(whole, is_causal=is_causal)
    wanted = values_and_gradients(one, q, k, v, d_out, ids)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_a_simulation_on_one_device_is_the_ring(quick_jit, order):
    """`vmap` with an axis name runs the same code, collectives and rule included."""
    q, k, v, d_out, ids = operands()

    def cut(x):
        return arrange(x, order, 4).reshape(B, 4, T // 4, *x.shape[2:])

    def one(q, k, v, d_out, ids):
        def attend(q, k, v, ids):
            call = {"axis_name": "seq", "is_causal": True, "order": order}
            return ONLINE(q, k, v, segment_ids=ids, **call)

        return values_and_gradients(attend, q, k, v, d_out, ids)

    many = quick_jit(jax.vmap(one, 1, 1, axis_name="seq"))
    got = [
        ascend(x.reshape(B, T, *x.shape[3:]), order, 4)
        for x in many(*map(cut, (q, k, v, d_out, ids)))
    ]
    wanted = values_and_gradients(
        functools.partial(whole, is_causal=True), q, k, v, d_out, ids
    )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


def test_bfloat16_is_rounded_once_a_hop_and_never_summed(quick_jit):
    """As near to the exact result as one device's, whose output is rounded once."""
    q, k, v, _, ids = operands(dtype=jnp.bfloat16)
    many = over(8, ONLINE, "zigzag", is_causal=True)
    got = quick_jit(many)(q, k, v, ids)
    assert got.dtype == jnp.bfloat16
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = attention(*wide, is_causal=True, segment_ids=ids)
    one = whole(q, k, v, ids, is_causal=True)

    def error(x):
        return float(jnp.sqrt(jnp.mean((x.astype(jnp.float32) - exact) ** 2)))

    assert error(got) < 2 * error(one)


def traffic(
    parts, method, order: Order = "zigzag", ids=False, dtype=jnp.float32, **options
):
    """(kind -> bytes sent by a device) of the forward pass and of both."""
    *arrays, d_out, packed = operands(dtype=dtype or jnp.float32)
    packed = packed if ids else None
    # with the check the tracer would add sums for what is replicated; none is here
    run = over(parts, method, order, check_vma=True, **options)
    both = jax.make_jaxpr(functools.partial(values_and_gradients, run))(
        *arrays, d_out, packed
    )
    forward = jax.make_jaxpr(run)(*arrays, packed)

    def sent(jaxpr):
        found = wire.jaxpr_collectives(jaxpr)
        assert all(c.exact and c.axes == ("seq",) for c in found)
        return {kind: row.wire_bytes for (kind, _), row in wire.summary(found).items()}

    return sent(forward), sent(both)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_bytes_equal_the_closed_forms(parts):
    """Chunks of b t k h; the head width of keys and values is the same here."""
    chunk, turns = 4 * B * T // parts * K * H, parts - 1
    permute, reduce, exchange = "collective-permute", "all-reduce", "all-to-all"
    cases: list[tuple[bool, Order]] = [(True, "zigzag"), (True, "contiguous")]
    for is_causal, order in (*cases, (False, "zigzag")):
        online = traffic(parts, ONLINE, order, is_causal=is_causal)
        assert online == ({permute: 2 * turns * chunk}, {permute: 6 * turns * chunk})
    ids = 4 * B * T // parts
    assert traffic(parts, ONLINE, ids=True) == (
        {permute: 2 * turns * chunk + turns * ids},
        {permute: 6 * turns * chunk + 2 * turns * ids},
    )
    # in bfloat16 only the sums dk, dv travel in float32
    assert traffic(parts, ONLINE, dtype=jnp.bfloat16) == (
        {permute: 2 * turns * chunk / 2},
        {permute: 4 * turns * chunk / 2 + 2 * turns * chunk},
    )
    assert traffic(parts, METHODS["paper"]) == (
        {permute: 2 * turns * chunk},
        {permute: 4 * turns * chunk, reduce: 4 * turns * chunk},
    )
    assert traffic(parts, METHODS["transposed"])[1] == {permute: 4 * turns * chunk}
    if parts <= K:
        # query and output have N / K chunks each, keys and values one
        once = (2 * N // K + 2) * chunk * turns / parts
        assert traffic(parts, METHODS["heads"]) == (
            {exchange: once},
            {exchange: 2 * once},
        )


def temporary(parts, slots, function, quick_jit):
    """Bytes that a compiled gradient keeps on a device, at `slots` local positions."""
    *arrays, d_out, _ = operands(length=parts * slots)
    run = over(parts, function, is_causal=False)
    step = quick_jit(lambda q, k, v, d: values_and_gradients(run, q, k, v, d, None))
    compiled = step.lower(*arrays, d_out).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def plain(q, k, v, *, axis_name, is_causal, order, segment_ids):
    """The same ring, differentiated by JAX."""
    return ring_values(Ring(axis_name, BLOCK, is_causal, order), q, k, v, segment_ids)[
        0
    ]


def test_memory_does_not_grow_with_the_devices(quick_jit):
    """At 32 local positions; differentiated plainly, every chunk that came by stays."""
    two, eight = (temporary(n, 32, ONLINE, quick_jit) for n in (2, 8))
    assert eight <= 1.02 * two
    two, eight = (temporary(n, 32, plain, quick_jit) for n in (2, 8))
    assert eight > 2 * two


def test_linformer_is_that_of_one_device(quick_jit):
    q, k, v, d_out, _ = operands()
    rows = 3
    e, f = jax.random.normal(jax.random.key(1), (2, T, rows)) / T**0.5
    mask = jnp.arange(T) < jnp.array([[T], [T - 5]])

    def one(q, k, v, e, f):
        k, v = (jnp.where(mask[..., None, None], x, 0) for x in (k, v))
        k, v = (jnp.einsum("tr,btkh->brkh", w, x) for w, x in ((e, k), (f, v)))
        return attention(q, k, v, implementation="reference")

    def body(q, k, v, e, f, mask):
        return linformer_attention(
            q, k, v, e, f, axis_name="seq", block=BLOCK, mask=mask
        )

    along = P(None, "seq")
    many = jax.shard_map(
        body,
        mesh=mesh_of(4),
        in_specs=(along, along, along, P("seq"), P("seq"), along),
        out_specs=along,
        check_vma=False,
    )

    def both(function, *more):
        out, pull = jax.vjp(lambda *x: function(*x, *more), q, k, v, e, f)
        return out, *pull(d_out)

    for a, b in zip(quick_jit(lambda: both(many, mask))(), both(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)
    found = wire.jaxpr_collectives(jax.make_jaxpr(many)(q, k, v, e, f, mask))
    assert wire.summary(found) == {
        ("all-reduce", ("seq",)): (
            2,
            2 * 4 * B * rows * K * H,
            2 * 1.5 * 4 * B * rows * K * H,
        )
    }


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_zigzag_gives_every_device_the_same_work(parts):
    length = 64
    zigzag = causal_work("zigzag", length, parts)
    assert zigzag.sum() == length * (length + 1) // 2
    assert np.all(zigzag == zigzag[0])  # at every hop
    contiguous = causal_work("contiguous", length, parts).sum(1)
    assert contiguous.sum() == length * (length + 1) // 2
    # (2 r + 1) / N of the mean, up to the diagonal
    most = contiguous.max() / contiguous.mean()
    assert most == pytest.approx((2 * parts - 1) / parts, rel=2 / length * parts)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_orders_are_permutations_and_undone(order):
    at = positions(order, 32, 4)
    assert sorted(at) == list(range(32))
    for chunk in at.reshape(4, -1):
        assert list(chunk) == sorted(chunk)
    x = jnp.arange(64).reshape(2, 32)
    np.testing.assert_array_equal(arrange(x, order, 4)[0], at)
    np.testing.assert_array_equal(ascend(arrange(x, order, 4), order, 4), x)


def test_what_does_not_divide_raises():
    with pytest.raises(ValueError, match=r"length: 20 .* multiples of 8; .* 16 or 24"):
        positions("zigzag", 20, 4)
    with pytest.raises(ValueError, match="order: 'spiral'"):
        positions("spiral", 16, 4)  # type: ignore
    q, k, v, _, _ = operands()
    with pytest.raises(ValueError, match=r"key: 4 heads .* seq=8; .* \[1, 2, 4\]"):
        over(8, METHODS["heads"])(q, k, v, None)
    options: dict[str, Any] = {"backward": "fast"}
    with pytest.raises(ValueError, match="backward: 'fast'"):
        over(2, full_score_attention, **options)(q, k, v, None)
