"""Train an agent that sees pictures of a room through a waist; stop and go on anywhere.

    python scripts/train_agent.py --workdir=/tmp/finder
    python scripts/train_agent.py --workdir=/tmp/ppo --teacher=reward --steps=800
    python scripts/train_agent.py --workdir=/tmp/finder --mesh=fsdp=8 --domain=shifted

Without flags an agent with a task codebook imitates the shortest paths to the thing
asked for. `--teacher=reward` is PPO: a step is a rollout of a whole episode in each row
and `--epochs` updates. `--displace` asks to carry one thing to another. A workdir that
holds a checkpoint is continued, on the same mesh or another. Exit codes: 0, also after
SIGTERM or SIGINT, which save first; 1 for a loss that is not finite; 2 for bad input.
"""

import functools
import json
import math
import signal
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx
from narrows.data.gridworld import PLAIN, SHIFTED, Gridworld
from narrows.models.agent import agent_parts
from narrows.models.waists import WAISTS, make_waist
from narrows.optim.table import warmup_cosine
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.layout import process_rows
from narrows.parallel.rules import WHOLE, Rule
from narrows.parallel.state import restore
from narrows.parallel.step import Program, abstract_state, create_state, make_step
from narrows.scripts import agents, command, results
from narrows.scripts.runlog import RunLog
from narrows.scripts.stopping import stop_asked
from rich.console import Console

DOMAINS = {"plain": PLAIN, "shifted": SHIFTED}
RULES = (  # the wide layers lie over fsdp, all else is small
    Rule("policy/./kernel", (None, "fsdp")),
    Rule("(policy/./bias|(compress|join|task|actor|critic)/.*|encoder)", WHOLE),
    Rule("waist/.*", WHOLE),
)


