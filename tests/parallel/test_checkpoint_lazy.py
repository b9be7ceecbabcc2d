"""What is written in the background is the state of the moment it was noted."""

import os
import pathlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.parallel.checkpoint import (
    CheckpointError,
    Checkpoints,
    LazyCheckpoints,
    commit,
    inspect,
    latest_step,
)
from narrows.parallel.checkpoint.leaves import named
from narrows.scripts.kill_runs import killed_runs

MIB = 2**20


def mesh_of(*sizes):
    kinds = (AxisType.Auto,) * len(sizes)
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, tuple("ab"[: len(sizes)]), kinds, devices=devices)


def make_state(mesh, seed=0):
    """Every kind of leaf, in shards, copies and halves."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, (8, 6), dtype=np.uint16)
    split, whole = NamedSharding(mesh, P("a")), NamedSharding(mesh, P())
    put = jax.device_put
    return {
        "w": put(jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), split),
        "h": put(jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16), split),
        "i": put(jnp.asarray(rng.integers(-8, 8, (3, 3))).astype(jnp.int4), whole),
        "yes": put(jnp.asarray(rng.integers(0, 2, 5) > 0), whole),
        "z": put(jnp.asarray(rng.normal(size=4) + 1j, jnp.complex64), whole),
        "keys": put(jax.random.split(jax.random.key(seed), 8), split),
        "step": put(jnp.int32(seed), whole),
        "none": put(jnp.zeros((0, 3)), whole),
    }


def assert_same(got, want):
    for name, x in named(want).items():
        y = named(got)[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def shapes_on(mesh, state, spec):
    def place(x):
        mine = P(*spec[: x.ndim]) if x.shape in ((8, 6), (8,)) else P()
        mine = NamedSharding(mesh, mine)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mine)

    return jax.tree.map(place, state)


def test_any_mesh_to_any_mesh(tmp_path):
    meshes = [(mesh_of(1), P()), (mesh_of(8), P("a")), (mesh_of(2, 2), P(None, "b"))]
    with LazyCheckpoints(tmp_path, keep=9, chunk_bytes=40) as checkpoints:
        for step, (mesh, spec) in enumerate(meshes):
            state = make_state(mesh, step)
            target = shapes_on(mesh, state, spec)
            state = jax.tree.map(
                lambda x, t: jax.device_put(x, t.sharding), state, target
            )
            checkpoints.save(step, state, {"at": step})
        checkpoints.wait()
        for step in range(len(meshes)):
            for mesh, spec in meshes:
                target = shapes_on(mesh, make_state(mesh), spec)
                got, meta = checkpoints.restore(target, step=step)
                assert_same(got, make_state(mesh_of(1), step))
                assert meta == {"at": step}
                for x, t in zip(got.values(), target.values(), strict=True):
                    assert x.sharding.is_equivalent_to(t.sharding, x.ndim)
    rows = {row.name: row for row in inspect(tmp_path, 1).rows}
    assert rows["w"].sharding == "P('a',) on a=8"
    assert (rows["keys"].bytes, rows["i"].bytes, rows["none"].bytes) == (64, 9, 0)


@pytest.mark.parametrize("shape", [(1,), (8,)])
def test_updates_that_donate_right_after_the_gate(tmp_path, shape):
    """Random delays in copy and write; every kept step is the state at its save."""
    mesh, rng = mesh_of(*shape), np.random.default_rng()
    x = jax.device_put(jnp.zeros((8, 2**15)), NamedSharding(mesh, P("a")))  # 1 MiB
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"x": x, "n": jnp.int32(0)}
    with LazyCheckpoints(
        tmp_path,
        keep=99,
        arena_bytes=300_000,
        chunk_bytes=2**17,
        copy_rate=rng.uniform(50, 200) * MIB,
        write_rate=rng.uniform(50, 200) * MIB,
    ) as checkpoints:
        for step in range(8):
            checkpoints.save(step, state, {})
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.02))
            checkpoints.gate()
            state = bump(state)
        checkpoints.wait()
        assert checkpoints.steps == list(range(8))
        for step in range(8):
            got, _ = checkpoints.restore(state, step=step)
            assert (np.asarray(got["x"]) == step).all()
            assert int(got["n"]) == step


def test_a_snapshot_leaves_the_buffers_to_be_donated(tmp_path):
    """No view of a device's memory outlives the gate: the update happens in place."""
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(2**18)
    with LazyCheckpoints(tmp_path) as checkpoints:
        for step in range(3):
            x = jax.block_until_ready(bump(x))
            where = x.unsafe_buffer_pointer()
            checkpoints.save(step, {"x": x}, {})
            checkpoints.gate()
            x = jax.block_until_ready(bump(x))
            assert x.unsafe_buffer_pointer() == where


