"""Attention as one fused Triton kernel: any GPU that Pallas serves through Triton.

A program holds one tile of rows and walks over the key tiles that they see; the
gradient of keys and values walks the other way, over the rows that see a tile of keys
(Dao 2023, arXiv:2307.08691, Section 3.1, with a second kernel for the gradient of the
queries in place of atomic sums, so that results repeat bit by bit). `_plan` lists the
tiles of each row: the FULL ones run without a mask, the PART ones with one, and those
that nobody sees are not visited. Sums never leave registers, in float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from . import dropout, tiles
from .call import Call, Spec

LOG2E = math.log2(math.e)
LEAST = -1e30  # where the running maximum starts: finite, so that it can be subtracted
WIDEST = 256  # a row of output must fit into the registers of its program


class Tiling(NamedTuple):
    """How one kernel is cut."""

    q: int  # rows of a tile, a power of two, at least 16
    k: int  # keys of a tile, likewise
    warps: int
    stages: int  # loads in flight


class Blocks(NamedTuple):
    """The cuts of the kernels of one call."""

    forward: Tiling
    keys: Tiling  # gradient of keys and values
    queries: Tiling  # gradient of queries, and of the bias


# By bytes of an element and padded head width. Chosen by the registers and spills that
# the compiler for an H100 reports, not by time: for 2 bytes nothing spills but the
# gradient of keys (4 bytes a thread at 128, 120 at 256); for 4 bytes nothing at 64,
# and up to 388 bytes at 128. Those of (4, 256) are guesses.
BLOCKS = {
    (2, 64): ((128, 128, 8, 3), (64, 128, 8, 2), (128, 128, 8, 2)),
    (2, 128): ((128, 128, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    (2, 256): ((128, 64, 8, 2), (32, 64, 8, 2), (128, 32, 8, 2)),
    (4, 64): ((128, 64, 8, 2), (32, 64, 8, 2), (64, 32, 4, 2)),
    (4, 128): ((128, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    (4, 256): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
BLOCKS = {at: Blocks(*(Tiling(*cut) for cut in cuts)) for at, cuts in BLOCKS.items()}
# Where tiles of a bias or a mask are loaded too, fewer loads in flight
# and smaller tiles fit the shared memory of a chip.
BESIDE = {(2, 128): Tiling(128, 64, 8, 2)}
PROGRAMS = 264  # two for each multiprocessor of the largest chips


class Job(NamedTuple):
    """What is compiled in."""

    spec: Spec
    blocks: Blocks
    interpret: bool


class Plan(NamedTuple):
    """The tiles that a row of tiles visits: FULL ones first, then PART ones."""

    order: Int[Array, "#b #n rows columns"]  # numbers of tiles, visited ones first
    full: Int[Array, "#b #n rows"]  # how many need no mask
    visited: Int[Array, "#b #n rows"]


def gpu(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k v"],
    call: Call,
    spec: Spec,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b t n"]]:
    """Same results as `reference`, in memory linear in the lengths.

    Scores, softmax and all sums are float32 (float32 operands multiply as three TF32
    products each, which keeps about 22 bits); weights enter the second product in the
    dtype of the operands. A row that sees a value that is not finite is NaN throughout.

    Args:
      interpret: run as plain XLA operations, on any backend.
      blocks: cuts of the kernels; by dtype and head width from `BLOCKS` if None.

    Raises:
      NotImplementedError: what these kernels do not take.
    """
    _refuse(query, key, value, call, spec)
    if blocks is None:
        wide = max(_padded(query.shape[3]), _padded(value.shape[3]), 64)
        at = query.dtype.itemsize, wide
        blocks = BLOCKS[at]
        if call.bias is not None or call.mask is not None:
            blocks = blocks._replace(forward=BESIDE.get(at, blocks.forward))
    t, s = query.shape[1], key.shape[1]
    cuts = [c._replace(q=min(c.q, _padded(t)), k=min(c.k, _padded(s))) for c in blocks]
    job = Job(spec, Blocks(*cuts), interpret)
    call = call._replace(
        low=call.low.astype(jnp.int32), high=jnp.minimum(call.high, s).astype(jnp.int32)
    )
    if call.dropout_key is not None:  # one key for each batch row and head
        row, head = jnp.arange(query.shape[0])[:, None], jnp.arange(query.shape[2])
        words = dropout.head_key(call.dropout_key, row, head)
        call = call._replace(dropout_key=jnp.stack(words, -1))
    rest = call._replace(bias=None, sinks=None)
    out: Any = _attend(job, query, key, value, call.bias, call.sinks, rest)
    return out


def _refuse(query, key, value, call, spec):
    dtypes = [x.dtype for x in (query, key, value)]
    if len(set(dtypes)) > 1 or dtypes[0] not in (
        jnp.float32,
        jnp.bfloat16,
        jnp.float16,
    ):
        raise NotImplementedError(
            "gpu: query, key and value must all be float32, bfloat16 or float16, not "
            + ", ".join(map(str, dtypes))
        )
    if max(query.shape[3], value.shape[3]) > WIDEST:
        raise NotImplementedError(
            f"gpu: head widths {query.shape[3]} and {value.shape[3]} must be at most "
            f"{WIDEST}"
        )
    if not (query.size and key.size and value.size):
        raise NotImplementedError("gpu: there are no rows, keys or heads")
    if call.mask is not None and 2**31 < call.mask.size <= 2**32:
        raise NotImplementedError(  # Pallas would index it with 32 signed bits
            f"gpu: a mask of {call.mask.size} entries must have at most 2^31"
        )
    if spec.sees is not None:
        index = jax.ShapeDtypeStruct((), jnp.int32)
        if jax.make_jaxpr(spec.sees)(index, index).consts:
            raise NotImplementedError(
                "gpu: `sees` holds arrays; it must compute from its two indices alone"
            )


def _padded(length):
    """The width of a register tile: a power of two, at least 16 for a product."""
    return max(16, pl.next_power_of_2(length))


def _plan(table):
    rank = jnp.where(table == tiles.SKIP, 2, jnp.where(table == tiles.FULL, 0, 1))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    full, visited = (table == tiles.FULL).sum(-1), (table != tiles.SKIP).sum(-1)
    return Plan(order, full.astype(jnp.int32), visited.astype(jnp.int32))


# ---------------------------------------------------------------- inside a kernel


class Places(NamedTuple):
    """Rows or keys of a tile, as a column or a row of indices."""

    start: Int[Array, ""]
    index: Int[Array, "..."]
    inside: Any  # bool like index; None: all of them are


def _places(number, block, length, axis, whole=False):
    """Tile `number` of an axis that lies along `axis` of the scores."""
    shape = (block, 1) if axis == 0 else (1, block)
    start = number * block
    index = start + lax.broadcasted_iota(jnp.int32, shape, axis)
    inside = None if whole or length % block == 0 else index < length
    return Places(start, index, inside)


def _program(count, heads):
    """(batch row, head, tile) of this program; tiles follow one another fastest."""
    rest = lax.div(pl.program_id(0), count)
    tile = lax.rem(pl.program_id(0), count)
    return lax.div(rest, heads), lax.rem(rest, heads), tile


def _all_of(*masks):
    masks = [mask for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _tile(ref, row, places, head):
    """The part of [b, length, heads, width] that a product takes, and its mask."""
    width, block = ref.shape[3], places.index.size
    padded = _padded(width)
    inside = None if places.inside is None else places.inside.reshape(block, 1)
    columns = lax.broadcasted_iota(jnp.int32, (1, padded), 1)
    mask = _all_of(inside, None if padded == width else columns < width)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (block, padded))
    return ref.at[row, pl.ds(places.start, block), head, pl.ds(0, padded)], mask


def _read(ref, row, places, head):
    ref, mask = _tile(ref, row, places, head)
    return triton.load(ref, mask=mask, other=None if mask is None else 0.0)


def _write(ref, row, places, head, x):
    dtype = ref.dtype
    ref, mask = _tile(ref, row, places, head)
    triton.store(ref, x.astype(dtype), mask=mask)


def _line(ref, *lead, at, other):
    """Entries of the last axis, lying like the indices; `other` beyond the edges."""
    mask = None if at.inside is None else at.inside.reshape(-1)
    part = ref.at[*lead, pl.ds(at.start, at.index.size)]
    line = triton.load(part, mask=mask, other=None if mask is None else other)
    return line.reshape(at.index.shape)


def _gather(ref, *index, other):
    """Entries at index arrays; `other` beyond the edges."""
    mask = _all_of(*(x.inside for x in index if isinstance(x, Places)))
    ref = ref.at[tuple(x.index if isinstance(x, Places) else x for x in index)]
    return triton.load(ref, mask=mask, other=None if mask is None else other)


def _own(ref, *index):
    """The same index, with 0 on the axes of length 1, which stand for all."""
    zero = jnp.int32(0)
    return [x if size > 1 else zero for size, x in zip(ref.shape, index, strict=False)]


def _dot(job, x, y, x_axis, y_axis):
    precise = x.dtype == jnp.float32 and not job.interpret
    return lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if precise else None,
        preferred_element_type=jnp.float32,
    )


def _finite(x):
    """Zero for what is not finite: 0 * NaN is NaN, and hidden entries have weight 0."""
    return jnp.where(jnp.abs(x) < jnp.inf, x, 0)


def _scores(job, call, row, head, rows, keys, product):
    """(x, unit): the scores are x unit / log2(e), where unit > 0.

    So that, where nothing comes between, 2^(x unit - m) is one fused multiply-add.
    """
    spec = job.spec
    if call.bias is None and spec.soft_cap is None and spec.scale > 0:
        return product, spec.scale * LOG2E
    x = product * spec.scale
    if call.bias is not None:
        index = _own(call.bias, row, head, rows, keys)
        x = x + _gather(call.bias, *index, other=0.0).astype(jnp.float32)
    if spec.soft_cap is None:
        return x, LOG2E
    # tanh; its error is absolute, 1e-7, which is what a score can take
    x = 1 - 2 / (jnp.exp2(x * (2 * LOG2E / spec.soft_cap)) + 1)
    return x, spec.soft_cap * LOG2E


def _seen(job, call, row, head, rows, keys):
    """Which entries of a tile are visible; nothing beyond the edges is."""
    low = _line(call.low, row, at=rows, other=0)
    high = _line(call.high, row, at=rows, other=0)
    seen = (keys.index >= low) & (keys.index < high)
    if call.segments is not None:
        q_ids, k_ids = call.segments
        q_ids = _line(q_ids, row, at=rows, other=0)
        seen &= q_ids == _line(k_ids, row, at=keys, other=0)
    if call.mask is not None:
        index = _own(call.mask, row, head, rows, keys)
        seen &= _gather(call.mask, *index, other=False)
    if call.kept is not None:
        cells = [
            x._replace(index=lax.div(x.index, jnp.int32(size)))
            for x, size in zip((rows, keys), job.spec.cell, strict=True)
        ]
        lead = _own(call.kept, row, head)
        seen &= _gather(call.kept, *lead, *cells, other=False)
    if job.spec.sees is not None:
        seen &= job.spec.sees(rows.index, keys.index)
    return seen


def _dropped(job, call, row, head, rows, keys, x):
    """x where dropout keeps the weight, else 0; not yet divided by 1 - rate."""
    if call.dropout_key is None:
        return x
    words = call.dropout_key[row, head, 0], call.dropout_key[row, head, 1]
    kept = dropout.keep(words, rows.index, keys.index, job.spec.dropout_rate)
    return jnp.where(kept, x, 0)


def _survivors(job, call):
    return 1.0 if call.dropout_key is None else 1 - job.spec.dropout_rate


def _walk(plan, row, head, tile, visit, carry):
    """`visit(number, whole, carry)` over the tiles that a row of tiles visits."""
    lead = _own(plan.order, row, head)
    full, visited = plan.full[*lead, tile], plan.visited[*lead, tile]

    def step(whole):
        return lambda c, carry: visit(plan.order[*lead, tile, c], whole, carry)

    carry = lax.fori_loop(0, full, step(True), carry)
    return lax.fori_loop(full, visited, step(False), carry)


def _forward_kernel(query, key, value, call, plan, out, logsumexp, *, job):
    cut, (t, n), s = job.blocks.forward, query.shape[1:3], key.shape[1]
    row, head, i = _program(pl.cdiv(t, cut.q), n)
    i = pl.cdiv(t, cut.q) - 1 - i  # under a causal mask the longest come first
    shared = lax.div(head, n // key.shape[2])
    rows = _places(i, cut.q, t, 0)
    q = _read(query, row, rows, head)

    def visit(j, whole, carry):
        o, top, total = carry
        keys = _places(j, cut.k, s, 1, whole)
        product = _dot(job, q, _read(key, row, keys, shared), 1, 1)
        x, unit = _scores(job, call, row, head, rows, keys, product)
        v = _read(value, row, keys, shared)
        taint = 0.0
        if not whole:
            seen = _seen(job, call, row, head, rows, keys)
            x = jnp.where(seen, x, -jnp.inf)
            # a value that is not finite concerns the rows that see it, and no other
            fine = jnp.abs(v).max(1) < jnp.inf
            v = jnp.where(fine[:, None], v, 0)
            taint = jnp.where(seen & ~fine[None], jnp.nan, 0).max(1)
        new_top = jnp.maximum(top, x.max(1) * unit)
        weights = jnp.exp2(x * unit - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        total = shrink * total + weights.sum(1)
        weights = _dropped(job, call, row, head, rows, keys, weights).astype(v.dtype)
        o = (shrink + taint)[:, None] * o + _dot(job, weights, v, 1, 0)
        return o, new_top, total

    top = jnp.full(cut.q, LEAST, jnp.float32)
    total = jnp.zeros(cut.q, jnp.float32)
    if call.sinks is not None:  # a key of its own whose value is 0
        sink = call.sinks[head].astype(jnp.float32) * LOG2E
        top = jnp.maximum(top, sink)
        total = total + jnp.exp2(sink - top)
    o = jnp.zeros((cut.q, _padded(value.shape[3])), jnp.float32)
    o, top, total = _walk(plan, row, head, i, visit, (o, top, total))
    safe = jnp.where(total == 0, 1, total)
    _write(out, row, rows, head, o / (safe * _survivors(job, call))[:, None])
    log = jnp.where(total == 0, -jnp.inf, top * math.log(2) + jnp.log(safe))
    inside = None if rows.inside is None else rows.inside.reshape(-1)
    triton.store(logsumexp.at[row, head, pl.ds(rows.start, cut.q)], log, mask=inside)


class Statistics(NamedTuple):
    """What the gradients need of a row besides its operands."""

    log: Float[Array, "b n t"]  # base 2, and inf where a row saw nothing
    delta: Float[Array, "b n t"]  # rowsum(out d_out) - d_logsumexp


def _weights(job, call, stats, place, product, whole):
    """Weights of a tile anew, with what their gradient needs; rows on either axis."""
    row, head, rows, _ = place
    x, unit = _scores(job, call, *place, product)
    weights = jnp.exp2(x * unit - _line(stats.log, row, head, at=rows, other=jnp.inf))
    seen = None if whole else _seen(job, call, *place)
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    return weights, x, seen


def _d_scores(job, call, stats, place, found, d_weights):
    """Gradient of the scores, before the scale and after the bias."""
    (row, head, rows, _), (weights, x, seen) = place, found
    d_weights = _dropped(job, call, *place, d_weights) / _survivors(job, call)
    delta = _line(stats.delta, row, head, at=rows, other=0.0)
    d_scores = weights * (d_weights - delta)
    if job.spec.soft_cap is not None:
        d_scores = d_scores * (1 - x * x)
    return d_scores if seen is None else jnp.where(seen, d_scores, 0)


def _queries_kernel(query, key, value, call, plan, stats, d_out, d_query, *, job):
    cut, (t, n), s = job.blocks.queries, query.shape[1:3], key.shape[1]
    row, head, i = _program(pl.cdiv(t, cut.q), n)
    i = pl.cdiv(t, cut.q) - 1 - i
    shared = lax.div(head, n // key.shape[2])
    rows = _places(i, cut.q, t, 0)
    q, d_o = _read(query, row, rows, head), _read(d_out, row, rows, head)

    def visit(j, whole, d_q):
        keys = _places(j, cut.k, s, 1, whole)
        k, v = _read(key, row, keys, shared), _read(value, row, keys, shared)
        place = row, head, rows, keys
        product, d_weights = _dot(job, q, k, 1, 1), _dot(job, d_o, v, 1, 1)
        found = _weights(job, call, stats, place, product, whole)
        d_scores = _d_scores(job, call, stats, place, found, d_weights)
        k = k if whole else _finite(k)
        return d_q + _dot(job, d_scores.astype(k.dtype), k, 1, 0)

    d_q = jnp.zeros((cut.q, _padded(query.shape[3])), jnp.float32)
    d_q = _walk(plan, row, head, i, visit, d_q)
    _write(d_query, row, rows, head, d_q * job.spec.scale)


def _keys_kernel(query, key, value, call, plan, stats, d_out, d_key, d_value, *, job):
    """Scores lie transposed, [keys, rows]: no product waits for a transposition."""
    cut, (t, n), (s, k_heads) = job.blocks.keys, query.shape[1:3], key.shape[1:3]
    parts = d_key.shape[2]
    row, part, j = _program(pl.cdiv(s, cut.k), parts)
    shared = lax.div(part, parts // k_heads)
    keys = _places(j, cut.k, s, 0)
    k, v = _read(key, row, keys, shared), _read(value, row, keys, shared)

    def one_head(g, carry):
        head = part * (n // parts) + g

        def visit(i, whole, carry):
            d_k, d_v = carry
            rows = _places(i, cut.q, t, 1)
            q, d_o = _read(query, row, rows, head), _read(d_out, row, rows, head)
            place = row, head, rows, keys
            found = _weights(job, call, stats, place, _dot(job, k, q, 1, 1), whole)
            weights = _dropped(job, call, *place, found[0]).astype(q.dtype)
            d_v = d_v + _dot(job, weights, d_o, 1, 0)
            d_weights = _dot(job, v, d_o, 1, 1)
            d_scores = _d_scores(job, call, stats, place, found, d_weights)
            q = q if whole else _finite(q)
            return d_k + _dot(job, d_scores.astype(q.dtype), q, 1, 0), d_v

        return _walk(plan, row, head, j, visit, carry)

    widths = query.shape[3], value.shape[3]
    start = tuple(jnp.zeros((cut.k, _padded(w)), jnp.float32) for w in widths)
    if n == parts:
        d_k, d_v = one_head(0, start)
    else:
        d_k, d_v = lax.fori_loop(0, n // parts, one_head, start)
    _write(d_key, row, keys, part, d_k * job.spec.scale)
    _write(d_value, row, keys, part, d_v / _survivors(job, call))


def _bias_kernel(query, key, value, call, table, stats, d_out, d_bias, *, job):
    """One tile of the bias: the sum over all tiles of scores that it was added to."""
    cut, (b, t, n), s = job.blocks.queries, query.shape[:3], key.shape[1]
    group, counts = n // key.shape[2], (b, n, *table.shape[2:])
    shared = [size == 1 for size in d_bias.shape]
    own, rest = [], pl.program_id(0)
    for same, count in zip(shared[::-1], counts[::-1], strict=True):
        own.append(0 if same else lax.rem(rest, count))
        rest = rest if same else lax.div(rest, count)
    own = own[::-1]
    axes = [*zip(shared, counts, own, strict=True)]

    def visit(c, total):
        place = []
        for same, count, mine in reversed(axes):
            place.append(lax.rem(c, count) if same else mine)
            c = lax.div(c, count) if same else c
        row, head, i, j = place[::-1]

        def add(total):
            rows, keys = _places(i, cut.q, t, 0), _places(j, cut.k, s, 1)
            q, d_o = _read(query, row, rows, head), _read(d_out, row, rows, head)
            k, v = (_read(x, row, keys, lax.div(head, group)) for x in (key, value))
            place = row, head, rows, keys
            product, d_weights = _dot(job, q, k, 1, 1), _dot(job, d_o, v, 1, 1)
            found = _weights(job, call, stats, place, product, False)
            return total + _d_scores(job, call, stats, place, found, d_weights)

        seen = table[*_own(table, row, head), i, j] != tiles.SKIP
        return lax.cond(seen, add, lambda total: total, total)

    many = math.prod(count for same, count, _ in axes if same)
    total = lax.fori_loop(0, many, visit, jnp.zeros((cut.q, cut.k), jnp.float32))
    places = _places(own[2], cut.q, t, 0), _places(own[3], cut.k, s, 1)
    for axis, same in enumerate(shared[2:]):
        total = total.sum(axis, keepdims=True) if same else total
    alive = zip(places, shared[2:], strict=True)
    mask = _all_of(*(p.inside for p, same in alive if not same))
    index = _own(d_bias, *own[:2], *(p.index for p in places))
    if shared[2] and shared[3]:
        total = total.sum()
    triton.store(d_bias.at[tuple(index)], total.astype(d_bias.dtype), mask=mask)


# ---------------------------------------------------------------- around the kernels


def _run(kernel, job, cut, programs, out_shape, *operands):
    return pl.pallas_call(
        functools.partial(kernel, job=job),
        grid=(programs,),
        out_shape=out_shape,
        interpret=job.interpret,
        compiler_params=triton.CompilerParams(
            num_warps=cut.warps, num_stages=cut.stages
        ),
        name=f"attention{kernel.__name__.removesuffix('_kernel')}",
    )(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(job, query, key, value, bias, sinks, call):
    return _forward(job, query, key, value, bias, sinks, call)[0]


def _forward(job, query, key, value, bias, sinks, call):
    (b, t, n, _), s, cut = query.shape, key.shape[1], job.blocks.forward
    whole = call._replace(bias=bias, sinks=sinks)
    plan = _plan(tiles.visits(call, job.spec, s, cut.q, cut.k))
    shapes = (
        jax.ShapeDtypeStruct((b, t, n, value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct((b, n, t), jnp.float32),
    )
    operands = query, key, value, whole, plan
    programs = b * n * pl.cdiv(t, cut.q)
    out, log = _run(_forward_kernel, job, cut, programs, shapes, *operands)
    return (out, log.swapaxes(1, 2)), (query, key, value, bias, sinks, call, out, log)


def _backward(job, saved, cotangents):
    query, key, value, bias, sinks, call, out, log = saved
    (b, t, n, _), (s, k_heads) = query.shape, key.shape[1:3]
    d_out, d_log = cotangents
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1) - d_log
    empty = log == -jnp.inf
    delta = jnp.where(empty, 0, delta.swapaxes(1, 2))
    stats = Statistics(jnp.where(empty, jnp.inf, log * LOG2E), delta)
    operands = query, key, value, call._replace(bias=bias)
    d_out = d_out.astype(query.dtype)

    cut = job.blocks.queries
    table = tiles.visits(call, job.spec, s, cut.q, cut.k)
    shape = jax.ShapeDtypeStruct(query.shape, query.dtype)
    programs = b * n * pl.cdiv(t, cut.q)
    rest = _plan(table), stats, d_out
    d_query = _run(_queries_kernel, job, cut, programs, shape, *operands, *rest)

    d_bias = None
    if bias is not None:
        counts = (b, n, *table.shape[2:])
        shape = jax.ShapeDtypeStruct(bias.shape, bias.dtype)
        own = zip(bias.shape, counts, strict=True)
        programs = math.prod(1 if size == 1 else count for size, count in own)
        rest = table, stats, d_out
        d_bias = _run(_bias_kernel, job, cut, programs, shape, *operands, *rest)

    cut = job.blocks.keys
    table = tiles.visits(call, job.spec, s, cut.q, cut.k).swapaxes(2, 3)
    programs = b * k_heads * pl.cdiv(s, cut.k)
    split = _split(programs, n // k_heads)
    dtype = key.dtype if split == 1 else jnp.float32
    shapes = [
        jax.ShapeDtypeStruct((b, s, k_heads * split, x.shape[3]), dtype)
        for x in (key, value)
    ]
    rest = _plan(table), stats, d_out
    both = _run(_keys_kernel, job, cut, programs * split, shapes, *operands, *rest)
    d_key, d_value = (
        x.reshape(b, s, k_heads, split, -1).sum(3).astype(key.dtype) for x in both
    )
    d_sinks = None
    if sinks is not None:
        wide = sinks.astype(jnp.float32)[:, None]
        share = jnp.where(empty, 0, jnp.exp(wide - jnp.where(empty, 0, log)))
        d_sinks = -(share * delta).sum((0, 2)).astype(sinks.dtype)
    return d_query, d_key, d_value, d_bias, d_sinks, None


def _split(programs, group):
    """Into how many sums the heads of a group go, so that every processor has work."""
    divisors = (d for d in range(1, group + 1) if group % d == 0)
    return next((d for d in divisors if programs * d >= PROGRAMS), group)


_attend.defvjp(_forward, _backward)
