"""Train a transformer with a bottleneck on text, on any mesh; stop and go on anywhere.

    python scripts/train.py --workdir=/tmp/waist                # 3 minutes, 2 CPU cores
    python scripts/train.py --workdir=/tmp/waist --mesh=data=2,fsdp=2,tensor=2

Without flags: 3 blocks of width 192 with a codebook of 1024 codes in the middle learn
the Python standard library's source, byte by byte, to about 2.5 bits per byte. A workdir
that holds a checkpoint is continued, on the same mesh or another. Exit codes: 0, also
after SIGTERM or SIGINT, which save first; 1 for a loss that is not finite; 2 for bad
input.
"""

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
from jax.experimental import multihost_utils
from narrows.data.text import batches, load_corpus, windows
from narrows.optim.table import OPTIMIZERS, make_optimizer, warmup_cosine
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.layout import Layout, make_mesh, place_batch, process_rows
from narrows.parallel.step import abstract_state, create_state, make_step
from narrows.scripts import command, results
from narrows.scripts.model_flags import (
    config_of,
    define_model,
    model_record,
    restore_parts,
)
from narrows.scripts.runlog import RunLog, bits_per_byte, draw_run, read_rows
from narrows.scripts.trained import model_of, sample_text
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("workdir", None, "checkpoints, log and figure (required)", flag_values=f)
    text("data", None, "text file or folder; default: Python's library", flag_values=f)
    text("tokenizer", "bytes", "or a folder with GPT-2's vocabulary", flag_values=f)
    integer("seed", 0, "of parameters and data order", 0, flag_values=f)
    integer("steps", 300, "updates, and the schedule's length", 1, flag_values=f)
    integer(
        "stop_at", None, "stop early, with the schedule of --steps", 1, flag_values=f
    )
    integer("batch_size", 16, "rows of the global batch", 1, flag_values=f)
    integer("seq_len", 256, "tokens per row", 1, flag_values=f)
    integer("microbatches", 1, "cut each batch and add gradients", 1, flag_values=f)
    flags.DEFINE_enum("optimizer", "adamw", list(OPTIMIZERS), "by name", flag_values=f)
    real("learning_rate", None, "peak; default 0.03 / width**0.5", 0.0, flag_values=f)
    integer(
        "warmup", None, "steps; default 5 % of --steps, at least 10", 0, flag_values=f
    )
    real("weight_decay", 0.1, "of kernels and embeddings", 0.0, flag_values=f)
    real("clip", 1.0, "global gradient norm", 0.0, flag_values=f)
    text("mesh", "", "e.g. data=2,fsdp=2,tensor=2; default: all on data", flag_values=f)
    integer("checkpoint_every", 100, "steps", 1, flag_values=f)
    integer("keep", 2, "newest checkpoints to keep, beside the best", 1, flag_values=f)
    integer("eval_every", 100, "steps", 1, flag_values=f)
    integer("eval_rows", 64, "windows of the validation split", 1, flag_values=f)
    text("profile_steps", None, "first:last, a trace for TensorBoard", flag_values=f)
    flags.DEFINE_bool("sample", True, "print a sample at the end", flag_values=f)
    define_model(f)
    command.define_processes(f)
    return f


