"""What a Pallas kernel moves, read from its grid and index maps; any kernel, any host.

A pipelined kernel fetches an input block when its place differs from that of the step
before, and writes an output block back when its place changes, and at the end. Places
are functions of the step and of the scalar-prefetch operands, so that they can be
computed without the kernel's body: nothing is run on the device but the few operations
that make those operands.

Counted as the TPU pipeline moves: what hangs over an array's edge does not travel.
Operands in `pl.ANY`, which a body copies by itself, are listed in `unseen`. Not for
Triton kernels: their bodies read parts of a block through pointers.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.experimental import pallas as pl
from jax.extend import core


class Operand(NamedTuple):
    """One operand of a kernel; counts are of one run of it."""

    name: str  # as Pallas names it: "args[0]", "outputs[1]"
    output: bool
    block: tuple[int, ...]
    dtype: str
    moves: int  # blocks fetched or written
    elements: int
    bytes: int


class Kernel(NamedTuple):
    """One `pl.pallas_call` of a program."""

    name: str
    grid: tuple[int, ...]
    runs: int  # of the kernel in one run of the program
    operands: tuple[Operand, ...]
    tables: int  # bytes of scalar-prefetch operands, read once a run
    unseen: tuple[str, ...]  # operands that the body copies by itself: not counted

    @property
    def read(self) -> int:
        """Bytes that one run reads, tables included."""
        return self.tables + sum(x.bytes for x in self.operands if not x.output)

    @property
    def written(self) -> int:
        return sum(x.bytes for x in self.operands if x.output)


Later = Callable[[], Any]  # a value that is computed when it is asked for


def kernels(function: Callable, *args, **options) -> list[Kernel]:
    """Every Pallas call of `function(*args, **options)`, in program order.

    Arguments are concrete arrays: those from which grids and scalar-prefetch operands
    are computed decide what is fetched; the others only lend their shapes.

    Raises:
      ValueError: a table or a grid depends on another kernel's result, on the turn of a
        loop, or on a device's part of an array; or a kernel runs in a loop of unknown
        length.
      NotImplementedError: a block of a kind that this meter does not know.
    """
    program = jax.make_jaxpr(functools.partial(function, **options))(*args)
    inputs = [functools.partial(_itself, x) for x in jax.tree.leaves(args)]
    return list(_kernels(program, inputs, 1)[0])


def _itself(x):
    return x


def _kernels(program, inputs: Sequence[Later], runs: int):
    """Kernels of a jaxpr, closed or open, and its outputs, to be computed later."""
    consts = [functools.partial(_itself, x) for x in getattr(program, "consts", ())]
    jaxpr = getattr(program, "jaxpr", program)
    known = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True)
    )
    found: list[Kernel] = []

    def value(atom) -> Later:
        if isinstance(atom, core.Literal):
            return functools.partial(_itself, atom.val)
        return known[atom]

    for eqn in jaxpr.eqns:
        more, outputs = _equation(jaxpr, eqn, [value(x) for x in eqn.invars], runs)
        found += more
        known |= zip(eqn.outvars, outputs, strict=True)
    return found, [value(x) for x in jaxpr.outvars]


def _equation(jaxpr, eqn, inputs: Sequence[Later], runs: int):
    name, outputs = eqn.primitive.name, len(eqn.outvars)
    if name == "pallas_call":
        unknown = [_unknown(f"the result of kernel {eqn.params['name']}")] * outputs
        return [_measured(eqn.params, inputs, runs)], unknown
    inside = list(_inside(eqn.params))
    if not any(map(_holds_kernel, inside)):
        return [], _evaluated(jaxpr, eqn, inputs)
    if name == "scan":
        fixed = inputs[: eqn.params["num_consts"]]
        turning = [_unknown("the turn of a loop")] * (len(inputs) - len(fixed))
        length = eqn.params["length"]
        found, _ = _kernels(inside[0], [*fixed, *turning], runs * length)
        return found, [_unknown("the result of a loop of kernels")] * outputs
    if name == "cond":
        branch = eqn.params["branches"][int(inputs[0]())]
        return _kernels(branch, inputs[1:], runs)
    if name == "while":
        raise ValueError(
            "a kernel runs in a while loop, whose length is unknown; count it in a "
            "function without the loop"
        )
    if name == "shard_map":
        inputs = [_unknown("a device's part of an array")] * len(inputs)
    body = eqn.params.get("call_jaxpr", inside[0])
    return _kernels(body, inputs, runs)


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    for x in params.values():
        for y in x if isinstance(x, tuple | list) else (x,):
            if hasattr(y, "eqns") or hasattr(y, "jaxpr"):
                yield y


def _holds_kernel(program) -> bool:
    jaxpr = getattr(program, "jaxpr", program)
    return any(
        eqn.primitive.name == "pallas_call"
        or any(map(_holds_kernel, _inside(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _unknown(what: str) -> Later:
    def ask():
        raise ValueError(
            f"a table or a grid depends on {what}: give the kernel's own function and "
            "concrete arrays"
        )

    return ask


def _evaluated(jaxpr, eqn, inputs: Sequence[Later]) -> list[Later]:
    """The outputs of an equation without kernels, computed together, once."""

    @functools.cache
    def run():
        places = [i for i, x in enumerate(eqn.invars) if isinstance(x, core.Var)]
        invars = list(dict.fromkeys(eqn.invars[i] for i in places))
        given = {eqn.invars[i]: inputs[i] for i in places}
        names = jaxpr.debug_info.with_unknown_names()
        alone = core.Jaxpr((), invars, eqn.outvars, [eqn], eqn.effects, names)
        return eval_jaxpr(alone, (), *(given[x]() for x in invars))

    return [lambda i=i: run()[i] for i in range(len(eqn.outvars))]


def _measured(params, inputs: Sequence[Later], runs: int) -> Kernel:
    mapping = params["grid_mapping"]
    bounds = mapping.num_dynamic_grid_bounds
    sizes = iter(int(x()) for x in inputs[:bounds])
    grid = tuple(g if isinstance(g, int) else next(sizes) for g in mapping.grid)
    tables = [x() for x in inputs[bounds : bounds + mapping.num_index_operands]]
    here = [_in_place(x) for x in mapping.block_mappings]
    numbered = enumerate(mapping.block_mappings)
    moved = [(i, x) for i, x in numbered if not here[i]]
    places = _places([x for _, x in moved], grid, tables)
    operands = [
        _operand(x, i >= mapping.num_inputs, found)
        for (i, x), found in zip(moved, places, strict=True)
    ]
    unseen = [
        str(x.origin)
        for x, stays in zip(mapping.block_mappings, here, strict=True)
        if stays
    ]
    size = sum(np.asarray(x).nbytes for x in tables)
    return Kernel(str(params["name"]), grid, runs, tuple(operands), size, tuple(unseen))


def _in_place(block) -> bool:
    """Left in slow memory for the body to copy from."""
    return str(block.transformed_block_aval.memory_space) in ("any", "hbm", "host")


def _places(blocks, grid, tables) -> list[np.ndarray]:
    """[steps, axes] of each block: where it starts, in elements."""
    steps = np.indices(grid, np.int32).reshape(len(grid), math.prod(grid)).T
    if not len(steps):
        return [np.zeros((0, len(x.block_shape)), np.int64) for x in blocks]

    def starts(step):
        found = [
            x.compute_start_indices_interpret(tuple(step), *tables) for x in blocks
        ]
        return [jnp.array(x, jnp.int32) for x in found]

    return [np.asarray(x) for x in jax.jit(jax.vmap(starts))(steps)]


def _operand(block, output: bool, places: np.ndarray) -> Operand:
    array, sizes = block.array_aval, []
    for dim in block.block_shape:
        if isinstance(dim, pl.Squeezed):
            sizes.append(1)
        elif isinstance(dim, pl.Blocked | pl.Element):
            sizes.append(dim.block_size)
        else:
            raise NotImplementedError(
                f"traffic: {block.origin} has a {type(dim).__name__} dimension; known "
                "are Blocked, Element and Squeezed ones"
            )
    other = (places[1:] != places[:-1]).any(1)
    ends = np.ones(min(1, len(places)), bool)
    # an input comes when its place is new, an output leaves before the next place
    start = places[np.concatenate([other, ends] if output else [ends, other])]
    length = np.minimum(start + sizes, array.shape) - np.maximum(start, 0)
    elements = int(np.maximum(length, 0).astype(np.int64).prod(1).sum())
    return Operand(
        str(block.origin),
        output,
        tuple(sizes),
        array.dtype.name,
        len(start),
        elements,
        -(-elements * jax.dtypes.itemsize_bits(array.dtype) // 8),
    )
