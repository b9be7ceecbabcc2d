"""Per-worker state keeps its meaning when the number of workers changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from narrows.parallel.checkpoint import Checkpoints
from narrows.parallel.layout import Layout, make_mesh
from narrows.parallel.state import (
    OverWorkers,
    PerWorkerMean,
    PerWorkerSum,
    Reported,
    own,
    replicate,
    reports,
    resize,
    restore,
    specs,
    stacked,
)

SIZE = 45  # of what is cut over workers; the rest of the chunks is zeros


def state(workers, seed=0):
    rng = np.random.default_rng(seed)
    width = -(-SIZE // (4 * workers)) * 4
    cut = np.zeros(workers * width, np.float32)
    cut[:SIZE] = rng.normal(size=SIZE)
    return {
        "m": jnp.asarray(rng.normal(size=7), jnp.float32),
        "e": PerWorkerMean({"w": jnp.asarray(rng.normal(size=(workers, 3, 5)), "f4")}),
        "sum": PerWorkerSum([jnp.asarray(rng.normal(size=(workers, 5)), "f4")]),
        "cut": OverWorkers(jnp.asarray(cut.reshape(workers, 2, -1))),
    }


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize(("before", "after"), [(8, 6), (8, 4), (8, 1), (6, 8), (1, 3)])
def test_rules_keep_what_they_promise(before, after):
    old = state(before)
    new = resize(old, shapes(state(after, 1)))
    np.testing.assert_array_equal(new["m"], old["m"])
    (e,), (was,) = new["e"][0].values(), old["e"][0].values()
    exact = np.asarray(was, np.float64).mean(0)
    assert e.shape[0] == after
    for part in e:  # all alike, and the mean of the old to a rounding
        np.testing.assert_array_equal(part, e[0])
        np.testing.assert_allclose(part, exact, rtol=0, atol=1.2e-7 * 3)
    total = np.asarray(old["sum"][0][0], np.float64).sum(0)
    np.testing.assert_allclose(new["sum"][0][0].sum(0), total, atol=1e-6)
    flat = np.asarray(new["cut"][0]).ravel()
    np.testing.assert_array_equal(flat[:SIZE], np.asarray(old["cut"][0]).ravel()[:SIZE])
    assert not flat[SIZE:].any()


def test_the_same_number_changes_no_bit():
    old = state(6)
    jax.tree.map(np.testing.assert_array_equal, resize(old, shapes(old)), old)


def test_a_worker_sees_its_own_part():
    all_of_them = state(8)
    told = specs(all_of_them, "data")
    assert (told["m"], told["e"][0]["w"], told["cut"][0]) == (P(), P("data"), P("data"))
    one = jax.tree.map(lambda x, s: x[:1] if s == P("data") else x, all_of_them, told)
    assert own(one)["e"][0]["w"].shape == (3, 5)
    jax.tree.map(np.testing.assert_array_equal, stacked(own(one)), one)
    many = replicate(own(one), 8)
    assert many["cut"][0].shape == all_of_them["cut"][0].shape
    assert many["m"].shape == (7,)


def test_what_is_replicated_may_not_change():
    with pytest.raises(ValueError, match=r"target: m has shape .* the rule repli"):
        resize({"m": jnp.zeros(3)}, {"m": jnp.zeros(4)})
    with pytest.raises(ValueError, match="rule per_worker_mean"):
        resize(PerWorkerMean(jnp.zeros((3, 2))), PerWorkerMean(jnp.zeros((4, 5))))


def test_reports_are_found_anywhere():
    tree = [state(2), {"a": (Reported({"x": jnp.ones(())}), jnp.zeros(3))}]
    assert list(reports(tree)) == ["x"]


@pytest.mark.parametrize("after", [8, 6, 4, 1])
def test_a_checkpoint_of_eight_workers_is_read_by_others(after, tmp_path):
    old = state(8)
    wanted = resize(old, shapes(state(after)))
    mesh = make_mesh(Layout(data=after), jax.devices()[:after])
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, s)
        ),
        wanted,
        specs(wanted, "data"),
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, old, {"seed": 1})
        checkpoints.wait()
        found, meta = restore(checkpoints, target, step=5, expect={"seed": 1})
    assert meta == {"seed": 1}
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # a restore adds in float64, `resize` in float32
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-7)
    assert jax.tree.map(lambda x: x.sharding.spec, found) == specs(wanted, "data")