def main(argv: Sequence[str]) -> int:
    f = define_flags()
    command.parse(f, argv, __doc__)
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stops.append(number))
    command.join_processes(f)
    chief = jax.process_index() == 0
    console = Console(quiet=not chief, highlight=False)

    with command.bad_input():
        if f.workdir is None:
            raise ValueError("workdir: give --workdir, where the run is kept")
        workdir = pathlib.Path(f.workdir).expanduser().absolute()
        layout = Layout.parse(f.mesh, devices=jax.device_count())
        mesh = make_mesh(layout)
        shard = process_rows(mesh, f.batch_size)
        rows = layout.data * layout.fsdp * f.microbatches
        if f.batch_size % rows:
            raise ValueError(
                f"microbatches: {f.microbatches} on {layout} cut a batch into {rows}, "
                f"which does not divide batch_size={f.batch_size}"
            )
        profile = profile_range(f.profile_steps)
        corpus = load_corpus(f.data, tokenizer=f.tokenizer)
        record = model_record(f, vocab_size=corpus.vocab_size, max_len=f.seq_len)
        parts = restore_parts(record)
        width = config_of(record).width
        rate = 0.03 / width**0.5 if f.learning_rate is None else f.learning_rate
        warmup = max(10, f.steps // 20) if f.warmup is None else f.warmup
        schedule = warmup_cosine(rate, steps=f.steps, warmup=warmup)
        tx = make_optimizer(
            f.optimizer, schedule, weight_decay=f.weight_decay, clip=f.clip
        )
        same = {  # a resumed run must agree in these, or its data would differ
            "corpus": corpus.hash,
            "model": record,
            "seed": f.seed,
            "batch_size": f.batch_size,
            "seq_len": f.seq_len,
        }
        meta = same | {
            "tokenizer": f.tokenizer,
            "optimizer": f.optimizer,
            "flags": f.flag_values_dict(),
            "mesh": str(layout),
            **results.provenance(),
        }
        checkpoints = Checkpoints(
            workdir / "checkpoints", keep=f.keep, best="validation"
        )
        if checkpoints.latest is None:
            state, first = create_state(parts.init, tx, f.seed, mesh), 0
        else:
            target = abstract_state(parts.init, tx, f.seed, mesh)
            state, stored = checkpoints.restore(target, expect=same)
            first = stored["data"]["next_index"]
        stream = batches(
            corpus,
            "train",
            batch_size=f.batch_size,
            seq_len=f.seq_len,
            seed=f.seed,
            shard=shard,
            start=first,
        )
        step = make_step(
            parts.loss,
            tx,
            layout,
            mesh,
            microbatches=f.microbatches,
            advance=parts.advance,
        )
        rates = np.asarray(jax.vmap(schedule)(np.arange(f.steps)))
        last = min(f.stop_at or f.steps, f.steps)
        log = RunLog(workdir, step=first) if chief else None
        if chief:
            (workdir / "run.json").write_text(json.dumps(meta, indent=1) + "\n")

    size = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(f"{corpus.describe()}\n{size:,} parameters on {layout}", markup=False)
    if first:
        console.print(f"resumed after step {first} of {last}")
    per_byte = corpus.bytes_per_token
    tokens = f.batch_size * f.seq_len
    clock = time.perf_counter()

    def settle(done: int, metrics: dict[str, jax.Array]) -> None:
        """Fetch and log the metrics of an update; refuse to go on from a broken one."""
        nonlocal clock
        got = {name: float(x) for name, x in jax.device_get(metrics).items()}
        nats, norm = got.pop("nats"), got.pop("grad_norm")
        now, clock = clock, time.perf_counter()
        if not math.isfinite(got["loss"]) or not math.isfinite(norm):
            good = checkpoints.latest
            where = (
                "none was saved"
                if good is None
                else workdir / "checkpoints" / str(good)
            )
            print(
                f"error: loss {got['loss']} and gradient norm {norm} at step {done} are "
                f"not finite; last good checkpoint: {where}; try a smaller "
                "--learning_rate or --clip",
                file=sys.stderr,
            )
            raise SystemExit(1)
        bits, speed = bits_per_byte(nats, per_byte["train"]), tokens / (clock - now)
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
            )
        bar.update(
            task,
            completed=done,
            bits=f"{bits:.3f}",
            speed=f"{speed:,.0f}",
            waist=f"{got['waist_bits']:.2f}",
        )

    def validate(done: int) -> float:
        """Nats per token over the first windows of the validation split."""
        nats = count = 0.0
        passed = windows(
            corpus,
            "validation",
            f.seq_len,
            batch_size=f.batch_size,
            limit=f.eval_rows,
        )
        index, shards = shard
        mine = slice(*(np.array([index, index + 1]) * f.batch_size // shards))
        for batch in passed:
            local = {name: rows[mine] for name, rows in batch.items()}
            sums, weight = jax.device_get(
                step.evaluate(state, place_batch(local, mesh))
            )
            nats, count = nats + float(sums["nats"]), count + float(weight)
        bits = bits_per_byte(nats / count, per_byte["validation"])
        if log:
            log.write(done, "validation", nats / count, bits_per_byte=bits)
        console.print(f"step {done}: validation {bits:.3f} bits per byte")
        return nats / count

    saved = first

    def save(done: int, validation: float | None) -> None:
        nonlocal saved
        if saved == done:
            return
        saved = done
        metrics = None if validation is None else {"validation": validation}
        checkpoints.save(
            done, state, meta | {"data": {"next_index": done}}, metrics=metrics
        )

    columns = (
        *Progress.get_default_columns()[:2],
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[bits]} bits/byte, waist {task.fields[waist]} bits"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    pending: tuple[int, dict] | None = None
    done = first
    with (
        checkpoints,
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        jax.transfer_guard("disallow"),
    ):
        task = bar.add_task(
            "train", total=last, completed=first, bits="-", waist="-", speed="-"
        )
        while done < last and not stop_asked(stops, done):
            if profile and done == profile[0]:
                jax.profiler.start_trace(workdir / "tensorboard")
            state, metrics = step.fused(state, place_batch(next(stream), mesh))
            done += 1
            if pending:
                settle(*pending)
            pending = (done, metrics)
            if profile and done == profile[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            check = done % f.eval_every == 0 or done == last
            if check or done % f.checkpoint_every == 0:
                settle(*pending)  # nothing broken is ever saved
                pending = None
                save(done, validate(done) if check else None)
                clock = time.perf_counter()
        if pending:
            settle(*pending)
        if done > first:
            save(done, None)
    if log:
        log.close()
        draw_run(read_rows(log.path)).savefig(workdir / "run.png", dpi=140)
    if stops:
        console.print(f"stopped at step {done} by {signal.Signals(stops[0]).name}")
    elif f.sample and jax.process_count() == 1:
        text = sample_text(model_of(state, record), f.tokenizer, "def ", seed=f.seed)
        console.print(text, markup=False)
    console.print(f"checkpoint {workdir / 'checkpoints' / str(done)}", soft_wrap=True)
    console.print(f"log        {workdir / 'metrics.jsonl'}", soft_wrap=True)
    console.print(f"figure     {workdir / 'run.png'}", soft_wrap=True)
    return 0


def profile_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (
        colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)
    ):
        raise ValueError(f"profile_steps: {text!r}, but write first:last, as in 10:13")
    return int(first), int(last)


def stop_asked(stops: list[int], done: int) -> bool:
    """Whether any process was told to stop; with several, asked every tenth step."""
    if jax.process_count() == 1:
        return bool(stops)
    if done % 10:
        return False
    told = multihost_utils.process_allgather(np.array(bool(stops)))
    if told.any() and not stops:
        stops.append(signal.SIGTERM)
    return bool(told.any())


if __name__ == "__main__":
    sys.exit(main(sys.argv))
