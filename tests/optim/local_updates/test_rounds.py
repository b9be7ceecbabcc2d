"""Rounds of local steps, beside a float64 trace of the published algorithm."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from narrows.optim.compressed_mean import Way, compressed_mean
from narrows.optim.compressors import make_compressor
from narrows.optim.local_updates.outer import Outer, make_outer
from narrows.optim.local_updates.rounds import local_updates, put, take
from narrows.parallel.state import resize, specs

N, EVERY, RATE = 4, 3, 0.1
CURVES = jnp.array([0.3, 1.0, 2.0, 3.5, 0.7])
PARAMS = {"a": jnp.linspace(-1, 1, 5), "b": jnp.float32(0.5), "c": jnp.ones((2, 3))}


def gradient(params, i, n):
    """Of worker i in step n: quadratics with minima of the workers' own, and noise."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), i), n)

    def of(path, x):
        draw = jax.random.fold_in(key, len(str(path)) + x.size)
        minimum = 0.3 * jax.random.normal(draw, x.shape)
        curve = CURVES if x.shape == CURVES.shape else 1.3
        return curve * (x - minimum)

    return jax.tree_util.tree_map_with_path(of, params)


def run(rounds, steps, workers=N, spread=jax.vmap):
    """x after each step, by workers under vmap."""
    state = rounds.init(PARAMS)

    def one(x, state, n, meets):
        def worker(i, mine):
            return rounds.step(mine[0], gradient(mine[0].params, i, n))

        new = jax.vmap(worker)(jnp.arange(workers), state.own)
        state = state._replace(own=type(state.own)(new))
        for k in meets:
            x, state = meeting(rounds, x, state, k)
        return x, state

    go = jax.jit(one, static_argnums=3)
    x, xs = PARAMS, []
    for n in range(steps):
        x, state = go(x, state, n, tuple(rounds.due(n + 1)))
        xs.append(x)
    return xs, state


def meeting(rounds, x, state, k):
    """As `step.meeting`, of all workers under vmap."""

    def worker(i, x, mine, arrived, anchor, memory):
        del i
        d = rounds.depart(x, mine[0], k)
        send = lambda: rounds.exchange(d, memory, anchor.rounds, k)  # noqa: E731
        if not rounds.stale:
            arrived, memory = send()
        x, mine, anchor = rounds.arrive(x, mine[0], arrived, anchor, k)
        if rounds.stale:
            arrived, memory = send()
        return x, mine, arrived, anchor, memory

    memory = state.memory[k]
    axes = jax.tree.map(lambda s: 0 if s == P("w") else None, specs(memory, "w"))
    x, mine, arrived, anchor, new = jax.vmap(
        worker, in_axes=(0, None, 0, None, None, axes), axis_name="data"
    )(jnp.arange(N), x, state.own, state.arriving[k], state.anchors[k], memory)
    first = lambda tree: jax.tree.map(lambda a: a[0], tree)  # noqa: E731
    memory = jax.tree.map(lambda a, s: a if s == 0 else a[0], new, axes)
    x, arrived, anchor = first((x, arrived, anchor))
    place = lambda parts, value: (*parts[:k], value, *parts[k + 1 :])  # noqa: E731
    return x, state._replace(
        own=type(state.own)(mine),
        anchors=place(state.anchors, anchor),
        arriving=place(state.arriving, arrived) if rounds.stale else state.arriving,
        memory=place(state.memory, memory),
    )


