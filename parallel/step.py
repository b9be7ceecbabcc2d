"""The training step, as two halves (gradients, update) and their fusion.

`make_step(loss, tx, layout, mesh)` knows pytrees, never a model. A loss is a function

    loss(params, rest, batch, key) -> Loss

whose total, weight and sums are plain sums over the rows it was given, so that rows may
be cut into microbatches and workers in any way: the gradient is that of
sum(total) / sum(weight) over the whole global batch, and 0 where the weight is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .layout import BATCH, Layout, constrain
from .rules import (
    TRANSFORMER,
    Rule,
    check_every_axis_is_used,
    follow,
    shardings,
    worker_axis,
)
from .state import own, reports, specs, stacked


class Loss(NamedTuple):
    """Sums over the rows of a batch. Any object with these four names will do."""

    total: jax.Array  # float32 scalar, what is differentiated
    weight: jax.Array  # float32 scalar, the number of positions that count
    sums: dict[str, jax.Array]  # float32 scalars to report, per weight
    stats: Any = ()  # sums for `advance`, which sees them once a step


class TrainState(NamedTuple):
    """All that training must keep. Plain arrays; checkpoints read the fields' names."""

    params: Any  # float32
    rest: Any  # what is learned without gradients: code statistics
    opt: Any  # optax state
    step: jax.Array  # int32, updates made
    key: jax.Array  # typed key; step n draws from fold_in(key, n)


class Report(NamedTuple):
    """What the gradient half tells the update half, summed over the global batch."""

    total: jax.Array
    weight: jax.Array
    sums: dict[str, jax.Array]
    stats: Any


class Program:
    """A jitted function that is traced, lowered and called inside its mesh."""

    def __init__(self, function: Callable, mesh: Mesh, donate: Sequence[int] = ()):
        self.jitted = jax.jit(function, donate_argnums=tuple(donate))
        self.mesh = mesh

    def __call__(self, *arguments):
        with jax.set_mesh(self.mesh):
            return self.jitted(*arguments)

    def lower(self, *arguments):
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*arguments)


class Step(NamedTuple):
    gradients: Program  # (state, batch) -> (gradients, Report)
    update: Program  # (state, gradients, Report) -> (state, metrics); donates both
    fused: Program  # (state, batch) -> (state, metrics); donates the state
    evaluate: Program  # (state, batch) -> (sums, weight); touches nothing


def state_shardings(
    state: TrainState, mesh: Mesh, rules: Sequence[Rule] = TRANSFORMER
) -> TrainState:
    """Where every leaf of a state (arrays or shapes) lies; raises as `rules` does."""
    params = shardings(state.params, mesh, rules)
    check_every_axis_is_used(mesh, params, (*BATCH, "seq"))
    whole: Any = NamedSharding(mesh, P())
    return TrainState(
        params=params,
        rest=shardings(state.rest, mesh, rules),
        opt=follow(state.opt, state.params, params),
        step=whole,
        key=whole,
    )


def abstract_state(
    init: Callable, tx, seed: int, mesh: Mesh, rules: Sequence[Rule] = TRANSFORMER
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without an array: restore's target."""
    state = jax.eval_shape(lambda: _initial(init, tx, seed))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(state, mesh, rules),
    )


def create_state(
    init: Callable, tx, seed: int, mesh: Mesh, rules: Sequence[Rule] = TRANSFORMER
) -> TrainState:
    """A fresh state, every array born in its shards: none is ever whole on one device.

    init: key -> (params, rest). The numbers do not depend on the mesh.
    """
    target = abstract_state(init, tx, seed, mesh, rules)
    places = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(lambda: _initial(init, tx, seed), out_shardings=places)()


def _initial(init: Callable, tx, seed: int) -> TrainState:
    key = jax.random.key(seed)
    params, rest = init(jax.random.fold_in(key, 0))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, rest, tx.init(params), zero, jax.random.fold_in(key, 1))


