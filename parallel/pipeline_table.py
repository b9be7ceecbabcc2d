"""Any pipeline schedule in one program, for its memory: a table of ticks, executed.

`compile_table` gives every operation of a schedule a tick, and every input that waits
for its backward pass a slot, reused as soon as it is free. `value_and_grad` runs the
table: in each tick a stage does nothing, a forward or a backward pass, which recomputes
the stage from the kept input. So 1F1B keeps as many inputs as there are stages, however
many microbatches there are; the loop of `pipeline.py` keeps them all.

Stages move in step, so a tick lasts as long as its slowest operation: a batch takes
2 (m + p - 1) max(tf, tb) and not the (m + p - 1) (tf + tb) of separate programs.

Sends per stage and tick: one microbatch of activations up and one of gradients down,
used or not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, PyTree

from .pipeline_simulator import simulate
from .schedules import Schedule

AXIS = "stage"
IDLE, FORWARD, BACKWARD = range(3)


class Table(NamedTuple):
    """[tick, device] of int32; a slot of -1 is none."""

    kind: Int32[np.ndarray, "ticks p"]  # IDLE, FORWARD or BACKWARD
    microbatch: Int32[np.ndarray, "ticks p"]
    chunk: Int32[np.ndarray, "ticks p"]
    x: Int32[np.ndarray, "ticks p"]  # slot of the input; -1: of the whole pipeline
    g: Int32[np.ndarray, "ticks p"]  # slot of the output's gradient; -1: of the loss
    x_in: Int32[np.ndarray, "ticks p"]  # slot of what arrived from the device before
    g_in: Int32[np.ndarray, "ticks p"]  # and from the one behind
    slots: tuple[int, int]  # of inputs and of gradients, on each device
    chunks: int


def compile_table(schedule: Schedule) -> Table:
    """Ticks and slots of a schedule. Raises ValueError as `simulate` does, and for 1
    device.

    >>> from .schedules import gpipe, one_f_one_b
    >>> [compile_table(f(4, 8)).slots[0] for f in (gpipe, one_f_one_b)]
    [8, 4]
    """
    devices = len(schedule)
    if devices < 2:
        raise ValueError(f"schedule: {devices} device; a pipeline takes at least 2")
    line = simulate(schedule, forward=1, backward=1)
    chunks = 1 + max(op.chunk for ops in schedule for op in ops)
    stages, ticks = devices * chunks, int(line.makespan)
    at = {
        (s.op.kind, s.op.microbatch, s.op.chunk * devices + device): int(s.start)
        for device, row in enumerate(line.spans)
        for s in row
    }
    names = ("kind", "microbatch", "chunk", "x", "g", "x_in", "g_in")
    table = {name: np.full((ticks, devices), -1, np.int32) for name in names}
    for name in ("kind", "microbatch", "chunk"):
        table[name][:] = 0
    waits: dict[str, list] = {"x": [], "g": []}
    for (kind, i, k), tick in at.items():
        device, last = k % devices, k == stages - 1
        # the last stage's forward pass has nobody to send to: its backward computes it
        table["kind"][tick, device] = (
            BACKWARD if kind == "B" else IDLE if last else FORWARD
        )
        table["microbatch"][tick, device] = i
        table["chunk"][tick, device] = k // devices
        if kind == "B":
            ends = at["F", i, k], tick
            if k:
                waits["x"].append((device, at["F", i, k - 1] + 1, *ends))
            if not last:
                waits["g"].append((device, at["B", i, k + 1] + 1, tick, tick))
    slots = {}
    for name, wanted in waits.items():
        slots[name] = 0
        free_at: list[dict[int, int]] = [{} for _ in range(devices)]
        for device, arrives, used, freed in sorted(wanted):
            taken = free_at[device]
            free = [slot for slot, end in taken.items() if end < arrives]
            slot = min(free, default=len(taken))
            taken[slot] = freed
            table[f"{name}_in"][arrives, device] = slot
            table[name][[used, freed], device] = slot
            slots[name] = max(slots[name], slot + 1)
    return Table(**table, slots=(slots["x"], slots["g"]), chunks=chunks)


def value_and_grad(
    cell: Callable, loss: Callable, table: Table
) -> Callable[..., tuple[Float[Array, ""], PyTree, PyTree, PyTree]]:
    """`run(params, head, x, targets)`: sum of losses, gradients of all but targets.

        sum over microbatches j of loss(head, cell(..., cell(params_0, x_j)), targets_j)

    for meshes with a stage axis as large as the table's devices; other axes stay
    automatic. cell(params_k, x) is one stage, y like x; loss(head, y, target) a scalar.
    params: leaves [v, p, ...], of stage k = c p + s at [c, s]. x, targets: leaves
    [m, r, ...], whole on every stage. Gradients are summed in float32.
    """
    devices = table.kind.shape[1]
    rows = {
        name: jnp.asarray(getattr(table, name)) for name in table._fields[:7]
    }  # scanned over ticks
    up = [(s, (s + 1) % devices) for s in range(devices)]
    down = [(b, a) for a, b in up]

    def run(params, head, x, targets):
        params = jax.tree.map(lambda leaf: leaf[:, 0], params)
        stage = lax.axis_index(AXIS)

        def put(slots, slot, value):
            """One place more than slots takes what nobody wants."""
            return slots.at[jnp.where(slot < 0, len(slots) - 1, slot)].set(value)

        def tick(carry, row):
            xs, gs, message, sums = carry
            own = {name: value[stage] for name, value in row.items()}
            xs, gs = put(xs, own["x_in"], message[0]), put(gs, own["g_in"], message[1])
            i, c = own["microbatch"], own["chunk"]
            first = own["x"] < 0
            value = jnp.where(first, x[i], xs[own["x"]])
            target = jax.tree.map(lambda leaf: leaf[i], targets)
            mine = jax.tree.map(lambda leaf: leaf[c], params)
            nothing = jnp.zeros_like(value)

            def from_loss(_):
                def whole(mine, head, value):
                    return loss(head, cell(mine, value), target)

                out, pull = jax.vjp(whole, mine, head, value)
                return out, *pull(jnp.ones_like(out))

            def from_behind(gradient):
                _, pull = jax.vjp(cell, mine, value)
                d_mine, d_value = pull(gradient)
                zeros = jax.tree.map(jnp.zeros_like, head)
                return jnp.zeros(()), d_mine, zeros, d_value

            def backward():
                out, d_mine, d_head, d_value = lax.cond(
                    own["g"] < 0, from_loss, from_behind, gs[own["g"]]
                )
                total, d_params, d_heads, d_x = sums
                new = (
                    total + out,
                    jax.tree.map(lambda a, b: a.at[c].add(b), d_params, d_mine),
                    jax.tree.map(jnp.add, d_heads, d_head),
                    d_x.at[i].add(jnp.where(first, d_value, 0)),
                )
                return nothing, d_value, new

            *message, sums = lax.switch(
                own["kind"],
                [
                    lambda: (nothing, nothing, sums),
                    lambda: (cell(mine, value), nothing, sums),
                    backward,
                ],
            )
            message = (
                lax.ppermute(message[0], AXIS, up),
                lax.ppermute(message[1], AXIS, down),
            )
            return (xs, gs, message, sums), None

        def wide(tree):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)

        start = (
            *(jnp.zeros((count + 1, *x.shape[1:]), x.dtype) for count in table.slots),
            (jnp.zeros_like(x[0]),) * 2,
            (jnp.zeros(()), wide(params), wide(head), wide(x)),
        )
        (*_, (total, d_params, *rest)), _ = lax.scan(tick, start, rows)
        total, d_head, d_x = lax.psum((total, *rest), AXIS)
        return total, jax.tree.map(lambda leaf: leaf[:, None], d_params), d_head, d_x

    along = P(None, AXIS)
    return jax.shard_map(
        run,
        in_specs=(along, P(), P(), P()),
        out_specs=(P(), along, P(), P()),
        axis_names={AXIS},
        check_vma=False,  # the branches of a tick vary over different axes
    )
