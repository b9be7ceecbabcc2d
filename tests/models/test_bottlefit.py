"""A split student is its parts; what is frozen stays, what matches costs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models import bottlefit
from narrows.models.bottlefit import Parts
from narrows.models.image_classifier import WIDTHS
from narrows.models.split_payload import pack, unpack

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def student(channels=2):
    return bottlefit.split(
        bottlefit.student_modules(1, channels, 10, width=WIDTHS[2], rngs=nnx.Rngs(0))
    )


@functools.cache
def teacher():
    return bottlefit.split(bottlefit.teacher_modules(1, 10, rngs=nnx.Rngs(1)))


def batch(rows=6):
    images = jax.random.normal(jax.random.key(2), (rows, 32, 32, 1))
    graphs, parts = teacher()
    middle = run(graphs, parts, "front", images)
    seen = run(graphs, parts, "tail", middle)
    labels = jnp.arange(rows) % 10
    return {"images": images, "labels": labels, "middle": middle} | seen._asdict()


def run(graphs, parts, name, x):
    return bottlefit.call(graphs[name], parts.params[name], parts.stats[name], x)[0]


@pytest.mark.parametrize(("side", "sent"), [(32, 5), (64, 9), (224, 29)])
def test_heights_are_those_of_the_paper(side, sent):
    """224 -> 29 -> 28, the shape that the front gives."""
    make = functools.partial(bottlefit.student_modules, 3, 6, 10, width=32)
    modules = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    fronts = nnx.eval_shape(lambda: bottlefit.teacher_modules(3, 10, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    z = jax.eval_shape(lambda m, x: m(x), modules["encoder"], x)
    assert z.shape == (1, sent, sent, 6)
    restored = jax.eval_shape(lambda m, z: m(z), modules["decoder"], z)
    assert restored.shape == jax.eval_shape(lambda m, x: m(x), fronts["front"], x).shape


def test_head_and_tail_apart_are_the_student():
    graphs, parts = student()
    x = batch()["images"]
    whole = jax.jit(lambda x: bottlefit.predict(graphs, parts, x))(x)
    z = jax.jit(lambda x: run(graphs, parts, "encoder", x))(x)
    rest = {name: graphs[name] for name in ("decoder", "tail")}
    apart = jax.jit(lambda z: bottlefit.predict(rest, parts, z))(z)
    np.testing.assert_allclose(apart, whole, rtol=1e-5, atol=1e-6)
    payloads = np.stack([unpack(pack(np.asarray(one), bits=8)) for one in z])
    sent = jax.jit(lambda z: bottlefit.predict(rest, parts, z))(payloads)
    quantised = jax.jit(lambda x: bottlefit.predict(graphs, parts, x, bits=8))(x)
    np.testing.assert_allclose(sent, quantised, rtol=1e-4, atol=1e-5)


def test_a_perfect_student_has_matched():
    """Fed the teacher's own layer, the teacher's tail gives it back: loss 0."""
    graphs, parts = teacher()
    known = batch()
    seen = run(graphs, parts, "tail", known["middle"])
    rows, _ = bottlefit.match()(known["middle"], seen, known)
    np.testing.assert_allclose(rows, 0, atol=1e-6)


def test_losses_are_their_formulas():
    known = batch()
    rng = np.random.default_rng(0)

    def near(x):
        return x + jnp.asarray(rng.normal(size=x.shape), x.dtype)

    middle = near(known["middle"])
    logits = near(known["logits"])
    third, fourth = near(known["third"]), near(known["fourth"])
    seen = type(run(*teacher(), "tail", known["middle"]))(third, fourth, logits)
    rows, _ = bottlefit.match()(middle, seen, known)
    expected = sum(
        ((np.asarray(a, float) - np.asarray(b, float)) ** 2).sum((1, 2, 3))
        for a, b in (
            (middle, known["middle"]),
            (third, known["third"]),
            (fourth, known["fourth"]),
        )
    )
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    rows, sums = bottlefit.tune(alpha=0.3, temperature=2.0)(middle, seen, known)
    softmax = [np.exp(np.asarray(x, float)) for x in (logits, logits / 2)]
    p, soft = (x / x.sum(1, keepdims=True) for x in softmax)
    t = np.exp(np.asarray(known["logits"], float) / 2)
    t /= t.sum(1, keepdims=True)
    nats = -np.log(p[np.arange(6), np.asarray(known["labels"])])
    apart = (t * np.log(t / soft)).sum(1)
    np.testing.assert_allclose(rows, 0.3 * nats + 0.7 * 4 * apart, rtol=1e-4)
    assert sums["correct"] == (p.argmax(1) == np.asarray(known["labels"])).sum()


@pytest.mark.parametrize("learn", [("encoder", "decoder"), ("decoder", "tail")])
def test_a_phase_moves_what_learns_and_nothing_else(learn):
    graphs, parts = student()
    phase = bottlefit.phase(graphs, lambda key: parts, bottlefit.tune(), learn=learn)
    params, rest = phase.init(jax.random.key(0))
    known = batch()

    @jax.jit
    def step(params, rest):
        def total(params):
            out = phase.loss(params, rest, known, None)
            return out.total / out.weight, out

        slope, out = jax.grad(total, has_aux=True)(params)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, slope)
        return params, phase.advance(params, rest, out.stats)[0]

    moved: Parts = phase.parts(*step(params, rest))
    for name in graphs:
        kept = [
            bool((a == b).all())
            for old, new in zip(parts, moved, strict=True)
            for a, b in zip(*map(jax.tree.leaves, (old[name], new[name])), strict=True)
        ]
        assert not any(kept) if name in learn else all(kept), name


def test_running_statistics_follow_the_batch():
    graphs, parts = teacher()
    learn = ("front", "tail")
    phase = bottlefit.phase(graphs, lambda key: parts, bottlefit.classify, learn=learn)
    params, rest = phase.init(jax.random.key(0))
    known = batch()
    out = phase.loss(params, rest, known, None)
    moved = phase.advance(params, rest, out.stats)[0]["stats"]["front"]["stem"]["norm"]
    kernel = params["front"]["stem"]["conv"]["kernel"]
    x = jax.lax.conv_general_dilated(
        known["images"], kernel, (2, 2), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(moved["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(
        moved["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-4, atol=1e-5
    )


def test_bad_arguments_are_named():
    graphs, parts = teacher()
    with pytest.raises(ValueError, match="layers: \\('fifth',\\)"):
        bottlefit.match(("fifth",))
    with pytest.raises(ValueError, match="learn: \\['encoder'\\]"):
        bottlefit.phase(graphs, lambda k: parts, bottlefit.classify, learn=["encoder"])
    known = batch(2)
    seen = run(graphs, parts, "tail", known["middle"])
    with pytest.raises(ValueError, match="middle: the student's is"):
        bottlefit.match()(known["middle"][:, :3], seen, known)


def test_parts_are_called_in_their_order_whatever_the_mapping():
    make = functools.partial(bottlefit.student_modules, 1, 1, 10, width=WIDTHS[2])
    shapes = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))  # sorted by name
    assert list(bottlefit.split(shapes)[0]) == ["encoder", "decoder", "tail"]
