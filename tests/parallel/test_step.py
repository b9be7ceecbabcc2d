"""The training step: no cut of the batch and no form of it changes what is learned.

The loss is a language model's with a codebook at its waist, on batches in which every
row has another number of positions that count.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrows.models.language_model import model_parts
from narrows.models.transformer import TransformerConfig
from narrows.parallel.layout import Layout, make_mesh, place_batch
from narrows.parallel.rules import Rule
from narrows.parallel.step import (
    Loss,
    create_state,
    make_step,
    state_shardings,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = TransformerConfig(vocab_size=32, depth=2, width=32, heads=2, mlp_width=64)
OPTIONS = {"codes": 16, "code_width": 4, "window": 4}
STEPS, ROWS, LENGTH = 6, 16, 12
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def exchange():
    """The mean over workers, as a transformation of gradients."""
    return optax.stateless(lambda grads, _: jax.lax.pmean(grads, "data"))


def batches():
    """Runs of one letter and its neighbours: something to learn in six steps."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        text = rng.integers(0, 8, (ROWS, 1)) + rng.integers(0, 3, (ROWS, LENGTH + 1))
        yield {
            "tokens": text[:, :-1].astype(np.int32),
            "targets": text[:, 1:].astype(np.int32),
            "mask": np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (ROWS, 1)),
        }


COMPILED = []  # seconds of each compilation


def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del kwargs
    if event.endswith("backend_compile_duration"):
        COMPILED.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(note)


def mesh_of(text: str):
    layout = Layout.parse(text)
    return layout, make_mesh(layout, jax.devices()[: layout.size])


def parts_of(**config):
    return model_parts(
        dataclasses.replace(CONFIG, **config), "codebook", waist_options=OPTIONS
    )


@functools.cache
def created(local: bool):
    """A fresh state on one device; steps take copies, since they donate."""
    tx = optax.chain(exchange(), ADAM) if local else ADAM
    state = create_state(parts_of().init, tx, 0, mesh_of("data=1")[1])
    return tx, state


def start(local, mesh):
    """The state of `created` where this mesh wants it."""
    tx, state = created(local)
    places = state_shardings(state, mesh)
    return tx, jax.tree.map(lambda x, s: jnp.copy(jax.device_put(x, s)), state, places)


@functools.cache
def run(text="data=1", *, halves=False, remat="none", **options):
    """Curves of every metric, the last state on the host, compilations by each step."""
    layout, mesh = mesh_of(text)
    tx, state = start(options.get("gradients") == "local", mesh)
    parts = parts_of(remat=remat)
    step = make_step(
        parts.loss,
        tx,
        layout,
        mesh,
        advance=parts.advance,
        **options,
    )
    curves, compiled = [], []
    for batch in batches():
        placed = place_batch(batch, mesh)
        if halves:
            state, metrics = step.update(state, *step.gradients(state, placed))
        else:
            state, metrics = step.fused(state, placed)
        curves.append(jax.device_get(metrics))
        compiled.append(len(COMPILED))
    curves = {name: np.array([m[name] for m in curves]) for name in curves[0]}
    return curves, jax.device_get(state._replace(key=state.step)), compiled


