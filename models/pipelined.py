"""The trunk of a transformer as a pipeline: a stage's blocks on the stage's devices."""

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.layout import devices_along
from ..parallel.pipeline import pipeline
from .bottleneck import Open, Waist
from .stack import recomputed, run_stack

BY_ROW = ("bits", "codes", "concepts", "assignments")  # of a waist's fields


def check_stages(depth: int, waist_at: int, stages: int) -> None:
    """Raise ValueError unless blocks, and a waist before one, can be cut into stages.

    >>> check_stages(8, 4, 2)
    """
    if depth % stages:
        near = max(stages, round(depth / stages) * stages)
        raise ValueError(
            f"depth: {depth} blocks do not divide over stage={stages}; nearest that "
            f"fits: {near}"
        )
    blocks = depth // stages
    if waist_at % blocks and stages > 1:
        fits = list(range(0, depth + 1, blocks))
        raise ValueError(
            f"waist_at: {waist_at}, but a waist lies between stages of {blocks} blocks;"
            f" choose from {fits}"
        )


def pipelined(model, x, mask, options: dict, microbatches: int):
    """(x, waist) behind all blocks of a `Transformer`, in a mesh with stages.

    A waist lies before the blocks of one stage (or behind all). Every stage computes
    it, small beside a block, and only the one where it lies uses it; its z never leaves
    that stage and is None in the result. remat="full" keeps the input of a stage alone,
    as GPipe does, not that of every block.

    Raises ValueError where depth, waist or microbatches do not fit the stages.
    """
    config, stages = model.config, devices_along("stage")
    at = config.depth if isinstance(model.waist, Open) else model.waist_at
    check_stages(config.depth, at, stages)
    blocks, inside = config.depth // stages, at < config.depth
    graph, stack = nnx.split(model.blocks)
    waist_graph, waist_state = nnx.split(model.waist)
    fixed = {"order": options["order"]}

    def cell(stack, shared, x, sides, stage):
        positions, segment_ids, mask = sides
        said, sums = None, None
        if inside:
            waist = nnx.merge(waist_graph, shared)(x, mask)
            here = stage == at // blocks
            x = jnp.where(here, waist.z, x)
            count = x[..., 0].size if mask is None else mask.sum()
            count = jnp.asarray(count, jnp.float32)
            sums = waist.loss * count, count, waist.stats
            said = {name: x for name, x in waist._asdict().items() if name in BY_ROW}
            said, sums = jax.tree.map(
                lambda a: jnp.where(here, a, jnp.zeros_like(a)), (said, sums)
            )

        def block(x, xs):
            call = {"positions": positions, "segment_ids": segment_ids, **fixed}
            return nnx.merge(graph, xs[0])(x, **call)

        inner = recomputed(block, "dots") if config.remat == "dots" else block
        return run_stack(inner, stack, x, scan=config.scan)[0], said, sums

    x, said, sums = pipeline(
        recomputed(cell, "full") if config.remat == "full" else cell,
        nnx.as_pure(stack),
        nnx.as_pure(waist_state) if inside else (),
        x,
        (options["positions"], options["segment_ids"], mask),
        microbatches=microbatches,
        axes=("seq", None),
    )
    if not inside:
        waist = model.waist(x, mask)
        return waist.z, waist
    loss, weight, stats = jax.tree.map(lambda a: a.sum(0), sums)
    loss = loss / jnp.where(weight == 0, 1, weight)
    return x, Waist(None, loss, stats=stats, **said)  # type: ignore
