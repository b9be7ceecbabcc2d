"""The transformer: sizes, names, what sees what, and options that change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models.transformer import (
    GPT2,
    LLAMA_7B,
    Transformer,
    TransformerConfig,
)
from narrows.parallel.rules import name_of

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)
MASK = jnp.asarray(np.arange(12) < np.array([[12], [8]]))

# Of a gated rms model without biases: depth 2, width 32, 2 heads, vocabulary of 64.
NAMES = {
    "blocks/attention/key/kernel": (2, 32, 2, 16),
    "blocks/attention/out/kernel": (2, 2, 16, 32),
    "blocks/attention/query/kernel": (2, 32, 2, 16),
    "blocks/attention/value/kernel": (2, 32, 2, 16),
    "blocks/attention_norm/scale": (2, 32),
    "blocks/mlp/down/kernel": (2, 128, 32),
    "blocks/mlp/gate/kernel": (2, 32, 128),
    "blocks/mlp/up/kernel": (2, 32, 128),
    "blocks/mlp_norm/scale": (2, 32),
    "embed/embedding": (64, 32),
    "final_norm/scale": (32,),
    "head/kernel": (32, 64),
    "waist/inward/kernel": (32, 4),
    "waist/norm/scale": (32,),
    "waist/outward/kernel": (4, 32),
}


def params_of(model):
    return nnx.as_pure(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    ("config", "size"), [(GPT2, 124_439_808), (LLAMA_7B, 6_738_415_616)]
)
def test_published_models_have_their_published_size(config, size):
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params_of(model))) == size


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("waist_at", [0, 1, 2])
def test_names_and_shapes_depend_on_neither_scan_nor_waist_position(
    small_model, scan, waist_at
):
    params = params_of(small_model("codebook", waist_at, scan=scan))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert {name_of(path): leaf.shape for path, leaf in leaves} == NAMES
    assert all(leaf.dtype == jnp.float32 for _, leaf in leaves)


@pytest.fixture(scope="module")
def outputs(quick_jit):
    """`outputs(model, tokens, ...)`: a call of a model, compiled."""
    return quick_jit(lambda model, *args, **options: model(*args, **options))


@pytest.fixture(scope="module")
def value_and_gradient(small_model, quick_jit):
    def run(waist_at, **options):
        model = small_model("codebook", waist_at, **options)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            out = nnx.merge(graph, params, rest)(TOKENS, mask=MASK)
            return jnp.mean(jnp.sin(out.logits)) + out.waist.loss

        return quick_jit(jax.value_and_grad(loss))(nnx.as_pure(params))

    return functools.cache(run)


@pytest.mark.parametrize(
    ("waist_at", "options"),
    [
        (1, {"scan": True, "remat": "dots"}),
        (0, {"scan": True}),
        (1, {"remat": "full"}),
    ],
)
def test_scan_and_remat_change_no_value_and_no_gradient(
    value_and_gradient, waist_at, options
):
    """Float32 sums in another order: a few units in the seventh digit."""
    value, gradient = value_and_gradient(waist_at, **options)
    expected, expected_gradient = value_and_gradient(waist_at)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(expected_gradient),
        strict=True,
    ):
        scale = float(jnp.abs(other).max())
        assert scale > 0, f"no gradient reaches {name_of(path)}"
        np.testing.assert_allclose(leaf, other, atol=1e-5 * scale, rtol=1e-5)


def test_remat_marks_every_block(small_model):
    def marked(remat):
        model = small_model(waist_at=0, remat=remat)
        jaxpr = jax.make_jaxpr(lambda x: model(x).logits)(TOKENS)
        found = [e for e in jaxpr.eqns if "prevent_cse" in e.params]
        return [e.params["policy"] is not None for e in found]

    assert marked("none") == []
    assert marked("full") == [False] * 2
    assert marked("dots") == [True] * 2


def test_a_scanned_trunk_does_not_grow_with_depth(small_model):
    def products(**options):
        model = small_model(waist_at=0, **options)
        text = jax.jit(lambda x: model(x).logits).lower(TOKENS).as_text()
        return text.count("stablehlo.dot_general")

    assert products(scan=True) == products(scan=True, depth=4) < products()
    assert products() < products(depth=4)


def test_bfloat16_computes_near_float32_and_returns_float32_logits(
    small_model, outputs
):
    """2^-8 of rounding at each of about ten roundings on the way to a logit."""
    exact = outputs(small_model(), TOKENS).logits
    model = small_model(dtype=jnp.bfloat16)
    out = outputs(model, TOKENS)
    assert out.logits.dtype == jnp.float32
    assert out.waist.z.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params_of(model))} == {
        jnp.dtype(jnp.float32)
    }
    error = jnp.sqrt(jnp.mean((out.logits - exact) ** 2) / jnp.mean(exact**2))
    assert 1e-4 < error < 10 * 2**-8


@pytest.mark.parametrize("causal", [True, False])
def test_only_an_encoder_sees_what_comes_later(small_model, outputs, causal):
    model = small_model(causal=causal)
    before = outputs(model, TOKENS).logits
    after = outputs(model, TOKENS.at[:, 7].add(1)).logits
    same = jnp.all(before == after, axis=-1)
    assert same[:, :7].all() == causal
    assert not same[:, 7:].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("garbage", [3, -1, 10**6])
def test_masked_tokens_change_nothing_elsewhere(small_model, outputs, causal, garbage):
    """Not even tokens outside the vocabulary, which would embed as NaN."""
    model = small_model("codebook", causal=causal)
    holes = MASK.at[0, 3].set(False)
    one = outputs(model, TOKENS, mask=holes)
    two = outputs(model, jnp.where(holes, TOKENS, garbage), mask=holes)
    assert jnp.all(jnp.isfinite(one.logits[holes]))
    assert jnp.array_equal(one.logits[holes], two.logits[holes])
    for a, b in zip(
        jax.tree.leaves((one.waist.loss, one.waist.bits, one.waist.stats)),
        jax.tree.leaves((two.waist.loss, two.waist.bits, two.waist.stats)),
        strict=True,
    ):
        assert jnp.array_equal(a, b)
    assert jnp.all(jnp.where(holes, one.waist.bits > 0, one.waist.bits == 0))


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_packed_documents_and_padding_equal_documents_alone(
    small_model, outputs, position
):
    model = small_model("codebook", position=position, causal=False)
    late = jnp.asarray(np.arange(12) >= 6)
    packed = outputs(
        model,
        TOKENS,
        segment_ids=jnp.stack([late, late & False]).astype(jnp.int32),
        mask=jnp.stack([late | True, ~late]),
    )
    alone = outputs(model, TOKENS.reshape(4, 6))
    got = packed.logits.reshape(4, 6, -1)
    np.testing.assert_allclose(got[:3], alone.logits[:3], atol=2e-5)
    assert jnp.abs(got[3] - alone.logits[3]).max() > 0.1  # that was the padding


def test_the_waist_lies_where_it_was_put(small_model, outputs):
    """Before the first block codes know their token alone; after the last, logits know
    their code alone."""
    first = small_model("codebook", 0)
    moved = outputs(first, TOKENS.at[:, 4].add(1)).waist.codes
    changed = moved != outputs(first, TOKENS).waist.codes
    assert not changed[:, np.arange(12) != 4].any()
    out = outputs(small_model("codebook", 2), TOKENS)
    codes, logits = np.asarray(out.waist.codes).ravel(), out.logits.reshape(24, -1)
    used = np.unique(codes)
    assert 1 < len(used) < 24
    for code in used:
        rows = logits[codes == code]
        assert jnp.array_equal(rows, jnp.broadcast_to(rows[0], rows.shape))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"norm": "batch"}, "norm: 'batch'"),
        ({"position": "sine"}, "position: 'sine'"),
        ({"mlp": "relu"}, "mlp: 'relu'"),
        ({"remat": "some"}, "remat: 'some'"),
        ({"depth": 0}, "depth: 0"),
        ({"vocab_size": -5}, "vocab_size: -5"),
        ({"kv_heads": 0}, "kv_heads: 0"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads: 3"),
        ({"head_width": 7}, "head_width: 7"),
    ],
)
def test_a_bad_configuration_raises_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        TransformerConfig(**options)


def test_a_call_without_room_raises(small_model):
    learned, rotary = small_model(position="learned"), small_model()
    long = jnp.zeros((1, 33), jnp.int32)
    endless = jax.eval_shape(rotary, long)
    with pytest.raises(ValueError, match="max_len=32"):
        learned(long)
    with pytest.raises(ValueError, match="room: 33"):
        learned.empty_cache(1, 33)
    assert endless.logits.shape == (1, 33, 64)  # rotary positions have no end
    cache = rotary.empty_cache(2, 11)
    with pytest.raises(ValueError, match="room for 11"):
        rotary(TOKENS, cache=cache)
    cache = cache._replace(length=jnp.asarray(8, jnp.int32))
    with pytest.raises(ValueError, match="8 positions held"):
        rotary(TOKENS[:, 8:], cache=cache)
    for options in ({"mask": MASK}, {"segment_ids": jnp.ones_like(TOKENS)}):
        with pytest.raises(ValueError, match="cache: only"):
            rotary(TOKENS, cache=rotary.empty_cache(2, 12), **options)
    with pytest.raises(ValueError, match="waist_at: 3"):
        small_model(waist_at=3)
