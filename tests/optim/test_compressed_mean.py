"""Compressed means: the same on every topology, mesh and worker, with nothing lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrows.optim.compressed_mean import (
    PLAIN,
    Way,
    compressed_mean,
    sharded_mean,
)
from narrows.optim.compression import identity
from narrows.optim.quantizers import blocks, qsgd
from narrows.optim.signs import sign
from narrows.optim.sparse import random_k, top_k
from narrows.parallel.chunks import chunk_shape
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.state import simulate, spmd
from narrows.parallel.wire import collectives

N, ROUNDS = 8, 3
SIGN = Way("feedback", sign())
METHODS = {
    "plain": (PLAIN, PLAIN),
    "sign": (SIGN, SIGN),
    "top_k": (Way("feedback", top_k(0.1)), PLAIN),
    "ef21": (Way("ef21", top_k(0.2)), Way("ef21", blocks(8))),
    "econtrol": (Way("econtrol", top_k(0.2)), SIGN),
    "diana": (Way("diana", qsgd(7)), PLAIN),
    "rules": (
        Way("feedback", [(".*bias", identity()), (".*", blocks(4, block=8))]),
        Way("feedback", [(".*bias", identity()), (".*", sign())]),
    ),
}
CASES = [(method, "two_phase") for method in METHODS]
CASES += [(m, "gather") for m in ("top_k", "diana")]
CASES += [(m, "dense") for m in ("sign", "ef21")] + [("random", "shared_key")]
METHODS["random"] = (Way("feedback", random_k(0.3, unbiased=False)), PLAIN)


def trees(seed=0):
    """A tree of signals on each worker; rows 2 and 5 of the kernel are zero."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(N, 10, 12)) + rng.normal(size=(10, 12))
    kernel[:, [2, 5]] = 0
    tree = {"kernel": kernel, "bias": rng.normal(size=(N, 5)), "x": rng.normal(size=N)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def one(tree):
    return jax.tree.map(lambda x: x[0], tree)


def make(method, topology, workers=N):
    up, down = METHODS[method]
    down = down if topology == "two_phase" else PLAIN
    return compressed_mean(up, down, workers=workers, topology=topology)


@functools.cache
def mesh():
    return make_mesh(Layout(data=N))


def worker(way):
    def step(x, carry):
        signals, count = x
        out, state = way.mean(signals, carry[0], jax.random.fold_in(carry[1], count))
        return out, (state, carry[1])

    return step


def run(way, how, rounds=ROUNDS):
    """Outputs [round, worker, ...] and the last state."""
    go = {
        "vmap": lambda f: simulate(f, workers=N, axis_name="data"),
        "mesh": lambda f: spmd(f, mesh=mesh(), axis_name="data"),
    }[how](worker(way))
    go = jax.jit(go)
    carry, outs = (way.init(one(trees())), jax.random.key(7)), []
    for i in range(rounds):
        y, carry = go((trees(i), jnp.full(N, i)), carry)
        outs.append(y)
    return jax.tree.map(lambda *x: np.stack(x), *outs), carry[0]


@pytest.fixture(scope="module")
def simulated():
    return functools.cache(lambda *case: run(make(*case), "vmap"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_all_workers_hear_the_same_and_nothing_is_lost(case, simulated):
    """Sum of outputs = sum of means - what workers and owners still keep."""
    outs, state = simulated(*case)
    up, down = METHODS[case[0]]
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, x[:, :1] + 0 * x), outs)
    assert not outs["kernel"][..., [2, 5], :].any()  # zero rows stay zero
    if up.link in ("ef21", "diana") or down.link == "ef21":
        return  # these keep no e; what they promise is convergence, below
    for name in outs:
        came = np.mean([trees(i)[name] for i in range(ROUNDS)], 1).sum(0)
        kept = 0.0
        if not isinstance(e := state.up.worker[0].e[name], tuple):
            kept = np.asarray(e).mean(0)
        if state.down and not isinstance(e := state.down.e[0][name], tuple):
            kept += np.asarray(e).reshape(-1)[: came.size].reshape(came.shape)
        np.testing.assert_allclose(outs[name][:, 0].sum(0) + kept, came, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_mesh_gives_what_the_simulation_gives(case, simulated):
    outs, state = run(make(*case), "mesh")
    wanted, simulated_state = simulated(*case)
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    jax.tree.map(close, outs, wanted)
    jax.tree.map(close, state, simulated_state)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, x[:, :1] + 0 * x), outs)


def test_the_phases_are_an_implementation_of_the_mean(simulated):
    """With nothing lost on the way down, two phases give what the dense sum gives."""
    for method in ("sign", "ef21"):
        up, _ = METHODS[method]
        outs, _ = run(compressed_mean(up, workers=N), "vmap")
        dense, _ = simulated(method, "dense")
        close = functools.partial(np.testing.assert_allclose, atol=2e-6)
        jax.tree.map(close, outs, dense)


