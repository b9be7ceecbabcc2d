"""Both readers of the wire against closed forms, and against each other."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.parallel.wire import collectives, jaxpr_collectives, summary, table
from rich.console import Console

NAMES = ("data", "seq", "tensor")
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(NAMES, n)]
X = jax.ShapeDtypeStruct((16, 16, 8), jnp.float32)  # 2048 / 8 = 256 numbers a device
B = 4 * 256  # bytes of one device's part


@functools.cache
def mesh(order=tuple(range(8)), sizes=(2, 2, 2)):
    devices = np.array(jax.devices())[list(order)].reshape(sizes)
    return Mesh(devices, NAMES, axis_types=(AxisType.Auto,) * 3)


def manual(body, on=None):
    spec = P(*NAMES)
    return jax.jit(
        jax.shard_map(
            body, mesh=on or mesh(), in_specs=spec, out_specs=spec, check_vma=False
        )
    )


def both(body, x=X, on=None):
    """What each reader finds: (compiled, traced)."""
    traced = manual(body, on).trace(x)
    compiled = traced.lower().compile()
    return collectives(compiled, on or mesh()), jaxpr_collectives(traced.jaxpr)


def shift(axes, n):
    return lambda v: lax.ppermute(v, axes, [(i, (i + 1) % n) for i in range(n)])


# body, kind, bytes that one device sends of its operand of b bytes among n devices
FORMS = {
    "psum": (
        lambda axes, n: lambda v: lax.psum(v, axes),
        "all-reduce",
        lambda b, n: 2 * b * (n - 1) / n,
    ),
    "pmax": (
        lambda axes, n: lambda v: lax.pmax(v, axes),
        "all-reduce",
        lambda b, n: 2 * b * (n - 1) / n,
    ),
    "all_gather": (
        lambda axes, n: lambda v: lax.all_gather(v, axes, tiled=True),
        "all-gather",
        lambda b, n: b * n * (n - 1) / n,
    ),
    "psum_scatter": (
        lambda axes, n: lambda v: lax.psum_scatter(v, axes, tiled=True),
        "reduce-scatter",
        lambda b, n: b * (n - 1) / n,
    ),
    "all_to_all": (
        lambda axes, n: lambda v: lax.all_to_all(v, axes, 0, 1, tiled=True),
        "all-to-all",
        lambda b, n: b * (n - 1) / n,
    ),
    "ppermute": (shift, "collective-permute", lambda b, n: b),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("axes", [("seq",), ("data", "tensor")])
def test_closed_forms(name, axes):
    """Either reader finds the one collective with the bytes of the formula by hand."""
    body, kind, sent = FORMS[name]
    n = 2 ** len(axes)
    for found in both(body(axes, n)):
        (c,) = found
        assert (c.kind, c.axes, c.size, c.dtype) == (kind, axes, n, "float32")
        assert (c.count, c.exact, c.bytes) == (1, True, B)
        assert c.wire_bytes == pytest.approx(sent(B, n))
        assert sum(math.prod(shape) for shape in c.shapes) == B // 4
        assert name.replace("psum_scatter", "reduce_scatter") in c.op_name


@pytest.mark.parametrize("axes", SUBSETS, ids="-".join)
@pytest.mark.parametrize(
    "order", [range(8), (3, 1, 6, 0, 7, 2, 5, 4)], ids=["id", "mixed"]
)
def test_groups_name_their_axes(axes, order):
    """Ids in groups are places in the assignment, so their order is no matter."""
    on = mesh(tuple(order))
    compiled, traced = both(lambda v: lax.psum(v, axes[::-1]), on=on)
    assert [c.axes for c in compiled] == [c.axes for c in traced] == [axes]


def test_axes_are_those_of_the_mesh_in_hand():
    """A program compiled over one order of devices, read with another mesh of them."""
    first, other = mesh(), mesh((0, 4, 1, 5, 2, 6, 3, 7))  # data is now innermost
    compiled = manual(lambda v: lax.psum(v, "data"), first).lower(X).compile()
    assert [c.axes for c in collectives(compiled, first)] == [("data",)]
    assert [c.axes for c in collectives(compiled, other)] == [("tensor",)]
    small = Mesh(np.array(jax.devices()[:2]), "x")
    with pytest.raises(ValueError, match=r"mesh: 2 devices.*runs on 8"):
        collectives(compiled, small)


def test_groups_that_are_no_axes():
    """Subgroups of an axis are named "?", and count with their own size."""
    on = Mesh(np.array(jax.devices()), "x", axis_types=(AxisType.Auto,))
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    f = jax.shard_map(
        lambda v: lax.psum(v, "x", axis_index_groups=groups),
        mesh=on,
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=False,
    )
    traced = jax.jit(f).trace(X)
    for found in (
        collectives(traced.lower().compile(), on),
        jaxpr_collectives(traced.jaxpr),
    ):
        assert summary(found) == {("all-reduce", ("?",)): (1, B, B)}


def test_one_device_sends_nothing():
    """Axes of size one, and permutations in place, are no traffic for either reader."""
    on = mesh(sizes=(8, 1, 1))

    def body(v):
        still = lax.ppermute(v, "data", [(i, i) for i in range(8)])
        return lax.psum(still, ("seq", "tensor")) + lax.psum(v, NAMES)

    for found in both(body, on=on):
        assert summary(found) == {("all-reduce", ("data",)): (1, B, 2 * B * 7 / 8)}


def test_scans_multiply():
    """A sum in a scan of 3 in a scan of 5 runs 15 times; a sum beside it, 5 times."""

    def inner(c, _):
        return lax.psum(c, "data") / 2, None

    def outer(c, _):
        return lax.psum(lax.scan(inner, c, length=3)[0], ("seq", "tensor")) / 4, None

    expected = {
        ("all-reduce", ("data",)): (15, 15 * B, 15 * B),
        ("all-reduce", ("seq", "tensor")): (5, 5 * B, 5 * 2 * B * 3 / 4),
    }
    for found in both(lambda v: lax.scan(outer, v, length=5)[0]):
        assert summary(found) == expected
        assert all(c.exact for c in found)


def test_what_is_not_known_is_flagged():
    """Loops that stop by value count once; branches count as taken."""

    def loop(v):
        return lax.while_loop(lambda c: c.sum() < 9, lambda c: lax.psum(c, "seq"), v)

    def branch(v):
        sums = [functools.partial(lax.psum, axis_name=a) for a in ("data", "seq")]
        return lax.cond(v.sum() > 1, *sums, v)

    for body, axes in ((loop, {("seq",)}), (branch, {("data",), ("seq",)})):
        for found in both(body):
            assert {c.axes for c in found} == axes
            assert all(c.count == 1 and not c.exact for c in found)


def test_readers_agree_on_a_program():
    """Gradient of a small sharded network: equal totals, whatever is combined."""
    on = mesh()

    def loss(w, x):
        w = lax.all_gather(w, "data", tiled=True)  # its transpose is a reduce-scatter
        h = jnp.tanh(jnp.einsum("bd,df->bf", x, w))
        h = lax.ppermute(h, "seq", [(0, 1), (1, 0)])
        return jnp.sum(lax.psum(h @ w.T, "tensor") ** 2)

    def step(w, x):
        grads = jax.grad(loss)(w, x)
        return w - 0.1 * lax.psum(grads, "seq")

    f = jax.shard_map(
        step,
        mesh=on,
        in_specs=(P("data", "tensor"), P("seq")),
        out_specs=P("data", "tensor"),
        check_vma=False,
    )
    traced = jax.jit(f).trace(jnp.ones((16, 8)), jnp.ones((32, 16)))
    compiled = summary(collectives(traced.lower().compile(), on))
    jaxpr = summary(jaxpr_collectives(traced.jaxpr))
    assert {kind for kind, _ in jaxpr} == {
        "all-gather",
        "reduce-scatter",
        "all-reduce",
        "collective-permute",
    }
    assert {k: v[1:] for k, v in compiled.items()} == {
        k: v[1:] for k, v in jaxpr.items()
    }
    assert jaxpr["all-gather", ("data",)].wire_bytes == 4 * 8 * 4  # the other half of w
    assert jaxpr["collective-permute", ("seq",)] == (2, 2 * 4 * 16 * 4, 2 * 4 * 16 * 4)


def test_combined_sums_stay_whole():
    """A variadic all-reduce carries the bytes of all its operands."""

    def body(v):
        a, b = lax.psum((v, v[:2] * 3), "seq")
        return a.at[:2].add(b)

    compiled, traced = both(body)
    assert [len(c.shapes) for c in compiled] == [2]
    assert [len(c.shapes) for c in traced] == [1, 1]
    part = 4 * 2 * 8 * 4
    assert sum(c.bytes for c in compiled) == sum(c.bytes for c in traced) == B + part


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "float8_e4m3fn", "bool"])
def test_traced_dtypes_are_the_true_ones(dtype):
    """The jaxpr keeps what CPU widens, and four bits are half a byte."""
    x = jax.ShapeDtypeStruct(X.shape, dtype)
    found = jaxpr_collectives(manual(shift("data", 2)).trace(x).jaxpr)
    half_bytes = {"bfloat16": 4, "int4": 1}.get(dtype, 2)
    assert [(c.dtype, c.bytes) for c in found] == [(dtype, 256 * half_bytes // 2)]


def test_keys_travel_as_their_words():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), X.shape))
    found = jaxpr_collectives(manual(shift("data", 2)).trace(keys).jaxpr)
    assert [(c.dtype, c.bytes) for c in found] == [("uint32", 256 * 8)]


def test_partitioned_program():
    """What the partitioner writes is seen too: the sum over a cut dimension."""
    on = mesh()
    x = jax.ShapeDtypeStruct(
        (8, 16), jnp.float32, sharding=NamedSharding(on, P(None, "seq"))
    )
    w = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(on, P("seq")))
    f = jax.jit(jnp.matmul, out_shardings=NamedSharding(on, P()))
    found = collectives(f.lower(x, w).compile(), on)
    assert summary(found) == {("all-reduce", ("seq",)): (1, 8 * 4 * 4, 8 * 4 * 4)}


def test_an_unbound_axis_is_refused():
    jaxpr = jax.make_jaxpr(lambda v: lax.psum(v, "data"), axis_env=[("data", 2)])(1.0)
    with pytest.raises(ValueError, match=r"axis 'data' is bound by no jax\.shard_map"):
        jaxpr_collectives(jaxpr)


def test_table_totals():
    """The table shows every row of the summary and their sum; "~" marks rough ones."""
    found = both(lambda v: lax.psum(lax.psum(v, "data"), ("seq", "tensor")))[1]
    console = Console(width=120)
    with console.capture() as shown:
        console.print(table([*found, found[0]._replace(exact=False)]))
    rows = shown.get().splitlines()
    assert any("data" in row and "~2" in row and f"{2 * B:,}" in row for row in rows)
    assert any("seq, tensor" in row and f"{3 * B // 2:,}" in row for row in rows)
    assert any("total" in row and f"{3 * B:,}" in row for row in rows)
