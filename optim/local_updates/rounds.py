"""Rounds: every worker steps alone, then fragments of the parameters meet.

All functions here are one worker's inside `jax.shard_map` or `jax.vmap` over the axis
of workers. What a worker has of its own is `Worker`; x, from which rounds start, lies
outside as `params`, equal on all workers. A meeting of a fragment has three parts:

    depart      d_i = x - y_i                                 nothing travels
    exchange    d = mean of d_i over workers                  all that travels
    arrive      x <- x + outer step of d;  y_i <- x           nothing travels

A method that waits does them in this order. A stale one (CO2) lets the d of the round
before arrive, departs, and steps on while the exchange is on its way; since it is d
that travels, the pseudo-gradient is always that of the x it started from.

Fragments (streaming DiLoCo, arXiv:2501.18512) are parts of the tree that meet in turn,
each once in `every` steps, so that the link is used evenly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ...parallel.state import PerWorkerMean, replicate
from ..compressed_mean import CompressedMean
from .outer import Outer, rms


class Worker(NamedTuple):
    params: Any  # y_i
    opt: Any  # of the inner optimizer, never averaged while the run goes on


class Anchor(NamedTuple):
    """Of one fragment, the same on all workers."""

    outer: Any  # state of the outer transformation
    moved: Float[Array, ""]  # rms of the last outer step
    rounds: Int[Array, ""]  # meetings so far


class RoundsState(NamedTuple):
    """Tuples have an entry a fragment; trees hold None where others' leaves are."""

    own: PerWorkerMean  # Worker, of each worker
    anchors: tuple[Anchor, ...]
    arriving: tuple[Any, ...]  # stale methods: d, float32, perhaps still on its way
    memory: tuple[Any, ...]  # MeanState of a compressed exchange, else ()


class Rounds(NamedTuple):
    """The functions of a method; `k` is the fragment's number."""

    init: Callable[[PyTree], RoundsState]  # params -> state of all workers
    step: Callable  # (Worker, grads) -> Worker
    depart: Callable  # (params, Worker, k) -> d_i
    exchange: Callable  # (d_i, memory, number, k) -> (d, memory)
    arrive: Callable  # (params, Worker, d, Anchor, k) -> (params, Worker, Anchor)
    due: Callable[[int], list[int]]  # steps done -> fragments that meet now
    every: int
    stale: bool


def local_updates(
    inner: optax.GradientTransformation,
    outer: Outer,
    *,
    workers: int,
    every: int,
    fragments: int = 1,
    mean: CompressedMean | None = None,
    axis_name: str = "data",
) -> Rounds:
    """Local updates by `inner`, met by `outer` every `every` steps.

    inner: any optax transformation without collectives, with a state for each worker.
    mean: how pseudo-gradients are exchanged, by default `lax.pmean` of them in float32;
    a `compressed_mean` of any links and topology over `axis_name` otherwise.

    When the number of workers changes, y_i and the inner moments become the mean of
    the old ones (`parallel.state`); x, momenta and what is arriving stay as they are.
    Raises ValueError for numbers that do not fit.

    >>> from .outer import make_outer
    >>> rounds = local_updates(optax.sgd(0.1), make_outer("co2"), workers=4, every=12)
    >>> [n for n in range(1, 40) if rounds.due(n)]
    [12, 24, 36]
    """
    if every < 1:
        raise ValueError(f"every: {every}, but a round has at least 1 step")
    if not 1 <= fragments <= every:
        raise ValueError(
            f"fragments: {fragments}, but it must lie in 1 to every={every}: two "
            "fragments never meet after the same step"
        )
    send = _dense(axis_name) if mean is None else mean.mean

    def part(tree, k):
        return take(tree, fragments, k)

    def init(params):
        if len(jax.tree.leaves(params)) < fragments:
            raise ValueError(
                f"fragments: {fragments}, but there are only "
                f"{len(jax.tree.leaves(params))} arrays to divide"
            )

        parts = [part(params, k) for k in range(fragments)]
        zeros = [optax.tree.zeros_like(p, dtype=jnp.float32) for p in parts]
        own = replicate(PerWorkerMean(Worker(params, inner.init(params))), workers)
        return RoundsState(
            own,
            tuple(
                Anchor(outer.tx.init(p), jnp.float32(0), jnp.int32(0)) for p in parts
            ),
            tuple(zeros) if outer.stale else ((),) * fragments,
            tuple(mean.init(z) if mean else () for z in zeros),
        )

    def step(worker: Worker, grads) -> Worker:
        updates, opt = inner.update(grads, worker.opt, worker.params)
        return Worker(optax.apply_updates(worker.params, updates), opt)

    def depart(params, worker: Worker, k: int):
        return jax.tree.map(
            lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32),
            part(params, k),
            part(worker.params, k),
        )

    def exchange(d, state, number, k: int):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), k), number)
        return send(d, state, key)

    def arrive(params, worker: Worker, d, anchor: Anchor, k: int):
        mine = part(params, k)
        updates, state = outer.tx.update(d, anchor.outer, mine, moved=anchor.moved)
        moved = rms(updates)
        if outer.stale:  # nothing has been sent before the first meeting
            updates, moved, state = jax.tree.map(
                lambda new, old: jnp.where(anchor.rounds > 0, new, old),
                (updates, moved, state),
                (optax.tree.zeros_like(updates), anchor.moved, anchor.outer),
            )
        new = optax.apply_updates(mine, updates)
        worker = worker._replace(params=put(worker.params, new))
        return put(params, new), worker, Anchor(state, moved, anchor.rounds + 1)

    def due(done: int) -> list[int]:
        return [
            k for k in range(fragments) if (done + k * every // fragments) % every == 0
        ]

    return Rounds(init, step, depart, exchange, arrive, due, every, outer.stale)


def _dense(axis_name: str) -> Callable:
    """The exact mean: each leaf as it lies, so that inner axes have nothing to do."""

    def mean(tree, state, key):
        del key
        return jax.lax.pmean(tree, axis_name), state

    return mean


def take(tree: PyTree, fragments: int, k: int) -> PyTree:
    """The tree with None in place of all leaves but those of fragment k.

    Fragments are runs of leaves in the tree's order, of about the same size.
    """
    leaves, treedef = jax.tree.flatten(tree)
    owner = _owners([x.size for x in leaves], fragments)
    return treedef.unflatten(
        [x if mine == k else None for x, mine in zip(leaves, owner, strict=True)]
    )


def put(tree: PyTree, part: PyTree) -> PyTree:
    """`tree` with the leaves that `part` has."""
    return jax.tree.map(
        lambda new, old: old if new is None else new,
        part,
        tree,
        is_leaf=lambda x: x is None,
    )


def _owners(sizes: Sequence[int], fragments: int) -> list[int]:
    """Fragment of each leaf: of its middle, and no fragment is left empty."""
    total, before, owners = sum(sizes), 0, []
    for index, size in enumerate(sizes):
        wanted = int(fragments * (before + size / 2) / total) if total else 0
        low = owners[-1] if owners else 0
        left = len(sizes) - index - 1  # each later fragment needs a leaf
        lowest = max(low, fragments - 1 - left)
        highest = min(low + 1 if owners else 0, fragments - 1)
        owners.append(min(max(wanted, lowest), max(highest, lowest)))
        before += size
    return owners
