"""How compressed payloads travel between workers, and what each keeps of them.

A plan is what a tree's shapes decide: how every leaf is cut and by which links it goes.
The functions of `TOPOLOGIES` and the two halves `scatter` and `gather` run inside
`jax.shard_map` or `jax.vmap` with the axis name bound; `compressed_mean.py` is the face
of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..parallel.chunks import chunk_shape, join, shard_shape, split
from ..parallel.messages import message_size, share, swap
from ..parallel.state import OverWorkers, PerWorkerMean, replicate
from .compression import chunked, payload_of, wide, wide_type
from .compressors import by_path
from .links import Link, LinkState, Row, init_link, make_link, receive, send


class Way(NamedTuple):
    """How one direction is sent: a row of `links.LINKS` over compressors by path.

    Or a row of your own, such as `links.econtrol(0.02)`.
    """

    link: str | Row
    compressors: Any  # a Compressor, or Rules


class UpState(NamedTuple):
    """Trees like the parameters', at least float32; () where a link keeps nothing."""

    worker: PerWorkerMean  # LinkState(e, h) in the parameters' shapes
    h: Any  # mean of the workers' h: OverWorkers chunks, or whole


class DownState(NamedTuple):
    e: OverWorkers  # of each owner, for its chunk
    h: Any  # what everyone expects, in the parameters' shapes


class MeanState(NamedTuple):
    up: UpState
    down: DownState | tuple


class Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    dimension: int | None
    chunk: tuple[int, ...]  # (rows, width)
    shard: tuple[int, ...]  # the chunk as it is cut: a part of the leaf, or `chunk`
    up: Link
    down: Link


class Plan(NamedTuple):
    """What a tree's shapes decide: leaves, and how to make a tree of them."""

    leaves: list[Leaf]
    treedef: Any

    def split(self, tree: PyTree, chunks: int) -> list:
        """[chunks, rows, width] of each leaf, () where there is none."""
        found = self.treedef.flatten_up_to(tree)
        return [
            split(x, chunks, leaf.dimension) if isinstance(x, jax.Array) else ()
            for x, leaf in zip(found, self.leaves, strict=True)
        ]

    def keep(self, chunks: Sequence) -> OverWorkers:
        """A worker's chunks as they are kept: cut anew in reading order when resized.

        Shards along a dimension are kept with that dimension first.
        """
        kept = []
        for x, leaf in zip(chunks, self.leaves, strict=True):
            if isinstance(x, jax.Array) and leaf.dimension is not None:
                x = jnp.moveaxis(x.reshape(leaf.shard), leaf.dimension, 0)
            kept.append(x)
        return OverWorkers(self.treedef.unflatten(kept))

    def take(self, kept: OverWorkers) -> list:
        """The inverse of `keep`."""
        found = []
        stored = self.treedef.flatten_up_to(kept.over_workers)
        for x, leaf in zip(stored, self.leaves, strict=True):
            if isinstance(x, jax.Array) and leaf.dimension is not None:
                x = jnp.moveaxis(x, 0, leaf.dimension).reshape(leaf.chunk)
            found.append(x)
        return found

    def join(self, chunks: Sequence) -> PyTree:
        return self.treedef.unflatten(
            [
                join(x, leaf.shape, leaf.dimension) if isinstance(x, jax.Array) else ()
                for x, leaf in zip(chunks, self.leaves, strict=True)
            ]
        )


def make_plan(tree, up: Way, down: Way, chunks: int, dimensions=None) -> Plan:
    leaves, treedef = jax.tree.flatten(tree)
    cuts = [None] * len(leaves)
    if dimensions is not None:
        cuts = treedef.flatten_up_to(dimensions)
    compressors = zip(
        by_path(tree, up.compressors), by_path(tree, down.compressors), strict=True
    )
    found = []
    for x, cut, (upward, downward) in zip(leaves, cuts, compressors, strict=True):
        shape = tuple(x.shape)
        chunk = chunk_shape(shape, chunks, cut)
        links = make_link(up.link, upward, chunk), make_link(down.link, downward, chunk)
        shard = chunk if cut is None else shard_shape(shape, chunks, cut)
        found.append(Leaf(shape, x.dtype, cut, chunk, shard, *links))
    return Plan(found, treedef)


