"""Layers whose parameters are stacked along a first axis: cut, run, recompute."""

from collections.abc import Callable
from typing import Any

import jax


def part(stack: Any, start: int, stop: int) -> Any:
    """Layers start..stop; unlike a slice, a split has a concatenation as transpose."""
    depth = jax.tree.leaves(stack)[0].shape[0]
    sizes = (start, stop - start, depth - stop)
    return jax.tree.map(lambda leaf: jax.lax.split(leaf, sizes)[1], stack)


def run_stack(
    block: Callable, stack: Any, x: jax.Array, caches: Any = None, *, scan: bool
) -> tuple[jax.Array, Any]:
    """x through block(x, (params, cache)) -> (x, cache) of every layer; new caches.

    scan: one compiled block instead of one for each layer.
    """
    if scan:
        return jax.lax.scan(block, x, (stack, caches))
    count = jax.tree.leaves(stack)[0].shape[0]
    new = []
    for at, params in enumerate(_unstack(stack, count)):
        cache = jax.tree.map(lambda leaf, at=at: leaf[at], caches)
        x, cache = block(x, (params, cache))
        new.append(cache)
    if caches is None:
        return x, None
    return x, jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *new)


def recomputed(function: Callable, policy: str) -> Callable:
    """none: keep all for the backward pass; dots: products alone; full: inputs alone"""
    if policy == "none":
        return function
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=keep if policy == "dots" else None)


def _unstack(stack, count: int) -> list:
    leaves, tree = jax.tree.flatten(stack)
    pieces = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [
        jax.tree.unflatten(tree, [piece[i][0] for piece in pieces])
        for i in range(count)
    ]
