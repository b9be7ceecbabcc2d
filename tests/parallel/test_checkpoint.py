"""What is restored is what was saved, on any mesh, or a sentence says why not."""

import asyncio
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from narrows.parallel.checkpoint import (
    CheckpointError,
    Checkpoints,
    inspect,
    latest_step,
)
from narrows.parallel.checkpoint.leaves import fingerprint, named

# name: mesh sizes, then the axes over which the first and second dimension are split
LAYOUTS: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "one": ((1,), None, None),
    "data8": ((8,), None, None),
    "fsdp8": ((8,), "a", None),
    "2x4": ((2, 4), "a", "b"),
    "2x2x2": ((2, 2, 2), ("a", "c"), "b"),
    "fsdp4": ((4,), "a", None),
}


class State(NamedTuple):
    params: dict
    opt: Any
    key: jax.Array
    step: jax.Array
    unused: jax.Array


def make_mesh(sizes: tuple[int, ...]) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    names = tuple("abc"[: len(sizes)])
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(sizes))


def target(layout: str, tree: Any) -> Any:
    """Shapes of `tree` with the shardings of `layout`."""
    sizes, *split = LAYOUTS[layout]
    mesh = make_mesh(sizes)

    def place(x):
        spec = PartitionSpec(*split[: x.ndim] if x.size else ())
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(place, tree)


def make_state(seed: int = 0) -> State:
    """Every kind of leaf, with a NaN that has a payload and a negative zero."""
    rng = np.random.default_rng(seed)
    half = rng.integers(0, 2**16, (8, 4), dtype=np.uint16)
    half[0] = [0x7FC5, 0x8000, 0xFFC1, 0x0001]
    params = {
        "w": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32),
        "h": jax.lax.bitcast_convert_type(jnp.asarray(half), jnp.bfloat16),
    }
    return State(
        params,
        optax.adam(1e-3).init({"w": params["w"]}),
        jax.random.split(jax.random.key(seed), 8),
        jnp.int32(-7 + seed),
        jnp.zeros((0, 4)),
    )


def put(tree: Any, layout: str) -> Any:
    return jax.tree.map(
        lambda x, t: jax.device_put(x, t.sharding), tree, target(layout, tree)
    )


def words(x: jax.Array) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def assert_same(got: Any, want: Any) -> None:
    """Equal structure, dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, x, y in zip(
        named(want), jax.tree.leaves(got), jax.tree.leaves(want), strict=True
    ):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        np.testing.assert_array_equal(words(x), words(y), err_msg=name)


def files(directory: pathlib.Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in directory.rglob("*")
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2 of a run, saved on a 2 x 4 mesh; tests only read or copy it."""
    directory = tmp_path_factory.mktemp("run")
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            meta = {"corpus": "abc", "position": step, "shape": (1, 2)}
            checkpoints.save(step, put(make_state(step), "2x4"), meta)
    return directory


@pytest.mark.parametrize("source", [name for name in LAYOUTS if name != "fsdp4"])
def test_any_mesh_to_any_mesh(tmp_path, source):
    """restore(save(x, A), B) == x bit for bit, in the layout that B asks for."""
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, put(state, source), {})
        for layout in LAYOUTS:
            wanted = target(layout, state)
            got, _ = checkpoints.restore(wanted)
            assert_same(got, state)
            for x, t in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
                assert x.sharding == jax.device_put(x, t.sharding).sharding


def test_fewer_and_fewer_devices(tmp_path):
    """8 -> 4 -> 1 devices, each saved again by the next, ends where it began."""
    state = put(make_state(), "fsdp8")
    with Checkpoints(tmp_path) as checkpoints:
        for step, layout in enumerate(["fsdp4", "one"]):
            checkpoints.save(step, state, {})
            state, _ = checkpoints.restore(target(layout, state))
    assert_same(state, make_state())


def test_containers_do_not_matter(saved):
    """The names of a NamedTuple's fields are those of a dictionary's keys."""
    wanted = target("one", make_state())
    got, _ = Checkpoints(saved).restore(wanted._asdict())
    assert_same(got, make_state(2)._asdict())


