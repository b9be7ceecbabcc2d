"""A language model's loss under a pipeline schedule of its own: 1F1B, interleaved.

`pipelined.py` runs the trunk as a loop that JAX differentiates: GPipe. Here one table
of ticks runs forward and backward passes in a schedule's order and gives the gradients
itself, so a stage keeps as many inputs as the schedule says, not one a microbatch.
Embeddings are looked up outside; norm, head and loss belong to the last stage.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..parallel.layout import devices_along
from ..parallel.pipeline import check_microbatches, cut, join, pipeline
from ..parallel.pipeline_table import compile_table, value_and_grad
from ..parallel.schedules import make_schedule
from .stack import run_stack
from .transformer import Transformer, logits_of

SCHEDULES = ("loop", "gpipe", "one_f_one_b", "interleaved")


def check_schedule(
    name: str, *, depth: int, stages: int, chunks: int, seq: int
) -> None:
    """Raise ValueError unless a table of this name can run so many blocks.

    >>> check_schedule("interleaved", depth=8, stages=2, chunks=2, seq=1)
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule: {name!r}, but allowed are {', '.join(SCHEDULES)}")
    if name != "interleaved" and chunks != 1:
        raise ValueError(f"chunks: {chunks}, but {name} has one chunk a device")
    if name == "loop":
        return
    if stages < 2:
        raise ValueError(
            f"schedule: {name} takes stages, but the mesh has stage={stages}; give "
            "stage=2 or more, or take schedule=loop"
        )
    if seq > 1:
        raise ValueError(
            f"schedule: {name} runs stages that do different things in a tick, and the "
            f"ring over seq={seq} needs all of them; take schedule=loop, or seq=1"
        )
    if depth % (stages * chunks):
        near = max(1, round(depth / (stages * chunks))) * stages * chunks
        raise ValueError(
            f"depth: {depth} blocks do not divide over stage={stages} x "
            f"chunks={chunks}; nearest that fits: {near}"
        )


def scheduled_nats(
    model: Transformer,
    x: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    nats: Callable,
    *,
    schedule: str,
    chunks: int,
    microbatches: int,
) -> Float[Array, ""]:
    """Sum of nats behind all blocks and the head; differentiable in model and x.

    nats(logits, targets): of each position. The value alone is that of the loop; asked
    for gradients, the table runs.
    Raises ValueError as `check_schedule` and the schedules do.
    """
    config, stages = model.config, devices_along("stage")
    check_schedule(
        schedule,
        depth=config.depth,
        stages=stages,
        chunks=chunks,
        seq=devices_along("seq"),
    )
    shards = devices_along("data") * devices_along("fsdp")
    check_microbatches(microbatches, len(x), stages, shards)
    table = compile_table(make_schedule(schedule, stages, microbatches, chunks))
    graph, stack = nnx.split(model.blocks)
    output = model.embed if model.head is None else model.head
    ends_graph, ends_state = nnx.split(nnx.List([model.final_norm, output]))

    def cell(stack, x):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])

        def block(x, xs):
            return nnx.merge(graph, xs[0])(x, positions=positions)

        return run_stack(block, stack, x, scan=config.scan)[0]

    def last(state, y, targets):
        norm, output = nnx.merge(ends_graph, state)
        return nats(logits_of(y, norm, output, config.dtype), targets).sum()

    @jax.custom_vjp
    def total(stack, state, x, targets):
        def own(stack, shared, x, sides, stage):
            return cell(stack, x), None, None

        axes = ("seq", None)
        y = pipeline(own, stack, (), x, microbatches=microbatches, axes=axes)[0]
        return last(state, y, targets)

    def forward(stack, state, x, targets):
        shape = (chunks, stages, config.depth // (chunks * stages))
        cells = jax.tree.map(lambda p: p.reshape(*shape, *p.shape[1:]), stack)
        run = value_and_grad(cell, last, table)
        pieces = cut(x, microbatches), cut(targets, microbatches)
        value, d_cells, d_state, d_x = run(cells, state, *pieces)
        d_stack = jax.tree.map(lambda g, p: g.reshape(p.shape), d_cells, stack)
        return value, (d_stack, d_state, join(d_x).astype(x.dtype))

    def backward(gradients, cotangent):
        scaled = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
        return *scaled, None

    total.defvjp(forward, backward)
    return total(nnx.as_pure(stack), nnx.as_pure(ends_state), x, targets)
