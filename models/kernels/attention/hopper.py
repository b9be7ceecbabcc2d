"""Attention on Hopper GPUs, through Pallas Mosaic GPU.

Two warpgroups compute on 64 rows each, a third fetches tiles of keys and values into
a ring of shared memory. The two take turns at the tensor cores, so that the softmax of
one hides under the products of the other; within each, the scores of a tile and the
weighted values of the tile before are under way together (Shah et al. 2024,
arXiv:2407.08608, Algorithms 1 and 2). Softmax in base 2, float32 sums, weights in the
value's dtype. Tiles that all rows see run first and without a mask.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .call import Call, Spec
from .hopper_backward import backward
from .tiles import visits
from .warpgroups import (
    COLUMN,
    COMPUTE,
    LOG2E,
    LOWEST,
    ROW,
    ROWS,
    TILE,
    Plan,
    along,
    base_two,
    cast,
    ids,
    load,
    make_finite,
    overlap,
    pad,
    pick,
    product,
    row_tiles,
    seen,
    tile_lists,
    tiled,
)

# head width -> (keys of a tile, stages of the ring); shared memory holds 227 KB
BLOCKS = {64: (128, 4), 128: (128, 2)}


def hopper(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    call: Call,
    spec: Spec,
    *,
    interpret: Any = False,
    blocks: tuple[int, int] | None = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Output and log-sum-exp as `call` defines them.

    Args:
      interpret: parameters of the Mosaic GPU interpreter, to run on a CPU.
      blocks: keys of a tile and stages of the ring; None takes those of `BLOCKS`.

    Raises:
      NotImplementedError: what this form cannot take; the Triton form takes it.
    """
    _refuse(query, key, value, call, spec)
    plan = Plan(spec, *(blocks or BLOCKS[query.shape[-1]]), interpret)
    out, logsumexp = _attend(plan, query, key, value, call)
    return out, logsumexp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, call):
    return _forward(plan, query, key, value, call)


def _remember(plan, query, key, value, call):
    out, logsumexp = _forward(plan, query, key, value, call)
    return (out, logsumexp), (query, key, value, call, out, logsumexp)


_attend.defvjp(_remember, backward)


