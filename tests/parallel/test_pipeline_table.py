"""Schedules as executed: the gradients of a row of layers, and the memory promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.parallel import wire
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.pipeline_table import BACKWARD, compile_table, value_and_grad
from narrows.parallel.schedules import make_schedule

D, ROWS = 8, 2
NAMES = ("one_f_one_b", "gpipe")


def cell(params, x):
    return x + jnp.tanh(x @ params["w"] + params["b"])


def loss(head, y, target):
    return (jnp.sin(y @ head) * target).sum()


def arguments(devices, chunks, microbatches, rows=ROWS):
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (chunks, devices)
    params = {
        "w": jax.random.normal(keys[0], (*shape, D, D)) / (2 * D**0.5),
        "b": jax.random.normal(keys[1], (*shape, D)),
    }
    head = jax.random.normal(keys[2], (D, 3)) / 8  # or sin would enlarge rounding
    x = jax.random.normal(keys[3], (microbatches, rows, D))
    target = jax.random.normal(keys[4], (microbatches, rows, 3))
    return params, head, x, target


def in_a_row(params, head, x, targets):
    stages = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), params)
    y = jax.lax.scan(lambda x, own: (cell(own, x), None), x, stages)[0]
    return jax.vmap(loss, (None, 0, 0))(head, y, targets).sum()


@pytest.mark.parametrize(
    ("name", "devices", "microbatches", "chunks"),
    [
        ("gpipe", 4, 6, 1),
        ("one_f_one_b", 4, 6, 1),
        ("one_f_one_b", 2, 1, 1),
        ("interleaved", 4, 8, 2),
        ("interleaved", 2, 4, 3),
    ],
)
def test_gradients_are_those_of_the_row(quick_jit, name, devices, microbatches, chunks):
    table = compile_table(make_schedule(name, devices, microbatches, chunks))
    batch = arguments(devices, chunks, microbatches)
    with jax.set_mesh(make_mesh(Layout(stage=devices), jax.devices()[:devices])):
        got = quick_jit(value_and_grad(cell, loss, table))(*batch)
    total, wanted = jax.value_and_grad(in_a_row, (0, 1, 2))(*batch)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves((total, *wanted)), strict=True)
    for a, b in pairs:
        scale = jnp.abs(b).max()
        # both are rounded, over as many as eight stages: 1e-6 each
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=2e-6)


def test_slots_are_as_many_as_the_schedule_keeps():
    """But for the first stage, whose inputs are those of the pipeline."""
    for name, p, m, v in (
        ("gpipe", 4, 8, 1),
        ("one_f_one_b", 4, 32, 1),
        ("one_f_one_b", 8, 8, 1),
        ("interleaved", 4, 8, 2),
    ):
        table = compile_table(make_schedule(name, p, m, v))
        most = {"gpipe": m, "one_f_one_b": p, "interleaved": 2 * (p - 1) + p + 1}[name]
        assert table.slots[0] <= most
        assert (table.kind == BACKWARD).sum() == m * p * v
    deep = [compile_table(make_schedule("one_f_one_b", 4, m, 1)) for m in (8, 32)]
    assert deep[0].slots == deep[1].slots


def temporary(name, microbatches, quick_jit):
    table = compile_table(make_schedule(name, 4, microbatches, 1))
    shapes = arguments(4, 1, microbatches, rows=64)
    compiled = quick_jit(value_and_grad(cell, loss, table)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_1f1b_keeps_no_more_for_more_microbatches(quick_jit):
    """What is kept beside arguments and gradients; GPipe keeps each one's input.

    The gradient of x, as large as x, is summed in place and counted apart.
    """
    step = 4 * 64 * D  # bytes of one microbatch's input
    with jax.set_mesh(make_mesh(Layout(stage=4), jax.devices()[:4])):
        few, many = (
            {name: temporary(name, m, quick_jit) / step for name in NAMES}
            for m in (8, 32)
        )
    # beside slots the table itself and the sum of d_x grow, alike for both
    grown = [many[name] - few[name] for name in NAMES]
    assert grown[1] - grown[0] == pytest.approx(32 - 8, abs=2)


def test_bytes_are_two_microbatches_a_tick():
    m, p = 8, 4
    table = compile_table(make_schedule("one_f_one_b", p, m, 1))
    assert len(table.kind) == 2 * (m + p - 1)
    batch = arguments(p, 1, m)
    with jax.set_mesh(make_mesh(Layout(stage=p), jax.devices()[:p])):
        jaxpr = jax.make_jaxpr(value_and_grad(cell, loss, table))(*batch)
    rows = wire.summary(wire.jaxpr_collectives(jaxpr))
    sent = rows["collective-permute", ("stage",)].wire_bytes
    assert sent == 2 * len(table.kind) * 4 * ROWS * D


def test_one_device_is_no_pipeline():
    with pytest.raises(ValueError, match=r"1 device; .* at least 2"):
        compile_table(make_schedule("gpipe", 1, 4, 1))
