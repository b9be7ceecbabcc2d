"""A pipeline in one program: stages along a mesh axis, microbatches in a ring.

Huang et al. 2019 (GPipe, arXiv:1811.06965): layers are cut into S stages, the batch
into m microbatches; at tick t stage s applies its layers to microbatch t - s, for
m + S - 1 ticks, and hands the result on. JAX's transpose of that loop is the mirrored
backward schedule; nothing here is differentiated by hand. So the gradient is that of
the whole batch, and (S - 1) / (m + S - 1) of the ticks of a stage are idle.

Microbatches wait in m / S places on each stage. Every tick the place in turn moves one
stage towards the first, which takes its input there, while the last one leaves its
output in it; in the end stage s holds the outputs of its m / S microbatches. So what
comes before and after the pipeline is shared out by rows over the stages too.

Sends per stage and tick, in microbatches of activations: one towards the last stage
(none from it) and one towards the first; backward the same again.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree, Shaped

from .layout import BATCH, ROWS, constrain, devices_along

AXIS = "stage"


def check_microbatches(microbatches: int, rows: int, stages: int, shards: int) -> None:
    """Raise ValueError unless so many microbatches can be cut and shared by stages.

    shards: of the rows over data and fsdp, within each of which the rows are cut.
    """
    most = rows // shards
    fits = [n for n in range(stages, most + 1, stages) if most % n == 0]
    if rows % shards or microbatches not in fits:
        near = min(fits, key=lambda n: abs(n - microbatches), default=None)
        said = "none fits" if near is None else f"nearest that fits: {near}"
        raise ValueError(
            f"microbatches: {microbatches}, but {rows} rows over data x fsdp = {shards}"
            f" are cut into a multiple of stage={stages} that divides {most}; {said}"
        )


def cut(x: Shaped[Array, "b *s"], microbatches: int) -> Shaped[Array, "m r *s"]:
    """Microbatch j takes the j-th part of every data shard's rows: no row moves."""
    shards = math.prod(devices_along(axis) for axis in BATCH)
    rows = x.shape[0] // (shards * microbatches)
    x = x.reshape(shards, microbatches, rows, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(microbatches, shards * rows, *x.shape[3:])


def join(x: Shaped[Array, "m r *s"]) -> Shaped[Array, "b *s"]:
    """The inverse of `cut`."""
    shards = math.prod(devices_along(axis) for axis in BATCH)
    rows = x.shape[1] // shards
    x = x.reshape(x.shape[0], shards, rows, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(-1, *x.shape[3:])


def pipeline(
    cell: Callable,
    params: PyTree[Float[Array, "layers ..."]],
    shared: PyTree,
    x: Float[Array, "b ..."],
    sides: PyTree[Shaped[Array, "b ..."]] = (),
    *,
    microbatches: int,
    axes: tuple = (),
) -> tuple[Float[Array, "b ..."], PyTree, PyTree]:
    """`x` through all layers, in a mesh whose stage axis is larger than 1.

        y, rows, sums = cell(own_params, shared, x, sides, stage)

    Args:
      cell: what every stage does to one microbatch [r ...]; y is like x. What it says
        beside, arrays [r ...] in `rows` and sums over rows in `sums`, must be zero on
        all stages but one. It sees the rows of its own place on the data axis and the
        other axes as automatic; wrap it in `jax.checkpoint` to keep only its input of
        each tick, as GPipe does.
      params: leaves [layers ...], which a stage sees [layers / S ...] of.
      shared: what every stage sees whole; its gradients are added up.
      sides: what goes with the rows of x to every stage, such as positions.
      microbatches: a multiple of the stages that divides the rows of a data shard.
      axes: mesh axes of the dimensions of x after its rows.

    Returns:
      y, its rows over (data, fsdp, stage); what was said of rows [b ...]; sums [m ...].

    Raises:
      ValueError: layers or microbatches that do not divide.
    """
    stages = devices_along(AXIS)
    shards = math.prod(devices_along(axis) for axis in BATCH)
    check_microbatches(microbatches, len(x), stages, shards)
    layers = {len(leaf) for leaf in jax.tree.leaves(params)}
    if any(n % stages for n in layers):
        raise ValueError(
            f"depth: {sorted(layers)} layers do not divide over stage={stages}; choose "
            f"a multiple of {stages}"
        )
    places = microbatches // stages
    data = ("data",) if devices_along("data") > 1 else ()
    up = [(s, s + 1) for s in range(stages - 1)]
    down = [(s, (s - 1) % stages) for s in range(stages)]

    def run(params, shared, waiting, sides):
        stage = lax.axis_index(AXIS)

        def tick(carry, t):
            waiting, arrived = carry
            fresh = waiting[t % places]
            index = jnp.clip(t - stage, 0, microbatches - 1)  # clipped: result unused
            mine = jax.tree.map(lambda side: side[index], sides)
            x = constrain(jnp.where(stage == 0, fresh, arrived), BATCH, *axes)
            y, *said = cell(params, shared, x, mine, stage)
            moved = lax.ppermute(fresh, AXIS, down)
            waiting = waiting.at[t % places].set(
                jnp.where(stage == stages - 1, y, moved)
            )
            return (waiting, lax.ppermute(y, AXIS, up)), said

        ticks = jnp.arange(microbatches + stages - 1)
        # real rows: a stage without work yet computes nothing that is not finite
        (done, _), said = lax.scan(tick, (waiting, waiting[0]), ticks)
        # microbatch j of stage s is what it said at tick j + s
        rows, sums = jax.tree.map(
            lambda a: lax.dynamic_slice_in_dim(a, stage, microbatches), said
        )
        # the output of microbatch j was left at tick j + S - 1
        return (
            jnp.roll(done, 1 - stages, 0),
            lax.psum(rows, AXIS),
            lax.psum(sums, (AXIS, *data)),
        )

    x = constrain(cut(x, microbatches), AXIS, BATCH, *axes)
    sides = jax.tree.map(lambda side: cut(side, microbatches), sides)
    # Left to the partitioner, every tick's gradients would be summed over data.
    along = data[0] if data else None
    y, rows, sums = jax.shard_map(
        run,
        in_specs=(P(AXIS), P(), P(AXIS, along), P(None, along)),
        out_specs=(P(AXIS, along), P(None, along), P()),
        axis_names={AXIS, *data},
        check_vma=False,  # kernels inside start from unvarying zeros
    )(params, shared, x, sides)
    return constrain(join(y), ROWS, *axes), jax.tree.map(join, rows), sums
