"""Sharded parameters written out: what the partitioner does over fsdp, by hand.

Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, Section 7.2), inside `jax.shard_map`:
each device keeps 1 / n of every matrix along its first dimension. A layer gathers its
matrices when it runs, forward and again backward, and the transpose of the gather
scatters the sum of the gradients. Of W bytes a device so sends (n - 1) / n W three
times a step, against twice for an all-reduce of whole gradients.

These are forms to count bytes with and to test the automatic ones against; models get
theirs from `rules.TRANSFORMER`.
"""

from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float, PyTree


def gather(
    shards: PyTree[Float[Array, "own ..."]], axis_name: str
) -> PyTree[Float[Array, "rows ..."]]:
    """Whole matrices of every device's rows; transposed, a scattered sum."""
    return jax.tree.map(lambda w: lax.all_gather(w, axis_name, tiled=True), shards)


def layer_of_shards(layer: Callable, axis_name: str) -> Callable:
    """`run(shards, x)` = layer(whole parameters, x); whole ones are not kept.

    The backward pass gathers them again and recomputes the layer.
    """

    def run(shards, x):
        return layer(gather(shards, axis_name), x)

    return jax.checkpoint(run)
