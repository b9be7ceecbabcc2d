"""Layouts: what can be written, and that training does not depend on them.

The curves are those of a whole language model with its optimizer. Steps are compiled
without optimizations, since compiling is what costs here; with them the curves were
measured to agree just as well (5e-7) and the collectives to be the same.
"""

import functools
import itertools
import math
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.optim.table import make_optimizer, warmup_cosine
from narrows.parallel import wire
from narrows.parallel.layout import (
    Layout,
    constrain,
    make_mesh,
    on_each_device,
    place_batch,
    process_rows,
)
from narrows.parallel.step import abstract_state, create_state, make_step

STEPS = 50
STEPS_TOGETHER = 50  # of several processes, which wait for each other in every step
ROWS, LENGTH = 8, 16
V, D, H = 256, 32, 64  # vocabulary, width, hidden units
CONFIG = TransformerConfig(vocab_size=V, depth=2, width=D, heads=4, mlp_width=H)
CODES, CODE_WIDTH = 32, 8
WAISTS = {"none": {}, "codebook": {"codes": CODES, "code_width": CODE_WIDTH}}
TX = make_optimizer("adamw", warmup_cosine(0.01, steps=STEPS, warmup=5))
ACROSS = [  # on 8 devices
    ("data=8", "codebook"),
    ("fsdp=8", "codebook"),
    ("data=2,fsdp=2,tensor=2", "codebook"),
    ("data=2,fsdp=2,tensor=2", "none"),
    ("data=2,tensor=4", "codebook"),
    ("data=2,seq=4", "none"),
    ("fsdp=2,seq=2,tensor=2", "none"),
    ("data=2,tensor=2,stage=2", "codebook"),
    ("data=2,seq=2,stage=2", "none"),
]


class Run(NamedTuple):
    losses: np.ndarray  # of each step, without the waist's part and with it
    codes: float  # perplexity of the codes at the end
    wires: list  # collectives of a step


