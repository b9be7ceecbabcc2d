"""The laws of every quantiser in the table.

Each learns for a hundred steps on three courses that must not differ: one device with
NaN under the mask, four microbatches with zeros there, eight devices with huge numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.models.quantize.protocol import Quantizer, State
from narrows.models.quantize.table import QUANTIZERS, make_quantizer
from orbax.checkpoint import v1 as ocp

NAMES = sorted(QUANTIZERS)
STEPS, ROWS, CODES = 100, 32, 16
SMALL = {
    "residual_vq": {"stages": 2},
    "grouped_vq": {"groups": 2},
    "multi_head_vq": {"heads": 2},
    "random_projection": {"label_width": 3},
}
LEARNED = [name for name in NAMES if "vq" in name and name != "simvq"]
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def made(name: str) -> Quantizer:
    width = {} if QUANTIZERS[name].code_width is None else {"code_width": 6}
    return make_quantizer(name, codes=CODES, **width, **SMALL.get(name, {}))


@functools.cache
def stream(width: int):
    """Positions around forty centres, and a mask that keeps two of three."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, width))
    x = centres[rng.integers(0, 40, (STEPS, ROWS))]
    x = x + 0.1 * rng.normal(size=x.shape)
    mask = rng.random((STEPS, ROWS)) < 2 / 3
    mask[3] = False  # a step of padding alone
    return x.astype(np.float32), mask


@functools.cache
def course(name: str, microbatches: int):
    """A compiled run: start, then steps of gradients on params and sums on memory."""
    q = made(name)

    def total(params, memory, x, mask):
        """A sum over positions, so that it adds up over microbatches."""
        out = q.quantize(State(params, memory), x, mask)
        count = mask.sum()
        loss = sum(q.weights[k] * v for k, v in out.losses.items()) * count
        loss += jnp.sum(jnp.where(mask[:, None], jnp.sin(out.z), 0.0))
        return loss, (out.stats, count)

    def step(state, xs):
        cut = [
            v.reshape(ROWS // microbatches, microbatches, *v.shape[1:]).swapaxes(0, 1)
            for v in xs
        ]

        def one(rows):
            grad = jax.grad(total, has_aux=True)
            return grad(state.params, state.memory, *rows)

        summed = jax.tree.map(lambda v: v.sum(0), jax.lax.map(one, tuple(cut)))
        slope, (stats, count) = summed
        rate = 0.05 / jnp.maximum(count, 1)
        params = jax.tree.map(lambda p, g: p - rate * g, state.params, slope)
        return q.update(state._replace(params=params), stats)[0], None

    @quick_jit
    def run(x, mask):
        state = q.init(jax.random.key(1))
        state = q.start(jax.random.key(2), state, x[0], mask[0])
        return jax.lax.scan(step, state, (x, mask))[0]

    return run


@functools.cache
def trained(name: str) -> State:
    x, mask = stream(made(name).width)
    return course(name, 1)(np.where(mask[..., None], x, np.nan), mask)


def same(one: State, two: State):
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        assert np.isfinite(np.asarray(a)).all()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_four_microbatches_give_the_same_state(name):
    x, mask = stream(made(name).width)
    same(trained(name), course(name, 4)(np.where(mask[..., None], x, 0), mask))


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_give_the_same_state(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, P(None, "data"))
    x, mask = stream(made(name).width)
    x = np.where(mask[..., None], x, np.float32(1e30))
    with jax.set_mesh(mesh):
        state = course(name, 1)(jax.device_put(x, over), jax.device_put(mask, over))
    same(trained(name), state)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """All trained states, saved and loaded."""
    states = {name: trained(name) for name in NAMES}
    path = tmp_path_factory.mktemp("states") / "saved"
    ocp.save(path, states)
    return ocp.load(path, jax.eval_shape(lambda: states))


@functools.cache
def sender(name: str):
    q = made(name)

    @quick_jit
    def send(state, x):
        wide = x.astype(jnp.float32)
        out, indices = q.quantize(state, wide), q.encode(state, wide)
        return out, indices, q.decode(state, indices), q.quantize(state, x)

    return send


@pytest.mark.parametrize("name", NAMES)
def test_what_passes_is_what_the_indices_say(name, loaded):
    """Bit for bit, before and after save and load, in bfloat16 as in float32."""
    q, state = made(name), trained(name)
    x = jnp.asarray(stream(q.width)[0][-1], jnp.bfloat16)
    out, indices, decoded, narrow = sender(name)(state, x)
    assert out.z.shape == (ROWS, q.code_width)
    assert (indices.shape, indices.dtype) == ((ROWS, len(q.sizes)), jnp.int32)
    assert jnp.array_equal(out.indices, indices)
    assert jnp.array_equal(narrow.indices, indices)
    assert jnp.array_equal(out.z, decoded)
    assert narrow.z.dtype == jnp.bfloat16
    assert jnp.array_equal(narrow.z, decoded.astype(jnp.bfloat16))
    assert jnp.all((indices >= 0) & (indices < jnp.array(q.sizes)))
    again = sender(name)(loaded[name], x)
    assert jnp.array_equal(again[1], indices)
    assert jnp.array_equal(again[2], decoded)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_named_as_they_are_weighed(name):
    q = made(name)
    shape = jax.ShapeDtypeStruct((3, 5, q.width), jnp.bfloat16)
    state = jax.eval_shape(q.init, jax.random.key(0))
    out = jax.eval_shape(q.quantize, state, shape)
    assert out.z.shape == (3, 5, q.code_width)
    assert out.losses.keys() == q.weights.keys()
    for value in (*out.losses.values(), *jax.tree.leaves(out.stats)):
        assert value.dtype == jnp.float32
    assert q.capacity == pytest.approx(np.log2(np.array(q.sizes, float)).sum())


@pytest.mark.parametrize("name", LEARNED)
def test_codes_stay_in_use(name):
    """Collapse would show here: fewer than nine of ten codes chosen in fifty steps."""
    q = made(name)
    x, mask = stream(q.width)
    encode = quick_jit(lambda state, x: q.encode(state, x))
    indices = np.asarray(encode(trained(name), x[50:]))[mask[50:]]
    for place, size in enumerate(q.sizes):
        assert len(np.unique(indices[:, place])) > 0.9 * size


@pytest.mark.parametrize("name", NAMES)
def test_another_width_is_refused_with_both_numbers(name):
    q = made(name)
    with pytest.raises(ValueError, match=rf"x: {q.width + 1} numbers .* {q.width}\b"):
        jax.eval_shape(
            q.quantize,
            jax.eval_shape(q.init, jax.random.key(0)),
            jax.ShapeDtypeStruct((2, q.width + 1), jnp.float32),
        )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sieve", {}, "quantizer: 'sieve', but allowed are vq"),
        ("fsq", {"code_width": 3}, "code_width: 3, but the codes of fsq fix it"),
        ("fsq", {"codes": 100_000_000}, "codes: 100000000, but levels are known"),
        ("lfq", {"codes": 1000}, "codes: 1000, but signs make a power of 2"),
        ("grouped_vq", {"groups": 3}, "groups: 3, but they must divide code_width=16"),
    ],
)
def test_what_is_not_to_be_had_is_said(name, options, said):
    with pytest.raises(ValueError, match=said):
        make_quantizer(name, **options)
