"""Which layout: every one there is, ranked by the cost model; and rules of thumb.

The rules are those of Narayanan et al. 2021 (arXiv:2104.04473, Section 3): tensor
parallelism up to the devices of a server, then stages, just enough that it fits; the
rest is data parallel; the microbatch b has the least (b' / b + p - 1) time(b).
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from .layout import Layout
from .plan_cost import Plan, predict
from .plan_machines import Machine
from .plan_model import Job, Sizes, refusals

AXES = ("stage", "data", "fsdp", "seq", "tensor")


class Candidate(NamedTuple):
    layout: Layout
    job: Job
    plan: Plan | None  # None: refused before it could be costed
    refused: str  # "" where it fits

    @property
    def seconds(self) -> float:
        fits = self.plan is not None and not self.refused
        return self.plan.seconds if fits and self.plan else float("inf")

    @property
    def order(self) -> tuple:
        """Total: by time, then by the layout's text, so that no search is luck."""
        job = self.job
        return (self.seconds, str(self.layout), job.microbatches, job.chunks)


def cost(sizes: Sizes, layout: Layout, job: Job, machine: Machine) -> Candidate:
    """A candidate, or why it is none: what does not divide, or how much is too much."""
    if reasons := refusals(sizes, layout, job):
        return Candidate(layout, job, None, "; ".join(reasons))
    plan = predict(sizes, layout, job, machine)
    over = plan.bytes - machine.memory
    told = max(plan.memory, key=plan.memory.__getitem__)
    refused = (
        f"memory: {plan.bytes / 1e9:.1f} GB on a device of {machine.memory / 1e9:.1f} "
        f"GB, {over / 1e9:.1f} too many; most are {told}"
        if over > 0
        else ""
    )
    return Candidate(layout, job, plan, refused)


def divisors(n: int) -> list[int]:
    """Ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, n + 1) if n % d == 0]


def layouts(devices: int, axes: tuple[str, ...] = AXES) -> Iterator[Layout]:
    """Every split of the devices over the axes."""
    *inner, last = axes
    for sizes in itertools.product(divisors(devices), repeat=len(inner)):
        used = 1
        for size in sizes:
            used *= size
        if devices % used == 0:
            yield Layout(
                **dict(zip(inner, sizes, strict=True)), **{last: devices // used}
            )


def candidates(
    sizes: Sizes,
    devices: int,
    job: Job,
    *,
    axes: tuple[str, ...] = AXES,
    chunks: tuple[int, ...] = (1,),
    rows: tuple[int, ...] = (1, 2, 4, 8),
) -> Iterator[tuple[Layout, Job]]:
    """Layouts with microbatches of so many rows; what cannot divide is left out.

    Without stages a batch is cut as well: fewer activations at a time.
    """
    for layout in layouts(devices, axes):
        if sizes.heads % layout.tensor or sizes.layers % layout.stage:
            continue
        shards = layout.data * layout.fsdp
        if job.batch % shards:
            continue
        for b, v in itertools.product(rows, chunks):
            cuts, rest = divmod(job.batch // shards, b)
            if rest or not cuts or (v > 1 and layout.stage == 1):
                continue
            yield layout, dataclasses.replace(job, microbatches=cuts, chunks=v)


def search(
    sizes: Sizes, devices: int, job: Job, machine: Machine, **options
) -> list[Candidate]:
    """Every candidate, best first; those that do not fit behind, with their reason."""
    found = [
        cost(sizes, layout, each, machine)
        for layout, each in candidates(sizes, devices, job, **options)
    ]
    return sorted(found, key=lambda c: c.order)


def rules_of_thumb(
    sizes: Sizes, devices: int, job: Job, machine: Machine, **options
) -> Candidate | None:
    """What the rules choose; None where nothing fits.

    The least tensor size that fits without stages, up to a server; then, with a whole
    server's, the fewest stages. Only the microbatch, and the chunks, are swept by cost.
    """
    server = int(min(machine.links[0][0], devices, 8))
    parts = [t for t in divisors(devices) if t <= server and sizes.heads % t == 0]
    tries = [(t, 1) for t in parts]
    tries += [(max(parts), p) for p in divisors(devices // max(parts)) if p > 1]
    options = {name: x for name, x in options.items() if name != "axes"}
    for tensor, stage in tries:
        if devices % (tensor * stage):
            continue
        wanted = Layout(stage=stage, data=devices // (tensor * stage), tensor=tensor)
        found = [
            cost(sizes, layout, each, machine)
            for layout, each in candidates(
                sizes, devices, job, axes=("stage", "data", "tensor"), **options
            )
            if layout == wanted
        ]
        best = min(found, key=lambda c: c.order, default=None)
        if best is not None and not best.refused:
            return best
    return None
