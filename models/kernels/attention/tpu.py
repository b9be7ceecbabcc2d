"""Attention on TPUs: a Pallas kernel whose scores never leave the chip.

FlashAttention-2 (Dao 2023, arXiv:2307.08691, Algorithm 1) over the tiles that the mask
leaves (`tpu_tile.schedule`: a tile that nobody sees is neither fetched nor stepped
over), with the two levels of FastAttention (Lin et al. 2024, arXiv:2410.16663): tiles
of `Tiling.k` keys are fetched, and the running maximum is updated once for
`Tiling.compute` of them, in pieces whose products overlap with the softmax of the piece
before. Keys with no mask take a body without mask code.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .call import Call, Spec
from .tiles import FULL, PART, visits
from .tpu_backward import gradients
from .tpu_schedule import read, schedule
from .tpu_tile import (
    FLOOR,
    LANES,
    LOG2E,
    PIECE,
    Operand,
    Place,
    Plan,
    Tiling,
    columns,
    cut,
    dot,
    finite,
    kept_by_dropout,
    of_keys,
    of_mask,
    of_pairs,
    of_rows,
    pad,
    parted,
    piece,
    pipeline,
    scalars,
    scores,
    upright,
    visible,
)

WIDEST = 256  # head width up to which tiles and accumulators fit the chip


def tpu(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k v"],
    call: Call,
    spec: Spec,
    *,
    interpret: Any = False,
    blocks: Tiling | None = None,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b t n"]]:
    """Output and log-sum-exp as `reference` defines them, on a TPU.

    Scores, softmax and sums are float32, weights enter the second product in the
    value's dtype; the output has the query's dtype, the log-sum-exp is float32, in
    nats. A visible key or value that is not finite gives NaN where it is seen.

    Args:
      interpret: True, or `pltpu.InterpretParams`, to run anywhere.
      blocks: sizes of tiles; None takes those of `BLOCKS` for the chip.

    Raises:
      NotImplementedError: what this form cannot take, with the reason.
    """
    _check(query, key, value, spec)
    if blocks is None:
        blocks = default_blocks(max(query.shape[3], value.shape[3]), query.dtype)
    blocks = fitted(blocks, query.shape[1], key.shape[1], spec.cell)
    if call.bias is not None and call.bias.shape[2:] == (1, 1):
        shape = (*call.bias.shape[:3], key.shape[1])
        call = call._replace(bias=jnp.broadcast_to(call.bias, shape))
    if call.mask is not None and call.mask.shape[2:] == (1, 1):
        shape = (*call.mask.shape[:3], key.shape[1])
        call = call._replace(mask=jnp.broadcast_to(call.mask, shape))
    out: Any = _attend(Plan(spec, blocks, interpret), query, key, value, call)
    return out


def _check(query, key, value, spec):
    dtypes = {x.dtype.name for x in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        raise NotImplementedError(
            f"tpu: query, key and value are {sorted(dtypes)}; all must be float32, or "
            "all bfloat16"
        )
    if max(query.shape[3], value.shape[3]) > WIDEST:
        raise NotImplementedError(
            f"tpu: head widths {query.shape[3]} and {value.shape[3]} must be at most "
            f"{WIDEST}"
        )
    if not query.size or not key.size or not value.size:
        raise NotImplementedError("tpu: an empty query, key or value has no tile")
    if spec.sees is not None:
        index = jax.ShapeDtypeStruct((8, LANES), jnp.int32)
        if jax.make_jaxpr(spec.sees)(index, index).consts:
            raise NotImplementedError(
                "tpu: sees holds arrays, which a kernel cannot read; give them as mask"
            )


# Rows: chip, head width up to, dtype. Chosen by bundles (see tpu_budgets.py).
BLOCKS = {
    ("v5e", 128, "bfloat16"): Tiling(1024, 1024, 1024, 128),
    ("v5p", 128, "bfloat16"): Tiling(1024, 1024, 1024, 128),
    ("other", 128, "bfloat16"): Tiling(1024, 1024, 1024, 256),
    ("other", 256, "bfloat16"): Tiling(1024, 1024, 1024, 256, 8192),
    ("other", 128, "float32"): Tiling(512, 512, 512, 256, 8192),
    ("other", 256, "float32"): Tiling(512, 512, 512, 256, 4096),
}


def default_blocks(width: int, dtype: DTypeLike, chip: str | None = None) -> Tiling:
    """The row of `BLOCKS` for a head width; for the chip that jax runs on, if None."""
    if chip is None:
        chip = "other"
        if jax.default_backend() == "tpu":
            chip = str(pltpu.get_tpu_info().chip_version)
    row = 128 if width <= 128 else 256, jnp.dtype(dtype).name
    return BLOCKS.get((chip, *row), BLOCKS["other", *row])


def fitted(blocks: Tiling, t: int, s: int, cell: tuple[int, int] | None) -> Tiling:
    """Tiling no larger than the call, even, and commensurable with cells."""
    q, k = (
        _fit(length, limit, 1 if cell is None else cell[axis])
        for axis, (length, limit) in enumerate(((t, blocks.q), (s, blocks.k)))
    )
    return blocks._replace(q=q, k=k)


def _fit(length, limit, cell):
    unit = math.lcm(LANES, cell)
    if unit > limit:
        unit = math.gcd(limit, cell)
        if unit % LANES:
            raise NotImplementedError(
                f"tpu: cells of {cell} and blocks of {LANES} to {limit} must be "
                "multiples of one another"
            )
        return unit
    tiles = -(-length // (limit // unit * unit))
    return unit * -(-length // (tiles * unit))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, call):
    return _forward(plan, query, key, value, call)[0]


def _forward(plan, query, key, value, call):
    (b, t, n, _), (_, s, k, v) = query.shape, value.shape
    spec, blocks = plan.spec, plan.blocks
    table = visits(call, spec, s, blocks.q, blocks.k)
    listed = schedule(table)
    steps = listed.shape

    def place(b, n, step, steps_, held_):
        at = read(steps_, steps, b, n, step)
        return Place(b, n, at.outer, at.inner)

    def near(b, n, step, steps_, held_):
        at = read(held_, steps, b, n, step)
        return Place(b, n, at.outer, at.inner)

    group = n // k
    operands = {
        "query": of_rows(query, blocks),
        "key": of_keys(key, blocks, group),
        "value": _transposed(value, blocks, group),
    }
    if call.bias is not None:
        operands |= of_pairs("bias", call.bias, blocks)
    specs = {name: x.at(place) for name, x in operands.items()}
    masking = of_mask(call, spec, s, blocks)
    specs |= {name: x.at(near) for name, x in masking.items()}
    arrays = {name: x.array for name, x in (operands | masking).items()}
    small = scalars(call, spec, b, n)
    specs |= {name: pl.BlockSpec(memory_space=pltpu.SMEM) for name in small}
    tall = -(-t // blocks.q) * blocks.q
    wide = -(-v // LANES) * LANES
    out, logsumexp = pl.pallas_call(
        functools.partial(_kernel, plan, steps, n, v),
        out_shape=[
            jax.ShapeDtypeStruct((b, tall, n * wide), query.dtype),
            jax.ShapeDtypeStruct((b, n, 1, tall), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, n, listed.count),
            in_specs=[specs],
            out_specs=[
                pl.BlockSpec(
                    (None, blocks.q, wide),
                    lambda *ids: (ids[0], place(*ids).i, ids[1]),
                ),
                pl.BlockSpec(
                    (None, None, 1, blocks.q),
                    lambda *ids: (ids[0], ids[1], 0, place(*ids).i),
                ),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, blocks.q), jnp.float32),
                pltpu.VMEM((1, blocks.q), jnp.float32),
                pltpu.VMEM((upright(v), blocks.q), jnp.float32),
            ],
        ),
        name="attention_forward",
        **plan.params("parallel", "parallel", "arbitrary"),
    )(listed.steps, listed.held, arrays | small)
    out = parted(out, t, n, v)
    logsumexp = logsumexp[:, :, 0, :t].swapaxes(1, 2)
    return (out, logsumexp), (query, key, value, call, out, logsumexp)


def _transposed(value, blocks, group):
    """[b, s, k, v] -> [b, k, v', s']: the second product needs its lines upright."""
    x = pad(pad(value, 1, blocks.k), 3, upright(1)).transpose(0, 2, 3, 1)
    return Operand(
        x,
        (None, None, x.shape[2], blocks.k),
        lambda place: (place.b, lax.div(place.n, group), 0, place.j),
    )


def _kernel(plan, steps_shape, heads, v, steps, held, refs, out, logs, *scratch):
    """One tile of the list; the running sums of a line of tiles lie in scratch."""
    del held  # read by the index maps alone
    b, n, step = (pl.program_id(axis) for axis in range(3))
    at = read(steps, steps_shape, b, n, step)
    top, total, gathered = scratch
    spec, blocks = plan.spec, plan.blocks
    units = [
        (keys, rows)
        for keys in cut(blocks.k, blocks.compute)
        for rows in cut(blocks.q, blocks.columns)
    ]

    @pl.when(at.first == 1)
    def _():
        start = jnp.full_like(top, FLOOR)
        if "sinks" in refs:
            start = jnp.maximum(start, refs["sinks"][n] * LOG2E)
            total[...] = jnp.exp2(refs["sinks"][n] * LOG2E - start)
        else:
            total[...] = jnp.zeros_like(total)
        top[...] = start
        gathered[...] = jnp.zeros_like(gathered)

    def update(masked):
        upright_ = columns(refs)
        value = finite(refs["value"][...]) if masked else refs["value"]

        def parts(keys, rows):
            for start in range(keys.start, keys.stop, PIECE):
                some = slice(start, min(start + PIECE, keys.stop))
                yield piece(blocks, at.outer, at.inner, some, rows)

        def front(unit):
            found, highest = [], top[:, unit[1]]
            for part in parts(*unit):
                seen = visible(refs, upright_, plan, part) if masked else None
                score, _ = scores(refs, upright_, spec, part, seen)
                found.append(score)
                highest = jnp.maximum(highest, score.max(0, keepdims=True))
            return found, highest

        def back(unit, ahead):
            (keys, rows), (found, highest) = unit, ahead
            shrink = jnp.exp2(top[:, rows] - highest)
            top[:, rows] = highest
            summed, weights = shrink * total[:, rows], []
            for part, score in zip(parts(keys, rows), found, strict=True):
                weight = jnp.exp2(score - highest)
                summed += weight.sum(0, keepdims=True)
                kept = kept_by_dropout(refs, spec, b * heads + n, part)
                if kept is not None:
                    weight = jnp.where(kept, weight, 0)
                weights.append(weight.astype(value.dtype))
            total[:, rows] = summed
            more = dot(value[:, keys], jnp.concatenate(weights, 0), 1, 0)
            gathered[:, rows] = gathered[:, rows] * shrink + more

        pipeline(units, front, back)
        if masked:
            _poison(refs, upright_, plan, at, gathered, units)

    pl.when(at.kind == FULL)(functools.partial(update, False))
    pl.when(at.kind == PART)(functools.partial(update, True))

    @pl.when(at.last == 1)
    def _():
        summed = total[...]
        share = jnp.where(summed > 0, 1 / summed, 0) / (1 - spec.dropout_rate)
        out[:, :v] = (gathered[...] * share).T[:, :v].astype(out.dtype)
        logs[...] = top[...] / LOG2E + jnp.log(summed)


def _poison(refs, upright_, plan, at, gathered, units):
    """NaN where a row sees a value that is not finite; `finite` has taken it out."""
    value = refs["value"][...].astype(jnp.float32)
    strange = jnp.where(jnp.abs(value) < jnp.inf, 0.0, 1.0)

    @pl.when(jnp.max(strange) > 0)
    def _():
        for keys, rows in units:
            part = piece(plan.blocks, at.outer, at.inner, keys, rows)
            seen = visible(refs, upright_, plan, part).astype(jnp.float32)
            met = dot(strange[:, keys], seen, 1, 0)
            gathered[:, rows] = jnp.where(met > 0, jnp.nan, gathered[:, rows])


_attend.defvjp(_forward, gradients)
