"""How long a step takes, and what memory it wants, by arithmetic alone.

Nothing here is fitted. A microbatch on the slowest stage costs

    products / (matmul peak)  +  bytes of all else / bandwidth  +  exposed messages,

a batch (m + (p - 1) / v) microbatches (arXiv:2104.04473, Section 2.2), then comes what
happens once a step: the exchange of gradients and the update. Backward is twice
forward, once more where layers are recomputed.
"""

from collections.abc import Callable
from typing import NamedTuple

from .layout import Layout
from .plan_machines import Machine, rate
from .plan_model import FLOAT32, Job, Sizes
from .plan_traffic import stage_parameters, step_traffic

ASSUMED = (
    "large products reach the machine's `matmul` share of its peak",
    "between products every number is read and written once an operation",
    "sums over tensor and messages between stages hide behind nothing",
    "gathers over fsdp and the ring over seq hide behind the layers they belong to",
    "the exchange over data hides behind nothing, unless `overlapped`",
    "no device is slower than another, and no link is shared with other jobs",
)


class Plan(NamedTuple):
    """What the model predicts of a layout."""

    seconds: float  # of a step
    parts: dict[str, float]  # of them: what they are spent on
    memory: dict[str, float]  # bytes on the fullest device: what they hold
    utilisation: float  # model operations, none counted twice, over the peak
    hardware: float  # operations done, recomputed ones too, over the peak

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)


def predict(
    sizes: Sizes,
    layout: Layout,
    job: Job,
    machine: Machine,
    *,
    overlapped: bool = False,
) -> Plan:
    """Time and memory of one step.

    overlapped: the exchange over data takes only what exceeds half of the backward
    pass of the last microbatch's layers.
    """
    m, p, v = job.microbatches, layout.stage, job.chunks
    tokens = job.microbatch(layout) * sizes.positions / layout.seq
    passes = 3 + job.recomputed
    layers = sizes.layers / p
    product, other = _layer_seconds(sizes, layout, job, machine, tokens)
    head = sizes.head_flops(tokens) / layout.tensor / (machine.peak * machine.matmul)
    head += 2 * FLOAT32 * tokens * sizes.vocabulary / layout.tensor / machine.bandwidth
    head *= 3 * (1 if job.head_on_last else 1 / p)
    sent = step_traffic(sizes, layout, job)
    speed = {axis: rate(machine, layout, axis) for axis in sent}
    spent = {axis: x / speed[axis] for axis, x in sent.items()}

    messages = m * layers * (4 + 2 * job.recomputed)
    late = machine.latency * 2 * (layout.tensor - 1)
    tensor = spent.get("tensor", 0.0) + (messages * late if layout.tensor > 1 else 0)
    stage = spent.get("stage", 0.0) + (2 * m * v * machine.latency if p > 1 else 0)
    gradient = 0.0
    if layout.seq > 1:  # its share of the sum of gradients happens once a step
        whole = FLOAT32 * stage_parameters(sizes, layout) / layout.fsdp
        gradient = 2 * (layout.seq - 1) / layout.seq * whole / speed["seq"]
    ring = spent.get("seq", 0.0) - gradient
    hidden = m * layers * passes * product
    parts = {
        "products": m * (layers * passes * product + head),
        "memory traffic": m * layers * passes * other,
        "tensor": tensor,
        "stage": stage,
        "ring": max(0.0, ring - hidden),
        "fsdp": max(0.0, spent.get("fsdp", 0.0) - hidden),
    }
    parts["bubble"] = sum(parts.values()) * (p - 1) / (m * v)
    data = spent.get("data", 0.0) + gradient
    if overlapped:
        data = max(0.0, data - layers * product)
    parts["data"] = data
    mine = stage_parameters(sizes, layout) / layout.fsdp
    moved = 2 * job.state * mine / (layout.data if job.shard_moments else 1)
    parts["update"] = moved / machine.bandwidth
    parts = {name: x for name, x in parts.items() if x > 0}
    seconds = sum(parts.values())
    whole = seconds * machine.peak * layout.size
    return Plan(
        seconds,
        parts,
        memory(sizes, layout, job),
        sizes.step_flops(job.batch, recomputed=False) / whole,
        sizes.step_flops(job.batch, recomputed=job.recomputed) / whole,
    )