def text_batches():
    """Real text, the same in every process: {"tokens", "targets"} [b, t]."""
    with open(textwrap.__file__, "rb") as file:
        text = np.frombuffer(file.read(), np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(len(text) - LENGTH, size=(STEPS, ROWS))
    for start in starts:
        rows = text[start[:, None] + np.arange(LENGTH + 1)]
        yield {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


@functools.cache
def created(waist: str):
    """The state on one device; test_creation_... holds all layouts to its bits."""
    parts = model_parts(CONFIG, waist, waist_options=WAISTS[waist])
    return create_state(parts.init, TX, 0, make_mesh(Layout(), jax.devices()[:1]))


def start(parts, waist: str, mesh):
    if jax.process_count() > 1:
        return create_state(parts.init, TX, 0, mesh)
    target = abstract_state(parts.init, TX, 0, mesh)
    return jax.tree.map(
        lambda x, t: jnp.copy(jax.device_put(x, t.sharding)), created(waist), target
    )


def train(text: str, waist: str, steps: int = STEPS) -> Run:
    """A run of so many updates on a layout; all processes together."""
    layout = Layout.parse(text)
    mesh = make_mesh(layout, jax.devices()[: layout.size])
    options = {"waist_options": WAISTS[waist], "microbatches": 2 * layout.stage}
    parts = model_parts(CONFIG, waist, **options)
    state = start(parts, waist, mesh)
    step = make_step(parts.loss, TX, layout, mesh, advance=parts.advance)
    index, count = process_rows(mesh, ROWS)
    mine = slice(index * ROWS // count, (index + 1) * ROWS // count)
    compiled, losses, metrics = None, [], {}
    for batch in itertools.islice(text_batches(), steps):
        batch = place_batch({name: rows[mine] for name, rows in batch.items()}, mesh)
        compiled = compiled or step.fused.lower(state, batch).compile()
        state, metrics = compiled(state, batch)
        losses.append([metrics["nats"], metrics["loss"]])
    codes = float(metrics.get("waist_perplexity", 0.0))
    wires = wire.collectives(compiled, mesh)
    return Run(np.array(jax.device_get(losses)), codes, wires)


@pytest.fixture(scope="module")
def trained(quick_compilation):
    """`trained(layout, waist)`, each made once."""
    return functools.cache(train)


def farthest(run: Run, reference: Run) -> float:
    return np.max(np.abs(run.losses / reference.losses - 1))


@pytest.mark.parametrize(("layout", "waist"), ACROSS)
def test_a_layout_has_the_curve_of_one_device(trained, layout, waist):
    one, many = trained("data=1", waist), trained(layout, waist)
    assert one.losses[-1, 0] < 0.7 * one.losses[0, 0]  # it did learn
    assert waist == "none" or one.codes > 2  # and chose among codes on the way
    assert farthest(many, one) < 1e-5


def curve_of_this_process(layout, waist):
    """In a process of the cluster: the curve, which all hold."""
    return train(layout, waist, STEPS_TOGETHER).losses


@pytest.mark.parametrize(
    ("layout", "waist"),
    [
        ("data=4", "none"),
        # the training script's test of two processes has this pair's first ten steps
        pytest.param("data=2,tensor=2", "codebook", marks=pytest.mark.slow),
        pytest.param("seq=4", "none", marks=pytest.mark.slow),
        pytest.param("seq=2,stage=2", "none", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_curve_of_one_device(
    trained, two_processes, layout, waist
):
    one = trained("data=1", waist).losses[:STEPS_TOGETHER]
    for losses in two_processes(
        curve_of_this_process, layout=layout, waist=waist, timeout=300
    ):
        np.testing.assert_allclose(losses, one, rtol=1e-5)


# Numbers that a device moves in one step, by closed forms of the model's sizes.
TABLES = V * D  # of the embedding, and of the head
KERNELS = 2 * (4 * D * D + 3 * D * H)  # of two blocks: attention and gated mlp
MLPS = 2 * 3 * D * H
NORMS = 2 * 2 * D + D
WAIST = D + 2 * D * CODE_WIDTH  # norm, inward, outward
STATS = CODES + CODES * CODE_WIDTH  # count and total of each code
STREAM = ROWS * LENGTH * D  # activations between blocks, whole batch
TOKENS = ROWS * LENGTH
SPLIT = 2 * TABLES + KERNELS  # what lies over fsdp and tensor; the rest is whole
ALL = SPLIT + NORMS + WAIST

# Forward, each row-parallel product is summed over tensor: the look-up, attention and
# mlp of two blocks. Backward, the products with the transposed query, key, value, up
# and gate kernels of two blocks, and the head's.
TENSOR = 1 + 2 * 2 + 2 * 5 + 1
# A vocabulary over tensor: max, sum and target of every position's logits.
LOGITS = 3

# A ring of n devices sends 6 (n - 1) chunks of keys a layer; the first hop of the
# backward pass is that of the forward pass, which the compiler sees: two less.
RING = {n: 2 * (6 * (n - 1) - 2) for n in (2, 4)}

# A pipeline of 2 stages and 4 microbatches; every tick, each stage computes its block
# and passes on two microbatches, and the same backward.
CUTS = 4
TICKS = CUTS + 2 - 1

STAGES = KERNELS / 2 + 2 * D  # of one block, a stage's

GOLDEN = {
    ("data=1", "codebook"): {},
    ("data=8", "codebook"): {
        # the gradient, and the statistics of the codes
        ("all-reduce", ("data",)): ALL + STATS,
    },
    ("fsdp=8", "codebook"): {
        # every kernel and table once, before the product that takes it
        ("all-gather", ("fsdp",)): SPLIT / 8,
        # the gradient and the statistics; XLA:CPU knows no reduce-scatter and slices
        ("all-reduce", ("fsdp",)): ALL + STATS,
    },
    ("data=2,fsdp=2,tensor=2", "codebook"): {
        # every kernel and table; those of the head and the mlps once more, backward
        ("all-gather", ("fsdp",)): (SPLIT + TABLES + MLPS) / 4,
        ("all-reduce", ("tensor",)): (TENSOR * STREAM + LOGITS * TOKENS) / 4,
        # gradients of kernels and head: over fsdp, cut, then over data
        ("all-reduce", ("fsdp",)): (KERNELS + TABLES) / 2,
        ("all-reduce", ("data",)): (KERNELS + TABLES) / 4,
        # gradients of what fsdp does not cut, of the table before it is cut; statistics
        ("all-reduce", ("data", "fsdp")): TABLES / 2 + NORMS + WAIST + STATS,
    },
    ("data=2,fsdp=2,tensor=2", "none"): {
        ("all-gather", ("fsdp",)): (SPLIT + TABLES + MLPS) / 4,
        ("all-reduce", ("tensor",)): (TENSOR * STREAM + LOGITS * TOKENS) / 4,
        ("all-reduce", ("fsdp",)): (KERNELS + TABLES) / 2,
        ("all-reduce", ("data",)): (KERNELS + TABLES) / 4,
        ("all-reduce", ("data", "fsdp")): TABLES / 2 + NORMS,
    },
    ("data=2,tensor=4", "codebook"): {
        ("all-reduce", ("tensor",)): (TENSOR * STREAM + LOGITS * TOKENS) / 2,
        # the gradient of this device's heads, hidden units and vocabulary; statistics
        ("all-reduce", ("data",)): SPLIT / 4 + NORMS + WAIST + STATS,
    },
    ("data=2,seq=4", "none"): {
        ("all-reduce", ("data",)): SPLIT + NORMS,
        ("all-reduce", ("seq",)): SPLIT + NORMS,
        ("collective-permute", ("seq",)): RING[4] * STREAM / 8,
    },
    ("fsdp=2,seq=2,tensor=2", "none"): {
        # as on data=2,fsdp=2,tensor=2, but gradients are added over positions, not data
        ("all-gather", ("fsdp",)): (SPLIT + TABLES + MLPS) / 4,
        ("all-reduce", ("tensor",)): (TENSOR * STREAM + LOGITS * TOKENS) / 4,
        ("all-reduce", ("fsdp",)): (KERNELS + TABLES) / 2 + TABLES / 2 + NORMS,
        ("all-reduce", ("seq",)): (KERNELS + TABLES) / 4 + TABLES / 2 + NORMS,
        ("collective-permute", ("seq",)): RING[2] * STREAM / 8,
    },
    ("data=2,seq=2,stage=2", "none"): {
        ("all-reduce", ("data",)): STAGES,
        # gradients over positions: of a block in every tick, of the tables once
        ("all-reduce", ("seq",)): TICKS * STAGES + 2 * TABLES + D,
        ("all-reduce", ("stage", "data")): 2 * TABLES + D,
        ("collective-permute", ("seq",)): 6 * TICKS * STREAM / 4 / CUTS,
        ("collective-permute", ("stage",)): 4 * TICKS * STREAM / 4 / CUTS,
        # numbers of tokens and targets: rows to rows over stages, in zigzag order
        ("all-gather", ("stage",)): 2 * TOKENS / 4,
        ("collective-permute", ("stage", "data", "seq")): 2 * TOKENS / 16,
    },
    ("data=2,tensor=2,stage=2", "codebook"): {
        # look-up and head on a quarter of the rows; a block's sums in every tick
        ("all-reduce", ("tensor",)): (2 * STREAM + LOGITS * TOKENS) / 4
        + 7 * TICKS * STREAM / 2 / CUTS,
        # gradients of a stage's block, once a step and not once a tick
        ("all-reduce", ("data",)): KERNELS / 4 + 2 * D,
        # of what every stage has; of each microbatch statistics and four numbers
        ("all-reduce", ("stage", "data")): 2 * TABLES / 2
        + D
        + WAIST
        + CUTS * (STATS + 4),
        ("all-reduce", ("stage",)): TOKENS / 2,  # bits of the waist
        ("collective-permute", ("stage",)): 4 * TICKS * STREAM / 2 / CUTS,
    },
}


@pytest.mark.parametrize(("layout", "waist"), GOLDEN)
def test_a_step_moves_what_its_layout_needs(trained, layout, waist):
    """No activation is gathered or moved, and nothing travels twice unseen.

    Scalars (sums of the loss, squares of the gradient's norm) ride along; which of them
    ride together is the compiler's choice, so they are only bounded.
    """
    moved, scalars = {}, 0
    for c in trained(layout, waist).wires:
        assert c.exact
        tokens = "seq=" in layout and (c.dtype, c.count) == ("int32", 1)
        assert c.dtype == "float32" or tokens
        numbers = [math.prod(shape) for shape in c.shapes if shape]
        scalars += c.count * (len(c.shapes) - len(numbers))
        if numbers:
            key = c.kind, c.axes
            moved[key] = moved.get(key, 0) + c.count * sum(numbers)
    assert moved == GOLDEN[layout, waist]
    assert scalars < 100


def test_creation_gives_every_layout_the_same_bits_in_shards(quick_compilation):
    """And no device ever holds more than its shards."""
    parts = model_parts(CONFIG, "codebook", waist_options=WAISTS["codebook"])
    mesh = make_mesh(Layout(data=2, fsdp=2, tensor=2))
    target = abstract_state(parts.init, TX, 0, mesh)
    one, many = created("codebook"), create_state(parts.init, TX, 0, mesh)

    def check(a, b, wanted):
        assert a.dtype == b.dtype == wanted.dtype
        assert b.sharding.is_equivalent_to(wanted.sharding, b.ndim)
        here = wanted.sharding.shard_shape(b.shape)
        assert {shard.data.shape for shard in b.addressable_shards} == {here}
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(check, one, many, target)
    kernel = many.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    for moment in (many.opt[1][0].mu, many.opt[1][0].nu):
        assert moment["blocks"]["mlp"]["up"]["kernel"].sharding == kernel.sharding


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(data=8), Layout(data=2, fsdp=2, tensor=2, seq=3)]
)
def test_a_layout_reads_what_it_writes(layout):
    assert Layout.parse(str(layout)) == layout
    assert Layout.parse(f" {str(layout).replace(',', ' , ')} ") == layout


def test_no_layout_puts_all_devices_on_data():
    assert Layout.parse("", devices=6) == Layout(data=6)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data", "'data'"),
        ("data=", "'data='"),
        ("data=two", "'data=two'"),
        ("rows=2", "'rows=2'"),
        ("data=2,,fsdp=2", "''"),
        ("data=2,data=4", "'data' stands twice"),
        ("data=0", "data=0"),
        ("data=-1", "'data=-1'"),
    ],
)
def test_an_unreadable_layout_raises(text, named):
    with pytest.raises(ValueError, match="mesh") as error:
        Layout.parse(text)
    assert named in str(error.value)


@pytest.mark.parametrize("text", ["data=4", "data=16", "data=3,tensor=3"])
def test_a_layout_takes_all_devices_or_raises(text):
    with pytest.raises(ValueError, match=r"takes \d+ devices, but there are 8"):
        make_mesh(Layout.parse(text))


def test_rows_that_do_not_divide_raise():
    mesh = make_mesh(Layout(data=2, fsdp=2, tensor=2))
    assert process_rows(mesh, 8) == (0, 1)
    with pytest.raises(ValueError, match=r"batch_size: 6 .* multiple of 4"):
        process_rows(mesh, 6)


def rows_of_this_process(layout):
    """In a process of the cluster: its share, and the batch as the devices hold it."""
    mesh = make_mesh(Layout.parse(layout))
    index, count = process_rows(mesh, 8)
    rows = np.arange(8)[index * 8 // count : (index + 1) * 8 // count]
    placed = place_batch(rows, mesh)
    held = [np.asarray(shard.data).tolist() for shard in placed.addressable_shards]
    return (index, count), held


@pytest.mark.parametrize(
    ("layout", "shares", "held"),
    [
        ("data=4", [(0, 2), (1, 2)], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        # a tensor axis inside each process, then one across the processes
        ("data=2,tensor=2", [(0, 2), (1, 2)], [[[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2]),
        ("tensor=4", [(0, 1), (0, 1)], [[list(range(8))] * 2] * 2),
    ],
)
def test_each_process_reads_the_rows_its_devices_hold(
    two_processes, layout, shares, held
):
    found = two_processes(rows_of_this_process, layout=layout)
    assert [tuple(share) for share, _ in found] == shares
    assert [rows for _, rows in found] == held


def test_constraints_are_nothing_without_a_mesh_and_hold_on_one():
    x = jnp.arange(32.0).reshape(8, 4)

    def double(x):
        return constrain(2 * x, ("data", "fsdp"), "tensor")

    assert constrain(x, "data", None) is x
    assert on_each_device(double, in_axes=(("data", None),), out_axes=()) is double
    mesh = make_mesh(Layout(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.jit(double)(x)
    assert placed.sharding.spec == P(("data", "fsdp"), "tensor")
    np.testing.assert_array_equal(placed, 2 * x)


def test_a_function_runs_on_every_devices_own_block():
    x = jnp.arange(32.0).reshape(8, 4)
    seen = []

    def keep_shape(block):
        seen.append(block.shape)
        return block + 1

    with jax.set_mesh(make_mesh(Layout(data=4, tensor=2))):
        axes = ("data", "tensor")
        mapped = on_each_device(keep_shape, in_axes=(axes,), out_axes=axes)
        got = jax.jit(mapped)(x)
    assert set(seen) == {(2, 2)}
    np.testing.assert_array_equal(got, x + 1)
