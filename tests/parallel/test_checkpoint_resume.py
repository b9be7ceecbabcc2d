"""A state comes back in any layout, under other names, for other numbers of workers."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.parallel.checkpoint import (
    Arrangement,
    CheckpointError,
    Checkpoints,
    LazyCheckpoints,
    Pattern,
    inspect,
    plan,
    summary,
)
from narrows.parallel.checkpoint.layout import cut
from narrows.parallel.state import OverWorkers, PerWorkerMean, PerWorkerSum, resize

Q, K = "blocks/attention/query/w", "blocks/attention/key/w"
SHAPES = {
    "embed/w": (16, 12),
    Q: (12, 4, 12),
    K: (12, 4, 12),
    "blocks/mlp/gate/w": (12, 4, 12),
    "blocks/mlp/up/w": (12, 4, 12),
    "opt/mu/blocks/mlp/up/w": (12, 4, 12),
}
KINDS = {name: jnp.bfloat16 if "attention" in name else jnp.float32 for name in SHAPES}
STAGES = {"stages": 2, "repeats": 3}
FUSED = Pattern(
    "(.*attention)/(?:query|key)/w",
    "fused",
    {"axis": 2, "order": ["query", "key"], "into": "qk", "ranks": 2},
)
PADDED = Pattern("embed/w", "padded", {"axis": 0, "multiple": 24})
# name: devices, the spec of every array's first dimensions, patterns
LAYOUTS: dict[str, tuple[dict[str, int], Any, list[Pattern]]] = {
    "one": ({"a": 1}, P(), []),
    "data 8": ({"a": 8}, P(), []),
    "fsdp 4": ({"a": 4}, P(None, "a"), []),
    "2 x 2": ({"a": 2, "b": 2}, P("a", "b"), []),
    "2 stages": ({"a": 2}, P("a"), [Pattern(".*blocks/.*", "pipelined", STAGES),
                                    PADDED]),
    "6 stages": ({"a": 6}, P("a"), [Pattern(".*blocks/.*", "pipelined", {"stages": 6}),
                                    PADDED]),
    "fused": ({"a": 2, "b": 4}, P("a", "b"), [FUSED]),
    "gated": ({"a": 2}, P(None, None, "a"), [
        Pattern("(blocks/mlp)/(?:gate|up)/w", "fused",
                {"axis": 2, "order": ["gate", "up"], "into": "gated", "ranks": 2})]),
    "flat over 6": ({"a": 6}, P("a"), [
        Pattern("(?!.*attention)()(?:.*)", "flat", {"ranks": 6, "into": "flat"}),
        Pattern("(.*)attention/(?:query|key)/w", "flat", {"ranks": 6, "into": "qk"})]),
    "unrolled": ({"a": 4}, P("a"), [Pattern("opt/.*", "unrolled", {"at": "blocks"})]),
}  # fmt: skip


def mesh_of(sizes: dict[str, int]):
    count = int(np.prod(list(sizes.values())))
    kinds = (AxisType.Auto,) * len(sizes)
    devices = jax.devices()[:count]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)


def placed(shapes, layout):
    """Shapes of stored leaves with the shardings of a layout, and a key and a step."""
    sizes, spec, _ = LAYOUTS[layout]
    mesh = mesh_of(sizes)
    target = {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, P(*spec[: len(shape)]))
        )
        for name, (shape, dtype) in shapes.items()
    }
    whole = NamedSharding(mesh, P())
    key = jax.eval_shape(lambda: jax.random.key(0))
    target["key"] = jax.ShapeDtypeStruct((), key.dtype, sharding=whole)
    target["step"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return target


def arrangement(layout):
    extra = {"key": (), "step": ()}
    patterns = [p._replace(names=f"(?!key|step){p.names}") for p in LAYOUTS[layout][2]]
    return Arrangement(SHAPES | extra, patterns)


@pytest.fixture(scope="module")
def logical():
    """Any bits: payloads of NaN, negative zeros."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256, (*s, np.dtype(KINDS[name]).itemsize), np.uint8)
        .view(KINDS[name])
        .reshape(s)
        for name, s in SHAPES.items()
    }


@pytest.fixture(scope="module")
def stored(logical):
    """Layout -> the leaves as numpy arrays, of which the state consists."""
    rest = {"key": np.zeros(()), "step": np.zeros(())}
    made = {name: cut(logical | rest, arrangement(name).map()) for name in LAYOUTS}
    return {n: {k: x for k, x in s.items() if k not in rest} for n, s in made.items()}


def state_of(stored, layout):
    shapes = {name: (x.shape, x.dtype) for name, x in stored[layout].items()}
    target = placed(shapes, layout)
    state = {
        n: jax.device_put(x, target[n].sharding) for n, x in stored[layout].items()
    }
    key, step = jax.random.key(7), jnp.int32(5)
    state["key"] = jax.device_put(key, target["key"].sharding)
    state["step"] = jax.device_put(step, target["step"].sharding)
    return state, target


def assert_bits(got, want, target):
    for name, x in want.items():
        assert got[name].sharding == target[name].sharding, name
        assert np.asarray(got[name]).tobytes() == x.tobytes(), name
    np.testing.assert_array_equal(
        jax.random.key_data(got["key"]), jax.random.key_data(jax.random.key(7))
    )
    assert int(got["step"]) == 5