def test_plain_links_give_the_mean(simulated):
    outs, _ = simulated("plain", "two_phase")
    for name in outs:
        mean = np.mean([trees(i)[name] for i in range(ROUNDS)], 1)
        np.testing.assert_allclose(outs[name][:, 3], mean, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        ("sign", "two_phase"),
        ("top_k", "gather"),
        ("diana", "two_phase"),
        ("random", "shared_key"),
    ],
    ids="-".join,
)
def test_the_compiled_program_sends_the_counted_bits(case):
    """And beside them nothing: no collective of floats but the shared values."""
    way, signals = make(*case), (trees(), jnp.zeros(N, int))
    go = jax.jit(spmd(worker(way), mesh=mesh(), axis_name="data"))
    carry = (way.init(one(trees())), jax.random.key(0))
    found = collectives(go.lower(signals, carry).compile(), mesh())
    if case[1] == "shared_key":
        assert {c.kind for c in found} == {"all-reduce"}
    else:
        assert {c.dtype for c in found} == {"uint8"}
    sent = 8 * sum(c.count * c.wire_bytes for c in found)
    assert way.sent_bits(one(trees())) == pytest.approx(sent, rel=1e-12)


def test_one_bit_is_near_one_bit():
    """A matrix of 2^20: 2 (n - 1) / n bits an entry, with scales, rows and chunks."""
    like = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    way = compressed_mean(SIGN, SIGN, workers=N)
    ideal = 2 * (N - 1) / N * 2**20
    assert ideal <= way.sent_bits(like) <= 1.002 * ideal


def test_constant_signals_are_learned_in_both_directions():
    """EF21 up and down (EF21-BC): the error falls geometrically to rounding."""
    way = compressed_mean(Way("ef21", top_k(0.2)), Way("ef21", top_k(0.2)), workers=N)
    signals, count = trees(), jnp.zeros(N, int)

    @jax.jit
    def many(carry):
        go = simulate(worker(way), workers=N, axis_name="data")

        def step(carry, _):
            y, carry = go((signals, count), carry)
            return carry, jax.tree.map(lambda x: x[0], y)

        return jax.lax.scan(step, carry, None, length=150)[1]

    outs = many((way.init(one(signals)), jax.random.key(0)))
    for name, x in signals.items():
        gap = np.abs(np.asarray(outs[name]) - np.asarray(x).mean(0))
        assert gap[-1].max() < 1e-5


def test_weights_and_absence():
    """Weights weigh; a worker that is away is counted with what is expected of it."""
    weights = jnp.asarray(np.random.default_rng(0).uniform(0, 2, N), jnp.float32)
    signals = trees()
    for topology in ("two_phase", "gather", "dense", "shared_key"):
        way = compressed_mean(PLAIN, workers=N, topology=topology)

        def f(x, state, way=way):
            return way.mean(x, state, jax.random.key(0), weights=weights)

        outs, _ = jax.jit(simulate(f, workers=N, axis_name="data"))(
            signals, way.init(one(signals))
        )
        wanted = np.tensordot(np.asarray(weights), np.asarray(signals["kernel"]), 1) / N
        np.testing.assert_allclose(outs["kernel"][2], wanted, atol=1e-6)

    way = compressed_mean(Way("ef21", identity()), workers=N)

    def step(x, state):
        signal, active = x
        return way.mean(signal, state, jax.random.key(0), active=active)

    go = jax.jit(simulate(step, workers=N, axis_name="data"))
    _, state = go((trees(0), jnp.ones(N, bool)), way.init(one(signals)))
    present = jnp.arange(N) % 2 == 0
    outs, state = go((trees(1), present), state)
    pairs = zip(trees(0)["kernel"], trees(1)["kernel"], present, strict=True)
    wanted = np.mean([b if here else a for a, b, here in pairs], 0)
    np.testing.assert_allclose(outs["kernel"][0], wanted, atol=1e-6)


def test_ef21_w_takes_the_steps_of_ef21():
    """arXiv:2402.10774: for homogeneous compressors the iterates are the same; a
    threshold would tell them apart, and so does a fixed grid."""
    spread = jnp.asarray([1.0] * (N - 1) + [64.0])
    weights = N * spread / spread.sum()
    signals = trees()["kernel"]

    def run_with(w, way):
        def step(x, state):
            g, w_i = x
            return way.mean(g / w_i, state, jax.random.key(0), weights=w)

        go = jax.jit(simulate(step, workers=N, axis_name="data"))
        state, outs = way.init(signals[0]), []
        for i in range(4):
            y, state = go((trees(i)["kernel"], w), state)
            outs.append(y[0])
        return np.stack(outs)

    way = compressed_mean(Way("ef21", top_k(0.2)), workers=N)
    plain = run_with(jnp.ones(N), way)
    np.testing.assert_allclose(run_with(weights, way), plain, atol=1e-5)


DIMENSIONS = {"kernel": 0, "bias": None, "out": 1}