def calibrate(
    machine: Machine, speed: Callable[[Machine], float], wanted: float
) -> Machine:
    """The machine with the `matmul` share at which `speed`, which grows with it, is as
    wanted: one number, for all that is then predicted.

    Raises ValueError where no share of 1 or less does it.
    """
    if speed(machine._replace(matmul=1.0)) < wanted:
        raise ValueError(
            f"wanted: {wanted:g}, but with products at the whole peak of "
            f"{machine.name} the model gives {speed(machine._replace(matmul=1.0)):g}"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        enough = speed(machine._replace(matmul=middle)) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return machine._replace(matmul=high)


def _layer_seconds(sizes, layout, job, machine, tokens) -> tuple[float, float]:
    """Forward, of a layer and a microbatch on a device: products, all else.

    All else, in numbers: two norms (read, write), two residual sums with dropout (two
    reads, a write, half for the mask), the hidden layer's nonlinearity, the order of
    heads turned twice; without a fused attention four and a half passes over scores.
    """
    t, speed = layout.tensor, machine.peak * machine.matmul
    product = 0.0
    for rows, columns, cut in sizes.matrices:
        rows, columns = (rows, columns / t) if cut == "columns" else (rows / t, columns)
        numbers = tokens * (rows + columns) + rows * columns
        product += max(
            2 * tokens * rows * columns / speed,
            job.activation * numbers / machine.bandwidth,
        )
    scores = 4 * tokens * sizes.positions * sizes.query_width / t
    product += scores * (0.5 if job.flash else 1.0) / speed
    moved = 11 * sizes.width
    moved += (2 + sizes.gated) * sizes.hidden / t
    moved += 4 * (sizes.query_width + sizes.key_width) / t
    if not job.flash:
        moved += 4.5 * sizes.heads / t * sizes.positions
    return product, job.activation * tokens * moved / machine.bandwidth


def memory(sizes: Sizes, layout: Layout, job: Job) -> dict[str, float]:
    """Bytes on the fullest device.

    Activations of a layer, where it is not recomputed, are s b h (10 + 24 / t) bytes
    and 5 a s^2 b / t more where scores are kept (Korthikanti et al. 2022,
    arXiv:2205.05198, Eq. 2, in numbers of two bytes).
    """
    t, p, v = layout.tensor, layout.stage, job.chunks
    mine = stage_parameters(sizes, layout)
    moments = 2 * FLOAT32
    fixed = (job.state - moments) * mine / layout.fsdp
    over = layout.fsdp * (layout.data if job.shard_moments else 1)
    rows = job.microbatch(layout)
    tokens = rows * sizes.positions / layout.seq
    stream = job.activation * tokens * sizes.width
    inner = stream * (5 + 12 / t)
    if not job.flash:
        inner += 2.5 * job.activation * sizes.heads / t * sizes.positions * tokens
    kept = job.microbatches
    if p == 1:
        kept = 1  # microbatches one after the other
    elif job.schedule == "one_f_one_b":
        kept = min(kept, p) if v == 1 else min(kept, p + (p - 1) / v)
    layers = sizes.layers / p
    held = kept * layers * (stream if job.recomputed else inner)
    logits = 2 * FLOAT32 * tokens * sizes.vocabulary / t
    if not job.head_on_last:
        logits *= job.microbatches / p if p > 1 else 1
    gathered = 0.0
    if layout.fsdp > 1:  # two layers at once, and the gradient of one
        gathered = sizes.layer_parameters / t * (2 * job.activation + FLOAT32)
    return {
        "parameters and gradients": fixed,
        "moments": moments * mine / over,
        "activations": held + (inner if job.recomputed else 0.0),
        "logits": logits,
        "gathered layers": gathered,
    }