def test_offloaded_leaves_stay_offloaded(saved, tmp_path):
    host = jax.tree.map(
        lambda t: jax.ShapeDtypeStruct(
            t.shape, t.dtype, sharding=t.sharding.with_memory_kind("pinned_host")
        ),
        target("2x4", make_state()).params,
    )
    wanted = target("2x4", make_state())._replace(params=host)
    got, _ = Checkpoints(saved).restore(wanted)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, got, {})
        again, _ = checkpoints.restore(wanted)
    assert again.params["w"].sharding.memory_kind == "pinned_host"
    assert_same(again, make_state(2))


MISFITS = {
    "missing": (lambda t: {**t, "new": t["step"]}, "1 missing in the checkpoint: new"),
    "extra": (
        lambda t: {k: v for k, v in t.items() if k != "step"},
        "1 in the checkpoint but not in the target: step",
    ),
    "dtype": (
        lambda t: {**t, "params": {**t["params"], "w": t["params"]["h"]}},
        r"params/w \(stored float32\[8,4\], target bfloat16\[8,4\]\)",
    ),
    "shape": (
        lambda t: {**t, "step": t["unused"]},
        r"step \(stored int32\[\], target float32\[0,4\]\)",
    ),
    "key": (
        lambda t: {
            **t,
            "key": jax.ShapeDtypeStruct(
                (8,), jax.random.key(0, impl="rbg").dtype, sharding=t["key"].sharding
            ),
        },
        r"key \(stored key<fry>\[8\], target key<rbg>\[8\]\)",
    ),
    "sharding": (
        lambda t: {**t, "step": jax.ShapeDtypeStruct((), jnp.int32)},
        "target leaf 'step' must say where to go",
    ),
    "divides": (
        lambda t: {
            **t,
            "step": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=t["key"].sharding),
        },
        r"target leaf 'step' of shape \(3,\) cannot be split",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_target_that_does_not_fit_is_refused_by_name(saved, kind):
    change, sentence = MISFITS[kind]
    before = files(saved)
    wanted = change(target("2x4", make_state())._asdict())
    with pytest.raises(ValueError, match=sentence):
        Checkpoints(saved).restore(wanted)
    assert files(saved) == before


def test_a_long_list_of_misfits_is_cut(saved):
    wanted = {f"x{i}": target("one", make_state()).step for i in range(20)}
    with pytest.raises(ValueError, match=r"20 missing.*: (x\d+, ){8}\.\.\.;"):
        Checkpoints(saved).restore(wanted)


def test_expectations(saved):
    """Meta comes back as JSON gives it; another value, or none, is refused."""
    wanted = target("one", make_state())
    fits = {"corpus": "abc", "shape": (1, 2)}
    _, meta = Checkpoints(saved).restore(wanted, expect=fits)
    assert meta == {"corpus": "abc", "position": 2, "shape": [1, 2]}
    with pytest.raises(ValueError, match=r"expect\['corpus'\] is 'xyz'.* with 'abc'"):
        Checkpoints(saved).restore(wanted, expect={"corpus": "xyz"})
    with pytest.raises(ValueError, match=r"expect\['absent'\] is None"):
        Checkpoints(saved).restore(wanted, expect={"absent": None})


BAD_SAVES = {
    "numpy": (3, {"x": np.ones(3)}, {}, {}, "leaf 'x' must be a jax array, got nda"),
    "bare": (3, jnp.ones(3), {}, {}, "must be a container"),
    "empty": (3, {}, {}, {}, "at least one array"),
    "twins": (3, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {}, {}, "two leaves"),
    "inside": (3, {"a": jnp.ones(1), "a/b": jnp.ones(1)}, {}, {}, "may not hold '/'"),
    "meta": (3, {"x": jnp.ones(3)}, {"f": {1}}, {}, "meta must be a JSON dictionary"),
    "nan": (3, {"x": jnp.ones(3)}, {"f": float("nan")}, {}, "meta must be a JSON"),
    "metric": (3, {"x": jnp.ones(3)}, {}, {"los": 1.0}, r"must hold 'loss'.*\['los'\]"),
    "step": (2, {"x": jnp.ones(3)}, {}, {}, "after 2, the newest"),
}


@pytest.mark.parametrize("kind", BAD_SAVES)
def test_a_bad_save_is_refused_before_anything_is_written(saved, kind):
    step, state, meta, metrics, sentence = BAD_SAVES[kind]
    before = files(saved)
    with (
        pytest.raises(ValueError, match=sentence),
        Checkpoints(saved, best="loss") as checkpoints,
    ):
        checkpoints.save(step, state, meta, metrics=metrics or None)
    assert files(saved) == before


def test_keeps_the_newest_and_the_best(tmp_path):
    """The best step outlives `keep`, also after a restart, until a better one comes."""
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path, keep=2, best="loss") as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 1.0]):
            checkpoints.save(step, state, {}, metrics={"loss": loss})
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best) == ([1, 3, 4], 1)
    with Checkpoints(tmp_path, keep=2, best="loss") as checkpoints:
        assert checkpoints.best == 1
        checkpoints.save(5, state, {})  # not evaluated: never the best
        checkpoints.save(6, state, {}, metrics={"loss": 4.0})
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best) == ([1, 5, 6], 1)
        checkpoints.save(7, state, {}, metrics={"loss": 0.5})
        checkpoints.save(8, state, {}, metrics={"loss": 0.7})
        checkpoints.save(9, state, {})
    assert Checkpoints(tmp_path, best="loss").steps == [7, 8, 9]
    assert Checkpoints(tmp_path, best="loss").best == 7
    with pytest.raises(ValueError, match="best needs a metric"):
        _ = Checkpoints(tmp_path).best


