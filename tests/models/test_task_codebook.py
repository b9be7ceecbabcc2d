"""The exact laws of the task-conditioned codebook; those of any waist are elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models.task_codebook import SELECT, TaskCodebook

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH, CODES, CODE_WIDTH = 24, 16, 5
X = jax.random.normal(jax.random.key(1), (6, 20, WIDTH)) * 3
KEYS = jax.random.split(jax.random.key(2), X.shape[:2])


def layer(**given) -> TaskCodebook:
    options: dict[str, Any] = {
        "codes": CODES,
        "code_width": CODE_WIDTH,
        "window": 4,
    } | given
    return TaskCodebook(WIDTH, rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def send(quick_jit):
    return quick_jit(lambda layer, x, keys=None: layer(x, keys=keys))


def reference(layer: TaskCodebook, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q and z in float64, position by position."""
    w, b, c, u, v = (
        np.asarray(a[...], np.float64)
        for a in (
            layer.indexer.kernel,
            layer.indexer.bias,
            layer.codes,
            layer.outward.kernel,
            layer.outward.bias,
        )
    )
    q, z = np.zeros((len(x), len(c))), np.zeros((len(x), WIDTH))
    for i, row in enumerate(np.asarray(x, np.float64)):
        logits = np.maximum(row, 0) @ w + b
        q[i] = np.exp(logits - logits.max())
        q[i] /= q[i].sum()
        z[i] = sum(weight * code for weight, code in zip(q[i], c, strict=True)) @ u + v
    return q, z


def test_it_is_the_reference(send):
    out = send(layer(), X[0])
    q, z = reference(layer(), np.asarray(X[0]))
    np.testing.assert_allclose(out.assignments, q, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out.z, z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("keys", [None, KEYS], ids=["calm", "drawn"])
def test_the_rank_of_what_passes_is_at_most_the_codes_width(send, select, keys):
    it = layer(select=select, top=3)
    z = np.asarray(send(it, X, keys).z - it.outward.bias[...], np.float64)
    singular = np.linalg.svd(z.reshape(-1, WIDTH), compute_uv=False)
    assert singular[CODE_WIDTH - 1] > 1e-3 * singular[0]
    assert singular[CODE_WIDTH] < 1e-5 * singular[0]


def test_weights_lie_on_the_simplex_and_the_mixture_in_the_hull(send):
    it = layer()
    out = send(it, X)
    assert jnp.all(out.assignments >= 0)
    np.testing.assert_allclose(out.assignments.sum(-1), 1, rtol=1e-6)
    mixed = it.outward(out.assignments @ it.codes[...])
    np.testing.assert_allclose(out.z, mixed, rtol=1e-5, atol=1e-6)


def test_top_of_all_codes_is_softmax(send):
    one, two = send(layer(select="top_k", top=CODES), X), send(layer(), X)
    assert jnp.array_equal(one.assignments, two.assignments)
    assert jnp.array_equal(one.z, two.z)


@pytest.mark.parametrize("top", [1, 4])
def test_the_top_codes_keep_their_weight(send, top):
    q = send(layer(select="top_k", top=top), X).assignments
    full = send(layer(), X).assignments
    assert jnp.all((q > 0).sum(-1) == top)
    np.testing.assert_allclose(q.sum(-1), jnp.sort(full, -1)[..., -top:].sum(-1))
    assert jnp.all(jnp.where(q > 0, q == full, full <= q.max(-1, keepdims=True)))


@pytest.mark.parametrize("keys", [None, KEYS[0, :8]], ids=["calm", "drawn"])
def test_a_hard_choice_passes_one_code_and_moves_no_other(send, quick_jit, keys):
    it, x = layer(select="gumbel", dropout=0.0), X[0, :8]  # fewer than codes
    out = send(it, x, keys)
    index = jnp.argmax(out.assignments, -1)
    one = it.outward(it.codes[...][index])
    np.testing.assert_allclose(out.z, one, rtol=1e-5, atol=1e-6)

    def total(codes):
        graph, state = nnx.split(it)
        state["codes"] = codes
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x, keys=keys).z))

    slope = quick_jit(jax.grad(total))(nnx.state(it)["codes"])
    moved = jnp.abs(slope[...]).sum(-1) > 1e-6
    assert jnp.array_equal(moved, jnp.bincount(index.reshape(-1), length=CODES) > 0)
    assert not moved.all()


