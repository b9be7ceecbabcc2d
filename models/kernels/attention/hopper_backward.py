"""Gradients of attention on Hopper GPUs: one kernel for queries, one for keys.

With D_i = sum over j of p_ij dp_ij - dL_i and dp = do v^T (Dao 2023, arXiv:2307.08691,
Algorithm 2, with the cotangent dL of the log-sum-exp):

    ds = p (dp - D)    dq = scale ds k    dk = scale ds^T q    dv = p^T do

Each kernel forms the scores anew and sums in registers, so that no gradient is added
to in memory: seven products for the five of the algorithm, and the same result on
every run. The heads that share a key add up within a block.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .tiles import visits
from .warpgroups import (
    COLUMN,
    COMPUTE,
    LOG2E,
    MATRIX,
    ROW,
    ROWS,
    TILE,
    along,
    base_two,
    cast,
    chain,
    ids,
    load,
    make_finite,
    pad,
    pick,
    row_tiles,
    seen,
    tile_lists,
    tiled,
)

# head width -> (length of the streamed tiles, stages of the ring), for both kernels
QUERY_BLOCKS = {64: (128, 3), 128: (64, 3)}
KEY_BLOCKS = {64: (64, 4), 128: (64, 2)}


def backward(plan, saved, cotangents):
    """Cotangents of query, key, value and the call, of which the sinks have one."""
    query, key, value, call, out, logsumexp = saved
    d_out, d_logsumexp = cotangents
    (_, t, _, h), s = query.shape, key.shape[1]
    products = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    delta = products.sum(-1) - d_logsumexp
    level = jnp.where(logsumexp == -jnp.inf, 0, logsumexp * LOG2E)
    stats = [pad(x, TILE).swapaxes(1, 2) for x in (level, delta)]
    stats = jnp.stack([x.reshape(*x.shape[:2], -1, ROWS) for x in stats], 3)
    query, d_out = pad(query, TILE), pad(d_out, TILE)
    key, value = pad(key, TILE), pad(value, TILE)
    arrays = query, key, value, d_out, stats
    block, stages = QUERY_BLOCKS[h]
    d_query = _queries(plan._replace(block=block, stages=stages), *arrays, call, s)
    block, stages = KEY_BLOCKS[h]
    d_key, d_value = _keys(
        plan._replace(block=block, stages=stages), *arrays, call, t, s
    )
    d_sinks = None
    if call.sinks is not None:
        share = jnp.exp(call.sinks.astype(jnp.float32) - logsumexp)
        share = jnp.where(call.sinks == -jnp.inf, 0, share)
        d_sinks = -jnp.where(share == 0, 0, share * delta).sum((0, 1))
        d_sinks = d_sinks.astype(call.sinks.dtype)
    d_call = type(call)(None, None)._replace(sinks=d_sinks)
    return d_query[:, :t], d_key[:, :s], d_value[:, :s], d_call


def _steps(plan, stat, mask, dtype, axis):
    """The two steps between the products of `chain`; rows run along `axis`.

    stat(i) and mask() are asked for when they are needed, not before: registers are
    what these kernels have least of.
    """

    def weigh(scores):
        scores, slope = base_two(plan, scores)
        weights = jnp.exp2(scores - along(plan, stat(0), scores.shape, axis))
        if mask is not None:
            weights = jnp.where(mask(), weights, 0)
        return weights.astype(dtype), (weights, slope)

    def grade(kept, slopes):
        weights, slope = kept
        errors = weights * (slopes - along(plan, stat(1), slopes.shape, axis))
        if slope is not None:
            errors = errors * slope
        if mask is not None:  # what a hidden key gives may be no number
            errors = jnp.where(weights == 0, 0, errors)
        return errors.astype(dtype)

    return weigh, grade


def _zeros(plan, h):
    return cast(plan, jnp.zeros((ROWS, h), jnp.float32), MATRIX)


def _queries(plan, query, key, value, d_out, stats, call, s):
    """dq: a block keeps the rows of one tile, keys and values stream by."""
    (b, t, n, h), k = query.shape, key.shape[2]
    group, fetching = n // k, COMPUTE
    block, stages = plan.block, plan.stages
    lists = tile_lists(visits(call, plan.spec, s, TILE, block))
    optional = ids(call, block)

    def kernel(q, k, v, do, stats, low, high, order, counts, *refs, smem, barriers):
        *refs, out = refs
        extra = dict(zip(optional, refs, strict=True))
        q_smem, do_smem, k_smem, v_smem = smem
        own, ready, landed, free = barriers
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
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(k.at[at], k_smem.at[slot], arrival)
                plgpu.copy_gmem_to_smem(v.at[at], v_smem.at[slot], ready.at[slot])
                return slot

            @pl.loop(0, full)
            def _(i):
                get(i, ready.at[lax.rem(i, stages)])

            @pl.loop(full, full + part)
            def _(i):
                slot = get(i, landed)
                plgpu.barrier_wait(landed)
                make_finite(plan, k_smem.at[slot])
                plgpu.barrier_arrive(ready.at[slot])

            for slot in range(stages):  # leave no arrival unseen
                plgpu.barrier_wait(free.at[slot])

        @pl.when(me < fetching)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            mine = tile * COMPUTE + me
            at = (row, pl.ds(mine * ROWS, ROWS), head)
            q_mine, do_mine = q_smem.at[me], do_smem.at[me]
            plgpu.copy_gmem_to_smem(q.at[at], q_mine, own.at[me])
            plgpu.copy_gmem_to_smem(do.at[at], do_mine, own.at[me])
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])
            own_stats = [load(plan, stats, (row, head, mine, i), ROW) for i in range(2)]
            limits = [load(plan, ref, (row, mine), ROW) for ref in (low, high)]
            q_ids = None
            if extra:
                q_ids = load(plan, extra["q_ids"], (row, mine), ROW)

            def step(i, acc, is_masked):
                slot = lax.rem(i, stages)

                def mask():
                    j, k_ids = order[(*entry, i)], None
                    if extra:
                        k_ids = load(plan, extra["k_ids"], (row, j), COLUMN)
                    return seen(plan, limits, q_ids, j * block, k_ids)

                steps = _steps(
                    plan, own_stats.__getitem__, mask if is_masked else None, q.dtype, 0
                )
                keys = k_smem.at[slot]
                plgpu.barrier_wait(ready.at[slot])
                (acc,) = chain(
                    plan,
                    (q_mine, keys),
                    (do_mine, v_smem.at[slot]),
                    *steps,
                    (acc,),
                    (keys,),
                )
                plgpu.barrier_arrive(free.at[slot])
                return acc

            plgpu.barrier_wait(own.at[me])
            acc = _zeros(plan, h)
            acc = lax.fori_loop(0, full, lambda i, x: step(i, x, False), acc)
            acc = lax.fori_loop(full, full + part, lambda i, x: step(i, x, True), acc)
            q_mine[...] = (acc * plan.spec.scale).astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_mine, out.at[at])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(query.shape, query.dtype),
        grid=(t // TILE, n, b),
        grid_names=("t", "n", "b"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types={
            "smem": (
                tiled((COMPUTE, ROWS, h), query.dtype),
                tiled((COMPUTE, ROWS, h), query.dtype),
                tiled((stages, block, h), key.dtype),
                tiled((stages, block, h), value.dtype),
            ),
            "barriers": (
                plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(),
                plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            ),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_queries",
        interpret=plan.interpret,
    )(
        query,
        key,
        value,
        d_out,
        stats,
        *row_tiles(call, s),
        *lists,
        *optional.values(),
    )


def _keys(plan, query, key, value, d_out, stats, call, t, s):
    """dk, dv: a block keeps the keys of one tile; rows of all its heads stream by.

    Scores are formed transposed, keys by rows, so that weights and errors are already
    the left operands of the products that follow.
    """
    (b, length, k, h), n = key.shape, query.shape[2]
    group, fetching = n // k, COMPUTE
    block, stages = plan.block, plan.stages
    table = visits(call, plan.spec, s, block, TILE)
    lists = tile_lists(table.swapaxes(2, 3))
    optional = ids(call, ROWS)

    def kernel(q, k, v, do, stats, low, high, order, counts, *refs, smem, barriers):
        *refs, d_k, d_v = refs
        extra = dict(zip(optional, refs, strict=True))
        k_smem, v_smem, q_smem, do_smem, stats_smem = smem
        own, ready, free = barriers
        row, kv_head = lax.axis_index("b"), lax.axis_index("k")
        tile, me = lax.axis_index("s"), lax.axis_index("warpgroup")

        def visited(g):
            entry = (*pick(order, row, kv_head * group + g), tile)
            return entry, counts[(*entry, 0)], counts[(*entry, 1)]

        @pl.when(me == fetching)
        def fetch():
            plgpu.set_max_registers(40, action="decrease")

            def by_head(g, done):
                entry, full, part = visited(g)
                head = kv_head * group + g

                @pl.loop(0, full + part)
                def _(i):
                    slot, j = lax.rem(done + i, stages), order[(*entry, i)]
                    at = (row, pl.ds(j * block, block), head)
                    arrival = ready.at[slot]
                    plgpu.barrier_wait(free.at[slot])
                    plgpu.copy_gmem_to_smem(q.at[at], q_smem.at[slot], arrival)
                    plgpu.copy_gmem_to_smem(do.at[at], do_smem.at[slot], arrival)
                    plgpu.copy_gmem_to_smem(
                        stats.at[row, head, j], stats_smem.at[slot], arrival
                    )

                return done + full + part

            lax.fori_loop(0, group, by_head, jnp.int32(0))
            for slot in range(stages):  # leave no arrival unseen
                plgpu.barrier_wait(free.at[slot])

        @pl.when(me < fetching)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            mine = tile * COMPUTE + me
            at = (row, pl.ds(mine * ROWS, ROWS), kv_head)
            k_mine, v_mine = k_smem.at[me], v_smem.at[me]
            plgpu.copy_gmem_to_smem(k.at[at], k_mine, own.at[me])
            plgpu.copy_gmem_to_smem(v.at[at], v_mine, own.at[me])
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])

            def by_head(g, carry):
                done, *sums = carry
                entry, full, part = visited(g)

                def step(i, sums, is_masked):
                    slot, j = lax.rem(done + i, stages), order[(*entry, i)]

                    def stat(x):
                        return load(plan, stats_smem, (slot, x), COLUMN)

                    def mask():
                        q_ids = k_ids = None
                        limits = [
                            load(plan, ref, (row, j), COLUMN) for ref in (low, high)
                        ]
                        if extra:
                            q_ids = load(plan, extra["q_ids"], (row, j), COLUMN)
                            k_ids = load(plan, extra["k_ids"], (row, mine), ROW)
                        return seen(plan, limits, q_ids, mine * ROWS, k_ids, flip=True)

                    steps = _steps(plan, stat, mask if is_masked else None, k.dtype, 1)
                    plgpu.barrier_wait(ready.at[slot])
                    sums = chain(
                        plan,
                        (k_mine, q_smem.at[slot]),
                        (v_mine, do_smem.at[slot]),
                        *steps,
                        sums,
                        (do_smem.at[slot], q_smem.at[slot]),
                    )
                    plgpu.barrier_arrive(free.at[slot])
                    return sums

                sums = tuple(sums)
                sums = lax.fori_loop(0, full, lambda i, x: step(i, x, False), sums)
                sums = lax.fori_loop(
                    full, full + part, lambda i, x: step(i, x, True), sums
                )
                return done + full + part, *sums

            plgpu.barrier_wait(own.at[me])
            start = (jnp.int32(0), _zeros(plan, h), _zeros(plan, h))
            _, values, keys = lax.fori_loop(0, group, by_head, start)
            k_mine[...] = (keys * plan.spec.scale).astype(d_k.dtype)
            v_mine[...] = values.astype(d_v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_mine, d_k.at[at])
            plgpu.copy_smem_to_gmem(v_mine, d_v.at[at])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        grid=(length // TILE, k, b),
        grid_names=("s", "k", "b"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types={
            "smem": (
                tiled((COMPUTE, ROWS, h), key.dtype),
                tiled((COMPUTE, ROWS, h), value.dtype),
                tiled((stages, block, h), query.dtype),
                tiled((stages, block, h), query.dtype),
                plgpu.SMEM((stages, 2, block), jnp.float32),
            ),
            "barriers": (
                plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
                plgpu.Barrier(num_arrivals=3, num_barriers=stages),
                plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            ),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_keys",
        interpret=plan.interpret,
    )(
        query,
        key,
        value,
        d_out,
        stats,
        *row_tiles(call, s),
        *lists,
        *optional.values(),
    )