def init_up(plan: Plan, workers: int, owned: bool) -> UpState:
    """Zeros for all workers; `owned`: each chunk of the mean of h is with its owner."""
    states = [_zeros(leaf, leaf.up, leaf.shape) for leaf in plan.leaves]
    worker = LinkState(*(plan.treedef.unflatten(x) for x in zip(*states, strict=True)))
    shapes = [leaf.chunk if owned else leaf.shape for leaf in plan.leaves]
    pairs = zip(shapes, plan.leaves, strict=True)
    h = [_zeros(leaf, leaf.up, shape).h for shape, leaf in pairs]
    kept = plan.keep(h) if owned else plan.treedef.unflatten(h)
    return replicate(UpState(PerWorkerMean(worker), kept), workers)


def expect(plan: Plan, state: UpState, first, weights, owned: bool) -> UpState:
    """Every h where `first`, the signals [workers, ...] of a tree, has them."""

    def known(x, leaf):
        return wide(x) if leaf.up.a else ()

    signals = plan.treedef.flatten_up_to(first)
    hs = [known(x, leaf) for x, leaf in zip(signals, plan.leaves, strict=True)]
    workers = len(signals[0])
    means = [_weighted(x, weights) if isinstance(x, jax.Array) else () for x in hs]
    mean = plan.treedef.unflatten(means)
    if owned:  # worker j has chunk j
        chunks = plan.split(mean, workers)
        kept = [
            plan.keep([x[j] if isinstance(x, jax.Array) else () for x in chunks])
            for j in range(workers)
        ]
        mean = jax.tree.map(lambda *x: jnp.stack(x), *kept)
    link_states = state.worker.per_worker_mean._replace(h=plan.treedef.unflatten(hs))
    return UpState(PerWorkerMean(link_states), mean)


def _zeros(leaf: Leaf, link: Link, shape) -> LinkState:
    return init_link(link, shape, dtype=wide_type(leaf.dtype))


def init_down(plan: Plan, workers: int) -> DownState:
    e = [_zeros(leaf, leaf.down, leaf.chunk).e for leaf in plan.leaves]
    h = [_zeros(leaf, leaf.down, leaf.shape).h for leaf in plan.leaves]
    return replicate(DownState(plan.keep(e), plan.treedef.unflatten(h)), workers)


def _send_up(plan: Plan, tree, state: UpState, key, active, chunks: int):
    """Payloads, what they decode to, and the workers' new link states, by leaf."""
    worker = state.worker.per_worker_mean
    signals = plan.split(tree, chunks)
    es, hs = plan.split(worker.e, chunks), plan.split(worker.h, chunks)
    payloads, states, decoded = [], [], []
    for i, (leaf, g, e, h) in enumerate(zip(plan.leaves, signals, es, hs, strict=True)):
        link = leaf.up._replace(compressor=chunked(leaf.up.compressor))
        own_key = jax.random.fold_in(key, i)
        payload, _, new = send(link, own_key, LinkState(e, h), g, active)
        payloads.append(payload)
        states.append(new)
        decoded.append(link.compressor.decode(payload, g.shape))
    new = LinkState(*(plan.join(x) for x in zip(*states, strict=True)))
    return payloads, decoded, PerWorkerMean(new)


def _weighted(x: Float[Array, "n *s"], weights) -> Float[Array, "*s"]:
    if weights is not None:
        x = x * weights.reshape(-1, *[1] * (x.ndim - 1))
    return x.mean(0)


def _received(links, h, means):
    """The receivers' estimates and their new h, by leaf."""
    triples = zip(links, h, means, strict=True)
    pairs = [receive(link, expected, mean) for link, expected, mean in triples]
    return [est for est, _ in pairs], [new for _, new in pairs]


def scatter(plan: Plan, tree, state: UpState, key, active, weights, axis_name):
    """(this worker's chunk of the mean, by leaf; new state)."""
    workers, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    key = jax.random.fold_in(jax.random.fold_in(key, 0), index)
    payloads, _, worker = _send_up(plan, tree, state, key, active, workers)
    means = []
    for leaf, payload in zip(plan.leaves, swap(payloads, axis_name), strict=True):
        decode = chunked(leaf.up.compressor).decode
        means.append(_weighted(decode(payload, (workers, *leaf.chunk)), weights))
    links = [leaf.up for leaf in plan.leaves]
    found, h = _received(links, plan.take(state.h), means)
    return found, UpState(worker, plan.keep(h))