@pytest.mark.parametrize("engine", [Checkpoints, LazyCheckpoints])
def test_every_layout_to_every_other(tmp_path, stored, engine):
    """restore(save(x, A), B) == x in B, bit for bit, in one call; and the plan said so.

    The lazy engine makes all ordered pairs; the other makes a ring of them.
    """
    targets = {}
    with engine(tmp_path, keep=len(LAYOUTS)) as checkpoints:
        for step, layout in enumerate(LAYOUTS):
            state, targets[layout] = state_of(stored, layout)
            checkpoints.save(step, state, {}, layout=arrangement(layout))
        checkpoints.wait()
        for a, b in itertools.product(range(len(LAYOUTS)), repeat=2):
            if engine is Checkpoints and (b - a) % len(LAYOUTS) not in (0, 1):
                continue
            layout = list(LAYOUTS)[b]
            options = {"step": a, "layout": arrangement(layout)}
            got, _, report = checkpoints.resume(targets[layout], **options)
            assert_bits(got, stored[layout], targets[layout])
            assert plan(tmp_path, targets[layout], **options).report == report
            assert {line.name for line in report} == set(targets[layout])
            converted = {line.name for line in report if line.how == "converted"}
            assert (converted == set()) == (a == b or {a, b} <= {0, 1, 2, 3})
    layout = inspect(tmp_path, 4).layout
    assert layout is not None
    assert layout["patterns"][0][1] == "pipelined"


def small(value=0.0):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = {
        "params": {"w": jnp.arange(4.0) + value, "b": jnp.zeros(2)},
        "opt": {"mu": jnp.ones(4)},
        "step": jnp.int32(3),
    }
    return jax.device_put(state, one)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(3, small(), {"data": {"next_index": 3}})
    return checkpoints


def test_weights_only(run):
    target = {"params": small()["params"]}
    got, meta, report = run.resume(target, ignore=["opt/.*", "step"])
    np.testing.assert_array_equal(got["params"]["w"], np.arange(4.0))
    assert meta["data"] == {"next_index": 3}
    assert summary(report) == "2 restored"


def test_renamed_leaves(run):
    new = small()
    new["model"] = {"kernel": new["params"]["w"], "b": new["params"]["b"]}
    del new["params"]
    rename = {"params/w": "model/kernel", "params/(.*)": r"model/\1"}
    got, _, report = run.resume(new, rename=rename)
    np.testing.assert_array_equal(got["model"]["kernel"], np.arange(4.0))
    assert {line.source for line in report} >= {"from params/w", "from params/b"}


def test_leaves_that_keep_their_initial_value(run):
    new = small(10.0)
    new["params"]["adapter"] = jnp.full(3, 7.0)
    got, _, report = run.resume(new, initial=["params/adapter", "opt/.*"])
    np.testing.assert_array_equal(got["params"]["adapter"], np.full(3, 7.0))
    np.testing.assert_array_equal(got["params"]["w"], np.arange(4.0))
    assert summary(report).startswith("3 restored, 2 initial (opt/mu left as given")


WRONG = {
    "missing": ({"new": jnp.zeros(2)}, {}, "1 missing in the checkpoint: new"),
    "extra": ({}, {"ignore": ["opt/.*"]}, "1 missing"),
    "unused ignore": ({}, {"ignore": ["x"]}, "ignore: 'x' matches no leaf"),
    "unused rename": ({}, {"rename": {"x": "y"}}, "rename: 'x' matches no stored leaf"),
    "twice": ({}, {"rename": {"params/(w|b)": "p"}}, "would be named 'p'"),
    "unused initial": ({}, {"initial": ["x"]}, "initial: 'x' matches no leaf"),
    "shape": ({"step": jnp.zeros(2, jnp.int32)}, {}, r"stored int32\[\], target int32"),
    "layout": ({}, {"layout": Arrangement({"a": (2,)}, ())}, "other leaves than there"),
    "expect": ({}, {"expect": {"data": 1}}, r"expect\['data'\] is 1"),
    "step": ({}, {"step": 9}, "no step 9"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_named_before_an_array_is_read(run, kind):
    more, options, sentence = WRONG[kind]
    with pytest.raises((ValueError, CheckpointError), match=sentence):
        plan(run.directory, small() | more, **options)


def test_a_shape_has_no_value_to_keep(run):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small()
    )
    with pytest.raises(ValueError, match="holds no array for it"):
        plan(run.directory, shapes, initial=["step"])


def test_a_layout_of_other_leaves_is_not_saved(tmp_path):
    with (
        pytest.raises(ValueError, match="such as"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(0, small(), {}, layout=Arrangement({"a": (2,)}, ()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("before", "after"), [(8, 6), (6, 8), (4, 1)])
def test_other_numbers_of_workers(tmp_path, before, after):
    """As `resize` does it; and the mean that enters an update is kept to 1e-6."""
    rng = np.random.default_rng(0)

    def state(workers):
        cut = np.zeros(48, np.float32)
        cut[:44] = rng.normal(size=44)
        return {
            "w": jnp.asarray(rng.normal(size=5), jnp.float32),
            "e": PerWorkerMean({"w": jnp.asarray(rng.normal(size=(workers, 5)), "f4")}),
            "sum": PerWorkerSum([jnp.asarray(rng.normal(size=(workers, 3)), "f4")]),
            "cut": OverWorkers(jnp.asarray(cut.reshape(workers, -1))),
        }

    old, new = state(before), state(after)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, old, {})
        got, _, report = checkpoints.resume(new)
    want = resize(old, new)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-7)
    was, now = (s["e"].per_worker_mean["w"] for s in (old, got))
    exact = np.asarray(was, np.float64).mean(0)
    np.testing.assert_allclose(np.asarray(now, np.float64).mean(0), exact, atol=1e-6)
    assert f"from e/per_worker_mean/w ({before}, 5) to ({after}, 5)" in summary(report)
