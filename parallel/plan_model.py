"""What a plan is about: the sizes of a transformer, and how a step is cut.

Symbols as in `closed_forms.py`: b rows of a microbatch, s positions, h width, l layers,
v vocabulary, m microbatches, p stages.
"""

import dataclasses
from typing import Literal

from .layout import Layout

FLOAT32 = 4  # bytes of parameters, moments and gradients


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A transformer; what is left out follows GPT's shape.

    >>> Sizes(layers=96, width=12288, heads=96).parameters // 10**9
    174
    """

    layers: int
    width: int
    heads: int
    vocabulary: int = 51200
    positions: int = 2048  # s, of every row
    kv_heads: int | None = None  # None: as many as heads
    head_width: int | None = None  # None: width / heads
    mlp_width: int | None = None  # None: 4 width
    gated: bool = False  # three matrices in the mlp, not two
    tied: bool = True  # the head is the embedding
    learned: bool = True  # positions are a table
    biased: bool = True  # biases everywhere, and in norms

    @property
    def query_width(self) -> int:
        return self.heads * (self.head_width or self.width // self.heads)

    @property
    def key_width(self) -> int:
        return self.query_width * (self.kv_heads or self.heads) // self.heads

    @property
    def hidden(self) -> int:
        return self.mlp_width or 4 * self.width

    @property
    def matrices(self) -> tuple[tuple[int, int, Literal["columns", "rows"]], ...]:
        """(in, out, what tensor parallelism cuts) of a layer's matrix products."""
        h, up = self.width, (1 + self.gated) * self.hidden
        return (
            (h, self.query_width + 2 * self.key_width, "columns"),
            (self.query_width, h, "rows"),
            (h, up, "columns"),
            (self.hidden, h, "rows"),
        )

    @property
    def layer_parameters(self) -> int:
        h = self.width
        count = sum(a * b for a, b, _ in self.matrices) + 2 * h
        if self.biased:
            count += sum(b for _, b, _ in self.matrices) + 2 * h
        return count

    @property
    def table_parameters(self) -> int:
        """Embedding, head, learned positions, last norm."""
        tables = (2 - self.tied) * self.vocabulary + self.learned * self.positions
        return (tables + 1 + self.biased) * self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.table_parameters

    def layer_flops(self, tokens: float) -> float:
        """Forward, of the matrix products; scores are counted whole, causal or not."""
        products = sum(a * b for a, b, _ in self.matrices)
        return 2 * tokens * products + 4 * tokens * self.positions * self.query_width

    def head_flops(self, tokens: float) -> float:
        return 2 * tokens * self.width * self.vocabulary

    def step_flops(self, batch: int, *, recomputed: bool) -> float:
        """Of all devices in a step: backward is twice forward, and the head is never
        computed twice. For GPT with recomputation it is `closed_forms.gpt_flops`.
        """
        tokens = batch * self.positions
        layers = self.layers * self.layer_flops(tokens)
        return (3 + recomputed) * layers + 3 * self.head_flops(tokens)


@dataclasses.dataclass(frozen=True)
class Job:
    """How one step of a model is done."""

    batch: int  # rows of a step, all devices
    microbatches: int = 1  # m, into which the rows of one data shard are cut
    chunks: int = 1  # v groups of layers a stage: interleaved where above 1
    schedule: Literal["gpipe", "one_f_one_b"] = "one_f_one_b"
    recomputed: bool = True  # layers keep their input alone
    activation: int = 2  # bytes of a number in activations
    state: float = 16.0  # bytes of a parameter, its gradient and its moments
    shard_moments: bool = False  # 8 of them lie over data (ZeRO's first stage)
    flash: bool = True  # attention keeps no scores, and skips what is masked
    head_on_last: bool = False  # or each stage does its share of the head's rows

    def microbatch(self, layout: Layout) -> float:
        """Rows of one microbatch on one device."""
        return self.batch / (layout.data * layout.fsdp * self.microbatches)


def refusals(sizes: Sizes, layout: Layout, job: Job) -> list[str]:
    """Why a layout cannot do a job, one sentence each with what is near; or nothing.

    >>> refusals(Sizes(4, 64, 4), Layout(stage=3), Job(batch=3, microbatches=3))
    ['layers: 4 do not divide over stage=3 x chunks=1; nearest that fits: 3']
    """
    found = []

    def divides(what: str, count: int, by: int, over: str) -> None:
        if count % by:
            near = max(by, round(count / by) * by)
            found.append(
                f"{what}: {count} do not divide over {over}; nearest that fits: {near}"
            )

    stages = layout.stage * job.chunks
    divides(
        "layers", sizes.layers, stages, f"stage={layout.stage} x chunks={job.chunks}"
    )
    divides("heads", sizes.heads, layout.tensor, f"tensor={layout.tensor}")
    if sizes.kv_heads:
        divides("kv_heads", sizes.kv_heads, layout.tensor, f"tensor={layout.tensor}")
    divides("hidden units", sizes.hidden, layout.tensor, f"tensor={layout.tensor}")
    divides("vocabulary", sizes.vocabulary, layout.tensor, f"tensor={layout.tensor}")
    divides("width", sizes.width, layout.fsdp, f"fsdp={layout.fsdp}")
    if layout.seq > 1:
        divides("positions", sizes.positions, 2 * layout.seq, f"2 x seq={layout.seq}")
    cuts = layout.data * layout.fsdp * job.microbatches
    divides("batch", job.batch, cuts, f"data x fsdp x microbatches = {cuts}")
    if layout.stage > 1:
        divides("microbatches", job.microbatches, layout.stage, f"stage={layout.stage}")
    elif job.chunks > 1:
        found.append(f"chunks: {job.chunks}, but one stage has one; take stage > 1")
    return found
