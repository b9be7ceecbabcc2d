"""What the Hopper kernels are built of: products, loads, tile lists, one ring of tiles.

A kernel has two warpgroups that compute and one that fetches. Every tensor core
product goes through `product`, `overlap` or `pair`, which issue wgmma on hardware and
are plain dot products under the interpreter: all the rest, the warp-specialised code
with its barriers, runs unchanged on a CPU.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, Int8

from .call import Spec
from .tiles import FULL, PART

ROWS = 64  # rows of one warpgroup: those of one wgmma
COMPUTE = 2  # compute warpgroups of a block; the one after them fetches
TILE = ROWS * COMPUTE
LOG2E = 1.4426950408889634
LOWEST = -1e30  # below every score, and finite: differences are not NaN

MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # one value per row, per column


class Plan(NamedTuple):
    """What one kernel is compiled for."""

    spec: Spec
    block: int  # length of the streamed tiles: keys, or rows for the gradients of keys
    stages: int  # of the ring
    interpret: Any  # False on hardware


def cast(plan, x, layout):
    """Registers hold `x` in this layout; the interpreter knows none."""
    return x if plan.interpret else plgpu.layout_cast(x, layout)


def load(plan, ref, index, layout):
    """A vector from memory, one entry per row or column of the matrices."""
    if plan.interpret:
        return ref[index]
    return plgpu.load(ref, index, layout=layout, optimized=False)


def along(plan, x, shape, axis):
    """A vector repeated into a matrix whose `axis` it runs along."""
    return cast(plan, lax.broadcast_in_dim(x, shape, (axis,)), MATRIX)


def index(plan, shape, axis):
    """The index along one axis of a matrix."""
    return cast(plan, lax.broadcasted_iota(jnp.int32, shape, axis), MATRIX)


def _dot(a, b, transpose):
    a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
    contract = ((1,), (1 if transpose else 0,))
    return lax.dot_general(
        a, b, (contract, ((), ())), preferred_element_type=jnp.float32
    )


def _issue(acc, a, b, transpose):
    plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)) if transpose else b)


def _size(a, b, transpose):
    return plgpu.ACC((a.shape[0], b.shape[0 if transpose else 1]))


def product(plan, a, b, start=None, *, transpose=False):
    """start + a b, or a b^T, in float32; a in registers or shared memory, b shared."""
    if plan.interpret:
        result = _dot(a, b, transpose)
        return result if start is None else start + result

    def scope(acc):
        if start is not None:
            acc[...] = start
        _issue(acc, a, b, transpose)
        return acc[...]

    return pl.run_scoped(scope, _size(a, b, transpose))


def overlap(plan, first, second, start, issued, then):
    """(start + second, then(first)), the second product under way meanwhile.

    first = (a, b) stands for a b^T, second = (a, b) for a b; `issued` runs when both
    are on their way.
    """
    if plan.interpret:
        scores = _dot(*first, True)
        issued()
        return start + _dot(*second, False), then(scores)

    def scope(scores, acc):
        acc[...] = start
        _issue(scores, *first, True)
        _issue(acc, *second, False)
        issued()
        rest = then(plgpu.wgmma_accumulator_load(scores, wait_n=1))
        return acc[...], rest

    return pl.run_scoped(scope, _size(*first, True), _size(*second, False))


def chain(plan, first, second, weigh, grade, sums, rights):
    """The sums of a gradient, plus what one tile of weights and errors adds.

    first, second = (a, b) stand for a b^T. (weights, kept) = weigh(first), and errors
    = grade(kept, second) while the weights are multiplied, where anyone asks for them:
    rights = (b, b') with sums for weights b and errors b', or (b',) for the errors.
    """
    if plan.interpret:
        weights, kept = weigh(_dot(*first, True))
        errors = grade(kept, _dot(*second, True))
        lefts = (weights, errors)[-len(sums) :]
        return tuple(
            start + _dot(a, b, False)
            for start, a, b in zip(sums, lefts, rights, strict=True)
        )

    def scope(scores, slopes, *accs):
        _issue(scores, *first, True)
        _issue(slopes, *second, True)
        weights, kept = weigh(plgpu.wgmma_accumulator_load(scores, wait_n=1))
        if len(accs) == 2:
            accs[0][...] = sums[0]
            _issue(accs[0], weights, rights[0], False)
        slopes = plgpu.wgmma_accumulator_load(slopes, wait_n=len(accs) - 1)
        errors = grade(kept, slopes)
        accs[-1][...] = sums[-1]
        _issue(accs[-1], errors, rights[-1], False)
        return tuple(acc[...] for acc in accs)

    accs = [plgpu.ACC(x.shape) for x in sums]
    return pl.run_scoped(scope, _size(*first, True), _size(*second, True), *accs)


def tile_lists(
    table: Int8[Array, "b n r c"],
) -> tuple[Int[Array, "b n r c"], Int[Array, "b n r 2"]]:
    """For each row of tiles: those visited, FULL ones first, and (FULL, PART) counts.

    Ranks by counting: no sort, whose launch would cost more than it saves.
    """
    c = table.shape[-1]
    column = jnp.arange(c, dtype=jnp.int32)
    turn = column + c * jnp.where(table == FULL, 0, jnp.where(table == PART, 1, 2))
    rank = jnp.sum(turn[..., None, :] < turn[..., None], -1, dtype=jnp.int32)
    placed = rank[..., None, :] == column[:, None]
    order = jnp.sum(jnp.where(placed, column, 0), -1, dtype=jnp.int32)
    counts = [jnp.sum(table == kind, -1, dtype=jnp.int32) for kind in (FULL, PART)]
    return order, jnp.stack(counts, -1)


def pad(x, block):
    """Axis 1 up to whole tiles."""
    missing = -x.shape[1] % block
    if not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def fold(x, block):
    """[b, length] -> int32 [b, tiles, block]."""
    x = pad(x.astype(jnp.int32), block)
    return x.reshape(x.shape[0], -1, block)


def row_tiles(call, s):
    """Bounds of the rows in tiles of 64, whole blocks of them; padding sees nothing."""
    bounds = (call.low, jnp.minimum(call.high, s))
    return [fold(pad(x, TILE), ROWS) for x in bounds]


def ids(call, block):
    """Documents of rows and of keys in tiles, where a call has any."""
    if call.segments is None:
        return {}
    q_ids, k_ids = call.segments
    return {"q_ids": fold(pad(q_ids, TILE), ROWS), "k_ids": fold(k_ids, block)}


def pick(ref, b, n):
    """An entry of a table whose leading axes may stand for all rows and heads."""
    return (0 if ref.shape[0] == 1 else b), (0 if ref.shape[1] == 1 else n)


def tiled(shape, dtype):
    """Shared memory as the tensor cores read it: 8 x 64 tiles, 128-byte swizzle."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def make_finite(plan, ref):
    """Non-finite entries become zero: a hidden key's times a weight of zero is NaN.

    For tiles seen in part only, by the warpgroup that fetches, before the others see
    the tile; they need no such care where every row sees every key.
    """
    rows, columns = ref.shape
    for i in range(0, rows, ROWS):
        for j in range(0, columns, ROWS):
            here = ref.at[i : i + ROWS, j : j + ROWS]
            entries = here[...]
            wide = entries.astype(jnp.float32)
            here[...] = jnp.where(jnp.abs(wide) < jnp.inf, entries, 0)
    plgpu.commit_smem()


def base_two(plan, scores):
    """(scores in base 2: scaled and capped; slope of the cap, or None)."""
    scale, cap = plan.spec.scale, plan.spec.soft_cap
    if cap is None:
        return scores * (scale * LOG2E), None
    bent = tanh(scores * (scale / cap))
    return bent * (cap * LOG2E), 1 - bent * bent


def tanh(x):
    """1 - 2 / (exp(2x) + 1): to float32, which the hardware's own tanh is not."""
    return 1 - 2 / (jnp.exp2(x * (2 * LOG2E)) + 1)


def seen(plan, bounds, ids, first, key_ids, *, flip=False):
    """The mask of a tile that starts at key `first`: rows by keys, or flipped."""
    keys_axis, rows_axis = (0, 1) if flip else (1, 0)
    shape = (ROWS, plan.block)
    low, high = (along(plan, x, shape, rows_axis) for x in bounds)
    keys = index(plan, shape, keys_axis) + first
    mask = (keys >= low) & (keys < high)
    if ids is not None:
        ids = along(plan, ids, shape, rows_axis)
        mask &= ids == along(plan, key_ids, shape, keys_axis)
    return mask
