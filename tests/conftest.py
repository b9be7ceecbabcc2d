"""Tests run on 8 simulated CPU devices unless the environment names a platform."""

import contextlib
import functools
import gc
import os
import pathlib
import sys
import types

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests cost, so programs are kept from run to run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import importlib.util

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the slow tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A worker for each core at hand, up to 8; none for one core or a single file."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    files = len(config.args) > 1 or pathlib.Path(config.args[0].split("::")[0]).is_dir()
    return min(cores, 8) if files and cores and cores > 1 else 0


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="minutes long: give --slow"))


@pytest.fixture(scope="session", autouse=True)
def _load_programs_of_one_device_only():
    """Programs over several devices, and those of child processes, are compiled anew.

    XLA:CPU may run the independent collectives of a program that it loads from the
    compilation cache in another order on each device. Devices then wait for each other
    for ever, and after 40 s XLA aborts the process. Programs that it compiled itself
    keep the order.
    """
    from jax._src import compiler  # no public setting tells the two kinds apart

    kept = compiler._cache_read

    def read(name, key, options, backend, devices):
        if len(devices) > 1:
            return None, None
        return kept(name, key, options, backend, devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_cache_read", read)
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs end with the file that compiled them.

    Each maps pages of code of its own, and Linux allows a process 65,530 maps by
    default: a worker that keeps all it ever compiled has half of them after a fifth of
    the tests.
    """
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data sets beside the checkout; skips where there is none."""
    folder = pathlib.Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of data sets at {folder}")
    return folder


# Compiling is most of what the tests cost. Without LLVM's passes and with the plainer
# of XLA:CPU's two ways to write a fusion, a training step compiles in a quarter of the
# time, to slower code with the same collectives.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@contextlib.contextmanager
def _quickly():
    import jax
    from narrows.parallel import step

    jit = functools.partial(jax.jit, compiler_options=QUICK)
    name = "jax_disable_most_optimizations"  # of all that is not compiled by the step
    before = jax.config.read(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "jax", types.SimpleNamespace(**(vars(jax) | {"jit": jit})))
        jax.config.update(name, True)
        try:
            yield
        finally:
            jax.config.update(name, before)


@pytest.fixture(scope="session")
def quickly():
    """`with quickly():` spends a quarter of the time on compiling, for slower code.

    The few bits that only optimized code keeps are those of a NaN in half precision.
    """
    return _quickly


@pytest.fixture(scope="session")
def quick_jit():
    """jax.jit for programs that run once: compiling is all they cost."""
    import jax

    return functools.partial(jax.jit, compiler_options=QUICK)


@pytest.fixture(scope="module")
def quick_compilation(quickly):
    """A whole module of tests `with quickly()`."""
    with quickly():
        yield


@pytest.fixture(scope="session")
def two_processes():
    """Two JAX processes of two devices each: `two_processes(function, **kwargs)`.

    Gives one result per process; see `Cluster` in cluster.py for what may be sent.
    """
    path = pathlib.Path(__file__).with_name("cluster.py")
    spec = importlib.util.spec_from_file_location("cluster", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cluster = module.Cluster(processes=2, devices=2)
    yield cluster
    cluster.close()