def shapes_of_model():
    rng = np.random.default_rng(3)
    tree = {
        "kernel": rng.normal(size=(16, 6)),
        "bias": rng.normal(size=5),
        "out": rng.normal(size=(6, 8)),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("dimensions", [None, DIMENSIONS], ids=["flat", "along"])
@pytest.mark.parametrize("method", ["plain", "sign", "ef21", "diana"])
def test_sharded_parameters_learn_by_every_method(method, dimensions):
    """Reduce-scatter of gradients, a step on shards, all-gather of parameters.

    On quadratics of unlike minima. What is gathered back are parameters, by EF21 from
    the copy that everyone holds.
    """
    up, _ = METHODS[method]
    params = shapes_of_model()
    dense = method == "plain"
    down = PLAIN if dense else Way("ef21", blocks(8))
    way = sharded_mean(up, down, like=params, dimensions=dimensions, workers=N)
    goals = jax.tree.map(
        lambda x: x + jax.random.normal(jax.random.key(1), (N, *x.shape)), params
    )

    def step(goal, carry):
        params, state, count = carry
        key = jax.random.fold_in(jax.random.key(2), count)
        index = jax.lax.axis_index("fsdp")
        grads = jax.tree.map(jnp.subtract, params, goal)
        shards, up_state = way.reduce_scatter(grads, state.up, key)
        mine = way.shards(params, index)
        rate = 0.5 / (1 + count / 10)
        mine = jax.tree.map(lambda p, g: p - rate * g, mine, shards)
        params, down_state = way.all_gather(mine, state.down, key)
        return 0.0, (params, state._replace(up=up_state, down=down_state), count + 1)

    @jax.jit
    def learn(carry, length):
        go = simulate(step, workers=N, axis_name="fsdp")
        return jax.lax.fori_loop(0, length, lambda _, c: go(goals, c)[1], carry)

    learned, *_ = learn((params, way.init(params), jnp.zeros(())), 120)
    for name in params:
        wanted = np.asarray(goals[name]).mean(0)
        gap = np.abs(np.asarray(learned[name]) - wanted).max()
        start = np.abs(np.asarray(params[name]) - wanted).max()
        assert gap < (1e-5 if dense else 0.12) * start, name
    if dimensions:  # a shard is that of the sharding rule, and is kept row by row
        mine = way.shards(params, 3)
        np.testing.assert_array_equal(mine["kernel"], params["kernel"][6:8])
        np.testing.assert_array_equal(mine["out"], params["out"][:, 3:4])
    assert chunk_shape((6, 8), N, 1) == (6, 1)


def test_sharded_parameters_on_a_mesh():
    """shard_map over fsdp gives the simulation's bits and sends bytes alone."""
    params, mesh = shapes_of_model(), make_mesh(Layout(fsdp=N))
    way = sharded_mean(
        SIGN, Way("ef21", blocks(8)), like=params, dimensions=DIMENSIONS, workers=N
    )
    goals = jax.tree.map(
        lambda x: x + jax.random.normal(jax.random.key(1), (N, *x.shape)), params
    )

    def step(goal, carry):
        params, state = carry
        key, index = jax.random.key(0), jax.lax.axis_index("fsdp")
        shards, up = way.reduce_scatter(
            jax.tree.map(jnp.subtract, params, goal), state.up, key
        )
        mine = jax.tree.map(lambda p, g: p - g / 2, way.shards(params, index), shards)
        params, down = way.all_gather(mine, state.down, key)
        return jnp.zeros(()), (params, state._replace(up=up, down=down))

    carry = (params, way.init(params))
    compiled = jax.jit(spmd(step, mesh=mesh, axis_name="fsdp")).lower(goals, carry)
    compiled = compiled.compile()
    sent = collectives(compiled, mesh)
    assert {(c.kind, c.dtype) for c in sent} == {
        ("all-to-all", "uint8"),
        ("all-gather", "uint8"),
    }
    bits = 8 * sum(c.wire_bytes for c in sent)
    assert way.sent_bits(params) == pytest.approx(bits, rel=1e-12)
    wanted = jax.jit(simulate(step, workers=N, axis_name="fsdp"))(goals, carry)
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    jax.tree.map(close, compiled(goals, carry)[1], wanted[1])


def test_errors_say_what_is_allowed():
    tree = one(trees())
    with pytest.raises(ValueError, match="topology: 'ring'"):
        compressed_mean(SIGN, workers=N, topology="ring")  # pyright: ignore
    with pytest.raises(ValueError, match="only two_phase has owners"):
        compressed_mean(SIGN, SIGN, workers=N, topology="gather")
    with pytest.raises(ValueError, match="shared_key sums payloads"):
        compressed_mean(SIGN, workers=N, topology="shared_key").init(tree)
    with pytest.raises(ValueError, match="does not divide"):
        sharded_mean(
            SIGN,
            like=tree,
            workers=3,
            dimensions={"kernel": 0, "bias": None, "x": None},
        )
