"""Sampling: the cache changes nothing, and every option keeps what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.models.generate import _generate, generate, sample_logits

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPT = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 5)), jnp.int32)
CONFIGS = {
    "llama": {"kv_heads": 1, "qk_norm": True},
    "gpt": {
        "norm": "layer",
        "position": "learned",
        "mlp": "gelu",
        "bias": True,
        "tied": True,
    },
}
DRAWS = 20_000
LOGITS = jnp.asarray([2.0, 0.5, 1.9, -1.0, 1.0, -3.0])
sample = jax.jit(sample_logits, static_argnames="top_k")


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request, small_model):
    """With the codebook between its blocks."""
    return small_model("codebook", 1, **CONFIGS[request.param])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_no_token(model, quick_jit, temperature):
    """Token by token from the whole sequence so far, with the same keys."""
    length, key = 7, jax.random.key(3)

    @quick_jit
    def logits_of(tokens):
        return model(tokens).logits

    tokens = jnp.zeros((2, 12), jnp.int32).at[:, :5].set(PROMPT)
    for index in range(length):
        last = logits_of(tokens)[:, 4 + index]  # causal: blind to the zeros after it
        new = sample(jax.random.fold_in(key, index), last, temperature=temperature)
        tokens = tokens.at[:, 5 + index].set(new)
    before = _generate._cache_size()  # pyright: ignore
    for _ in range(2):
        got = generate(model, PROMPT, length=length, key=key, temperature=temperature)
        assert jnp.array_equal(got, tokens[:, 5:])
    assert got.dtype == jnp.int32
    assert _generate._cache_size() <= before + 1  # pyright: ignore


def test_two_chunks_fill_the_cache_as_one(model, quick_jit):
    tokens = jnp.concatenate([PROMPT, PROMPT[:, ::-1], PROMPT[:, :2]], 1)
    run = quick_jit(lambda tokens, cache: model(tokens, cache=cache))
    whole = run(tokens, model.empty_cache(2, 16))
    first = run(tokens[:, :6], model.empty_cache(2, 16))
    second = run(tokens[:, 6:], first.cache)
    assert int(second.cache.length) == int(whole.cache.length) == 12
    for a, b in zip(*map(jax.tree.leaves, (second.cache, whole.cache)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    logits = jnp.concatenate([first.logits, second.logits], 1)
    np.testing.assert_allclose(logits, whole.logits, atol=5e-5)
    uncached = quick_jit(lambda tokens: model(tokens).logits)(tokens)
    np.testing.assert_allclose(logits, uncached, atol=5e-5)


def drawn(logits=LOGITS, *, temperature=1.0, top_k=0, top_p=1.0):
    rows = jnp.broadcast_to(logits, (DRAWS, len(logits)))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return np.asarray(sample(jax.random.key(0), rows, **options))


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def agree(tokens, share):
    """Every frequency within 4.5 standard deviations of its probability."""
    frequency = np.bincount(tokens, minlength=len(share)) / DRAWS
    assert np.all(np.abs(frequency - share) <= 4.5 * np.sqrt(share / DRAWS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    agree(drawn(temperature=temperature), softmax(np.asarray(LOGITS) / temperature))


def test_every_row_is_drawn_from_its_own_logits():
    rows = jnp.stack([jnp.roll(LOGITS, i) for i in range(6)])
    greedy = sample(jax.random.key(0), rows, temperature=0.0)
    assert greedy.tolist() == list(range(6))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_keeps_the_k_likeliest(k):
    kept = np.argsort(-np.asarray(LOGITS))[:k]
    share = np.zeros(6)
    share[kept] = softmax(LOGITS[kept])
    agree(drawn(top_k=k), share)


def test_top_k_keeps_no_more_where_tokens_tie():
    tied = jnp.asarray([0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert set(drawn(tied, top_k=2)) == {1, 2}
    assert set(drawn(jnp.zeros(6), top_k=1)) == {0}  # as the greedy choice does


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    share = softmax(LOGITS)
    order = np.argsort(-share)
    for count in (1, 2, 3):
        reached = share[order[:count]].sum()
        for p in (reached - 1e-3, share[order[: count - 1]].sum() + 1e-3):
            assert set(drawn(top_p=p)) == set(order[:count])
    assert set(drawn(top_p=1e-6)) == {0}


def test_options_combine_and_broadcast_as_arrays():
    """top_p counts the probability that top_k and the temperature left."""
    tokens = drawn(temperature=jnp.float32(2.0), top_k=3, top_p=jnp.float32(0.6))
    assert set(tokens) == {0, 2}


def test_the_vocabulary_is_cut(small_model):
    model = small_model()
    tokens = generate(
        model,
        PROMPT % 9,
        length=20,
        key=jax.random.key(0),
        temperature=5.0,
        vocab_size=9,
    )
    assert set(np.unique(tokens)) == set(range(9))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"length": 0}, "length: 0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"vocab_size": 65}, "vocab_size: 65"),
        ({"length": 28}, "room: 33 positions, but max_len=32"),
    ],
)
def test_bad_options_raise_by_name(small_model, options, named):
    model = small_model(position="learned")
    with pytest.raises(ValueError, match=named):
        generate(model, PROMPT, **({"length": 2, "key": jax.random.key(0)} | options))
