"""What one device sends in a step of a transformer, axis by axis, as the papers say.

With b rows of a microbatch on a device, s positions, h width, l layers, m microbatches
and a bytes of an activation, L = l / p layers a stage and W the parameters of a stage's
tensor part:

    tensor n  4 all-reduces of a b s h a layer and microbatch, 6 where the forward pass
              is done twice (Narayanan et al. 2021, arXiv:2104.04473, Section 2.3);
              embedding and head one each; three numbers a position for the loss
    seq n     6 (n - 1) chunks of keys a layer and microbatch, of which 2 (n - 1) are
              sums in float32 (8 (n - 1) done twice); then the gradient
    stage p   2 m v messages of a b s h, of a stage between two others (Section 2.2);
              then the gradient of the tables, which first and last stage share
    fsdp n    (n - 1) / n of a W gathered forward and again backward, and of 4 W
              scattered, each once for each microbatch that stands alone
              (Rajbhandari et al. 2020, arXiv:1910.02054, Section 7.2: 3 W)
    data n    an all-reduce of 4 W / fsdp

An all-reduce of x bytes sends 2 (n - 1) / n of x around a ring (`wire.SENT`).
"""

from collections.abc import Iterable
from typing import NamedTuple

from .layout import Layout
from .plan_model import FLOAT32, Job, Sizes
from .wire import Collective


def share(n: int) -> float:
    """(n - 1) / n, of what a ring of n passes on."""
    return (n - 1) / n


def stage_parameters(sizes: Sizes, layout: Layout) -> float:
    """Parameters of a stage's tensor part, tables and all but stacked layers whole.

    Vectors of a layer (norms) are counted as cut; they are a ten-thousandth.
    """
    layers = sizes.layers * sizes.layer_parameters / layout.stage
    return (layers + sizes.table_parameters) / layout.tensor


def step_traffic(sizes: Sizes, layout: Layout, job: Job) -> dict[str, float]:
    """Bytes that one device sends over each axis of more than one device, in a step."""
    rows = job.microbatch(layout)
    tokens = rows * sizes.positions / layout.seq
    stream = job.activation * tokens * sizes.width
    runs = job.microbatches * sizes.layers / layout.stage  # of a layer on a device
    mine = stage_parameters(sizes, layout)
    loose = 1 if layout.stage > 1 else job.microbatches
    sent = {}

    n = layout.tensor
    layer = (4 + 2 * job.recomputed) * stream
    ends = job.microbatches / layout.stage * (2 * stream + 3 * FLOAT32 * tokens)
    sent["tensor"] = 2 * share(n) * (runs * layer + ends)

    n = layout.seq
    chunk = tokens * sizes.key_width / layout.tensor
    turn = (4 + 2 * job.recomputed) * job.activation + 2 * FLOAT32
    tables = FLOAT32 * sizes.table_parameters / layout.tensor / layout.fsdp
    gradient = FLOAT32 * mine / layout.fsdp - (tables if layout.stage > 1 else 0)
    sent["seq"] = runs * (n - 1) * chunk * turn + 2 * share(n) * gradient

    if layout.stage > 1:
        replicas = layout.stage * layout.data * layout.seq
        sent["stage"] = 2 * job.microbatches * job.chunks * stream
        sent["stage"] += 2 * share(replicas) * tables
    n = layout.fsdp
    sent["fsdp"] = loose * share(n) * (2 * job.activation + FLOAT32) * mine
    sent["data"] = 2 * share(layout.data) * gradient
    return {axis: x for axis, x in sent.items() if getattr(layout, axis) > 1}


class Compared(NamedTuple):
    found: float  # bytes a device sends, as compiled
    closed: float  # as the closed form says; 0 for an axis that it does not know
    exact: bool  # all counts of loops are known

    @property
    def ratio(self) -> float:
        return self.found / self.closed if self.closed else float("inf")


def compare(
    found: Iterable[Collective], closed: dict[str, float]
) -> dict[str, Compared]:
    """Compiled bytes beside the closed form's, by axis.

    What spans several axes counts under the outermost, whose link is the slowest.
    """
    sent: dict[str, tuple[float, bool]] = dict.fromkeys(closed, (0.0, True))
    for c in found:
        before, sure = sent.get(c.axes[0], (0.0, True))
        sent[c.axes[0]] = before + c.count * c.wire_bytes, sure and c.exact
    return {
        axis: Compared(bytes_, closed.get(axis, 0.0), sure)
        for axis, (bytes_, sure) in sent.items()
    }
