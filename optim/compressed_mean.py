"""The mean of a tree over workers, sent compressed: two links and a topology.

    dense       every worker's estimate, summed in float32: the reference
    gather      payloads to everyone, who decode them all (sparse ones)
    shared_key  payloads are summed, which linear compressors with one key allow
    two_phase   chunk j of every payload to worker j, who takes the mean and sends it
                on through a link of its own: the all-reduce of 1-bit Adam, Sec. 4.2 of
                arXiv:2102.02888 (Tang et al. 2021)

`sharded_mean` stops halfway: a reduce-scatter of gradients and an all-gather of
parameters, for parameters that lie in shards. All take a tree as one worker sees it,
inside `jax.shard_map` or `jax.vmap` with the axis name bound, and every worker gets the
same bits. Float32 inside (float64 for float64), the tree's dtypes outside.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .compression import identity, payload_of, wide, wide_type
from .topologies import (
    TOPOLOGIES,
    MeanState,
    Plan,
    Way,
    cast,
    expect,
    gather,
    init_down,
    init_up,
    make_plan,
    payload_bits,
    scatter,
)

Topology = Literal["dense", "gather", "shared_key", "two_phase"]


class CompressedMean(NamedTuple):
    init: Callable[..., MeanState]  # (tree, *, first, weights) -> of all workers
    mean: Callable  # (tree, state, key, *, active, weights) -> (tree, state)
    sent_bits: Callable[[PyTree], int]  # that a worker sends in one mean


class ShardedMean(NamedTuple):
    init: Callable[[PyTree], MeanState]  # of all workers
    reduce_scatter: Callable  # (tree, state.up, key, ...) -> (shards, up)
    all_gather: Callable  # (shards, state.down, key) -> (tree, down)
    shards: Callable  # (tree, worker's index) -> its shards, as they are cut
    sent_bits: Callable[[PyTree], int]


PLAIN = Way("plain", identity())


def compressed_mean(
    up: Way,
    down: Way = PLAIN,
    *,
    workers: int,
    axis_name: str = "data",
    topology: Topology = "two_phase",
) -> CompressedMean:
    """The mean over `workers`: `mean(tree, state, key) -> (tree, state)`.

    key: one for all workers; each folds in its index, but for "shared_key".
    active: False for a worker that takes no part; the mean counts it with what is
    expected of it, and its state stays (EF21-PP). weights [n]: the mean of w_i x_i
    (EF21-W takes w_i = n L_i / sum L of signals g_i / w_i). `init(tree, first=signals)`
    starts every h at signals [workers, ...] that were exchanged whole.

    >>> from narrows.optim.signs import sign
    >>> one_bit = Way("feedback", sign())
    >>> compressed_mean(one_bit, one_bit, workers=8).sent_bits(jnp.zeros((80, 64)))
    9632
    """
    if topology not in ("dense", "gather", "shared_key", "two_phase"):
        raise ValueError(
            f"topology: {topology!r}, but allowed are dense, gather, shared_key and "
            "two_phase"
        )
    if topology != "two_phase" and down is not PLAIN:
        raise ValueError(
            f"down: only two_phase has owners who send, but topology is {topology!r}"
        )
    chunks = 1 if topology in ("gather", "shared_key") else workers
    owned = topology == "two_phase"

    def plan_of(tree) -> Plan:
        plan = make_plan(tree, up, down, chunks)
        if topology == "shared_key" and not all(
            leaf.up.compressor.linear for leaf in plan.leaves
        ):
            raise ValueError(
                "up: shared_key sums payloads, so its compressors must be linear given "
                "the key (random_k, identity); take gather or two_phase for others"
            )
        return plan

    def init(params, *, first=None, weights=None):
        plan = plan_of(params)
        up_state = init_up(plan, workers, owned)
        if first is not None:
            up_state = expect(plan, up_state, first, weights, owned)
        return MeanState(up_state, init_down(plan, workers) if owned else ())

    def mean(tree, state, key, *, active=True, weights=None):
        plan = plan_of(tree)
        run = scatter if owned else TOPOLOGIES[topology]
        found, up_state = run(plan, tree, state.up, key, active, weights, axis_name)
        if not owned:
            return cast(plan, plan.join(found)), MeanState(up_state, ())
        tree, down_state = gather(plan, found, state.down, key, axis_name)
        return tree, MeanState(up_state, down_state)

    def sent_bits(tree):
        plan = plan_of(tree)
        if topology == "gather":
            return (workers - 1) * payload_bits(plan, "up")
        if topology == "two_phase":
            return (workers - 1) * (
                payload_bits(plan, "up") + payload_bits(plan, "down")
            )
        arrays = jax.tree.leaves(tree)
        if topology == "shared_key":
            arrays = [
                x
                for leaf in plan.leaves
                for x in jax.tree.leaves(
                    payload_of(leaf.up.compressor, leaf.chunk, wide_type(leaf.dtype))
                )
                if jnp.issubdtype(x.dtype, jnp.floating)
            ]
        bits = sum(8 * wide_type(x.dtype).itemsize * x.size for x in arrays)
        return round(2 * (workers - 1) / workers * bits)

    return CompressedMean(init, mean, sent_bits)


def sharded_mean(
    up: Way,
    down: Way = PLAIN,
    *,
    like: PyTree,
    dimensions: PyTree = None,
    workers: int,
    axis_name: str = "fsdp",
) -> ShardedMean:
    """The two halves of the two-phase mean, for what lies in shards between them.

    like: shapes and dtypes of the whole parameters. dimensions: a tree of the dimension
    along which each is sharded; None cuts all freely, as (rows, width) chunks. With
    down "ef21" what travels back is the compressed difference of the parameters from
    the copy that every worker holds (EF21-P, arXiv:2209.15218).
    """
    plan = make_plan(like, up, down, workers, dimensions)

    def whole(chunks):
        return plan.treedef.unflatten(
            [
                x.reshape(leaf.shard).astype(leaf.dtype)
                for x, leaf in zip(chunks, plan.leaves, strict=True)
            ]
        )

    def init(params):
        """`params` are whole: what everyone expects of the first all-gather."""
        down_state = init_down(plan, workers)
        expected = [
            wide(x) if leaf.down.a else ()
            for x, leaf in zip(
                plan.treedef.flatten_up_to(params), plan.leaves, strict=True
            )
        ]
        down_state = down_state._replace(h=plan.treedef.unflatten(expected))
        return MeanState(init_up(plan, workers, True), down_state)

    def reduce_scatter(tree, state, key, *, active=True, weights=None):
        found, state = scatter(plan, tree, state, key, active, weights, axis_name)
        return whole(found), state

    def all_gather(shards, state, key):
        chunks = [
            x.reshape(leaf.chunk)
            for x, leaf in zip(jax.tree.leaves(shards), plan.leaves, strict=True)
        ]
        return gather(plan, chunks, state, key, axis_name)

    def shards(tree, index):
        return whole([x[index] for x in plan.split(tree, workers)])

    def sent_bits(tree):
        del tree
        return (workers - 1) * (payload_bits(plan, "up") + payload_bits(plan, "down"))

    return ShardedMean(init, reduce_scatter, all_gather, shards, sent_bits)