def run_policy(directory, when_busy):
    state = {"x": jnp.zeros(MIB // 4)}
    with LazyCheckpoints(
        directory, keep=9, when_busy=when_busy, write_rate=8 * MIB, chunk_bytes=2**18
    ) as checkpoints:
        for step in range(3):
            checkpoints.save(step, {"x": state["x"] + step}, {})
            checkpoints.gate()
        checkpoints.wait()
        for step in checkpoints.steps:
            got, _ = checkpoints.restore(state, step=step)
            assert (np.asarray(got["x"]) == step).all()
        return checkpoints


def test_back_pressure(tmp_path):
    """The disk takes 125 ms for a step, and three come at once."""
    waits = run_policy(tmp_path / "wait", "wait")
    assert (waits.steps, waits.skipped) == ([0, 1, 2], [])
    assert sum(stall.gate for stall in waits.stalls) > 0.1  # for room in the arena
    skips = run_policy(tmp_path / "skip", "skip")
    assert (skips.steps, skips.skipped) == ([0], [1, 2])
    drops = run_policy(tmp_path / "drop", "drop")
    assert (drops.steps, drops.skipped) == ([2], [0, 1])
    assert not list(tmp_path.rglob("*tmp*"))
    for bad, sentence in (
        ({"when_busy": "hope"}, "'hope', but allowed"),
        ({"directory": "gs://bucket/run"}, "no file system"),
    ):
        with pytest.raises(ValueError, match=sentence):
            LazyCheckpoints(**{"directory": tmp_path, **bad})


def test_the_stall_is_what_of_the_copy_outlasts_the_gradients(tmp_path):
    """T_gate = max(0, T_copy - T_gradients), by rates that sleep; 20 ms of slack."""
    state = {"x": jnp.zeros(MIB)}  # 4 MiB at 20 MiB/s: 200 ms
    with LazyCheckpoints(
        tmp_path, copy_rate=20 * MIB, chunk_bytes=2**19
    ) as checkpoints:
        for step, work in enumerate([0.0, 0.1, 0.3]):
            checkpoints.save(step, state, {})
            time.sleep(work)
            checkpoints.gate()
            checkpoints.wait()
    for stall, want in zip(checkpoints.stalls, [0.2, 0.1, 0.0], strict=True):
        assert want - 0.02 < stall.gate < want + 0.08
        assert stall.enqueue < 0.1 + (stall.step == 0) * 5  # compiles at first
        assert stall.copied <= stall.committed
    assert checkpoints.take_blocked() > 0.3
    assert checkpoints.take_blocked() == 0.0


def test_keeps_the_newest_and_the_best_and_mixes_with_the_other_engine(tmp_path):
    state = {"x": jnp.arange(3.0)}
    with LazyCheckpoints(tmp_path, keep=2, best="loss") as lazy:
        for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 1.0]):
            lazy.save(step, state, {}, metrics={"loss": loss})
        lazy.wait()
        assert (lazy.steps, lazy.best) == ([1, 3, 4], 1)
    with Checkpoints(tmp_path, keep=2, best="loss") as checkpoints:
        checkpoints.save(5, state, {}, metrics={"loss": 7.0})
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best) == ([1, 4, 5], 1)
    with LazyCheckpoints(tmp_path, keep=2, best="loss") as lazy:
        assert lazy.best == 1
        lazy.save(6, state, {}, metrics={"loss": 0.5})
        lazy.save(7, state, {})
        lazy.save(8, state, {})
        with pytest.raises(ValueError, match=r"after (7|8)"):
            lazy.save(8, state, {})
    assert lazy.steps == [6, 7, 8]
    assert_same(Checkpoints(tmp_path).restore(state)[0], state)