def define_flags() -> flags.FlagValues:
    f = flags.FlagValues()
    text, integer, real, enum, yes = (
        functools.partial(define, flag_values=f)
        for define in (
            flags.DEFINE_string,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_enum,
            flags.DEFINE_bool,
        )
    )
    text("workdir", None, "checkpoints and log (required)")
    enum("teacher", "expert", ["expert", "reward"], "imitation, or PPO")
    yes("displace", False, "carry one thing to another, not only find one")
    enum("domain", "plain", list(DOMAINS), "how rooms are drawn")
    enum("waist", "task_codebook", sorted(WAISTS), "bottleneck layer")
    integer("codes", 128, "for each index of the waist", 2)
    integer("code_width", 10, "numbers in a code", 1)
    real("dropout", 0.1, "chance that a code of a task codebook drops out", 0.0, 1.0)
    integer("seed", 0, "of parameters and rooms", 0)
    integer("steps", 2000, "and the schedule's length", 1)
    integer("stop_at", None, "stop early, with the schedule of --steps", 1)
    integer("batch_size", 128, "rooms in a step", 1)
    integer("epochs", 4, "updates from a rollout", 1)
    real("learning_rate", 1e-2, "peak", 0.0)
    real("clip", 0.5, "global gradient norm", 0.0)
    text("mesh", "", "e.g. data=2,fsdp=4; default: all on data")
    integer("checkpoint_every", 500, "steps", 1)
    integer("keep", 2, "newest checkpoints to keep, beside the best", 1)
    integer("eval_every", 250, "steps", 1)
    integer("eval_rows", 512, "episodes", 1)
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
        for rows in (f.batch_size, f.eval_rows):
            process_rows(mesh, rows)  # refuses what does not divide
        options = {} if f.waist == "none" else {"codes": f.codes}
        if f.waist == "task_codebook":
            options |= {"code_width": f.code_width, "dropout": f.dropout}
        room = Gridworld(displace=f.displace, limit=24 if f.displace else 16)
        domain = DOMAINS[f.domain]
        waist = functools.partial(make_waist, f.waist, **options)
        parts = agent_parts(agents.config_for(room), waist)
        imitates = f.teacher == "expert"
        updates = 1 if imitates else f.epochs
        schedule = warmup_cosine(
            f.learning_rate, steps=f.steps * updates, warmup=50 * updates
        )
        tx = optax.chain(optax.clip_by_global_norm(f.clip), optax.adam(schedule))
        same = {  # a resumed run must agree in these
            name: f[name].value
            for name in ("teacher", "displace", "waist", "seed", "batch_size", "epochs")
        } | {"waist_options": options}
        meta = same | {
            "flags": f.flag_values_dict(),
            "mesh": str(layout),
            **results.provenance(),
        }
        folder = workdir / "checkpoints"
        checkpoints = Checkpoints(folder, keep=f.keep, best="failures")
        first = checkpoints.latest or 0
        last = min(f.stop_at or f.steps, f.steps)
        if checkpoints.latest is None:
            state = create_state(parts.init, tx, f.seed, mesh, RULES)
        else:
            target = abstract_state(parts.init, tx, f.seed, mesh, RULES)
            state, _ = restore(checkpoints, target, step=first, expect=same)
        objective = agents.imitation if imitates else agents.reinforcement
        step = make_step(
            agents.loss_of(parts, objective),
            tx,
            layout,
            mesh,
            advance=agents.advance_of(parts),
            rules=RULES,
        )
        log = RunLog(workdir, step=first) if chief else None
        if chief:
            (workdir / "run.json").write_text(json.dumps(meta, indent=1) + "\n")

    def keys(purpose: int, index, rows: int):
        key = jax.random.fold_in(jax.random.key(f.seed), purpose)
        return agents.row_keys(jax.random.fold_in(key, index), rows)

    def agent(state):
        return nnx.merge(parts.graph, state.params, state.rest)

    def learn_from(state, done):
        """The batch of the step that follows `done` others."""
        rows = keys(1, done, f.batch_size)
        if imitates:
            return agents.demonstrate(room, domain, rows)
        return agents.experience(agent(state), room, domain, rows)

    def failing(state):
        rows = keys(2, 0, f.eval_rows)  # the same episodes at every look
        return 1 - agents.successes(agent(state), room, domain, rows).mean()

    batch_of, failures = Program(learn_from, mesh), Program(failing, mesh)
    size = sum(x.size for x in jax.tree.leaves(state.params))
    console.print(f"{size:,} parameters on {layout}", markup=False)
    if first:
        console.print(f"resumed after step {first} of {last}")
    done = saved = first
    with checkpoints:
        while done < last and not stop_asked(stops, done):
            batch = batch_of(state, jnp.asarray(done))
            metrics: dict[str, jax.Array] = {}
            for _ in range(updates):
                state, metrics = step.fused(state, batch)
            done += 1
            got = {name: float(x) for name, x in jax.device_get(metrics).items()}
            loss = got.pop("loss")
            if not math.isfinite(loss + got["grad_norm"]):
                good = checkpoints.latest
                print(
                    f"error: loss {loss} at step {done}: not finite; last good "
                    f"checkpoint: {good and folder / str(good)}; try a smaller "
                    "--learning_rate or --clip",
                    file=sys.stderr,
                )
                return 1
            if log:
                log.write(done, "train", loss, **got)
            check = done % f.eval_every == 0 or done == last
            failed = float(failures(state)) if check else math.nan
            if check:
                console.print(f"step {done}: {100 * (1 - failed):.1f} % succeed")
                if log:
                    log.write(done, "validation", failed, success=1 - failed)
            if check or done % f.checkpoint_every == 0:
                found = {"failures": failed} if check else None
                checkpoints.save(done, state, meta, metrics=found)
                saved = done
        if saved < done:
            checkpoints.save(done, state, meta)
    if log:
        log.close()
    if stops:
        console.print(f"stopped at step {done} by {signal.Signals(stops[0]).name}")
    console.print(f"checkpoint {folder / str(done)}", soft_wrap=True)
    console.print(f"log        {workdir / 'metrics.jsonl'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
