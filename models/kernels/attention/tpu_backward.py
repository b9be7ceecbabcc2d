"""Gradients of attention on TPUs: one pass over the tiles, five products for each.

FlashAttention-2 (Dao 2023, arXiv:2307.08691, Algorithm 2), columns of tiles outside:
the gradients of a tile of keys gather in scratch, and those of the queries of a whole
head stay on the chip beside them, so that scores are formed once. Longer sequences go
in chunks of `Tiling.rows` rows, whose gradients of keys are summed. With the number
D = do . o - dL for each row, and weights p from the saved log-sum-exp,

    dv = p^T do    ds = p (do v^T - D)    dq = scale ds k    dk = scale ds^T q
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .call import Call
from .tiles import FULL, PART, SKIP, visits
from .tpu_schedule import read, schedule
from .tpu_tile import (
    LANES,
    LOG2E,
    PIECE,
    Operand,
    Place,
    columns,
    cut,
    dot,
    finite,
    kept_by_dropout,
    of_keys,
    of_mask,
    of_pairs,
    of_rows,
    of_statistics,
    parted,
    piece,
    pipeline,
    scalars,
    scores,
    upright,
    visible,
)


class Sizes(NamedTuple):
    """Lengths and widths of a call, before padding."""

    b: int
    t: int
    s: int
    n: int
    k: int
    h: int
    v: int


def gradients(plan, saved, cotangents):
    """Cotangents of query, key, value and call: of its bias and its sinks."""
    query, key, value, call, out, logsumexp = saved
    d_out, d_log = cotangents
    (b, t, n, h), (_, s, k, v) = query.shape, value.shape
    sizes = Sizes(b, t, s, n, k, h, v)
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_log
    # a row that sees nothing has no weights, so that any finite number will do
    empty = jnp.isneginf(logsumexp)
    inner = jnp.where(empty, 0, inner)
    base2 = jnp.where(empty, 0, logsumexp * LOG2E)
    table = visits(call, plan.spec, s, plan.blocks.q, plan.blocks.k)
    operands = _operands(plan, sizes, query, key, value, d_out, base2, inner, call)
    masking = of_mask(call, plan.spec, s, plan.blocks)
    small = scalars(call, plan.spec, b, n)
    chunk = max(plan.blocks.rows // plan.blocks.q, 1)
    parts = [
        _chunk(plan, sizes, table[:, :, i : i + chunk], i, operands, masking, small)
        for i in range(0, table.shape[2], chunk)
    ]
    d_query = jnp.concatenate([part[0] for part in parts], 1)
    d_query = parted(d_query, t, n, h)
    d_key = _summed([part[1] for part in parts], sizes, h).astype(key.dtype)
    d_value = _summed([part[2] for part in parts], sizes, v).astype(value.dtype)
    d_call = Call._make([None] * len(Call._fields))
    if call.bias is not None:
        d_bias = bias_gradient(plan, sizes, table, operands, masking, small, call)
        d_call = d_call._replace(bias=d_bias.astype(call.bias.dtype))
    if call.sinks is not None:
        weights = jnp.exp(call.sinks.astype(jnp.float32) - logsumexp)
        d_sinks = -(jnp.where(empty, 0, weights) * inner).sum((0, 1))
        d_call = d_call._replace(sinks=d_sinks.astype(call.sinks.dtype))
    return d_query, d_key, d_value, d_call


def _operands(plan, sizes, query, key, value, d_out, base2, inner, call):
    blocks, group = plan.blocks, sizes.n // sizes.k
    operands = {
        "query": of_rows(query, blocks),
        "key": of_keys(key, blocks, group),
        "value": of_keys(value, blocks, group),
        "d_out": of_rows(d_out.astype(value.dtype), blocks),
        "logsumexp": of_statistics(base2.swapaxes(1, 2), blocks),
        "inner": of_statistics(inner.swapaxes(1, 2), blocks),
    }
    if call.bias is not None:
        operands |= of_pairs("bias", call.bias, blocks)
    return operands


def _summed(parts, sizes, width):
    """Chunks and the heads of a group, added in float32."""
    total = functools.reduce(jnp.add, parts)
    total = parted(total, sizes.s, sizes.n, width)
    b, s, n, _ = total.shape
    return total.reshape(b, s, sizes.k, n // sizes.k, width).sum(3)


def _chunk(plan, sizes, table, start, operands, masking, small):
    """Gradients from the rows of the tiles `start` and on, joined as `of_rows` does."""
    b, t, _, n, k, h, v = sizes
    blocks = plan.blocks
    tiles = table.shape[2]
    listed = schedule(table.swapaxes(2, 3))
    steps = listed.shape

    def place(b, n, step, steps_, held_):
        at = read(steps_, steps, b, n, step)
        return Place(b, n, at.inner + start, at.outer)

    def near(b, n, step, steps_, held_):
        at = read(held_, steps, b, n, step)
        return Place(b, n, at.inner + start, at.outer)

    specs = {name: x.at(place) for name, x in operands.items()}
    specs |= {name: x.at(near) for name, x in masking.items()}
    specs |= {name: pl.BlockSpec(memory_space=pltpu.SMEM) for name in small}
    arrays = {name: x.array for name, x in (operands | masking).items()}
    wide_h, wide_v = (-(-width // LANES) * LANES for width in (h, v))
    tall = operands["key"].array.shape[1]
    dtype = operands["query"].array.dtype
    alone = n == k and tiles == -(-t // blocks.q)  # nothing is added outside
    sum_dtype = dtype if alone else jnp.float32

    def of_key(width):
        return pl.BlockSpec(
            (None, blocks.k, width), lambda *ids: (ids[0], place(*ids).j, ids[1])
        )

    return pl.pallas_call(
        functools.partial(_kernel, plan, steps, n, start, h),
        out_shape=[
            jax.ShapeDtypeStruct((b, tiles * blocks.q, n * wide_h), dtype),
            jax.ShapeDtypeStruct((b, tall, n * wide_h), sum_dtype),
            jax.ShapeDtypeStruct((b, tall, n * wide_v), sum_dtype),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, n, listed.count),
            in_specs=[specs],
            out_specs=[
                pl.BlockSpec(
                    (None, tiles * blocks.q, wide_h),
                    lambda b, n, step, *lists: (b, 0, n),
                ),
                of_key(wide_h),
                of_key(wide_v),
            ],
            scratch_shapes=[
                pltpu.VMEM((tiles, upright(h), blocks.q), jnp.float32),
                pltpu.VMEM((blocks.k, wide_h), jnp.float32),
                pltpu.VMEM((blocks.k, wide_v), jnp.float32),
                pltpu.VMEM((wide_h, blocks.k), dtype),
                pltpu.VMEM((blocks.k, blocks.q), dtype),
                pltpu.VMEM((blocks.k, blocks.q), dtype),
            ],
        ),
        name="attention_backward",
        **plan.params("parallel", "parallel", "arbitrary"),
    )(listed.steps, listed.held, arrays | small)


def _kernel(plan, steps_shape, heads, start, h, steps, held, refs, *rest):
    """One tile of the list; every line of it is a column of tiles."""
    del held  # read by the index maps alone
    d_query, d_key, d_value, by_rows, by_key, by_value, turned, weights, slopes = rest
    b, n, step = (pl.program_id(axis) for axis in range(3))
    end = pl.num_programs(2) - 1
    at = read(steps, steps_shape, b, n, step)
    blocks, scale = plan.blocks, plan.spec.scale

    @pl.when(step == 0)
    def _():
        by_rows[...] = jnp.zeros_like(by_rows)

    @pl.when(at.first == 1)
    def _():
        by_key[...] = jnp.zeros_like(by_key)
        by_value[...] = jnp.zeros_like(by_value)
        turned[...] = finite(refs["key"][...]).T

    def add(masked):
        clean = finite if masked else lambda x: x
        vectors = columns(refs)
        units = cut(blocks.q, blocks.columns)

        def front(rows):
            found = []
            for keys in cut(blocks.k, PIECE):
                part = piece(blocks, at.inner + start, at.outer, keys, rows)
                found.append(slope(plan, refs, vectors, part, b * heads + n, masked))
            return found

        def back(rows, found):
            for keys, (weight, d_score) in zip(
                cut(blocks.k, PIECE), found, strict=True
            ):
                weights[keys, rows] = weight.astype(weights.dtype)
                slopes[keys, rows] = d_score.astype(slopes.dtype)
            more = dot(turned[: by_rows.shape[1]], slopes[:, rows], 1, 0)
            by_rows[at.inner, :, rows] += more

        pipeline(units, front, back)
        by_value[...] += dot(weights[...], clean(refs["d_out"][...]), 1, 0)
        by_key[...] += dot(slopes[...], clean(refs["query"][...]), 1, 0)

    pl.when(at.kind == FULL)(functools.partial(add, False))
    pl.when(at.kind == PART)(functools.partial(add, True))

    @pl.when(at.last == 1)
    def _():
        d_key[...] = (by_key[...] * scale).astype(d_key.dtype)
        share = 1 / (1 - plan.spec.dropout_rate)
        d_value[...] = (by_value[...] * share).astype(d_value.dtype)

    @pl.when(step == end)
    def _():
        @pl.loop(0, by_rows.shape[0])
        def _(i):
            block = (by_rows[i] * scale).T.astype(d_query.dtype)
            d_query[pl.ds(pl.multiple_of(i * blocks.q, LANES), blocks.q), :h] = block[
                :, :h
            ]


def slope(plan, refs, vectors, part, head, masked):
    """(weights after dropout without its factor, gradient by the biased scores)."""
    spec = plan.spec
    seen = visible(refs, vectors, plan, part) if masked else None
    score, bend = scores(refs, vectors, spec, part, seen)
    weight = jnp.exp2(score - refs["logsumexp"][:, part.rows])
    by_weight = dot(refs["value"][part.keys, :], refs["d_out"][part.rows, :], 1, 1)
    kept = kept_by_dropout(refs, spec, head, part)
    passed = weight
    if kept is not None:
        passed = jnp.where(kept, weight, 0)
        by_weight = jnp.where(kept, by_weight / (1 - spec.dropout_rate), 0)
    d_score = weight * (by_weight - refs["inner"][:, part.rows])
    if bend is not None:
        d_score = d_score * bend
    if seen is not None:  # beside a hidden NaN a weight of 0 does not help
        d_score = jnp.where(seen, d_score, 0)
    return passed, d_score


def bias_gradient(plan, sizes, table, operands, masking, small, call):
    """Gradient by the bias, summed over the axes along which it was spread.

    A kernel of its own, which forms the scores again: where nobody asks for this
    gradient the compiler drops it. Axes that are summed over are the inner ones.
    """
    b, n = sizes.b, sizes.n
    tiles_t, tiles_s = table.shape[2:]
    name = next(name for name in operands if name.startswith("bias"))
    target: Operand = operands[name]
    lengths = (b, n, tiles_t, tiles_s)
    summed = [size == 1 for size in call.bias.shape]
    order = sorted(range(4), key=lambda axis: summed[axis])
    batch, heads = table.shape[:2]

    def kind(kinds, place):
        row = (place.b if batch > 1 else 0) * heads + (place.n if heads > 1 else 0)
        return kinds[(row * tiles_t + place.i) * tiles_s + place.j]

    def full_place(*ids):
        return Place(*(ids[order.index(axis)] for axis in range(4)))

    def place(*ids):
        """Tiles that are not visited fetch the first one, all of them the same."""
        at = full_place(*ids[:4])
        used = (kind(ids[4], at) != SKIP).astype(jnp.int32)
        return at._replace(i=at.i * used, j=at.j * used)

    specs = {name: x.at(place) for name, x in (operands | masking).items()} | {
        name: pl.BlockSpec(memory_space=pltpu.SMEM) for name in small
    }
    arrays = {name: x.array for name, x in (operands | masking).items()}
    kinds = table.astype(jnp.int32).ravel()

    def kernel(kinds, refs, out):
        ids = [pl.program_id(axis) for axis in range(4)]
        at = full_place(*ids)
        inner = [ids[order.index(axis)] for axis in range(4) if summed[axis]]
        fresh = functools.reduce(jnp.logical_and, [x == 0 for x in inner], True)

        @pl.when(fresh)
        def _():
            out[...] = jnp.zeros_like(out)

        def add(masked):
            vectors = columns(refs)
            for keys in cut(plan.blocks.k, PIECE):
                for rows in cut(plan.blocks.q, plan.blocks.columns):
                    part = piece(plan.blocks, at.i, at.j, keys, rows)
                    head = at.b * n + at.n
                    _, found = slope(plan, refs, vectors, part, head, masked)
                    if name == "bias":
                        out[keys, rows] += found
                    elif name == "bias_rows":
                        out[:, rows] += found.sum(0, keepdims=True)
                    else:  # the product with ones lays a column along the lanes
                        ones = jnp.ones((8, found.shape[1]), jnp.float32)
                        out[:, keys] += dot(ones, found, 1, 1)[:1]

        now = kind(kinds, at)
        pl.when(now == FULL)(functools.partial(add, False))
        pl.when(now == PART)(functools.partial(add, True))

    found = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(target.array.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tuple(lengths[axis] for axis in order),
            in_specs=[specs],
            out_specs=pl.BlockSpec(
                target.block, lambda *ids: target.index(full_place(*ids[:4]))
            ),
        ),
        name="attention_bias_gradient",
        **plan.params(*["parallel"] * (4 - sum(summed)), *["arbitrary"] * sum(summed)),
    )(kinds, arrays | small)
    if name != "bias_keys":
        found = found.swapaxes(2, 3)
    return found[:, :, : call.bias.shape[2], : call.bias.shape[3]]
