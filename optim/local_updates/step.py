"""The training step of local updates: programs that meet nobody, and meetings.

`make_local_step` has the face of `parallel.step.make_step`, but its `fused` is a Python
function over several programs. The one of a step holds no collective over data at all.
A stale method's exchange is a program of its own, dispatched when a round has ended and
waited for when the next one has; no step takes what it returns. What is on its way is
an array of the state like any other, so a checkpoint waits for it and keeps it.

Of several CPU processes, a step that was dispatched by the thread that had dispatched
the exchange was seen to wait for it, whatever it takes. So where every process has one
device in the mesh a thread of its own dispatches exchanges, and they travel while steps
compute. Elsewhere one thread dispatches all: late, and not shown to be hidden.

Accelerators run one program after the other, so there a whole round must be one
program, `round`. In it the exchange is a ring of hops, some in every step, since it is
single sends that compilers let run beside other operations.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...parallel.layout import Layout
from ...parallel.ring_mean import ring_mean
from ...parallel.rules import TRANSFORMER, Rule, follow, shardings
from ...parallel.state import PerWorkerMean, own, specs, stacked
from ...parallel.step import Program, TrainState, counted, place, summed_gradients
from .rounds import Rounds, RoundsState, Worker

ALL, OWN = P(), P("data")  # equal on all workers; each worker's own, along an axis


class LocalStep(NamedTuple):
    local: Program  # (own, rest, step, key, batch) -> (own, step, metrics); donates own
    fused: Callable  # (state, batch) -> (state, metrics), with the meetings then due
    meet: Callable  # (state, k) -> state: fragment k meets
    round: Program  # (state, batches) -> (state, metrics): a meeting, then all steps
    evaluate: Callable  # (state, batch) -> (sums, weight), of x, where rounds start


def make_local_step(
    loss: Callable,
    rounds: Rounds,
    layout: Layout,
    mesh: Mesh,
    *,
    microbatches: int = 1,
    rules: Sequence[Rule] = TRANSFORMER,
) -> LocalStep:
    """The step of `rounds`, a worker on each part of the mesh's data axis.

    The state is the TrainState of `create_state(init, rounds, ...)`: `params` is x,
    `opt` a RoundsState. A worker may itself lie over fsdp and tensor. Metrics of a step
    are float32 [workers], each worker's own: their mean would have to travel. All but
    `evaluate` use up what they are given. `fused` and `meet` dispatch; `round` wants
    batches with a leading axis of `every` steps.

    Raises ValueError for a mesh of another layout and, when traced, for a waist that
    learns without gradients: its sums are over all workers in every step.
    """
    if dict(mesh.shape) != dataclasses.asdict(layout):
        raise ValueError(f"mesh: has axes {dict(mesh.shape)}, but layout is {layout}")
    gradients = summed_gradients(loss, microbatches)

    def on_workers(function, inputs, outputs):
        return jax.shard_map(
            function,
            in_specs=inputs,
            out_specs=outputs,
            axis_names={"data"},
            check_vma=False,  # a worker's gradients are its own: no automatic sum
        )

    def step(worker: Worker, rest, number, key, batch):
        """One worker's step, and its metrics."""
        key = jax.random.fold_in(key, number)
        key = jax.random.fold_in(key, lax.axis_index("data"))
        grads, report = gradients(worker.params, rest, batch, key)
        if jax.tree.leaves(report.stats):
            raise ValueError(
                "waist: learns from sums over all workers in every step, which local "
                "updates do not exchange; take one that does not, as none or fsq"
            )
        weight = counted(report.weight)
        grads = jax.tree.map(lambda g: g / weight, grads)
        metrics = {"loss": report.total, **report.sums}
        metrics = {name: value / weight for name, value in metrics.items()}
        metrics["grad_norm"] = optax.tree.norm(grads)
        return rounds.step(worker, grads), metrics

    def placed(mine: PerWorkerMean):
        like = jax.eval_shape(lambda x: jax.tree.map(lambda a: a[0], x), mine[0].params)
        return place(mine, follow(mine, like, shardings(like, mesh, rules)))

    def local(mine, rest, number, key, batch):
        def worker(mine, rest, number, key, batch):
            new, metrics = step(own(mine)[0], rest, number, key, batch)
            return stacked(PerWorkerMean((new, metrics)))

        run = on_workers(worker, (OWN, ALL, ALL, ALL, OWN), OWN)
        new, metrics = run(mine, rest, number, key, batch)[0]
        return placed(PerWorkerMean(new)), number + 1, metrics

    def depart(params, mine, k):
        def worker(params, mine):
            return stacked(PerWorkerMean(rounds.depart(params, own(mine)[0], k)))

        return on_workers(worker, (ALL, OWN), OWN)(params, mine)

    def exchange(d, memory, number, k):
        def worker(d, memory, number):
            mean, new = rounds.exchange(own(d)[0], own(memory), number, k)
            return mean, stacked(new)

        kept = specs(memory, "data")
        return on_workers(worker, (OWN, kept, ALL), (ALL, kept))(d, memory, number)

    def arrive(params, mine, d, anchor, k):
        def worker(params, mine, d, anchor):
            params, new, anchor = rounds.arrive(params, own(mine)[0], d, anchor, k)
            return params, stacked(PerWorkerMean(new)), anchor

        run = on_workers(worker, (ALL, OWN, ALL, ALL), (ALL, OWN, ALL))
        params, mine, anchor = run(params, mine, d, anchor)
        params = place(params, shardings(params, mesh, rules))
        return params, placed(mine), anchor

    def meeting(state: TrainState, k: int, depart, exchange, arrive) -> TrainState:
        """The three parts of a meeting, in the order of the method."""
        opt: RoundsState = state.opt
        number, arrived = opt.anchors[k].rounds, opt.arriving[k]
        d = depart(state.params, opt.own, k)
        if not rounds.stale:
            arrived, memory = exchange(d, opt.memory[k], number, k)
        params, mine, anchor = arrive(state.params, opt.own, arrived, opt.anchors[k], k)
        if rounds.stale:  # dispatched when the new round can already start
            arrived, memory = exchange(d, opt.memory[k], number, k)
        opt = RoundsState(
            mine,
            _with(opt.anchors, k, anchor),
            _with(opt.arriving, k, arrived) if rounds.stale else opt.arriving,
            _with(opt.memory, k, memory),
        )
        return state._replace(params=params, opt=opt)

    def program(function, donate):
        at = functools.cache(
            lambda k: Program(functools.partial(function, k=k), mesh, donate)
        )
        return lambda *arguments: at(arguments[-1])(*arguments[:-1])

    sent = program(exchange, (0, 1))
    if rounds.stale and mesh.devices.size == jax.process_count():
        sent = _dispatched_apart(sent)
    programs = program(depart, ()), sent, program(arrive, (0, 1, 2))

    def meet(state: TrainState, k: int) -> TrainState:
        return meeting(state, k, *programs)

    take, clock = Program(local, mesh, (0,)), _Clock()

    def fused(state: TrainState, batch):
        done = clock.read(state.step) + 1
        mine, step, metrics = take(
            state.opt.own, state.rest, state.step, state.key, batch
        )
        clock.note(step, done)
        state = state._replace(opt=state.opt._replace(own=mine), step=step)
        for k in rounds.due(done):
            state = meet(state, k)
        return state, metrics

    def whole_round(state: TrainState, batches):
        """A meeting and `every` steps; a stale method's exchange goes hop by hop."""
        if len(state.opt.anchors) > 1 or jax.tree.leaves(state.opt.memory):
            raise ValueError(
                "fragments, mean: a round in one program has one fragment, exchanged "
                "without compression; use `fused`"
            )
        sent = []  # d, where its exchange is to be hidden

        def put_off(d, memory, number, k):
            sent.append(d[0])
            return None, memory

        travel = put_off if rounds.stale else exchange
        state = meeting(state, 0, depart, travel, arrive)
        every = len(jax.tree.leaves(batches)[0])
        places = shardings(state.params, mesh, rules)
        ring = ring_mean(state.params, jax.tree.map(lambda s: s.spec, places), mesh)
        chunks: Any = ring.begin(sent[0]) if sent else ()
        each = -(-ring.hops // every)  # hops a step

        def one(carry, xs):
            (mine, number, chunks), (turn, batch) = carry, xs
            for hop in range(each if sent else 0):
                chunks = ring.hop(chunks, turn * each + hop)
            mine, number, metrics = local(mine, state.rest, number, state.key, batch)
            return (mine, number, chunks), metrics

        start = state.opt.own, state.step, chunks
        (mine, number, chunks), metrics = lax.scan(
            one, start, (jnp.arange(every), batches)
        )
        opt = state.opt._replace(own=mine)
        if sent:
            opt = opt._replace(arriving=(ring.end(chunks),))
        return state._replace(opt=opt, step=number), metrics

    @functools.partial(Program, mesh=mesh)
    def evaluate(state: TrainState, batch):
        out = loss(state.params, state.rest, batch, state.key)
        return {"loss": out.total, **out.sums}, out.weight

    def evaluate_alone(state: TrainState, batch):
        jax.block_until_ready(state.opt.arriving)  # two sums at a time would mix
        return evaluate(state, batch)

    return LocalStep(
        local=take,
        fused=fused,
        meet=meet,
        round=Program(whole_round, mesh, (0,)),
        evaluate=evaluate_alone,
    )


_messenger = concurrent.futures.ThreadPoolExecutor(1, "exchange")


def _dispatched_apart(program: Callable) -> Callable:
    """`program`, dispatched by the one thread that dispatches exchanges, in order."""

    def dispatch(*arguments):
        return _messenger.submit(program, *arguments).result()  # not yet arrived

    return dispatch


class _Clock:
    """Steps done, known to the host without waiting for a step it has dispatched."""

    def __init__(self):
        self.array, self.done = None, 0

    def read(self, step: jax.Array) -> int:
        if step is not self.array:  # a state that did not come from the last call
            self.done = int(jax.device_get(step))
        return self.done

    def note(self, step: jax.Array, done: int) -> None:
        self.array, self.done = step, done


def _with(parts: tuple, k: int, new) -> tuple:
    return (*parts[:k], new, *parts[k + 1 :])