def test_a_reader_leaves_no_trace(tmp_path, saved):
    directory = tmp_path / "absent"
    with Checkpoints(directory) as checkpoints:
        assert (checkpoints.latest, checkpoints.steps) == (None, [])
        with pytest.raises(CheckpointError, match=r"no complete checkpoint.*afresh"):
            checkpoints.restore(target("one", make_state()))
    assert not directory.exists()
    with pytest.raises(CheckpointError, match=r"no step 7 .*\[1, 2\]"):
        Checkpoints(saved).restore(target("one", make_state()), step=7)


def test_latest_step_counts_committed_folders_alone(saved, tmp_path, monkeypatch):
    assert latest_step(tmp_path) is None
    shutil.copytree(saved, tmp_path / "run")
    for name in ("9", "10.orbax-checkpoint-tmp", "007", "notes"):
        (tmp_path / "run" / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert latest_step("run") == 2
    assert Checkpoints("run").directory.is_absolute()


def test_arrays_may_be_donated_at_once(tmp_path):
    """The next step takes the buffers, or they are freed, while the write goes on."""
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = put({"x": jnp.zeros((1024, 256))}, "fsdp8")
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(2):
            checkpoints.save(step, x, {})
            old, x = x, jax.tree.map(bump, x)
            old["x"].delete()  # where the backend did not take it
        for step in range(2):
            got, _ = checkpoints.restore(target("one", x), step=step)
            assert (np.asarray(got["x"]) == step).all()


def test_explicit_axes_under_a_transfer_guard(tmp_path):
    """A run that forbids implicit transfers and has explicit axes may save."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    split = NamedSharding(mesh, PartitionSpec("a"))
    state = {"h": jnp.ones(8, jnp.bfloat16), "i": jnp.arange(8).astype(jnp.int4)}
    state = jax.device_put(state, split)
    with (
        jax.set_mesh(mesh),
        jax.transfer_guard("disallow"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(0, state, {})
        got, _ = checkpoints.restore(state)
    assert all(x.sharding == split for x in got.values())
    assert_same(got, state)


def test_inside_a_running_event_loop(tmp_path):
    """As in a notebook, where a loop already runs in this thread."""
    state = {"x": jnp.arange(4.0)}

    async def cell():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(0, state, {})
            await asyncio.sleep(0)
            return checkpoints.restore(state)[0], inspect(tmp_path).step

    got, step = asyncio.run(cell())
    assert_same(got, state)
    assert step == 0


@pytest.mark.parametrize("call", ["wait", "save", "close", "body"])
def test_a_failed_write_is_an_error_at_the_next_call(tmp_path, call):
    """The fault is a limit on the size of files, which also binds the superuser."""
    big = {"x": jnp.asarray(np.random.default_rng(0).random(2**20, np.float32))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, big, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        sentence = "step 2 was not saved.*newest complete step is 1"
        if call == "body":  # an error in the run itself stays the one that is raised

            def run():
                with checkpoints:
                    checkpoints.save(2, big, {})
                    raise KeyError("the run's own")

            with pytest.raises(KeyError) as caught:
                run()
            assert "step 2 was not saved" in caught.value.__notes__[0]
        else:
            checkpoints.save(2, big, {})
            with pytest.raises(CheckpointError, match=sentence):
                checkpoints.save(3, big, {}) if call == "save" else getattr(
                    checkpoints, call
                )()
        checkpoints.close()  # said once, not again
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Checkpoints(tmp_path).steps == [1]
    with checkpoints:
        checkpoints.save(2, big, {})
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
        assert_same(checkpoints.restore(big)[0], big)


def _data(step: pathlib.Path) -> pathlib.Path:
    found = [path for path in step.rglob("d/*") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_size)


def _flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def _halve(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "header cut": lambda step: _halve(step / "_CHECKPOINT_METADATA"),
    "header gone": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "header garbage": lambda step: (step / "_CHECKPOINT_METADATA").write_text("{}"),
    "header altered": lambda step: (step / "_CHECKPOINT_METADATA").write_text(
        (step / "_CHECKPOINT_METADATA").read_text().replace('"abc"', '"abd"')
    ),
    "tree gone": lambda step: (step / "state" / "_METADATA").unlink(),
    "tree cut": lambda step: _halve(step / "state" / "_METADATA"),
    "arrays gone": lambda step: shutil.rmtree(step / "state"),
    "index cut": lambda step: _halve(step / "state" / "manifest.ocdbt"),
    "data gone": lambda step: _data(step).unlink(),
    "data cut": lambda step: _halve(_data(step)),
    "one bit": lambda step: _flip(_data(step)),
}


@pytest.mark.filterwarnings("ignore")  # storage threads complain on their own account
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_way_out_named(tmp_path, kind):
    """Nothing is changed by the failed restore, and the other step still loads."""
    state = {"x": jnp.asarray(np.random.default_rng(0).random(2**14, np.float32))}
    run = tmp_path / "run"
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"corpus": "abc"})
    DAMAGE[kind](run / "2")
    before = files(run)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(run).restore(state)
    assert str(caught.value).startswith(f"checkpoint {run / '2'} cannot be read (")
    assert str(caught.value).endswith(
        "delete that folder or pass step=1, the newest other one"
    )
    assert "\n" not in str(caught.value)
    assert files(run) == before
    with Checkpoints(run, keep=1, best="loss") as checkpoints:
        assert_same(checkpoints.restore(state, step=1)[0], state)
        checkpoints.save(3, state, {})  # a broken step stops no later one
        assert_same(checkpoints.restore(state)[0], state)


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float8_e4m3fn", "int4", "bool", "complex64"]
)
def test_fingerprint_sees_every_change_and_exchange(dtype):
    """Ones and zeros: in floats the low bits of both are equal, the hardest case."""
    x = np.random.default_rng(0).integers(0, 2, (8, 4)).astype(jnp.dtype(dtype))
    seen = {int(fingerprint(jnp.asarray(x)))}
    for i in np.ndindex(x.shape):
        y = x.copy()
        y[i] = not y[i]
        seen.add(int(fingerprint(jnp.asarray(y))))
    for i in range(1, 8):
        seen.add(int(fingerprint(jnp.asarray(np.roll(x, i, axis=0)))))
    assert len(seen) == 1 + x.size + 7


def test_inspect(saved):
    """Names, types, bytes and layouts of what a 2 x 4 mesh saved."""
    contents = inspect(saved, step=1)
    assert (contents.step, contents.meta["position"]) == (1, 1)
    rows = {row.name: row for row in contents.rows}
    state = make_state()
    assert list(rows) == sorted(named(state))
    for name, leaf in named(state).items():
        assert (rows[name].shape, rows[name].dtype) == (leaf.shape, str(leaf.dtype))
        assert rows[name].bytes == words(leaf).size
    assert rows["params/w"].sharding == "P('a', 'b') on a=2,b=4"
    with pytest.raises(CheckpointError, match="no step 5"):
        inspect(saved, step=5)


CHILD = textwrap.dedent(
    """
    import sys, numpy as np, jax, jax.numpy as jnp
    from narrows.parallel.checkpoint import Checkpoints
    with Checkpoints(sys.argv[1], keep=3) as checkpoints:
        state = {"x": jnp.zeros(2**20), "step": jnp.int32(0)}
        if checkpoints.latest is not None:
            state, meta = checkpoints.restore(state)
            assert int(state["step"]) == meta["step"] == checkpoints.latest
        while True:
            state = jax.tree.map(lambda x: x + 1, state)
            step = int(state["step"])
            checkpoints.save(step, state, {"step": step})
    """
)


def child_environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}


def test_killed_at_any_instant_nothing_committed_is_lost(tmp_path):
    """Two runs of one device die by SIGKILL; the second goes on where the first was."""
    wait = np.random.default_rng().uniform(0, 0.2)
    newest = 0
    for kill in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], env=child_environment(1)
        )
        try:
            deadline = time.monotonic() + 120
            while (latest_step(tmp_path) or 0) < newest + 3:
                assert process.poll() is None, "the run died on its own"
                assert time.monotonic() < deadline, "the run saves nothing"
                time.sleep(0.005)
            if kill == 0:  # surely in the middle of a write
                while not list(tmp_path.glob("*-tmp*")):
                    assert time.monotonic() < deadline
            else:
                time.sleep(wait)
            newest = latest_step(tmp_path) or 0
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        checkpoints = Checkpoints(tmp_path)
        steps = checkpoints.steps[-3:]  # an older one may die half deleted
        assert len(steps) == 3
        assert steps[-1] >= newest
        wanted = {"x": jnp.zeros(2**20), "step": jnp.int32(0)}
        for step in steps:
            got, meta = checkpoints.restore(target("fsdp8", wanted), step=step)
            assert meta["step"] == step == int(got["step"])
            assert (np.asarray(got["x"]) == step).all()
        newest = steps[-1]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(newest + 1, {"x": jnp.zeros(1)}, {})
    assert not list(tmp_path.glob("*-tmp*"))


def save_together(directory: str) -> list[int]:
    """In each of two processes: save twice, restore the newest split another way."""
    mesh = make_mesh((jax.device_count(),))
    values = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "step": np.int32(3)}

    def shardings(w):
        split = {"w": PartitionSpec(*w), "step": PartitionSpec()}
        return {name: NamedSharding(mesh, spec) for name, spec in split.items()}

    state = {
        name: jax.make_array_from_callback(
            values[name].shape, sharding, lambda i, x=values[name]: np.asarray(x)[i]
        )
        for name, sharding in shardings(["a"]).items()
    }
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(ValueError, match="'x' lives on this process alone"):
            checkpoints.save(0, {"x": jnp.ones(3)}, {})
        checkpoints.save(0, state, {})
        checkpoints.save(1, state, {"position": 5})
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for (name, sharding), x in zip(
                shardings([None, "a"]).items(), state.values(), strict=True
            )
        }
        got, _ = checkpoints.restore(wanted, expect={"position": 5})
    for shard in got["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, values["w"][shard.index])
    return checkpoints.steps


def test_two_processes_save_what_one_restores(tmp_path, two_processes):
    assert two_processes(save_together, directory=str(tmp_path)) == [[0, 1]] * 2
    state = {"w": jnp.arange(32.0).reshape(8, 4), "step": jnp.int32(3)}
    assert_same(Checkpoints(tmp_path).restore(target("2x4", state))[0], state)
