"""The meter of kernels against closed forms, and against what a kernel itself saw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from narrows.models.kernels.attention import io, traffic
from narrows.models.kernels.attention.call import Call, Spec
from narrows.models.kernels.attention.tpu import tpu
from narrows.models.kernels.attention.tpu_tile import Tiling
from narrows.models.kernels.attention.traffic import kernels


def product(x, y, rows, columns, inner, order=(0, 1, 2)):
    """x @ y by tiles; `order` says which of (i, j, k) is which axis of the grid."""
    (m, k), n = x.shape, y.shape[1]
    sizes = -(-m // rows), -(-n // columns), -(-k // inner)
    grid = [0, 0, 0]
    for axis, place in enumerate(order):
        grid[place] = sizes[axis]

    def body(x_ref, y_ref, out_ref):
        @pl.when(pl.program_id(order[2]) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += x_ref[...] @ y_ref[...]

    def at(*axes):
        return lambda *ids: tuple(ids[order[axis]] for axis in axes)

    return pl.pallas_call(
        body,
        grid=tuple(grid),
        in_specs=[
            pl.BlockSpec((rows, inner), at(0, 2)),
            pl.BlockSpec((inner, columns), at(2, 1)),
        ],
        out_specs=pl.BlockSpec((rows, columns), at(0, 1)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        interpret=True,
    )(x, y)


def moves(kernel):
    return [x.moves for x in kernel.operands]


def test_a_tiled_product_reads_each_side_once_a_tile_of_the_other():
    m, k, n, (rows, inner, columns) = 24, 32, 40, (8, 16, 10)
    x, y = jnp.ones((m, k)), jnp.ones((k, n), jnp.bfloat16).astype(jnp.float32)
    call = functools.partial(product, rows=rows, columns=columns, inner=inner)
    np.testing.assert_allclose(call(x, y), x @ y)
    (kernel,) = kernels(call, x, y)
    assert kernel.grid == (3, 4, 2)
    assert [a.elements for a in kernel.operands] == [4 * m * k, 3 * k * n, m * n]
    assert kernel.read == 4 * (4 * m * k + 3 * k * n)
    assert kernel.written == 4 * m * n


def test_a_block_that_stays_is_not_fetched_again():
    x, y = jnp.ones((24, 32)), jnp.ones((32, 40))
    (kernel,) = kernels(
        functools.partial(product, rows=8, columns=10, inner=32), x, y
    )  # one step along k: the rows of x stay for all columns
    assert moves(kernel) == [3, 12, 12]
    (kernel,) = kernels(
        functools.partial(product, rows=8, columns=10, inner=32, order=(1, 0, 2)), x, y
    )
    assert moves(kernel) == [12, 4, 12]


def test_edges_do_not_travel():
    x = jnp.ones((10, 7), jnp.bfloat16)

    def double(x):
        def body(x_ref, out_ref):
            out_ref[...] = 2 * x_ref[...]

        spec = pl.BlockSpec((4, 7), lambda i: (i, 0))
        return pl.pallas_call(
            body,
            grid=(3,),
            in_specs=[spec],
            out_specs=spec,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            interpret=True,
        )(x)

    (kernel,) = kernels(double, x)
    assert moves(kernel) == [3, 3]
    assert (kernel.read, kernel.written) == (2 * 70, 2 * 70)


def gather(table, x, count=None, *, seen=None, rows=4):
    """out[i] = x[table[i]] by blocks of rows; `count` makes the grid dynamic.

    `seen` logs the first element of the block that each step found in place.
    """
    width = x.shape[1]

    def body(table_ref, x_ref, out_ref, *log):
        del table_ref
        out_ref[...] = x_ref[...]
        if log:
            log[0][pl.program_id(0)] = x_ref[0, 0]

    shapes = [jax.ShapeDtypeStruct((table.size * rows, width), x.dtype)]
    specs = [pl.BlockSpec((rows, width), lambda i, table: (i, 0))]
    if seen:
        shapes.append(jax.ShapeDtypeStruct(table.shape, x.dtype))
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(table.size if count is None else count,),
            in_specs=[pl.BlockSpec((rows, width), lambda i, table: (table[i], 0))],
            out_specs=specs,
        ),
        out_shape=shapes,
        interpret=True,
    )(table, x)


@pytest.mark.parametrize("seed", range(3))
def test_tables_decide_as_they_did_when_the_kernel_ran(seed):
    """The blocks that an interpreted run found in place, step by step."""
    table = jnp.asarray(np.random.default_rng(seed).integers(0, 3, 20), jnp.int32)
    x = jnp.arange(12.0)[:, None] + jnp.zeros((12, 8))
    _, log = gather(table, x, seen=True)
    changes = 1 + int((log[1:] != log[:-1]).sum())
    assert 1 < changes < 20
    kernel, *_ = kernels(lambda t: gather(t, x), table)
    assert moves(kernel) == [changes, 20]
    assert kernel.tables == 4 * 20
    assert kernel.read == 4 * 20 + changes * 4 * 8 * 4


def test_tables_that_the_program_computes_are_computed():
    x, lengths = jnp.ones((12, 8)), jnp.array([2, 1, 3], jnp.int32)

    @jax.jit
    def run(lengths, x):
        table = jnp.repeat(jnp.arange(3), lengths, total_repeat_length=6)
        return gather(table.astype(jnp.int32), x)[0].sum() + jnp.sin(x).sum()

    (kernel,) = kernels(run, lengths, x)
    assert moves(kernel) == [3, 6]
    (kernel,) = kernels(run, jnp.array([0, 0, 6], jnp.int32), x)
    assert moves(kernel) == [1, 6]


def test_grids_of_a_length_that_the_program_computes():
    x, table = jnp.ones((12, 8)), jnp.array([0, 1, 0, 1, 0, 1], jnp.int32)

    def run(n):
        return gather(table, x, count=n * 2)

    for n in (1, 2, 3):
        (kernel,) = kernels(run, jnp.int32(n))
        assert kernel.grid == (2 * n,)
        assert moves(kernel) == [2 * n, 2 * n]
    (kernel,) = kernels(run, jnp.int32(0))
    assert moves(kernel) == [0, 0]


def test_loops_branches_and_derivatives_are_walked():
    x, y = jnp.ones((8, 8)), jnp.ones((8, 8))

    @jax.custom_vjp
    def square(x):
        return product(x, y, 4, 4, 8)

    square.defvjp(lambda x: (square(x), x), lambda x, d: (product(d, x, 8, 8, 8),))

    def run(x, twice):
        x, _ = lax.scan(lambda x, _: (square(x), None), x, length=5)
        return lax.cond(twice, lambda x: square(square(x)), lambda x: x, x)

    assert [k.runs for k in kernels(run, x, True)] == [5, 1, 1]
    assert [k.runs for k in kernels(run, x, False)] == [5]
    found = kernels(jax.grad(lambda x: square(x).sum()), x)
    assert [k.grid for k in found] == [(2, 2, 1), (1, 1, 1)]
    found = kernels(jax.vmap(square), jnp.ones((3, 8, 8)))
    assert sum(moves(k)[2] * k.runs for k in found) == 3 * 4


def test_operands_that_the_body_copies_are_listed():
    def run(x):
        def body(x_ref, out_ref):
            pltpu.sync_copy(x_ref, out_ref)

        return pl.pallas_call(
            body,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        )(x)

    (kernel,) = kernels(run, jnp.ones((8, 128)))
    assert len(kernel.unseen) == 1
    assert (kernel.read, kernel.written) == (0, 4 * 8 * 128)


def test_what_cannot_be_known_is_refused():
    x, table = jnp.ones((12, 8)), jnp.zeros(3, jnp.int32)

    def of_a_kernel(x):
        first, *_ = gather(table, x)
        return gather(first[:3, 0].astype(jnp.int32), x)

    with pytest.raises(ValueError, match="the result of kernel"):
        kernels(of_a_kernel, x)

    def of_a_turn(x):
        return lax.map(lambda i: gather(table + i, x), jnp.arange(3, dtype=jnp.int32))

    with pytest.raises(ValueError, match="the turn of a loop"):
        kernels(of_a_turn, x)

    def while_loop(x):
        return lax.while_loop(lambda x: x[0, 0] < 3, lambda x: gather(table, x)[0], x)

    with pytest.raises(ValueError, match="while loop"):
        kernels(while_loop, x)


def flash(query, key, value, block_q, block_k):
    """FlashAttention-2 with nothing but its products and its moves."""
    (t, h), s = query.shape, len(key)

    def body(q, k, v, out, logs):
        @pl.when(pl.program_id(1) == 0)
        def _():
            out[...] = jnp.zeros_like(out)
            logs[...] = jnp.zeros_like(logs)

        out[...] += q[...] @ k[...].T @ v[...]

    rows, keys = (lambda i, j: (i, 0)), (lambda i, j: (j, 0))
    return pl.pallas_call(
        body,
        grid=(-(-t // block_q), -(-s // block_k)),
        in_specs=[
            pl.BlockSpec((block_q, h), rows),
            pl.BlockSpec((block_k, h), keys),
            pl.BlockSpec((block_k, h), keys),
        ],
        out_specs=[
            pl.BlockSpec((block_q, h), rows),
            pl.BlockSpec((block_q, 1), rows),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((t, h), query.dtype),
            jax.ShapeDtypeStruct((t, 1), jnp.float32),
        ],
        interpret=True,
    )(query, key, value)


def by_name(kernel):
    """Bytes of the operands of the attention kernel; those of the mask left out."""
    found = {x.name.split("'")[1]: x.bytes for x in kernel.operands if "'" in x.name}
    out, logs = (x.bytes for x in kernel.operands if x.output)
    reads = sum(found[name] for name in ("query", "key", "value"))
    return reads + out + logs


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads", "rows", "keys"), [(1, 128, 128), (2, 256, 128)])
def test_the_tpu_kernel_moves_what_the_model_says(is_causal, heads, rows, keys):
    """To the byte, for whole tiles; the bounds of rows and the table come on top."""
    t, s, h = 512, 384, 128
    x, y = (jnp.ones((1, n, heads, h), jnp.bfloat16) for n in (t, s))
    low = jnp.zeros((1, t), jnp.int32)
    high = jnp.full((1, t), s, jnp.int32)
    if is_causal:
        high = jnp.minimum(jnp.arange(1, t + 1, dtype=jnp.int32)[None], s)

    def run(query, key, value, low, high):
        call, spec = Call(low, high), Spec(h**-0.5)
        tiling = Tiling(rows, keys, keys, 128)
        return tpu(query, key, value, call, spec, interpret=True, blocks=tiling)

    (kernel,) = kernels(run, x, y, y, low, high)
    first_keys, last_rows = np.arange(0, s, keys), np.arange(rows, t + 1, rows) - 1
    visited = first_keys < np.asarray(high)[0, last_rows][:, None]
    model = io.q_outer(t, s, h, io.Tile(rows, keys), visited, reuse=True)
    assert by_name(kernel) == heads * model.bytes(WIDTHS)
    assert is_causal == (not visited.all())


WIDTHS = {"query": 2, "key": 2, "value": 2, "out": 2, "statistics": 4}


@pytest.mark.parametrize("tile", [io.Tile(16, 16), io.Tile(32, 8), io.Tile(24, 64)])
def test_model_and_kernel_agree_to_the_byte(tile):
    t, s, h = 60, 64, 8
    query, key, value = (jnp.ones((n, h), jnp.bfloat16) for n in (t, s, s))
    (kernel,) = kernels(lambda *x: flash(*x, *tile), query, key, value)
    moved = io.q_outer(t, s, h, tile, reuse=True)
    assert kernel.read + kernel.written == moved.bytes(WIDTHS)
    assert kernel.written == 2 * t * h + 4 * t
    assert isinstance(kernel.operands[0], traffic.Operand)