def gather(plan: Plan, chunks, state: DownState, key, axis_name):
    """(the whole tree from its owners' chunks, new state)."""
    workers, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    key = jax.random.fold_in(jax.random.fold_in(key, 1), index)
    es, hs = plan.take(state.e), plan.split(state.h, workers)
    payloads, new_es = [], []
    for i, (leaf, x, e, h) in enumerate(zip(plan.leaves, chunks, es, hs, strict=True)):
        mine = LinkState(e, h[index] if leaf.down.a else ())
        payload, _, new = send(leaf.down, jax.random.fold_in(key, i), mine, x)
        payloads.append(payload)
        new_es.append(new.e)
    means = []
    for leaf, payload in zip(plan.leaves, share(payloads, axis_name), strict=True):
        decode = chunked(leaf.down.compressor).decode
        means.append(decode(payload, (workers, *leaf.chunk)))
    links = [leaf.down for leaf in plan.leaves]
    found, hs = _received(links, hs, means)
    return cast(plan, plan.join(found)), DownState(plan.keep(new_es), plan.join(hs))


def _everywhere(plan: Plan, means, state: UpState, worker, chunks: int):
    """As `scatter`, where every worker has the whole mean of what was sent."""
    links = [leaf.up for leaf in plan.leaves]
    found, h = _received(links, plan.split(state.h, chunks), means)
    return found, UpState(worker, plan.join(h))


def _dense(plan, tree, state, key, active, weights, axis_name):
    workers, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
    key = jax.random.fold_in(jax.random.fold_in(key, 0), index)
    _, sent, worker = _send_up(plan, tree, state, key, active, workers)
    if weights is not None:
        sent = [x * weights[index] for x in sent]
    means = lax.pmean(sent, axis_name)
    return _everywhere(plan, means, state, worker, workers)


def _gathered(plan, tree, state, key, active, weights, axis_name):
    index = lax.axis_index(axis_name)
    key = jax.random.fold_in(jax.random.fold_in(key, 0), index)
    payloads, _, worker = _send_up(plan, tree, state, key, active, 1)
    means = []
    for leaf, payload in zip(plan.leaves, share(payloads, axis_name), strict=True):
        decode = chunked(leaf.up.compressor).decode
        every = jax.vmap(lambda p, s=leaf.chunk, f=decode: f(p, (1, *s)))(payload)
        means.append(_weighted(every, weights))
    return _everywhere(plan, means, state, worker, 1)


def _shared(plan, tree, state, key, active, weights, axis_name):
    weight = 1.0 if weights is None else weights[lax.axis_index(axis_name)]
    key = jax.random.fold_in(key, 0)
    payloads, _, worker = _send_up(plan, tree, state, key, active, 1)

    def mean(x):  # seeds are equal on all workers
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return lax.pmean(x * weight, axis_name) if floating else x

    means = []
    for leaf, payload in zip(plan.leaves, jax.tree.map(mean, payloads), strict=True):
        decode = chunked(leaf.up.compressor).decode
        means.append(decode(payload, (1, *leaf.chunk)))
    return _everywhere(plan, means, state, worker, 1)


TOPOLOGIES: dict[str, Callable] = {
    "dense": _dense,
    "gather": _gathered,
    "shared_key": _shared,
}


def cast(plan: Plan, tree: PyTree) -> PyTree:
    leaves = zip(jax.tree.leaves(tree), plan.leaves, strict=True)
    return plan.treedef.unflatten([x.astype(leaf.dtype) for x, leaf in leaves])


def payload_bits(plan: Plan, way: Literal["up", "down"]) -> int:
    """Of one chunk of every leaf."""
    return 8 * sum(
        message_size(
            payload_of(getattr(leaf, way).compressor, leaf.chunk, wide_type(leaf.dtype))
        )
        for leaf in plan.leaves
    )
