"""State that workers do not share, and what becomes of it when their number changes.

A container names the rule of all arrays in it, in the tree and so in a checkpoint's
names. Outside a program its arrays have a leading axis of workers, sharded over the
mesh; inside, a worker sees its own part without that axis. What lies in no container is
replicated. The rules, from n workers to m:

    PerWorkerMean  every new part is the mean of the old ones: what enters an average
                   over workers (residuals, mirrors) has the average it had
    PerWorkerSum   the first new part is the sum of the old ones, the others are zero:
                   a share of each would be rounded, and the total lost
    OverWorkers    the parts are one array, cut in reading order and filled up with
                   zeros: it is cut anew

`restore` applies them to a checkpoint that was saved by another number of workers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped

from .checkpoint import Checkpoints


class PerWorkerMean(NamedTuple):
    per_worker_mean: Any


class PerWorkerSum(NamedTuple):
    per_worker_sum: Any


class OverWorkers(NamedTuple):
    over_workers: Any


class Reported(NamedTuple):
    """Float32 scalars, the same on all workers, that join the metrics of a step."""

    reported: dict[str, Array]


CONTAINERS = (PerWorkerMean, PerWorkerSum, OverWorkers)
RULES = {container._fields[0]: container for container in CONTAINERS}


def rule_of(path) -> str | None:
    """The innermost rule on the path of a leaf; None where it is replicated."""
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return next((part for part in reversed(parts) if part in RULES), None)


def _map(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """function(rule, leaf, ...) over all leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(rule_of(path), *leaves), tree, *rest
    )


def specs(tree: PyTree, axis_name: str) -> PyTree:
    """What `jax.shard_map` must be told of a state, argument or result."""
    return _map(lambda rule, _: P(axis_name) if rule else P(), tree)


def own(tree: PyTree) -> PyTree:
    """A worker's view inside `jax.shard_map`: without the axis, which has length 1."""
    return _map(lambda rule, x: x[0] if rule else x, tree)


def stacked(tree: PyTree) -> PyTree:
    """The inverse of `own`."""
    return _map(lambda rule, x: x[None] if rule else x, tree)


def replicate(tree: PyTree, workers: int) -> PyTree:
    """All workers' state, each part being as in `tree`, a worker's view."""

    def repeat(rule, x):
        return jnp.broadcast_to(x, (workers, *x.shape)) if rule else x

    return _map(repeat, tree)


def simulate(function: Callable, *, workers: int, axis_name: str) -> Callable:
    """`function(x, state) -> (y, state)` of one worker, for n of them on one device.

    The result takes x with a leading axis of workers and the state of all; y gets that
    axis too. Of what is replicated the first worker's copy is returned.
    """

    def run(x, state):
        axes = _map(lambda rule, _: 0 if rule else None, state)
        y, new = jax.vmap(
            function, in_axes=(0, axes), axis_name=axis_name, axis_size=workers
        )(x, state)
        return y, _map(lambda rule, x: x if rule else x[0], new)

    return run


def spmd(function: Callable, *, mesh: Mesh, axis_name: str) -> Callable:
    """As `simulate`, with a worker on each device along an axis of the mesh."""

    def run(x, state):
        def worker(x, state):
            y, new = function(jax.tree.map(lambda a: a[0], x), own(state))
            return jax.tree.map(lambda a: a[None], y), stacked(new)

        places = specs(state, axis_name)
        return jax.shard_map(
            worker,
            mesh=mesh,
            in_specs=(P(axis_name), places),
            out_specs=(P(axis_name), places),
            check_vma=False,  # what was gathered is equal everywhere: not provable
        )(x, state)

    return run


def reports(tree: PyTree) -> dict[str, Array]:
    """All that a state reports."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Reported))
    return {k: v for x in nodes if isinstance(x, Reported) for k, v in x[0].items()}


def resize(tree: PyTree, target: PyTree) -> PyTree:
    """A state of all workers, for the number of workers that `target` has.

    `target` is the same tree of arrays or shapes. Raises ValueError for a leaf that its
    rule cannot bring to the wanted shape.
    """

    def change(path, x, wanted):
        rule, shape = rule_of(path), tuple(wanted.shape)
        if x.shape == shape:
            return x
        same = x.shape[1:] == shape[1:] and x.ndim == len(shape)
        if rule == "over_workers":
            return _recut(x, shape)
        if rule and same:
            merge = jnp.mean if rule == "per_worker_mean" else jnp.sum
            whole = merge(x, 0, dtype=jnp.promote_types(x.dtype, jnp.float32))
            copies = jnp.broadcast_to(whole.astype(x.dtype), shape)
            return copies if merge is jnp.mean else copies.at[1:].set(0)
        raise ValueError(
            f"target: {jax.tree_util.keystr(path, simple=True, separator='/')} has "
            f"shape {shape}, but the state {x.shape} under the rule "
            f"{rule or 'replicated'}, which cannot change it"
        )

    return jax.tree_util.tree_map_with_path(change, tree, target)


def _recut(x: Shaped[Array, "n *s"], shape: tuple[int, ...]) -> Shaped[Array, "m *t"]:
    flat, size = x.reshape(-1), math.prod(shape)
    return jnp.pad(flat[:size], (0, max(0, size - flat.size))).reshape(shape)


def restore(
    checkpoints: Checkpoints, target: PyTree, *, step: int, expect: dict | None = None
) -> tuple[PyTree, dict[str, Any]]:
    """`checkpoints.restore`: the number of workers that saved the step may be another.

    Per-worker arrays are brought to the number that `target` has by their rules. All
    else must fit exactly.
    """
    return checkpoints.restore(target, step=step, expect=expect)