def published(steps, *, rate, momentum, clip, stale, penalty):
    """Algorithm 1 of arXiv:2401.16265 in float64, x_{t-1,0} and averages kept whole."""
    flat = lambda tree: np.concatenate(  # noqa: E731
        [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    )
    _, unflatten = jax.flatten_util.ravel_pytree(PARAMS)
    x, before, average = flat(PARAMS), None, None
    m, usual, count, xs = np.zeros_like(x), 0.0, 0, []
    y = np.tile(x, (N, 1))
    root = lambda v: np.sqrt((v**2).mean())  # noqa: E731
    for n in range(steps):
        for i in range(N):
            y[i] -= RATE * flat(gradient(unflatten(y[i].astype("f")), i, n))
        if (n + 1) % EVERY == 0:
            now = y.mean(0)
            start, end = (before, average) if stale else (x, now)
            kept = x.copy()
            if start is not None:
                d = start - end
                count += 1
                usual = 0.9 * usual + 0.1 * root(d)
                gap = root(x - before) if before is not None else 0.0
                d = d / (1 + gap / (usual / (1 - 0.9**count)) if penalty else 1)
                m = np.clip(momentum * m + d, -clip, clip)
                x = x - rate * m
            before, average = kept, now
            y[:] = x
        xs.append(x.copy())
    return xs


def flattened(xs):
    return [np.asarray(jax.flatten_util.ravel_pytree(x)[0]) for x in xs]


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize(("momentum", "clip"), [(0.0, math.inf), (0.5, 0.08)])
def test_the_published_algorithm(stale, momentum, clip):
    """The mechanism never holds x_{t-1,0}: it sends d, which pairs it with its y."""
    options = {"rate": 0.7, "momentum": momentum, "clip": clip}
    if stale:
        outer = make_outer("co2", **options)
    else:
        still = make_outer("co2", **options, gap=lambda moved, usual: jnp.float32(1))
        outer = Outer(still.tx, stale=False)
    rounds = local_updates(optax.sgd(RATE), outer, workers=N, every=EVERY)
    xs, _ = run(rounds, 24)
    wanted = published(24, stale=stale, penalty=stale, **options)
    np.testing.assert_allclose(flattened(xs), wanted, rtol=2e-5, atol=2e-6)


def test_without_staleness_and_clip_it_is_slowmo():
    still = make_outer(
        "co2",
        rate=0.8,
        momentum=0.4,
        clip=math.inf,
        gap=lambda moved, usual: jnp.float32(1),
    )
    inner = optax.adam(0.05)
    pair = (
        local_updates(inner, o, workers=N, every=EVERY)
        for o in (Outer(still.tx, False), make_outer("slowmo", rate=0.8, momentum=0.4))
    )
    found, wanted = (flattened(run(rounds, 12)[0]) for rounds in pair)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_one_step_rounds_are_data_parallel_sgd():
    rounds = local_updates(optax.sgd(RATE), make_outer("local_sgd"), workers=N, every=1)
    xs, _ = run(rounds, 20)
    x = PARAMS
    for n in range(20):
        each = [gradient(x, i, n) for i in range(N)]
        mean = jax.tree.map(lambda *g: sum(g) / N, *each)
        x = jax.tree.map(lambda p, g: p - RATE * g, x, mean)
    np.testing.assert_allclose(
        flattened(xs)[-1], flattened([x])[0], rtol=1e-6, atol=1e-6
    )


def test_local_sgd_is_the_mean_of_models():
    rounds = local_updates(
        optax.sgd(RATE), make_outer("local_sgd"), workers=N, every=EVERY
    )
    before, state = run(rounds, EVERY - 1)
    after, _ = run(rounds, EVERY)
    n = EVERY - 1
    each = [
        rounds.step(w, gradient(w.params, i, n)).params
        for i in range(N)
        for w in [jax.tree.map(lambda x, i=i: x[i], state.own[0])]
    ]
    mean = jax.tree.map(lambda *y: sum(y) / N, *each)
    np.testing.assert_allclose(flattened(after)[-1], flattened([mean])[0], rtol=1e-5)
    for x in before:
        np.testing.assert_array_equal(flattened([x]), flattened([PARAMS]))


@pytest.mark.parametrize("name", ["diloco", "co2"])
def test_fragments_meet_in_turn_and_once_a_round(name):
    rounds = local_updates(
        optax.sgd(RATE), make_outer(name), workers=N, every=6, fragments=3
    )
    assert [rounds.due(n) for n in range(1, 13)] == [
        *([], [2], [], [1], [], [0]) * 2,
    ]
    xs, state = run(rounds, 20)
    changed = np.array(
        [
            jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), *pair))
            for pair in itertools.pairwise([PARAMS, *xs])
        ]
    )
    leaf = 2 if name == "diloco" else 8  # the first meeting of a stale method
    for n in range(leaf, 21):
        met = [k in rounds.due(n) for k in range(3)]
        assert changed[n - 1].tolist() == met
    assert [int(a.rounds) for a in state.anchors] == [3, 3, 4]


def test_parts_of_a_tree_make_the_tree():
    for fragments in (1, 2, 3):
        parts = [take(PARAMS, fragments, k) for k in range(fragments)]
        whole = jax.tree.map(jnp.zeros_like, PARAMS)
        for part in parts:
            assert jax.tree.leaves(part)
            whole = put(whole, part)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), whole, PARAMS))


@pytest.mark.parametrize("name", ["slowmo", "co2"])
def test_any_exchange_of_the_library(name):
    """Identity links change nothing to rounding; one bit with feedback stays near."""
    found = {}
    for kind in ("dense", "identity", "sign"):
        way = Way("feedback", make_compressor(kind)) if kind != "dense" else None
        mean = way and compressed_mean(way, way, workers=N)
        rounds = local_updates(
            optax.sgd(RATE), make_outer(name), workers=N, every=EVERY, mean=mean
        )
        found[kind] = flattened(run(rounds, 60)[0])
    np.testing.assert_allclose(found["identity"], found["dense"], rtol=1e-5, atol=1e-6)
    last = np.mean(found["dense"][-12:], 0)
    assert np.abs(np.mean(found["sign"][-12:], 0) - last).max() < 0.1
    assert np.abs(np.asarray(found["sign"]) - found["dense"]).max() > 1e-4


def test_fewer_workers_start_from_the_mean():
    """y_i and moments of 4 become those of 2 with the same mean; the rest stays."""
    make = lambda n: local_updates(  # noqa: E731
        optax.adam(0.05), make_outer("co2"), workers=n, every=EVERY
    )
    _, state = run(make(N), 8)
    target = jax.eval_shape(lambda: make(2).init(PARAMS))
    new = resize(state, target)
    for old, few in zip(*map(jax.tree.leaves, (state.own, new.own)), strict=True):
        assert few.shape[0] == 2
        np.testing.assert_allclose(few.mean(0), old.mean(0), rtol=1e-6, atol=1e-7)
    for a, b in zip(*map(jax.tree.leaves, (state[1:3], new[1:3])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_arguments_are_refused():
    outer = make_outer("co2")
    for options, said in (
        ({"every": 0}, "every: 0"),
        ({"every": 2, "fragments": 3}, "fragments: 3"),
    ):
        with pytest.raises(ValueError, match=said):
            local_updates(optax.sgd(0.1), outer, workers=2, **options)
    many = local_updates(optax.sgd(0.1), outer, workers=2, every=9, fragments=9)
    with pytest.raises(ValueError, match="only 3 arrays"):
        many.init(PARAMS)