def test_a_failed_write_is_an_error_at_the_next_call(tmp_path):
    big = {"x": jnp.asarray(np.random.default_rng(0).random(MIB, np.float32))}
    checkpoints = LazyCheckpoints(tmp_path)
    checkpoints.save(1, big, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        for call in (checkpoints.gate, checkpoints.wait, checkpoints.close):
            checkpoints.save(2, big, {})
            checkpoints._versions[-1].done.wait()
            with pytest.raises(
                CheckpointError, match=r"step 2 was not saved.* step is 1"
            ):
                call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    with checkpoints:
        checkpoints.save(2, big, {})
    assert checkpoints.steps == [1, 2]
    with (
        pytest.raises(CheckpointError, match="does not fit into 1024"),
        LazyCheckpoints(tmp_path / "small", arena_bytes=1000) as checkpoints,
    ):
        checkpoints.save(0, big, {})


class Killed(BaseException):
    """Stands for the end of the process: no handler of the engine undoes it."""


@pytest.mark.parametrize("boundary", range(6))
def test_ended_at_each_boundary_of_a_commit(tmp_path, monkeypatch, boundary):
    """Before and after: prepared, header, marker, rename. Never half a step."""
    state = {"x": jnp.arange(8.0)}
    with LazyCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
    calls = iter(range(99))

    def fatal(function):
        def run(*args):
            if next(calls) == boundary:
                raise Killed
            return function(*args)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(commit, "_put", fatal(commit._put))
        patch.setattr(commit, "_sync", fatal(commit._sync))
        patch.setattr(commit.Prepared, "abandon", lambda *args: None)
        checkpoints = LazyCheckpoints(tmp_path)
        checkpoints.save(1, {"x": state["x"] + 1}, {})
        checkpoints._versions[-1].done.wait()
    newest = latest_step(tmp_path)
    assert newest is not None
    assert newest == (0 if boundary < 4 else 1)
    got, _ = Checkpoints(tmp_path).restore(state)
    assert (np.asarray(got["x"]) == np.arange(8) + newest).all()
    with LazyCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
    assert not list(tmp_path.glob("*tmp*"))


def _chunk(step: pathlib.Path) -> pathlib.Path:
    return next(path for path in step.glob("arrays/x/c/*") if path.is_file())


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "one bit": lambda step: _flip(_chunk(step)),
    "chunk cut": lambda step: os.truncate(_chunk(step), 100),
    "chunk gone": lambda step: _chunk(step).unlink(),
    "array gone": lambda step: shutil.rmtree(step / "arrays" / "x"),
    "header cut": lambda step: os.truncate(step / "header.json", 20),
    "header altered": lambda step: (step / "header.json").write_text(
        (step / "header.json").read_text().replace('"abc"', '"abd"')
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_way_out_named(tmp_path, kind):
    state = {"x": jnp.asarray(np.random.default_rng(0).random(2**12, np.float32))}
    with LazyCheckpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"corpus": "abc"})
    DAMAGE[kind](tmp_path / "2")
    with pytest.raises(CheckpointError, match="delete that folder or pass step=1"):
        Checkpoints(tmp_path).restore(state)
    assert_same(Checkpoints(tmp_path).restore(state, step=1)[0], state)


def test_killed_at_random_instants_nothing_committed_is_lost(tmp_path):
    assert killed_runs(tmp_path, kills=10, seed=None) >= 10
    with LazyCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(10**6, {"x": jnp.zeros(1)}, {})
    assert not list(tmp_path.glob("*tmp*"))


def save_together(directory: str):
    """In each of two processes: two steps, then one that process 1 never prepares."""
    mesh = mesh_of(jax.device_count())
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    split = NamedSharding(mesh, P("a"))
    w = jax.make_array_from_callback((8, 4), split, lambda i: values[i])
    n = jax.make_array_from_callback(
        (), NamedSharding(mesh, P()), lambda i: np.array(5)
    )
    with LazyCheckpoints(directory, commit_timeout=60) as checkpoints:
        for step in (0, 1):
            checkpoints.save(step, {"w": w, "n": n}, {})
            checkpoints.gate()
        checkpoints.wait()
        steps = checkpoints.steps
        assert checkpoints._commit is not None
        checkpoints._commit.timeout = 0.5
        if jax.process_index() == 1:  # as if it had died between write and prepare
            finish = checkpoints._commit.finish
            checkpoints._commit.finish = lambda *args: None
        checkpoints.save(2, {"w": w, "n": n}, {})
        said = ""
        try:
            checkpoints.wait()
        except CheckpointError as error:
            said = str(error)
        if jax.process_index() == 1:
            checkpoints._commit.finish = finish
        checkpoints._commit.timeout = 60
        checkpoints.save(3, {"w": w, "n": n}, {})
    return steps, said, checkpoints.steps


def test_two_processes_commit_together_or_not_at_all(tmp_path, two_processes):
    (steps, said, after), other = two_processes(save_together, directory=str(tmp_path))
    assert steps == other[0] == [0, 1]
    assert "waited 0.5 s for processes [1]" in said
    assert after == other[2] == [0, 1, 3]
    wanted = {"w": jnp.arange(32.0).reshape(8, 4), "n": jnp.int32(5)}
    assert_same(Checkpoints(tmp_path).restore(wanted)[0], wanted)