def _refuse(query, key, value, call, spec):
    """Say at once what has to go another way."""
    dtypes = {str(x.dtype) for x in (query, key, value)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        raise NotImplementedError(
            f"hopper: dtypes {sorted(dtypes)} must be one of bfloat16 and float16: "
            "wgmma multiplies 16-bit numbers"
        )
    if query.shape[-1] not in BLOCKS or value.shape[-1] != query.shape[-1]:
        raise NotImplementedError(
            f"hopper: head widths {query.shape[-1]} and {value.shape[-1]} must be "
            f"equal and one of {sorted(BLOCKS)}; the gradients of wider keys and "
            "values do not fit into registers"
        )
    given = {
        "bias": call.bias is not None,
        "a dense mask": call.mask is not None,
        "a function of indices": spec.sees is not None,
        "dropout": call.dropout_key is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise NotImplementedError(
                f"hopper: {name} would fill the time between the products that this "
                "form exists to save"
            )


def _forward(plan, query, key, value, call):
    """One block for each tile of rows, head and batch row; the last tiles first."""
    (_, rows, _, _), s = query.shape, key.shape[1]
    block, stages = plan.block, plan.stages
    lists = tile_lists(visits(call, plan.spec, s, TILE, block))
    bounds = row_tiles(call, s)
    optional = ids(call, block)
    if call.sinks is not None:
        optional["sinks"] = call.sinks.astype(jnp.float32)
    query, key, value = pad(query, TILE), pad(key, block), pad(value, block)
    (b, t, n, h), k = query.shape, key.shape[2]
    group, fetching = n // k, COMPUTE
    c = plan.spec.scale * LOG2E  # scores are c q.k, in base 2

    def kernel(q, k, v, low, high, order, counts, *refs, smem, barriers):
        *refs, out, lse = refs
        extra = dict(zip(optional, refs, strict=True))
        q_smem, k_smem, v_smem = smem
        ready, k_ready, v_ready, landed, k_free, v_free, turn = barriers
        row, head = lax.axis_index("b"), lax.axis_index("n")
        tile = t // TILE - 1 - lax.axis_index("t")
        me = lax.axis_index("warpgroup")
        entry = (*pick(order, row, head), tile)
        full, part = counts[(*entry, 0)], counts[(*entry, 1)]

        @pl.when(me == fetching)
        def fetch():
            plgpu.set_max_registers(40, action="decrease")

            def get(i, arrival):
                slot = lax.rem(i, stages)
                at = (row, pl.ds(order[(*entry, i)] * block, block), head // group)
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.copy_gmem_to_smem(k.at[at], k_smem.at[slot], k_ready.at[slot])
                plgpu.barrier_wait(v_free.at[slot])
                plgpu.copy_gmem_to_smem(v.at[at], v_smem.at[slot], arrival)
                return slot

            @pl.loop(0, full)
            def _(i):
                get(i, v_ready.at[lax.rem(i, stages)])

            @pl.loop(full, full + part)
            def _(i):
                slot = get(i, landed)
                plgpu.barrier_wait(landed)
                make_finite(plan, v_smem.at[slot])
                plgpu.barrier_arrive(v_ready.at[slot])

            for slot in range(stages):  # leave no arrival unseen
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

        @pl.when(me < fetching)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            mine = tile * COMPUTE + me  # of the tiles of 64 rows
            at = (row, pl.ds(mine * ROWS, ROWS), head)
            q_mine = q_smem.at[me]
            plgpu.copy_gmem_to_smem(q.at[at], q_mine, ready.at[me])
            for slot in range(stages):
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])

            @pl.when(me == 1)
            def _():
                plgpu.barrier_arrive(turn.at[0])

            def hand_over():
                plgpu.barrier_arrive(turn.at[1 - me])

            def softmax(scores, top, total, mask=None):
                """(weights, factor of what came before, top, total)."""
                factor = c
                if plan.spec.soft_cap is not None or c <= 0:
                    scores, factor = base_two(plan, scores)[0], 1.0
                if mask is not None:
                    scores = jnp.where(mask, scores, -jnp.inf)
                new = jnp.maximum(top, scores.max(axis=1) * factor)
                weights = jnp.exp2(scores * factor - along(plan, new, scores.shape, 0))
                fade = jnp.exp2(top - new)
                total = total * fade + weights.sum(axis=1)
                return weights.astype(v.dtype), fade, new, total

            def scale(acc, by):
                return acc * along(plan, by, acc.shape, 0)

            def all_full(carry):
                """Weights of one tile meet their values while the next is scored."""
                acc, top, total = carry
                plgpu.barrier_wait(k_ready.at[0])
                plgpu.barrier_wait(turn.at[me])
                scores = product(plan, q_mine, k_smem.at[0], transpose=True)
                hand_over()
                plgpu.barrier_arrive(k_free.at[0])
                weights, _, top, total = softmax(scores, top, total)

                def step(i, carry):
                    acc, weights, top, total = carry
                    slot, last = lax.rem(i, stages), lax.rem(i - 1, stages)
                    plgpu.barrier_wait(k_ready.at[slot])
                    plgpu.barrier_wait(v_ready.at[last])
                    plgpu.barrier_wait(turn.at[me])

                    def then(scores):
                        plgpu.barrier_arrive(k_free.at[slot])
                        return softmax(scores, top, total)

                    acc, (weights, fade, top, total) = overlap(
                        plan,
                        (q_mine, k_smem.at[slot]),
                        (weights, v_smem.at[last]),
                        acc,
                        hand_over,
                        then,
                    )
                    plgpu.barrier_arrive(v_free.at[last])
                    return scale(acc, fade), weights, top, total

                acc, weights, top, total = lax.fori_loop(
                    1, full, step, (acc, weights, top, total)
                )
                last = lax.rem(full - 1, stages)
                plgpu.barrier_wait(v_ready.at[last])
                acc = product(plan, weights, v_smem.at[last], acc)
                plgpu.barrier_arrive(v_free.at[last])
                return acc, top, total

            def masked(i, carry):
                acc, top, total = carry
                slot = lax.rem(i, stages)
                j = order[(*entry, i)]
                key_ids = None
                if q_ids is not None:
                    key_ids = load(plan, extra["k_ids"], (row, j), COLUMN)
                mask = seen(plan, limits, q_ids, j * block, key_ids)
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(turn.at[me])
                scores = product(plan, q_mine, k_smem.at[slot], transpose=True)
                hand_over()
                plgpu.barrier_arrive(k_free.at[slot])
                weights, fade, top, total = softmax(scores, top, total, mask)
                plgpu.barrier_wait(v_ready.at[slot])
                acc = product(plan, weights, v_smem.at[slot], scale(acc, fade))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, top, total

            limits = [load(plan, ref, (row, mine), ROW) for ref in (low, high)]
            q_ids = None
            if "q_ids" in extra:
                q_ids = load(plan, extra["q_ids"], (row, mine), ROW)
            top, total = jnp.float32(LOWEST), jnp.float32(0)
            if "sinks" in extra:  # one more score, of a key without a value
                sink = extra["sinks"][head] * LOG2E
                top, total = jnp.maximum(sink, LOWEST), jnp.where(sink < LOWEST, 0.0, 1)
            top, total = (
                cast(plan, jnp.full((ROWS,), x, jnp.float32), ROW) for x in (top, total)
            )
            acc = cast(plan, jnp.zeros((ROWS, h), jnp.float32), plgpu.Layout.WGMMA)
            plgpu.barrier_wait(ready.at[me])
            carry = lax.cond(full > 0, all_full, lambda x: x, (acc, top, total))
            acc, top, total = lax.fori_loop(full, full + part, masked, carry)

            @pl.when(me == 0)
            def _():
                plgpu.barrier_wait(turn.at[0])  # leave no arrival unseen

            nothing = total == 0
            safe = jnp.where(nothing, 1.0, total)
            q_mine[...] = scale(acc, 1 / safe).astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_mine, out.at[at])
            lse[row, head, mine] = jnp.where(
                nothing, -jnp.inf, top / LOG2E + jnp.log(safe)
            )
            plgpu.wait_smem_to_gmem(0)

    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    out, lse = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((b, n, t // ROWS, ROWS), jnp.float32),
        ),
        grid=(t // TILE, n, b),
        grid_names=("t", "n", "b"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types={
            "smem": (
                tiled((COMPUTE, ROWS, h), query.dtype),
                tiled((stages, block, h), key.dtype),
                tiled((stages, block, h), value.dtype),
            ),
            "barriers": (
                plgpu.Barrier(num_barriers=COMPUTE),
                barrier(),
                barrier(),
                plgpu.Barrier(),
                barrier(num_arrivals=COMPUTE),
                barrier(num_arrivals=COMPUTE),
                plgpu.Barrier(num_barriers=COMPUTE),
            ),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_forward",
        interpret=plan.interpret,
    )(query, key, value, *bounds, *lists, *optional.values())
    return out[:, :rows], lse.reshape(b, n, t)[:, :, :rows].swapaxes(1, 2)
