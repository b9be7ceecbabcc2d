"""The processes that other tests run on: they compute together, and fail aloud."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def _mesh():
    return jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))


def _total(start):
    """Sum over all devices of start + device number, by shard_map."""
    f = jax.shard_map(
        lambda: jax.lax.psum(start + jax.lax.axis_index("d").astype(jnp.float32), "d"),
        mesh=_mesh(),
        in_specs=(),
        out_specs=P(),
    )
    return jax.jit(f)().addressable_data(0)


def _global_mean(local):
    """Mean over rows of which each process holds its own part."""
    mesh = _mesh()
    rows = jax.make_array_from_process_local_data(NamedSharding(mesh, P("d")), local)
    mean = jax.jit(lambda x: x.mean(0), out_shardings=NamedSharding(mesh, P()))(rows)
    return {"shape": rows.shape, "mean": mean.addressable_data(0)}


def _who():
    return (
        jax.process_index(),
        jax.local_device_count(),
        jax.device_count(),
        os.getpid(),
    )


def _one_fails():
    if jax.process_index() == 1:
        raise ArithmeticError("the second process stumbles")
    return _total(0.0)  # waits for the other for ever


def _one_dies():
    if jax.process_index() == 1:
        os._exit(7)
    time.sleep(60)


def _one_hangs():
    if jax.process_index() == 0:
        time.sleep(60)


def test_processes_sum_together(two_processes):
    start = 0.5
    expected = 4 * start + sum(range(4))
    assert [float(x) for x in two_processes(_total, start=start)] == [expected] * 2


def test_local_data_makes_a_global_array(two_processes):
    """Each process gives the same rows, so the mean is theirs and the shape doubles."""
    local = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    for answer in two_processes(_global_mean, local=local):
        assert answer["shape"] == (12, 3)
        np.testing.assert_allclose(answer["mean"], local.mean(0), rtol=1e-5, atol=1e-7)


def test_processes_stay(two_processes):
    """Results come in the order of ranks, and later calls meet the same ones."""
    first, second = two_processes(_who), two_processes(_who)
    assert [answer[:3] for answer in first] == [(0, 2, 4), (1, 2, 4)]
    assert [a[3] for a in first] == [a[3] for a in second]


def test_failures_are_named(two_processes):
    """What a process raises, its death and its silence reach the test; none stays."""
    idle = [answer[3] for answer in two_processes(_who)]
    os.kill(idle[0], signal.SIGKILL)  # between two calls: the next one starts afresh
    os.waitid(os.P_PID, idle[0], os.WEXITED | os.WNOWAIT)  # until it is gone
    before = [answer[3] for answer in two_processes(_who)]
    with pytest.raises(RuntimeError, match=r"process 0 gave no answer.* in 1 s"):
        two_processes(_one_hangs, timeout=1)
    for pid in idle + before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match=r"process 1 failed(.|\n)*process stumbles"):
        two_processes(_one_fails)
    with pytest.raises(RuntimeError, match=r"process 1 died in _one_dies.* code 7"):
        two_processes(_one_dies)


def test_an_inner_function_is_refused(two_processes):
    with pytest.raises(ValueError, match="is defined inside another"):
        two_processes(lambda: 0)
