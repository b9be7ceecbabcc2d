"""Train a transformer with a bottleneck on text, on any mesh; stop and go on anywhere.

    python scripts/train.py --workdir=/tmp/waist                # 4 minutes, 2 CPU cores
    python scripts/train.py --workdir=/tmp/waist --mesh=data=2,fsdp=2,tensor=2

Without flags: 3 blocks of width 192 with a codebook of 1024 codes in the middle learn
the Python standard library's source, byte by byte, to about 2.7 bits per byte. A
workdir that holds a checkpoint is continued, on the same mesh or another. Exit codes:
0, also after SIGTERM or SIGINT, which save first; 1 for a loss that is not finite; 2
for bad input.
"""

import functools
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from narrows.data.text import batches, load_corpus
from narrows.models.pipelined import check_stages
from narrows.parallel.checkpoint import ENGINES, summary
from narrows.parallel.layout import place_batch, process_rows
from narrows.parallel.pipeline import check_microbatches
from narrows.parallel.sequence import check_order
from narrows.parallel.step import abstract_state, create_state, mean_of_mine
from narrows.scripts import command, groups, results
from narrows.scripts.model_flags import (
    config_of,
    define_model,
    model_record,
    restore_parts,
)
from narrows.scripts.optimizer_flags import define_optimizer, optimizer_of
from narrows.scripts.profiling import profile_range, tracing
from narrows.scripts.runlog import COLUMNS, RunLog, bits_per_byte
from narrows.scripts.schedule_flags import define_schedule, schedule_of
from narrows.scripts.stopping import stop_asked
from narrows.scripts.trained import check_same_run, model_of, sample_text
from narrows.scripts.validation import validation_nats
from rich.console import Console
from rich.progress import Progress


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer, yes = (
        functools.partial(define, flag_values=f)
        for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool)
    )
    text("workdir", None, "checkpoints, log and figure (required)")
    text("data", None, "text file or folder; default: Python's library")
    text("tokenizer", "bytes", "or a folder with GPT-2's vocabulary")
    integer("seed", 0, "of parameters and data order", 0)
    integer("steps", 500, "updates, and the schedule's length", 1)
    integer("stop_at", None, "stop early, with the schedule of --steps", 1)
    integer("batch_size", 8, "rows of the global batch", 1)
    integer("seq_len", 256, "tokens per row", 1)
    integer("microbatches", None, "cut each batch; default 1, or one a stage", 1)
    text("mesh", "", "e.g. data=2,tensor=2,stage=2; default: all on data")
    integer("checkpoint_every", 100, "steps", 1)
    flags.DEFINE_enum(
        "checkpoint", "async", [*ENGINES], "when saves block", flag_values=f
    )
    integer("keep", 2, "newest checkpoints to keep, beside the best", 1)
    integer("eval_every", 100, "steps", 1)
    integer("eval_rows", 64, "windows of the validation split", 1)
    text("profile_steps", None, "first:last, updates to trace for TensorBoard")
    yes("sample", True, "print a sample at the end")
    define_optimizer(f)
    define_model(f)
    define_schedule(f)
    command.define_processes(f)
    return f


def main(argv: Sequence[str], devices: Sequence | None = None) -> int:
    """Train as argv says, on all devices unless some are given; the exit code."""
    return command.run_training(define_flags(), argv, __doc__, train, devices)


