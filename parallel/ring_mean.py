"""The mean of a tree over a mesh axis as a ring of hops, each to be hidden by a step.

A reduction that a compiler cannot split is exposed where it stands: XLA for TPUs, for
one, runs an all-reduce of many arrays as one synchronous operation, but sends a
collective-permute while other operations run. So the sum goes round by hand. With n
workers and every array cut in n chunks, in hop t of 2 (n - 1) worker i sends chunk
i - t to worker i + 1 and takes chunk i - 1 - t from worker i - 1: it adds the first
n - 1 of them to its own, then they are whole and replace its own (the ring all-reduce;
Patarasuk and Yuan 2009). A worker sends 2 (n - 1) / n of its numbers, and all end with
the same bits, since each chunk is summed along one way.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree


class RingMean(NamedTuple):
    hops: int
    begin: Callable[[PyTree], Float[Array, "devices n c"]]
    hop: Callable  # (chunks, t) -> chunks
    end: Callable[[Float[Array, "devices n c"]], PyTree]


def ring_mean(
    like: PyTree, specs: PyTree, mesh: Mesh, *, axis_name: str = "data"
) -> RingMean:
    """The mean over `axis_name` of trees with a leading axis of its workers.

    `like` holds a worker's shapes, and `specs` how each lies over the other axes of the
    mesh; every device sends the parts that it holds. Sums are float32. Use it as

        chunks = ring.begin(tree)                  # tree leaves [workers, ...]
        for t in range(ring.hops):                 # inside lax.scan, between steps
            chunks = ring.hop(chunks, t)
        mean = ring.end(chunks)                    # like `like`, float32

    Further hops leave the chunks as they are.
    """
    workers = mesh.shape[axis_name]
    shapes, treedef = jax.tree.flatten(like)
    places = treedef.flatten_up_to(specs)
    held = [
        jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape)
        for x, spec in zip(shapes, places, strict=True)
    ]
    size = sum(map(math.prod, held))
    width = -(-size // workers)
    everywhere = P(mesh.axis_names)

    def on_devices(function, inputs, outputs):
        return jax.shard_map(
            function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def begin(tree):
        def one(*leaves):
            flat = jnp.concatenate([x.astype(jnp.float32).ravel() for x in leaves])
            flat = jnp.pad(flat, (0, workers * width - size))
            return flat.reshape(1, workers, width)

        inputs = tuple(P(axis_name, *spec) for spec in places)
        return on_devices(one, inputs, everywhere)(*treedef.flatten_up_to(tree))

    def hop(chunks: Float[Array, "devices n c"], t: Int[Array, ""]):
        def one(chunks, t):
            me = lax.axis_index(axis_name)
            ring = [(i, (i + 1) % workers) for i in range(workers)]
            sent = lax.dynamic_index_in_dim(chunks, (me - t) % workers, 1)
            taken = lax.ppermute(sent, axis_name, ring)
            at = (me - 1 - t) % workers
            mine = lax.dynamic_index_in_dim(chunks, at, 1)
            new = jnp.where(t < workers - 1, mine + taken, taken)
            new = jnp.where(t < 2 * (workers - 1), new, mine)
            return lax.dynamic_update_slice_in_dim(chunks, new, at, 1)

        if workers == 1:
            return chunks
        return on_devices(one, (everywhere, P()), everywhere)(chunks, t)

    def end(chunks):
        def one(chunks):
            flat, leaves = chunks.ravel()[:size] / workers, []
            for shape in held:
                count = math.prod(shape)
                leaves.append(flat[:count].reshape(shape))
                flat = flat[count:]
            return tuple(leaves)

        return treedef.unflatten(on_devices(one, everywhere, tuple(places))(chunks))

    return RingMean(2 * (workers - 1), begin, hop, end)