def test_dropout_leaves_codes_out_scales_the_rest_and_is_drawn_by_key(send):
    """C = 1 and U = 1 let z tell the sum of what was passed."""
    it = layer(code_width=1, dropout=0.25)
    it.codes.set_value(jnp.ones((CODES, 1)))
    it.outward.kernel.set_value(jnp.ones((1, WIDTH)))
    keys = jax.random.split(jax.random.key(0), 4000)
    x = jnp.broadcast_to(X[0, 0], (4000, WIDTH))
    total = send(it, x, keys).z[:, 0]
    assert total.std() > 0.05  # the sum is not brought back to 1
    error = total.std() / len(total) ** 0.5
    assert abs(total.mean() - 1) < 4 * error  # but is 1 on average
    assert jnp.array_equal(send(it, x, keys).z, send(it, x, keys).z)
    whole, part = send(it, X, KEYS).z, send(it, X[2:4], KEYS[2:4]).z
    np.testing.assert_allclose(whole[2:4], part, rtol=1e-6)
    np.testing.assert_allclose(send(it, x).z[:, 0], 1, rtol=1e-6)  # no key: no dropout


def test_what_is_reported(send):
    """Against entropies in float64 over all positions of the window."""
    it = layer(window=2)
    updating = jax.jit(lambda it, stats: (it.update(stats), nnx.as_pure(nnx.state(it))))
    graph = nnx.graphdef(it)
    for x in (X[:1], X[1:3], X[3:]):  # the first leaves the window
        said, state = updating(it, send(it, x).stats)
        it = nnx.merge(graph, state)
    q, _ = reference(it, np.asarray(X[1:].reshape(-1, WIDTH)))
    entropy = -(q.mean(0) * np.log2(q.mean(0))).sum()
    inner = -(q * np.log2(np.maximum(q, 1e-300))).sum(1).mean()
    assert said["waist_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert said["waist_perplexity"] == pytest.approx(2**entropy, rel=1e-4)
    assert said["waist_told"] == pytest.approx(entropy - inner, rel=1e-4)
    assert said["waist_usage"] == pytest.approx(np.mean(q.mean(0) > 0.1 / CODES))


def test_bits(send):
    """Those of the floats that pass; of a hard choice those of its frequency."""
    assert jnp.all(send(layer(), X).bits == 32 * CODE_WIDTH)
    it = layer(select="gumbel", window=1)
    assert it.capacity == 4
    out = send(it, X)
    it.update(out.stats)
    index = np.argmax(np.asarray(out.assignments), -1)
    count = np.bincount(index.reshape(-1), minlength=CODES) + 0.5
    expected = -np.log2(count / count.sum())[index]
    np.testing.assert_allclose(send(it, X).bits, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codes": 1}, "codes=1"),
        ({"select": "hard"}, "select: 'hard', but allowed are softmax, top_k, gumbel"),
        ({"select": "top_k", "top": 17}, "top: 17, but must be from 1 to the 16"),
        ({"dropout": 1.0}, r"dropout: 1.0, but must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        layer(**options)


def test_bfloat16_passes_as_bfloat16_from_float32_inside():
    x = X.astype(jnp.bfloat16)
    narrow, wide = layer()(x), layer()(x.astype(jnp.float32))
    assert narrow.z.dtype == jnp.bfloat16
    assert jnp.array_equal(narrow.z, wide.z.astype(jnp.bfloat16))