def make_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    layout: Layout,
    mesh: Mesh,
    *,
    gradients: Literal["mean", "local"] = "mean",
    microbatches: int = 1,
    advance: Callable | None = None,
    rules: Sequence[Rule] = TRANSFORMER,
) -> Step:
    """The compiled step of a loss and an optax transformation on a mesh.

    gradients="mean": the global gradient, reduced by the partitioner.
    gradients="local": every gradient leaf gets a leading axis of workers (sharded over
        data, or over fsdp where data is one device) whose mean is the global gradient;
        `tx` runs with that axis name bound and must itself exchange them
        (`jax.lax.pmean`, or a compressed mean). Of its state it sees its own part of
        what `state.py` calls per-worker, and the whole of the rest. Over fsdp workers
        compute with whole parameters: give `rules` for that (`rules.whole_over`).
    microbatches: cuts the batch's rows; gradients, sums and stats are added in float32.
    advance(params, rest, stats) -> (rest, report): called once per update with the sums
        of `stats` over the global batch; `report` scalars join the metrics.

    Metrics are float32 scalars: loss (total per weight), grad_norm, every sum per
    weight, what the optimizer's state reports, and advance's report. Raises ValueError
    for a bad argument, at once or when traced.
    """
    if gradients not in ("mean", "local"):
        raise ValueError(
            f"gradients: {gradients!r}, but allowed are 'mean' and 'local'"
        )
    if microbatches < 1:
        raise ValueError(f"microbatches: {microbatches}, but it must be at least 1")
    if dict(mesh.shape) != dataclasses.asdict(layout):
        raise ValueError(f"mesh: has axes {dict(mesh.shape)}, but layout is {layout}")

    axis = worker_axis(mesh)
    bound = {axis} if mesh.shape[axis] > 1 else {"data", "fsdp"}
    summed = summed_gradients(loss, microbatches)

    def mean_gradients(state: TrainState, batch):
        key = jax.random.fold_in(state.key, state.step)
        grads, report = summed(state.params, state.rest, batch, key)
        grads = jax.tree.map(lambda g: g / counted(report.weight), grads)
        return place(grads, shardings(grads, mesh, rules)), report

    def local_gradients(state: TrainState, batch):
        def worker(params, rest, rows, key):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
            grads, report = summed(params, rest, rows, key)
            report = jax.lax.psum(report, axis)
            scale = mesh.shape[axis] / counted(report.weight)
            return jax.tree.map(lambda g: (g * scale)[None], grads), report

        key = jax.random.fold_in(state.key, state.step)
        return jax.shard_map(
            worker,
            in_specs=(P(), P(), P(axis), P()),
            out_specs=(P(axis), P()),
            axis_names=bound,
            check_vma=False,  # gradients must stay local: no automatic sum
        )(state.params, state.rest, batch, key)

    def apply(params, opt, grads):
        updates, opt = tx.update(grads, opt, params)
        norm = optax.tree.norm(grads)
        return optax.apply_updates(params, updates), opt, norm

    def apply_local(params, opt, grads):
        def worker(params, opt, grads):
            grads = jax.tree.map(lambda g: g[0], grads)
            params, opt, _ = apply(params, own(opt), grads)
            squares = jax.lax.pmean(optax.tree.norm(grads) ** 2, axis)
            return params, stacked(opt), jnp.sqrt(squares)

        places = specs(opt, axis)
        return jax.shard_map(
            worker,
            in_specs=(P(), places, P(axis)),
            out_specs=(P(), places, P()),
            axis_names=bound,
            check_vma=False,
        )(params, opt, grads)

    def update(state: TrainState, grads, report: Report):
        run = apply if gradients == "mean" else apply_local
        params, opt, norm = run(state.params, state.opt, grads)
        metrics = {"loss": report.total, **report.sums}
        weight = counted(report.weight)
        metrics = {name: value / weight for name, value in metrics.items()}
        metrics |= {"grad_norm": norm, **reports(opt)}
        rest = state.rest
        if advance is not None:
            rest, said = advance(state.params, rest, report.stats)
            metrics |= said
        new = TrainState(params, rest, opt, state.step + 1, state.key)
        return place(new, state_shardings(new, mesh, rules)), metrics

    take = mean_gradients if gradients == "mean" else local_gradients

    def fused(state: TrainState, batch):
        return update(state, *take(state, batch))

    def evaluate(state: TrainState, batch):
        out = loss(state.params, state.rest, batch, state.key)
        return {"loss": out.total, **out.sums}, out.weight

    return Step(
        gradients=Program(take, mesh),
        update=Program(update, mesh, donate=(0, 1)),
        fused=Program(fused, mesh, donate=(0,)),
        evaluate=Program(evaluate, mesh),
    )


def summed_gradients(loss: Callable, microbatches: int = 1) -> Callable:
    """(params, rest, batch, key) -> (gradients, Report) of the rows at hand, as sums.

    The rows are cut into microbatches, whose gradients and reports are added.
    """

    def summed(params, rest, batch, key):
        """Gradient and report of the rows at hand, microbatch by microbatch."""

        def one(carry, xs):
            index, rows = xs

            def total(params):
                out = loss(params, rest, rows, jax.random.fold_in(key, index))
                return out.total, Report(out.total, out.weight, out.sums, out.stats)

            grads, report = jax.grad(total, has_aux=True)(params)
            new = (grads, report)
            return (new if carry is None else jax.tree.map(jnp.add, carry, new)), None

        if microbatches == 1:
            return one(None, (0, batch))[0]
        cut = jax.tree.map(lambda x: _cut(x, microbatches), batch)
        first = jax.tree.map(lambda x: x[0], cut)
        shape = jax.eval_shape(lambda rows: one(None, (0, rows))[0], first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        return jax.lax.scan(one, zeros, (jnp.arange(microbatches), cut))[0]

    return summed


def mean_of_mine(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """A step's metrics on the host; where workers have their own, the mean of ours.

    Those of other processes are not asked for, so nothing waits for one.
    """
    mine = {
        name: [shard.data for shard in x.addressable_shards] if x.ndim else [x]
        for name, x in metrics.items()
    }
    return {
        name: float(np.mean(np.asarray(parts, np.float64).ravel()))
        for name, parts in jax.device_get(mine).items()
    }


def _cut(x: jax.Array, microbatches: int) -> jax.Array:
    """[b, ...] -> [m, b/m, ...]; microbatch j takes rows j, j+m, ..., so none moves."""
    if x.shape[0] % microbatches:
        raise ValueError(
            f"microbatches: {microbatches} do not divide the {x.shape[0]} rows at hand"
        )
    x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, BATCH)


def counted(weight: jax.Array) -> jax.Array:
    """1 for a batch of padding alone: its sums are 0, and 0 / 0 would spoil all."""
    return jnp.where(weight == 0, 1.0, weight)


def place(tree, places):
    """Ask that leaves lie at `places`; the identity on one device."""
    if jax.sharding.get_abstract_mesh().size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, places)