def train(f: flags.FlagValues, devices: Sequence, stops: list[int]) -> int:
    chief = jax.process_index() == 0
    console = Console(quiet=not chief, highlight=False)

    with command.bad_input():
        workdir, layout, mesh = command.place_of(f, devices)
        shard = process_rows(mesh, f.batch_size)
        cuts = f.microbatches or layout.stage
        rows = layout.data * layout.fsdp
        check_microbatches(cuts, f.batch_size, stages=layout.stage, shards=rows)
        check_order("zigzag", f.seq_len, layout.seq)
        corpus = load_corpus(f.data, tokenizer=f.tokenizer)
        record = model_record(f, vocab_size=corpus.vocab_size, max_len=f.seq_len)
        folder = workdir / "checkpoints"
        config = config_of(record)
        parts = restore_parts(
            record, microbatches=cuts, **schedule_of(f, config, layout)
        )
        if f.waist != "none":
            middle = config.depth // 2 if f.waist_at is None else f.waist_at
            check_stages(config.depth, middle, layout.stage)
        name, tx, schedule, make, rules, ask = optimizer_of(
            f, config.width, layout, mesh=mesh, parts=parts, folder=folder
        )
        same = {  # a resumed run must agree in these, or its data would differ
            "corpus": corpus.hash,
            "model": record,
            "seed": f.seed,
            "batch_size": f.batch_size,
            "seq_len": f.seq_len,
            "optimizer": name,
            "outer": f.outer,
        }
        source = f.data and str(pathlib.Path(f.data).expanduser().absolute())
        meta = same | {
            "tokenizer": f.tokenizer,
            "flags": f.flag_values_dict() | {"data": source},
            "mesh": str(layout),
            **results.provenance(),
        }
        checkpoints = ENGINES[f.checkpoint](folder, keep=f.keep, best="validation")
        first = checkpoints.latest or 0
        last = min(f.stop_at or f.steps, f.steps)
        traced = profile_range(f.profile_steps, first=first, last=last)
        if checkpoints.latest is None:
            state = create_state(parts.init, tx, f.seed, mesh, rules)
        else:
            check_same_run(folder, same)
            target = abstract_state(parts.init, tx, f.seed, mesh, rules)
            state, _, report = checkpoints.resume(target, step=first, expect=same)
            console.print(f"checkpoint: {summary(report)}", markup=False)
        stream = batches(
            corpus,
            "train",
            batch_size=f.batch_size,
            seq_len=f.seq_len,
            seed=f.seed,
            shard=shard,
            start=first,
        )
        step = make(
            parts.loss,
            tx,
            layout,
            mesh,
            microbatches=1 if layout.stage > 1 else cuts,
            advance=parts.advance,
            rules=rules,
        )
        update = checkpoints.gated(step)
        rates = np.asarray(jax.vmap(schedule)(np.arange(f.steps)))
        log = RunLog(workdir, step=first) if chief else None
        lost = groups.lost(workdir, jax.process_count()) if chief else ""
        note = groups.noting(workdir, active=f.outer != "none")
        if chief:
            (workdir / "run.json").write_text(json.dumps(meta, indent=1) + "\n")

    size = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(f"{corpus.describe()}\n{size:,} parameters on {layout}", markup=False)
    if first:
        console.print(f"resumed after step {first} of {last}", lost)
    per_byte = corpus.bytes_per_token
    tokens = f.batch_size * f.seq_len
    clock = time.perf_counter()

    def refuse(what: str, broken: int) -> None:
        """End the run: the state after update `broken` leads to what is not finite."""
        checkpoints.wait()
        good = max((step for step in checkpoints.steps if step < broken), default=None)
        said = f"{what}: not finite; last good checkpoint: "
        said += "none" if good is None else str(folder / str(good))
        if broken == checkpoints.latest:
            said += f"; delete {folder / str(broken)}, which leads here"
        print(
            f"error: {said}; try a smaller --learning_rate or --clip", file=sys.stderr
        )
        raise SystemExit(1)

    def settle(done: int, metrics: dict[str, jax.Array]) -> None:
        """Fetch and log the metrics of an update; refuse to go on from a broken one."""
        nonlocal clock
        got = mean_of_mine(metrics)
        nats, norm = got.pop("nats"), got.pop("grad_norm")
        now, clock = clock, time.perf_counter()
        if not math.isfinite(got["loss"] + norm):
            what = f"loss {got['loss']} and gradient norm {norm} at step {done}"
            refuse(what, done - 1)
        bits, speed = bits_per_byte(nats, per_byte["train"]), tokens / (clock - now)
        if got.get("compressed") and done == got["frozen_at"] + 1:
            console.print(f"step {done}: second moment frozen, gradients compressed")
        if log:
            log.write(
                done,
                "train",
                nats,
                bits_per_byte=bits,
                **{name: x for name, x in got.items() if name != "loss"},
                objective=got["loss"],
                grad_norm=norm,
                learning_rate=float(rates[done - 1]),
                tokens_per_s=speed,
                blocked_s=checkpoints.take_blocked(),
            )
        bar.update(
            task,
            completed=done,
            bits=f"{bits:.3f}",
            speed=f"{speed:,.0f}",
            waist=f"{got['waist_bits']:.2f}",
        )

    def validate(done: int, rows: int) -> float:
        """Nats per token of the state that is to be saved; refuse a broken one."""
        nats = validation_nats(
            step.evaluate,
            state,
            corpus,
            mesh,
            seq_len=f.seq_len,
            batch_size=f.batch_size,
            rows=rows,
            shard=shard,
        )
        if not math.isfinite(nats):
            refuse(f"validation loss {nats} after step {done}", done)
        return nats

    def save(done: int, **metrics: float) -> None:
        if done != checkpoints.latest:
            data = {"next_index": done}  # of the batch that comes next
            checkpoints.save(
                done, state, meta | {"data": data}, metrics=metrics or None
            )

    pending: tuple[int, dict] | None = None
    done = first
    with (
        checkpoints,
        Progress(*COLUMNS, console=console, disable=not console.is_terminal) as bar,
        tracing(traced, workdir / "tensorboard") as mark,
        jax.transfer_guard("disallow"),
    ):
        task = bar.add_task(
            "train", total=last, completed=first, bits="-", waist="-", speed="-"
        )
        while done < last and not stop_asked(stops, done, every=ask):
            mark(done, state)
            state, metrics = update(state, place_batch(next(stream), mesh))
            done += 1
            note(done)
            if pending:
                settle(*pending)
            pending = (done, metrics)
            check = done % f.eval_every == 0 or done == last
            if check or done % f.checkpoint_every == 0:
                settle(*pending)
                pending = None
                nats = validate(done, f.eval_rows if check else f.batch_size)
                if check:
                    bits = bits_per_byte(nats, per_byte["validation"])
                    console.print(f"step {done}: validation {bits:.3f} bits per byte")
                    if log:
                        log.write(done, "validation", nats, bits_per_byte=bits)
                save(done, **({"validation": nats} if check else {}))
                clock = time.perf_counter()
        mark(done, state)
        if pending:
            settle(*pending)
            save(done)
    if log:
        log.close()
        log.draw().savefig(workdir / "run.png", dpi=140)
    if stops:
        console.print(f"stopped at step {done} by {signal.Signals(stops[0]).name}")
    elif f.sample and jax.process_count() == 1:
        text = sample_text(model_of(state, record), f.tokenizer, "def ", seed=f.seed)
        console.print(text, markup=False)
    if done:
        console.print(f"checkpoint {folder / str(done)}", soft_wrap=True)
    console.print(f"log        {workdir / 'metrics.jsonl'}", soft_wrap=True)
    console.print(f"figure     {workdir / 'run.png'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
