"""The tables of a plan: what was compiled, closed forms, and what is predicted."""

from narrows.parallel.layout import Layout
from narrows.parallel.ledger import Ledger
from narrows.parallel.plan_cost import ASSUMED, predict
from narrows.parallel.plan_machines import Machine, rate
from narrows.parallel.plan_model import Job, Sizes
from narrows.parallel.plan_traffic import compare, step_traffic
from rich.table import Table


def assumptions(chip: Machine) -> str:
    said = f"matmul share {chip.matmul:g}, rates of {chip.name} by {chip.source}"
    return "assumed: " + "; ".join((said, *ASSUMED))


def memory_table(found: Ledger, chip: Machine) -> Table:
    out = Table(title="Memory of a device, as compiled")
    out.add_column("what")
    out.add_column("GB", justify="right")
    for name in ("arguments", "results", "shared", "temporary", "code"):
        out.add_row(name, f"{getattr(found.memory, name) / 1e9:.2f}")
    left = chip.memory - found.memory.peak
    out.add_section()
    out.add_row("together", f"{found.memory.peak / 1e9:.2f}")
    out.add_row(f"{chip.name} has", f"{chip.memory / 1e9:.2f}")
    said = "fits, left over" if left >= 0 else "does not fit, too many"
    out.add_row(said, f"{abs(left) / 1e9:.2f}")
    return out


def cost_table(
    found: Ledger, sizes: Sizes, layout: Layout, job: Job, chip: Machine
) -> Table:
    """Arithmetic and bytes of each axis: compiled, closed form, time at the rate."""
    out = Table(title="A device in a step: compiled, and the papers' closed forms")
    for name in ("what", "compiled", "closed form", "ratio", "rate", "ms"):
        out.add_column(name, justify="left" if name == "what" else "right")
    times: dict[str, float] = {}
    closed = sizes.step_flops(job.batch, recomputed=job.recomputed) / layout.size
    rough = "" if found.exact else "~"
    times["arithmetic"] = max(found.flops, closed) / chip.peak
    out.add_row(
        "arithmetic, TFLOP" + (f" (+{found.kernels} kernels)" if found.kernels else ""),
        f"{rough}{found.flops / 1e12:.3f}",
        f"{closed / 1e12:.3f}",
        f"{found.flops / closed:.2f}",
        f"{chip.peak / 1e12:.0f} T/s",
        f"{times['arithmetic'] * 1e3:.2f}",
    )
    rows = compare(found.collectives, step_traffic(sizes, layout, job))
    for axis, row in sorted(rows.items()):
        if axis == "?":
            speed = min(speed for _, speed in chip.links)
        else:
            speed = rate(chip, layout, axis)
        times[axis] = row.found / speed
        out.add_row(
            f"bytes over {axis}, GB",
            f"{'' if row.exact else '~'}{row.found / 1e9:.3f}",
            f"{row.closed / 1e9:.3f}",
            f"{row.ratio:.2f}",
            f"{speed / 1e9:.0f} GB/s",
            f"{times[axis] * 1e3:.2f}",
        )
    worst = max(times, key=times.__getitem__)
    total = sum(times.values())
    out.caption = (
        f"binding: {worst}; a step takes at least {times[worst] * 1e3:.2f} ms, and "
        f"{total * 1e3:.2f} ms if nothing overlaps"
    )
    return out


def prediction(sizes: Sizes, layout: Layout, job: Job, chip: Machine) -> Table:
    """The cost model's step, part by part, with what it assumes."""
    plan = predict(sizes, layout, job, chip)
    out = Table(
        title=f"Predicted: {plan.seconds * 1e3:.1f} ms a step, "
        f"{plan.utilisation:.1%} of peak, bound by {plan.bottleneck}"
    )
    for name in ("spent on", "ms", "memory for", "GB"):
        out.add_column(name, justify="right" if name in ("ms", "GB") else "left")
    left = [(name, f"{x * 1e3:.2f}") for name, x in plan.parts.items()]
    right = [(name, f"{x / 1e9:.2f}") for name, x in plan.memory.items()]
    for i in range(max(len(left), len(right))):
        row = [*(left[i : i + 1] or [("", "")]), *(right[i : i + 1] or [("", "")])]
        out.add_row(*row[0], *row[1])
    out.caption = assumptions(chip)
    return out