CASES = {
    "four microbatches, recomputed": {"microbatches": 4, "remat": "full"},
    "eight devices, in two halves": {"text": "data=8", "halves": True},
    "local gradients on three axes": {
        "text": "data=2,fsdp=2,tensor=2",
        "gradients": "local",
        "microbatches": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_curves_and_codebook_are_those_of_one_device(case):
    """To 1e-5: float32 sums in another order, through six steps of Adam."""
    expected, at_end, _ = run()
    curves, state, _ = run(**CASES[case])
    assert curves.keys() == expected.keys()
    local = CASES[case].get("gradients") == "local"
    for name, curve in curves.items():
        if not (local and name == "grad_norm"):  # that of the workers' own gradients
            np.testing.assert_allclose(curve, expected[name], rtol=1e-5, err_msg=name)
    assert state.rest["waist"].keys() == at_end.rest["waist"].keys()
    for name, value in state.rest["waist"].items():
        np.testing.assert_allclose(
            value, at_end.rest["waist"][name], rtol=1e-4, atol=1e-5, err_msg=name
        )
    assert int(state.step) == STEPS


def test_something_is_learned_and_nothing_compiles_twice():
    """Or equal curves would say little."""
    curves, state, compiled = run()
    assert curves["nats"][-1] < 0.8 * curves["nats"][0]
    assert np.all(np.isfinite(curves["loss"]))
    assert {value.dtype for value in curves.values()} == {np.dtype(np.float32)}
    assert np.ptp(curves["waist_bits"]) > 0.1
    assert int(state.rest["waist"]["steps"]) == STEPS
    for later in (compiled, run(**CASES["eight devices, in two halves"])[2]):
        assert later[0] > 0
        assert len(set(later)) == 1


def test_the_loss_is_the_mean_over_positions_of_nats_and_weighted_waist():
    curves, *_ = run()
    total = curves["nats"] + 0.25 * curves["waist_loss"]
    np.testing.assert_allclose(curves["loss"], total, rtol=1e-6)


# A loss of one number, for what needs no model: sum over rows of (w - x)^2 / 2.


def square(params, rest, batch, key):
    """Reports what it drew, too."""
    x, weight = batch["x"], batch["weight"]
    total = jnp.sum(weight * (params["w"] - x) ** 2) / 2
    drawn = jax.random.uniform(key) * weight.sum()
    return Loss(total, weight.sum(), {"drawn": drawn}, {"x": jnp.sum(weight * x)})


def tiny(**options):
    layout, mesh = mesh_of("data=1")
    rules = (Rule("w|x", None),)

    def init(_):
        return {"w": jnp.float32(1)}, {"x": jnp.float32(0)}

    def advance(_, rest, stats):
        return {"x": rest["x"] + stats["x"]}, {"seen": stats["x"]}

    options = {"advance": advance, "rules": rules} | options
    return (
        create_state(init, optax.sgd(0.5), 0, mesh, rules),
        make_step(square, optax.sgd(0.5), layout, mesh, **options),
    )


def rows(weight=(1.0, 1.0, 1.0, 1.0)):
    return {"x": jnp.arange(4.0), "weight": jnp.asarray(weight)}


def test_a_step_by_hand():
    state, step = tiny()
    state, metrics = step.fused(state, rows((1, 1, 0, 2)))
    # gradient of the mean: 1 - (0 + 1 + 2 * 3) / 4 = -0.75
    assert float(state.params["w"]) == 1.375
    assert float(state.rest["x"]) == 7.0
    assert float(metrics["loss"]) == (1 + 0 + 8) / 2 / 4
    assert float(metrics["grad_norm"]) == 0.75
    assert float(metrics["seen"]) == 7.0
    assert int(state.step) == 1


def test_evaluation_touches_nothing():
    state, step = tiny()
    before = jax.tree.map(jnp.copy, state)
    sums, weight = step.evaluate(state, rows())
    assert (float(sums["loss"]), float(weight)) == (3.0, 4.0)
    assert all(
        bool(jnp.all(a == b))
        for a, b in zip(*map(jax.tree.leaves, (state, before)), strict=True)
    )


def test_every_step_and_microbatch_draws_anew():
    state, step = tiny(microbatches=2)
    drawn = []
    for weight in ((1, 0, 1, 0), (0, 1, 0, 1), (1, 0, 1, 0)):  # one microbatch counts
        state, metrics = step.fused(state, rows(weight))
        drawn.append(float(metrics["drawn"]))
    assert len(set(drawn)) == 3
    state, step = tiny(microbatches=2)
    alone = [
        float(step.gradients(state, rows(w))[1].sums["drawn"])
        for w in ((1, 0, 1, 0), (0, 1, 0, 1))
    ]
    assert alone[0] != alone[1]  # of the same step


@pytest.mark.parametrize("gradients", ["mean", "local"])
def test_a_batch_of_padding_moves_no_parameter(gradients):
    state, step = tiny(gradients=gradients)
    state, metrics = step.fused(state, rows((0, 0, 0, 0)))
    assert float(state.params["w"]) == 1.0
    assert all(float(value) == 0 for value in metrics.values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gradients": "sum"}, "gradients: 'sum'"),
        ({"microbatches": 0}, "microbatches: 0"),
    ],
)
def test_wrong_arguments_raise_at_once(options, named):
    with pytest.raises(ValueError, match=named):
        tiny(**options)


def test_a_mesh_of_another_layout_raises():
    mesh = mesh_of("data=2")[1]
    with pytest.raises(ValueError, match="mesh: has axes"):
        make_step(square, optax.sgd(0.5), Layout(), mesh)


def test_rows_that_do_not_divide_raise_when_traced():
    state, step = tiny(microbatches=3)
    with pytest.raises(ValueError, match="microbatches: 3 do not divide the 4 rows"):
        step.fused(state, rows())
