"""Schedules of a whole language model: one curve, one gradient, the memory promised."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from narrows.models.language_model import model_parts
from narrows.models.scheduled import check_schedule
from narrows.models.transformer import TransformerConfig
from narrows.optim.table import make_optimizer
from narrows.parallel.layout import Layout, batch_sharding, make_mesh, place_batch
from narrows.parallel.step import abstract_state, create_state, make_step

CONFIG = TransformerConfig(
    vocab_size=128, depth=4, width=32, heads=4, mlp_width=64, scan=True
)
TX = make_optimizer("adamw", lambda step: 0.01)
ROWS, LENGTH = 32, 8


def made(layout: str, schedule: str, chunks=1, microbatches=8, config=CONFIG):
    shape = Layout.parse(layout)
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    parts = model_parts(
        config, microbatches=microbatches, schedule=schedule, chunks=chunks
    )
    return mesh, parts, make_step(parts.loss, TX, shape, mesh, advance=parts.advance)


def batch():
    rows = np.random.default_rng(0).integers(0, 128, (ROWS, LENGTH + 1), np.int32)
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def run(*arguments, **options):
    """(gradients of the first step, loss of three steps, of evaluation) as numpy."""
    mesh, parts, step = made(*arguments, **options)
    state = create_state(parts.init, TX, 0, mesh)
    rows = place_batch(batch(), mesh)
    gradients = jax.device_get(step.gradients(state, rows)[0])
    evaluated = step.evaluate(state, rows)[0]["nats"]
    losses = []
    for _ in range(3):
        state, metrics = step.fused(state, rows)
        losses.append(metrics["loss"])
    return gradients, np.array(jax.device_get(losses)), float(evaluated)


@pytest.fixture(scope="module")
def one(quick_compilation):
    return functools.cache(lambda tied: run("data=1", "loop", config=config(tied)))


def config(tied: bool) -> TransformerConfig:
    return dataclasses.replace(CONFIG, tied=tied)


@pytest.mark.parametrize(
    ("layout", "schedule", "chunks", "tied"),
    [
        ("data=2,tensor=2,stage=2", "one_f_one_b", 1, True),
        ("fsdp=2,stage=4", "gpipe", 1, False),
        ("data=2,fsdp=2,stage=2", "interleaved", 2, False),
    ],
)
def test_a_schedule_changes_neither_gradient_nor_curve(
    one, layout, schedule, chunks, tied
):
    """Embedding, head and all blocks, over data, fsdp and tensor as well."""
    wanted, losses, evaluated = one(tied)
    found, curve, also = run(layout, schedule, chunks, config=config(tied))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # a bias of keys has gradient 0 in theory; there is none here
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    np.testing.assert_allclose(curve, losses, rtol=1e-5)
    assert also == pytest.approx(evaluated, rel=1e-6)


def test_1f1b_keeps_a_stages_inputs_and_the_loop_all(quick_compilation):
    """Temporary memory against microbatches of one size; the loop recomputes, too."""
    small = dataclasses.replace(CONFIG, remat="full", width=64, mlp_width=64)
    size = 4 * 2 * LENGTH * 64  # bytes of a microbatch's stream

    def temporary(schedule, microbatches):
        mesh, parts, step = made("stage=4", schedule, 1, microbatches, small)
        state = abstract_state(parts.init, TX, 0, mesh)
        rows = jax.ShapeDtypeStruct(
            (2 * microbatches, LENGTH), np.int32, sharding=batch_sharding(mesh)
        )
        lowered = step.gradients.lower(state, {"tokens": rows, "targets": rows})
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    grown = {
        name: (temporary(name, 32) - temporary(name, 8)) / (24 * size)
        for name in ("one_f_one_b", "gpipe")
    }
    # a microbatch's input is kept or not; the rest (batch, its gradient) is alike
    assert grown["gpipe"] - grown["one_f_one_b"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "two_f"}, "allowed are loop"),
        ({"name": "gpipe", "stages": 1}, "stage=1"),
        ({"name": "gpipe", "seq": 2}, "ring over seq=2"),
        ({"name": "gpipe", "chunks": 2}, "one chunk a device"),
        ({"name": "interleaved", "chunks": 3}, "nearest that fits: 6"),
    ],
)
def test_what_cannot_be_scheduled_raises(arguments, said):
    given = {"depth": 8, "stages": 2, "chunks": 1, "seq": 1} | arguments
    with pytest.raises(ValueError, match=said):
        check_schedule(given.pop("name"), **given)


def test_a_waist_takes_the_loop():
    with pytest.raises(ValueError, match=r"waist is codebook.*schedule=loop"):
        model_parts(CONFIG, "codebook", schedule="one_f_one_b")
