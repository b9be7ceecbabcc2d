"""The pipeline in one program: the numbers of the layers in a row, bytes and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.parallel import wire
from narrows.parallel.layout import BATCH, Layout, constrain, make_mesh
from narrows.parallel.pipeline import check_microbatches, cut, join, pipeline

LAYERS, D, ROWS = 8, 8, 16


def arguments(rows=ROWS):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w": jax.random.normal(keys[0], (LAYERS, D, D)) / D**0.5,
        "b": jax.random.normal(keys[1], (LAYERS, D)),
    }
    scale = jax.random.normal(keys[2], (D,))
    x = jax.random.normal(keys[3], (rows, D))
    return params, scale, x, jnp.arange(rows)


def layers(params, scale, x, turns):
    """Every row is scaled by its own side input, so that rows cannot be mixed up."""

    def layer(x, own):
        x = x + jnp.tanh(x @ own["w"] + own["b"]) * scale
        return x + 0.1 * jnp.sin(turns)[:, None], None

    return jax.lax.scan(layer, x, params)[0]


def cell(params, scale, x, turns, stage):
    """Says its turns, on the first stage, and their sum, on the second."""
    sums = jnp.where(stage == 1, turns.sum(), 0)
    return layers(params, scale, x, turns), jnp.where(stage == 0, turns, 0), sums


def gradients(function):
    """Value and gradient of a sum in which every element counts differently."""

    def total(params, scale, x, turns):
        y = function(params, scale, x, turns)
        y, *said = y if isinstance(y, tuple) else (y, None)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), (y, said)

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)


def staged(microbatches, remat=False):
    run = jax.checkpoint(cell) if remat else cell

    def whole(params, scale, x, turns):
        return pipeline(
            run, params, scale, x, turns, microbatches=microbatches, axes=(None,)
        )

    return whole


@pytest.mark.parametrize(
    ("layout", "microbatches", "remat"),
    [
        ("stage=2", 2, False),
        ("stage=2", 8, True),
        ("stage=4", 4, True),
        ("stage=4", 16, False),
        ("stage=8", 8, True),
        ("data=2,stage=4", 8, True),
        ("data=2,tensor=2,stage=2", 4, False),
    ],
)
def test_stages_and_microbatches_change_nothing(quick_jit, layout, microbatches, remat):
    layout = Layout.parse(layout)
    mesh = make_mesh(layout, jax.devices()[: layout.size])
    with jax.set_mesh(mesh):
        (_, (y, said)), got = quick_jit(gradients(staged(microbatches, remat)))(
            *arguments()
        )
    (_, (wanted_y, _)), wanted = gradients(layers)(*arguments())
    np.testing.assert_allclose(y, wanted_y, rtol=1e-6, atol=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        scale = jnp.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-6)
    rows, sums = said
    np.testing.assert_array_equal(rows, jnp.arange(ROWS))
    assert sums.shape == (microbatches,)
    assert sums.sum() == jnp.arange(ROWS).sum()


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 8), (4, 8), (8, 16)])
def test_bytes_equal_the_closed_form(stages, microbatches):
    """Two microbatches a tick and stage, m + S - 1 ticks, and the same backward."""
    layout = Layout(stage=stages)
    with jax.set_mesh(make_mesh(layout, jax.devices()[:stages])):
        params, scale, x, turns = arguments()

        def total(params, x):
            y, *_ = pipeline(
                lambda own, _, x, turns, stage: (layers(own, scale, x, turns), (), ()),
                params,
                (),
                x,
                turns,
                microbatches=microbatches,
                axes=(None,),
            )
            return y.sum()

        forward = jax.make_jaxpr(total)(params, x)
        both = jax.make_jaxpr(jax.value_and_grad(total, (0, 1)))(params, x)
    once = 2 * (microbatches + stages - 1) * 4 * ROWS // microbatches * D
    for jaxpr, times in ((forward, 1), (both, 2)):
        found = wire.jaxpr_collectives(jaxpr)
        assert all(c.exact for c in found)
        rows = wire.summary(found)
        assert rows.keys() == {("collective-permute", ("stage",))}
        assert rows["collective-permute", ("stage",)].wire_bytes == times * once


def test_recomputing_a_stage_saves_memory(quick_jit):
    """Kept: one input a tick, in place of everything inside the stage."""

    def temporary(remat):
        compiled = quick_jit(gradients(staged(8, remat))).lower(*arguments(128))
        return compiled.compile().memory_analysis().temp_size_in_bytes

    with jax.set_mesh(make_mesh(Layout(stage=2), jax.devices()[:2])):
        assert temporary(True) < 0.7 * temporary(False)


def test_cutting_moves_no_row_and_is_undone():
    x = jnp.arange(48).reshape(16, 3)
    np.testing.assert_array_equal(join(cut(x, 4)), x)
    mesh = make_mesh(Layout(data=2, fsdp=2), jax.devices()[:4])

    def there_and_back(x):
        pieces = constrain(cut(constrain(x, BATCH, None), 2), None, BATCH, None)
        return pieces, constrain(join(pieces), BATCH, None)

    with jax.set_mesh(mesh):
        run = jax.jit(there_and_back)
        pieces, back = run(x)
        assert not wire.collectives(run.lower(x).compile(), mesh)
    np.testing.assert_array_equal(back, x)
    assert sorted(pieces.ravel().tolist()) == sorted(x.ravel().tolist())


def test_what_does_not_divide_raises():
    check_microbatches(8, 16, stages=4, shards=2)
    with pytest.raises(ValueError, match=r"microbatches: 6, .* nearest that fits: 4"):
        check_microbatches(6, 16, stages=4, shards=2)
    with pytest.raises(ValueError, match="none fits"):
        check_microbatches(8, 6, stages=4, shards=2)
    params, scale, x, turns = arguments()
    run = functools.partial(pipeline, cell, params, scale, x[:15], turns[:15])
    with (
        jax.set_mesh(make_mesh(Layout(stage=3), jax.devices()[:3])),
        pytest.raises(ValueError, match=r"depth: \[8\] layers .* multiple of 3"),
    ):
        run(microbatches=3, axes=(None,))
