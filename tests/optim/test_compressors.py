"""Every compressor keeps its promise, on every kind of tensor.

The tensors of a few shapes come in kinds (Gaussian, one entry, equal entries, heavy
tails, zero rows, all zero) and scales; hypothesis draws among them, without chance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrows.optim.bits import (
    pack_codes,
    pack_trits,
    packed_size,
    unpack_codes,
    unpack_trits,
)
from narrows.optim.compression import (
    bits,
    chunked,
    compress,
    identity,
    payload_of,
    scaled,
)
from narrows.optim.compressors import COMPRESSORS, by_path, make_compressor
from narrows.optim.low_rank import low_rank
from narrows.optim.quantizers import blocks, natural, qsgd
from narrows.optim.signs import sign, terngrad
from narrows.optim.sparse import random_k, top_k

OPTIONS = {
    "top_k": {"ratio": 0.1},
    "threshold_top_k": {"ratio": 0.1},
    "blocked_top_k": {"ratio": 0.25, "block": 16},
    "random_k": {"ratio": 0.2},
    "low_rank": {"rank": 2},
}
TABLE = {name: make_compressor(name, **OPTIONS.get(name, {})) for name in COMPRESSORS}
TABLE["biased_random_k"] = random_k(0.2, unbiased=False)
TABLE["scaled_qsgd"] = scaled(qsgd(7))
SHAPES = [(7, 9), (130,)]
KINDS = ["gaussian", "one", "equal", "heavy", "rows", "zero"]
DRAWS = 512
few = settings(max_examples=4, deadline=None, derandomize=True, database=None)
kinds, shapes = st.sampled_from(KINDS), st.sampled_from(SHAPES)
exponents, seeds = st.sampled_from([-90, 0, 3, 90]), st.integers(0, 9)


def tensor(kind, shape, seed=0, exponent=0):
    rng = np.random.default_rng([seed, *map(ord, kind)])
    x = rng.normal(size=shape)
    if kind == "one":
        x = np.where(np.arange(x.size).reshape(shape) == seed, x, 0)
    elif kind == "equal":
        x = np.full(shape, x.flat[0])
    elif kind == "heavy":
        x = x / rng.uniform(size=shape) ** 2
    elif kind == "rows":
        x = x * (np.arange(shape[0]) % 3 == 0).reshape(-1, *[1] * (len(shape) - 1))
    elif kind == "zero":
        x = np.zeros(shape)
    return jnp.asarray(x * 2.0**exponent, jnp.float32)


@functools.cache
def compiled(name, shape):
    """One draw, and many: for several keys at once."""
    del shape  # of each its own cache entry
    return jax.jit(functools.partial(compress, TABLE[name]))


@functools.cache
def many(name):
    """Draws for many keys at once."""

    def draws(key, x):
        keys = jax.random.split(key, DRAWS)
        return jax.vmap(lambda k: compress(TABLE[name], k, x))(keys)

    return jax.jit(draws)


@functools.cache
def encoder(name):
    return jax.jit(TABLE[name].encode)


def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def promised(kind):
    return [n for n, c in TABLE.items() if getattr(c.promise((130,)), kind) is not None]


@pytest.mark.parametrize("name", [n for n in promised("delta") if not TABLE[n].random])
@few
@given(kind=kinds, shape=shapes, seed=seeds, exponent=exponents)
def test_a_contraction_contracts_every_tensor(name, kind, shape, seed, exponent):
    x = tensor(kind, shape, seed, exponent)
    y = compiled(name, shape)(jax.random.key(seed), x)
    delta = TABLE[name].promise(shape).delta or 0.0
    assert norm(y - x) <= (1 - delta) ** 0.5 * norm(x) * (1 + 1e-5)


@pytest.mark.parametrize("name", [n for n in promised("delta") if TABLE[n].random])
@pytest.mark.parametrize("kind", ["gaussian", "one", "heavy"])
def test_a_random_contraction_contracts_on_average(name, kind):
    x = tensor(kind, SHAPES[0], seed=3)
    errors = np.asarray(many(name)(jax.random.key(1), x) - x, np.float64)
    squares = (errors**2).sum((1, 2)) / norm(x) ** 2
    delta = TABLE[name].promise(x.shape).delta or 0.0
    assert squares.mean() <= 1 - delta + 4 * squares.std() / DRAWS**0.5 + 1e-6


@pytest.mark.parametrize("name", promised("omega"))
@pytest.mark.parametrize("kind", ["gaussian", "equal", "heavy", "rows"])
def test_an_unbiased_one_has_its_mean_and_variance(name, kind):
    x = tensor(kind, SHAPES[0], seed=2)
    draws = np.asarray(many(name)(jax.random.key(2), x), np.float64)
    omega = TABLE[name].promise(x.shape).omega or 0.0
    squares = ((draws - np.asarray(x)) ** 2).sum((1, 2)) / norm(x) ** 2
    rounding = 1e-6
    assert squares.mean() <= omega + 4 * squares.std() / DRAWS**0.5 + rounding
    # |mean - x|^2 has expectation var / n; five times its root is far in the tail.
    drift = norm(draws.mean(0) - np.asarray(x)) / norm(x)
    assert drift <= 5 * (omega / DRAWS) ** 0.5 + rounding


@pytest.mark.parametrize("name", list(TABLE))
@few
@given(shape=shapes, seed=seeds)
def test_zero_rows_stay_zero(name, shape, seed):
    for kind in ("rows", "zero"):
        x = tensor(kind, shape, seed)
        y = compiled(name, shape)(jax.random.key(seed), x)
        assert not np.asarray(y)[~np.any(np.asarray(x) != 0, -1)].any()


@pytest.mark.parametrize("name", list(TABLE))
@few
@given(kind=kinds, seed=seeds)
def test_bfloat16_is_computed_in_float32(name, kind, seed):
    """The same values, passed in either dtype, give the same payload to the bit."""
    narrow = tensor(kind, SHAPES[0], seed).astype(jnp.bfloat16)
    key = jax.random.key(seed)
    pair = [encoder(name)(key, x) for x in (narrow, narrow.astype("float32"))]
    jax.tree.map(np.testing.assert_array_equal, *pair)
    shape = jax.eval_shape(functools.partial(compress, TABLE[name]), key, narrow)
    assert shape.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", list(TABLE))
@few
@given(kind=kinds, shape=shapes, exponent=exponents)
def test_it_scales_with_powers_of_two(name, kind, shape, exponent):
    one, key = compiled(name, shape), jax.random.key(5)
    x = tensor(kind, shape, 1)
    if name == "natural":  # below 2^-126 there is no mantissa to round
        x = jnp.where(jnp.abs(x) * 2.0**exponent < 2.0**-125, 0, x)
    factor = jnp.float32(2.0**exponent)
    np.testing.assert_array_equal(one(key, x * factor), one(key, x) * factor)


@pytest.mark.parametrize("name", list(TABLE))
def test_the_bits_are_those_of_the_payload(name):
    c, shape = TABLE[name], SHAPES[0]
    payload = encoder(name)(jax.random.key(0), tensor("gaussian", shape))
    assert bits(c, shape) == 8 * sum(x.nbytes for x in jax.tree.leaves(payload))
    described = jax.tree.map(lambda x: (x.shape, x.dtype), payload)
    told = jax.tree.map(lambda x: (x.shape, x.dtype), payload_of(c, shape))
    assert described == told


@pytest.mark.parametrize("name", [n for n in TABLE if "random_k" not in n])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_hidden(name, bad):
    x = tensor("gaussian", (7, 9)).at[3, 4].set(bad)
    assert not np.isfinite(compiled(name, x.shape)(jax.random.key(0), x)).all()


@pytest.mark.parametrize("name", [n for n, c in TABLE.items() if c.linear])
def test_with_one_key_payloads_may_be_averaged(name):
    c, key = TABLE[name], jax.random.key(3)
    x, y = tensor("gaussian", (7, 9), 1), tensor("heavy", (7, 9), 2)

    def mean(a, b):
        return (a + b) / 2 if jnp.issubdtype(a.dtype, jnp.floating) else a

    merged = jax.tree.map(mean, c.encode(key, x), c.encode(key, y))
    apart = (compress(c, key, x) + compress(c, key, y)) / 2
    np.testing.assert_allclose(c.decode(merged, x.shape), apart, rtol=1e-6)


# Exact identities, one for each idea.


@few
@given(kind=kinds, shape=shapes, seed=seeds)
def test_the_error_of_top_k_is_the_smallest_squares(kind, shape, seed):
    x = tensor(kind, shape, seed)
    y = compiled("top_k", shape)(jax.random.key(0), x)
    k = max(1, round(0.1 * x.size))
    squares = np.sort(np.asarray(x, np.float64).ravel() ** 2)
    assert norm(x - y) ** 2 == pytest.approx(squares[: x.size - k].sum(), rel=1e-6)
    assert not np.any(np.asarray(y) * np.asarray(x - y))
    same = compiled("threshold_top_k", shape)(jax.random.key(0), x)
    np.testing.assert_array_equal(y, same)  # ties too: the lowest place wins


def test_of_equal_magnitudes_top_k_takes_the_first():
    x = jnp.asarray([1.0, -2.0, 2.0, 2.0, -1.0])
    for by in ("sort", "threshold"):
        y = compress(top_k(0.4, by=by), jax.random.key(0), x)
        assert y.tolist() == [0, -2, 2, 0, 0]


def test_random_k_has_its_second_moment():
    """E|Q|^2 = (d / k) |x|^2; the d subsets of size d - 1 are drawn alike."""
    x = tensor("gaussian", (6,))
    draws = jax.vmap(lambda key: compress(random_k(5 / 6), key, x))
    y = np.asarray(draws(jax.random.split(jax.random.key(0), 3000)))
    left_out = (y == 0).argmax(1)
    counts = np.bincount(left_out, minlength=6)
    assert (np.abs(counts - 500) < 4 * (500 * 5 / 6) ** 0.5).all()
    exact = [(np.delete(np.asarray(x), i) ** 2).sum() * 1.44 for i in range(6)]
    assert np.mean(exact) == pytest.approx(1.2 * norm(x) ** 2, rel=1e-6)
    np.testing.assert_allclose((y**2).sum(1), np.asarray(exact)[left_out], rtol=1e-5)


@pytest.mark.parametrize("scale", ["l1", "rms"])
@few
@given(kind=kinds, shape=shapes, seed=seeds)
def test_the_error_of_the_sign(scale, kind, shape, seed):
    x = np.asarray(tensor(kind, shape, seed), np.float64)
    name = {"l1": "sign", "rms": "rms_sign"}[scale]
    y = compiled(name, shape)(jax.random.key(0), jnp.asarray(x, jnp.float32))
    count = x[np.any(x != 0, -1)].size
    two, one = norm(x), np.abs(x).sum()
    if not count:
        assert not y.any()
        return
    exact = {
        "l1": two**2 - one**2 / count,
        "rms": 2 * two**2 * (1 - one / (count**0.5 * two)),
    }[scale]
    assert norm(x - y) ** 2 == pytest.approx(exact, rel=1e-4, abs=1e-5 * two**2)


def test_the_rms_sign_is_no_contraction():
    x = jnp.zeros(64).at[3].set(1.0)
    assert norm(compress(sign("rms"), jax.random.key(0), x) - x) > 1.3 * norm(x)


def test_terngrad_meets_its_worst_case():
    d = 100
    x = jnp.full(d, 1 / (1 + d**0.5)).at[0].set(1.0)
    one, two = float(jnp.abs(x).sum()), norm(x)
    omega = terngrad().promise((d,)).omega
    assert omega is not None
    assert one / two**2 - 1 == pytest.approx(omega, rel=1e-5)


def test_natural_keeps_powers_of_two():
    x = jnp.asarray([-(2.0**-126), 0.5, -1.0, 2.0**127, 0.0])
    np.testing.assert_array_equal(compress(natural(), jax.random.key(0), x), x)


@few
@given(kind=kinds, shape=shapes, seed=seeds)
def test_qsgd_gives_multiples_of_its_step(kind, shape, seed):
    x = tensor(kind, shape, seed)
    y = np.asarray(compiled("qsgd", shape)(jax.random.key(seed), x), np.float64)
    steps = y / max(norm(x) / 7, 1e-30)
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)


@pytest.mark.parametrize(("width", "block"), [(8, 64), (4, 32), (3, 5)])
def test_blocks_round_to_within_half_a_step(width, block):
    x = np.asarray(tensor("heavy", (130,)))
    y = compress(blocks(width, block=block), jax.random.key(0), jnp.asarray(x))
    cut = np.pad(x, (0, -x.size % block)).reshape(-1, block)
    half = np.abs(cut).max(1) / (2 ** (width - 1) - 1) / 2
    error = np.pad(np.abs(x - np.asarray(y)), (0, -x.size % block)).reshape(-1, block)
    assert (error <= half[:, None] * (1 + 1e-5)).all()


def test_low_rank_is_exact_up_to_its_rank():
    rng = np.random.default_rng(0)
    for rows, columns in ((30, 8), (8, 30)):
        x = jnp.asarray(rng.normal(size=(rows, 2)) @ rng.normal(size=(2, columns)))
        y = compress(low_rank(2), jax.random.key(0), x.astype(jnp.float32))
        assert norm(y - x) < 1e-5 * norm(x)


@few
@given(width=st.integers(1, 8), count=st.integers(1, 40), seed=seeds)
def test_codes_of_any_width_come_back(width, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**width, count).astype(np.uint32)
    packed = pack_codes(jnp.asarray(codes), width)
    assert packed.size == packed_size(count, width)
    np.testing.assert_array_equal(unpack_codes(packed, count, width), codes)
    packed = pack_trits(jnp.asarray(codes % 3))
    assert packed.size == -(-count // 5)
    np.testing.assert_array_equal(unpack_trits(packed, count), codes % 3)


def test_chunks_are_compressed_each_by_itself():
    x, c = tensor("gaussian", (3, 4, 8)), sign()
    y = compress(chunked(c), jax.random.key(0), x)
    for part, whole in zip(y, x, strict=True):
        np.testing.assert_array_equal(part, compress(c, jax.random.key(0), whole))


def test_rules_choose_by_path():
    tree = {"a": {"kernel": jnp.zeros(3), "bias": jnp.zeros(3)}, "b": [jnp.zeros(3)]}
    dense, signed = identity(), sign()
    rules = [(".*/bias", dense), ("a/.*", signed), ("b/0", dense)]
    assert by_path(tree, rules) == [dense, signed, dense]
    assert by_path(tree, signed) == [signed] * 3
    with pytest.raises(ValueError, match="matches 'b/0'"):
        by_path(tree, rules[:2])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: make_compressor("huffman"), "allowed are identity"),
        (lambda: top_k(0.0), "ratio: 0.0"),
        (lambda: top_k(by="guess"), "by: 'guess'"),  # pyright: ignore
        (lambda: sign("l2"), "scale: 'l2'"),  # pyright: ignore
        (lambda: qsgd(0), "levels: 0"),
        (lambda: blocks(9), "width: 9"),
        (lambda: low_rank(0), "rank: 0"),
        (lambda: compress(sign(), jax.random.key(0), jnp.zeros(())), "a scalar"),
        (lambda: scaled(sign()).promise((3,)), "promises no omega"),
    ],
)
def test_errors_say_what_is_allowed(call, said):
    with pytest.raises(ValueError, match=said):
        call()
