"""The codebook: what it sends, what it learns, what it counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from narrows.models.codebook import Codebook, CodeSums, nearest

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH, CODES, CODE_WIDTH, WINDOW = 8, 64, 4, 3
STILL = {"revive": 0.0, "decay": 0.8}
X = jnp.asarray(np.random.default_rng(0).normal(size=(64, WIDTH)), jnp.float32)


@functools.cache
def parts(**options):
    sizes = {"codes": CODES, "code_width": CODE_WIDTH, "window": WINDOW}

    def make():
        return Codebook(WIDTH, rngs=nnx.Rngs(0), **(sizes | options))

    graph = nnx.graphdef(nnx.eval_shape(make))
    return graph, jax.jit(lambda: nnx.as_pure(nnx.state(make())))()


def book(**options) -> Codebook:
    """A fresh one; the same numbers each time."""
    return nnx.merge(*parts(**options))


@jax.jit
def send(layer, x, mask=None):
    return layer(x, mask)


@jax.jit
def learned(layer, stats):
    said = layer.update(stats)
    return said, nnx.as_pure(nnx.state(layer))


def learn(layer, stats):
    """`layer.update(stats)`, compiled."""
    said, state = learned(layer, stats)
    nnx.update(layer, state)
    return said


def same_state(a, b) -> bool:
    pairs = zip(*(jax.tree.leaves(nnx.state(w)) for w in (a, b)), strict=True)
    return all(bool(jnp.array_equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nearest_is_nearest(dtype):
    rng = np.random.default_rng(1)
    e, codes = (jnp.asarray(rng.normal(size=s), dtype) for s in ((500, 8), (100, 8)))
    wide = [np.asarray(v, np.float64) for v in (e, codes)]
    distance = ((wide[0][:, None] - wide[1]) ** 2).sum(-1)
    index = nearest(e, codes)
    assert index.dtype == jnp.int32
    assert jnp.array_equal(index, distance.argmin(-1))
    # the same numbers in a wider type are the same question
    assert jnp.array_equal(index, nearest(e.astype(float), codes.astype(float)))


def test_ties_go_to_the_first_code():
    codes = jnp.asarray([[1.0, 0], [0, 1], [1, 0]])
    assert nearest(jnp.asarray([[2.0, 0], [0.5, 0.5]]), codes).tolist() == [0, 0]


def test_narrow_input_takes_the_same_codes():
    narrow = X.astype(jnp.bfloat16)
    layer = book()
    one, two = send(layer, narrow), send(layer, narrow.astype(jnp.float32))
    assert jnp.array_equal(one.codes, two.codes)
    assert one.z.dtype == jnp.bfloat16


def test_what_passes_is_the_code_and_nothing_else():
    """z equals decode(encode(x)) bit for bit, so it holds at most log2(codes) bits."""
    layer = book()
    waist = send(layer, X)
    assert jnp.array_equal(waist.codes, layer.encode(X))
    assert jnp.array_equal(waist.z, layer.decode(layer.encode(X)))
    assert layer.capacity == 6.0


def test_gradients_go_straight_through():
    """d z / d x is that of the linear path x -> W_out e(x), codes left out."""
    layer = book()
    weigh = jnp.asarray(np.random.default_rng(2).normal(size=X.shape), jnp.float32)
    gradient = jax.jit(
        lambda x: (
            jax.grad(lambda x: jnp.sum(weigh * layer(x).z))(x),
            jax.grad(lambda x: jnp.sum(weigh * layer.outward(layer._inward(x))))(x),
        )
    )
    through, linear = gradient(X)
    np.testing.assert_allclose(through, linear, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_squared_distance_and_pulls_the_input_alone():
    layer = book()
    e, waist = layer._inward(X), send(layer, X)
    chosen = layer.average[...][waist.codes]
    np.testing.assert_allclose(
        waist.loss, jnp.mean(jnp.sum((e - chosen) ** 2, -1)), rtol=1e-6
    )
    pull = jax.jit(jax.grad(lambda layer: layer(X).loss, allow_int=True))(layer)
    assert jnp.any(pull.inward.kernel[...] != 0)
    assert jnp.all(pull.outward.kernel[...] == 0)
    assert jnp.all(pull.average[...] == 0)  # codes follow averages, not gradients


def reference(state, count, total, decay):
    """Appendix A.1 as it stands there, float64: sums N and m decay, a code is m / N."""
    n, m = state
    n = decay * n + (1 - decay) * count
    m = decay * m + (1 - decay) * total
    return n, m


def test_codes_follow_the_exponential_average():
    layer, decay = book(**STILL), 0.8
    rng = np.random.default_rng(3)
    start = np.asarray(layer.average[...], np.float64)
    state = np.zeros(CODES), np.zeros((CODES, CODE_WIDTH))
    for step in range(6):
        count = rng.integers(0, 4, CODES) * (rng.random(CODES) < 0.5)
        count[0], count[1] = 0, step < 1  # never seen; seen once, then left alone
        total = rng.normal(size=(CODES, CODE_WIDTH)) * (count > 0)[:, None]
        state = reference(state, count, total, decay)
        learn(
            layer,
            CodeSums(
                jnp.asarray(count, jnp.float32),
                jnp.asarray(total, jnp.float32),
                jnp.float32(1.0),
            ),
        )
    n, m = state
    expected = np.where(n[:, None] > 0, m / np.where(n > 0, n, 1)[:, None], start)
    np.testing.assert_allclose(layer.weight[...], n, rtol=1e-5)
    np.testing.assert_allclose(layer.average[...], expected, rtol=1e-4, atol=1e-5)
    assert jnp.array_equal(layer.average[...][0], start[0].astype(np.float32))


def test_a_code_left_alone_for_long_stays_where_it_is():
    """Its weight underflows after some 400 steps; its place must not."""
    layer = book(**STILL)
    count = jnp.zeros(CODES).at[0].set(4.0).at[1].set(1e-35)
    total = 0.5 * count[:, None] * jnp.ones(CODE_WIDTH)
    learn(layer, CodeSums(count, total, jnp.float32(1)))
    before = layer.average[...][1]
    alone = count.at[1].set(0)
    for _ in range(30):
        learn(layer, CodeSums(alone, alone[:, None] * 0.5, jnp.float32(1)))
    assert jnp.array_equal(layer.average[...][1], before)


def test_a_step_that_saw_nothing_teaches_nothing():
    layer = book()
    learn(layer, send(layer, X).stats)
    before = nnx.clone(layer)
    waist = send(layer, X, jnp.zeros(len(X), bool))
    assert float(waist.loss) == 0
    assert not waist.bits.any()
    said = learn(layer, waist.stats)
    assert same_state(layer, before)
    assert said == before.report() | {"waist_revived": 0.0}


def test_without_updates_it_is_frozen():
    layer = book()
    for _ in range(3):
        send(layer, X)
    assert same_state(layer, book())


def test_counts_and_bits_equal_numpy_over_the_window():
    layer = book()
    rng, batches = np.random.default_rng(4), []
    for _ in range(WINDOW + 2):
        x = X + jnp.asarray(rng.normal(size=X.shape), jnp.float32)
        waist = send(layer, x)
        said = learn(layer, waist.stats)
        batches.append(np.asarray(waist.codes))
    count = np.bincount(np.concatenate(batches[-WINDOW:]), minlength=CODES)
    share = count[count > 0] / count.sum()
    entropy = -(share * np.log2(share)).sum()
    assert float(said["waist_usage"]) == pytest.approx(np.mean(count > 0))
    assert float(said["waist_entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert float(said["waist_perplexity"]) == pytest.approx(2**entropy, rel=1e-5)
    frequency = np.asarray(layer.frequencies())
    np.testing.assert_allclose(frequency, (count + 0.5) / (count + 0.5).sum())
    assert frequency.sum() == pytest.approx(1, rel=1e-6)
    waist = send(layer, X)
    np.testing.assert_allclose(
        waist.bits, -np.log2(frequency[np.asarray(waist.codes)]), rtol=1e-5
    )
    # over the positions counted, smoothing costs something, never beyond the index
    mean = (count / count.sum() * -np.log2(frequency)).sum()
    assert entropy <= mean <= layer.capacity


def test_a_fresh_codebook_sends_its_capacity():
    assert send(book(), X).bits == pytest.approx(6.0)


CLUSTERS = np.random.default_rng(5).normal(size=(256, WIDTH))


def stream(steps):
    """Rows from 256 narrow clusters; the codes start anywhere."""
    rng = np.random.default_rng(6)
    for _ in range(steps):
        centres = CLUSTERS[rng.integers(0, len(CLUSTERS), 1024)]
        yield jnp.asarray(centres + 0.02 * rng.normal(size=centres.shape), jnp.float32)


def test_revival_brings_dead_codes_to_use():
    """A crowded start: all codes but one lie far from the data."""
    usage, loss = {}, {}
    for name, options in (("revived", {}), ("still", STILL)):
        layer = book(**options)
        layer.average[...] = layer.average[...].at[1:].add(20.0)
        for x in stream(60):
            waist = send(layer, x)
            said = learn(layer, waist.stats)
        usage[name], loss[name] = said["waist_usage"], waist.loss
    assert usage["revived"] > 0.95
    assert usage["still"] < 0.05
    assert loss["revived"] < 0.2 * loss["still"]


def test_a_revived_code_starts_beside_its_donor_with_half_its_weight():
    layer = book()
    # all 64 positions at one point, a distance of 0.1 along each axis from code 5
    count = jnp.zeros(CODES).at[5].set(64.0)
    place = layer.average[...][5]
    square = jnp.float32(64 * CODE_WIDTH * 0.01)
    said = learn(layer, CodeSums(count, count[:, None] * place, square))
    assert float(said["waist_revived"]) == 1  # the one code that can spare half
    weight = np.asarray(layer.weight[...])
    (revived,) = set(np.flatnonzero(weight)) - {5}
    assert weight[revived] == weight[5] == pytest.approx(0.05 * 64 / 2)
    off = jnp.abs(layer.average[...][revived] - place)
    assert 0 < float(off.max()) < 1.0
    # the next step moves it from there, and does not throw it back
    before = layer.average[...][revived]
    learn(layer, CodeSums(count, count[:, None] * place, square))
    assert jnp.array_equal(layer.average[...][revived], before)


@pytest.mark.parametrize("options", [{"codes": 1}, {"code_width": 0}, {"window": 0}])
def test_sizes_out_of_range_raise(options):
    with pytest.raises(
        ValueError, match=next(iter(options)) + "=" + "01"["codes" in options]
    ):
        book(**options)
