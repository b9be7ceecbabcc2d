"""Plan a training step for machines that are not there: does it fit, and how fast.

    python scripts/plan.py --preset=llama_7b --topology=v5p:8x8x4 --mesh=fsdp=256
    python scripts/plan.py --preset=gpt_175b --machine=a100 --devices=1024 --search
    JAX_NUM_CPU_DEVICES=8 python scripts/plan.py --topology=cpu:8 --mesh=data=2,tensor=4

The real step (model, AdamW, sharding rules) is compiled ahead of time for the named
chips; tables say what a device keeps, moves and computes, beside the papers' closed
forms and the makers' link rates, and what a cost model predicts. --search compiles
nothing: it ranks all layouts by the cost model, and the rules of thumb beside them.
Two CPU cores take minutes for a real size; nothing else is needed. Exit code 2, and the
largest tensors, for a layout that does not fit.
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags
from narrows.models.language_model import model_parts
from narrows.models.pipelined import check_stages
from narrows.models.transformer import LLAMA_7B, TransformerConfig
from narrows.optim.table import make_optimizer, warmup_cosine
from narrows.parallel.layout import Layout, batch_sharding, make_mesh
from narrows.parallel.ledger import ledger
from narrows.parallel.pipeline import check_microbatches
from narrows.parallel.plan import compile_step, devices_of
from narrows.parallel.plan_machines import MACHINES, Machine, machine
from narrows.parallel.plan_model import Job, Sizes, refusals
from narrows.parallel.plan_search import Candidate, cost, rules_of_thumb, search
from narrows.parallel.sequence import check_order
from narrows.parallel.step import abstract_state, make_step
from narrows.scripts import command
from narrows.scripts.model_flags import config_of, define_model, model_record
from narrows.scripts.plan_tables import (
    assumptions,
    cost_table,
    memory_table,
    prediction,
)
from narrows.scripts.schedule_flags import define_schedule, schedule_of
from rich.console import Console
from rich.table import Table

GPT: dict = {
    "norm": "layer",
    "position": "learned",
    "mlp": "gelu",
    "bias": True,
    "tied": True,
    "vocab_size": 51200,
    "max_len": 2048,
}
PRESETS = {
    "llama_7b": LLAMA_7B,
    "gpt_22b": TransformerConfig(depth=48, width=6144, heads=48, **GPT),
    "gpt_175b": TransformerConfig(depth=96, width=12288, heads=96, **GPT),
    "gpt_1t": TransformerConfig(depth=128, width=25600, heads=160, **GPT),
}

# What libtpu asks a machine for, where there is no TPU.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer, yes = (
        functools.partial(define, flag_values=f)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool)
    )
    flags.DEFINE_enum(
        "preset", None, [*PRESETS], "a model by name; else by --depth", flag_values=f
    )
    text("topology", None, "v5p:8x8x4, v5e:4x4, cpu:8: what to compile for")
    text("mesh", "", "e.g. fsdp=64,tensor=4; default: all on data")
    integer("batch_size", None, "rows of the global batch; default 1 a device", 1)
    integer("seq_len", 2048, "tokens per row", 1)
    integer("vocab_size", 32768, "of a model by --depth", 2)
    integer("microbatches", None, "cut each batch; default 1, or one a stage", 1)
    yes("quick", False, "compile with less effort, to a program that needs more")
    yes("search", False, "rank layouts by the cost model; compiles nothing")
    integer("devices", None, "how many to search for; default: the topology's", 1)
    flags.DEFINE_enum(
        "machine", None, sorted(MACHINES), "default: the topology's", flag_values=f
    )
    integer("shown", 10, "rows of the search", 1)
    define_model(f)
    define_schedule(f)
    f.set_default("waist", "none")
    f.set_default("precision", "bfloat16")
    f.set_default("remat", "full")
    f.set_default("scan", True)
    return f


def main(argv: Sequence[str], console: Console | None = None) -> int:
    f = define_flags()
    command.parse(f, argv, __doc__)
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    for name, value in NO_TPU.items():
        os.environ.setdefault(name, value)
    with command.bad_input():
        config, chip = model_and_machine(f)
        if f.search:
            devices = f.devices or len(devices_of(f.topology or ""))
            console.print(searched(f, config, chip, devices))
            return 0
        devices = devices_of(f.topology)
        layout = Layout.parse(f.mesh, devices=len(devices))
        cuts = f.microbatches or layout.stage
        batch = f.batch_size or layout.size
        sizes = sizes_of(config, f.seq_len)
        job = job_of(config, batch, cuts, f)
        check(config, sizes, layout, job)
        start = time.process_time()
        program, state, rows, mesh = the_step(config, layout, devices, batch, cuts, f)
        compiled = compile_step(program, state, rows, memory=chip.memory, quick=f.quick)
    spent = time.process_time() - start
    count = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(
        f"{count / 1e9:.3f} G parameters on {layout} of {f.topology}; compiled in "
        f"{spent:.0f} s of CPU time{', quickly' if f.quick else ''}",
        highlight=False,
    )
    found = ledger(compiled, mesh)
    fits = found.memory.peak <= chip.memory
    console.print(memory_table(found, chip))
    console.print(cost_table(found, sizes, layout, job, chip))
    console.print(prediction(sizes, layout, job, chip))
    return 0 if fits else 2


def model_and_machine(f: flags.FlagValues) -> tuple[TransformerConfig, Machine]:
    """What the flags name; a preset keeps the flags' precision, remat and scan."""
    record = model_record(f, vocab_size=f.vocab_size, max_len=f.seq_len)
    config = config_of(record)
    if f.preset:
        preset = PRESETS[f.preset]
        config = dataclasses.replace(
            preset,
            max_len=max(f.seq_len, preset.max_len),
            dtype=config.dtype,
            remat=config.remat,
            scan=config.scan,
        )
    name = f.machine or (f.topology or "").partition(":")[0]
    if f.search and not (f.topology or (f.machine and f.devices)):
        raise ValueError("search: give --machine and --devices, or --topology")
    if not f.search and not f.topology:
        raise ValueError("topology: give --topology=v5p:8x8x4 or so, or --search")
    return config, machine("v5e" if name == "cpu" else name)


def sizes_of(config: TransformerConfig, positions: int) -> Sizes:
    """A model of `models/` in the planner's words."""
    return Sizes(
        layers=config.depth,
        width=config.width,
        heads=config.heads,
        vocabulary=config.vocab_size,
        positions=positions,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        mlp_width=config.mlp_width,
        gated=config.mlp == "gated",
        tied=config.tied,
        learned=config.position == "learned",
        biased=config.bias,
    )


def job_of(
    config: TransformerConfig, batch: int, microbatches: int, f: flags.FlagValues
) -> Job:
    """As this project's step does it: moments lie where parameters do."""
    loop = f.schedule in ("loop", "gpipe")
    return Job(
        batch=batch,
        microbatches=microbatches,
        chunks=f.chunks,
        schedule="gpipe" if loop else "one_f_one_b",
        recomputed=config.remat == "full" or not loop,
        activation=jnp.dtype(config.dtype).itemsize,
    )


def check(config, sizes: Sizes, layout: Layout, job: Job) -> None:
    """Raise ValueError for what the step itself would refuse, before it is traced."""
    shards = layout.data * layout.fsdp
    check_microbatches(job.microbatches, job.batch, stages=layout.stage, shards=shards)
    check_order("zigzag", sizes.positions, layout.seq)
    check_stages(config.depth, config.depth, layout.stage)
    if reasons := refusals(sizes, layout, job):
        raise ValueError(reasons[0])


def the_step(config, layout: Layout, devices, batch: int, cuts: int, f):
    """(program, state, batch, mesh) of the real training step, as shapes alone."""
    mesh = make_mesh(layout, devices)
    parts = model_parts(config, microbatches=cuts, **schedule_of(f, config, layout))
    tx = make_optimizer("adamw", warmup_cosine(1e-3, steps=1000, warmup=50))
    state = abstract_state(parts.init, tx, 0, mesh)
    step = make_step(
        parts.loss,
        tx,
        layout,
        mesh,
        microbatches=1 if layout.stage > 1 else cuts,
        advance=parts.advance,
    )
    rows = jax.ShapeDtypeStruct(
        (batch, f.seq_len), jnp.int32, sharding=batch_sharding(mesh)
    )
    return step.fused, state, {"tokens": rows, "targets": rows}, mesh


def searched(f, config: TransformerConfig, chip: Machine, devices: int) -> Table:
    """The best layouts by the cost model, and the one of the rules of thumb."""
    sizes = sizes_of(config, f.seq_len)
    job = job_of(config, f.batch_size or devices, 1, f)
    options = {"chunks": (1,), "rows": (1, 2, 4, 8)}
    found = search(sizes, devices, job, chip, **options)
    fitting = [c for c in found if not c.refused]
    thumb = rules_of_thumb(sizes, devices, job, chip, **options)
    out = Table(
        title=f"{len(found)} layouts of {devices} {chip.name}, {len(fitting)} fit"
    )
    for name in ("rank", "layout", "microbatches", "ms", "of peak", "GB", "bound by"):
        out.add_column(name, justify="left" if name == "layout" else "right")

    def add(rank: str, c: Candidate) -> None:
        assert c.plan is not None
        out.add_row(
            rank,
            str(c.layout),
            str(c.job.microbatches),
            f"{c.plan.seconds * 1e3:.1f}",
            f"{c.plan.utilisation:.1%}",
            f"{c.plan.bytes / 1e9:.1f}",
            c.plan.bottleneck,
        )

    for rank, candidate in enumerate(fitting[: f.shown], 1):
        add(str(rank), candidate)
    out.add_section()
    if f.mesh:
        layout = Layout.parse(f.mesh)
        mine = cost(
            sizes,
            layout,
            job_of(config, job.batch, f.microbatches or layout.stage, f),
            chip,
        )
        if mine.plan is None or mine.refused:
            raise ValueError(mine.refused)
        add("--mesh", mine)
    if thumb is not None:
        add("rules of thumb", thumb)
    if not fitting:
        least = min(
            (c for c in found if c.plan is not None),
            key=lambda c: c.plan.bytes if c.plan else 0.0,
            default=None,
        )
        said = f"; nearest, {least.layout}: {least.refused}" if least else ""
        raise ValueError(f"search: no layout of {devices} {chip.name} fits{said}")
    out.caption = assumptions(chip)
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv))
