"""Several JAX processes for tests, kept alive from one test to the next.

A `Cluster` starts processes that join one `jax.distributed` job over loopback (gloo),
each with its own CPU devices. A call sends them the file and the name of a function,
which each loads and runs; so the functions live beside the tests that use them.
"""

import importlib.util
import inspect
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import connection

START_TIMEOUT = 120  # seconds; importing JAX takes 2 on an idle core


class Cluster:
    """Call as `cluster(function, **kwargs)`: a list of one result per process.

    `function` is defined at the top of a module, `kwargs` and its result are plain
    containers of numbers, strings and arrays; JAX arrays come back as numpy, so they
    must be replicated or local to the process. Processes start at the first call and
    end at `close`, or as soon as one fails: peers wait in a collective for ever, so the
    next call starts afresh.
    """

    def __init__(self, processes: int = 2, devices: int = 2):
        self.processes, self.devices = processes, devices
        self._children: list[tuple[subprocess.Popen, connection.Connection]] = []

    def __call__(self, function, *, timeout: float = 120, **kwargs) -> list:
        """Raises RuntimeError that names the process which raised, died or hung."""
        if "." in function.__qualname__:
            raise ValueError(
                f"function: {function.__qualname__} is defined inside another; a "
                "process can only load what stands at the top of a module"
            )
        if any(process.poll() is not None for process, _ in self._children):
            self._end()  # killed from outside between two calls
        if not self._children:
            self._start()
        for _, pipe in self._children:
            pipe.send((inspect.getfile(function), function.__name__, kwargs))
        return self._answers(f"{function.__name__}()", timeout)

    def close(self):
        """End all processes and wait until they are gone."""
        self._end()

    def _end(self) -> str:
        """What they had printed."""
        if not self._children:
            return ""
        for process, pipe in self._children:
            process.kill()
            pipe.close()
        for process, _ in self._children:
            process.wait()
        self._children = []
        with self._log:
            self._log.seek(0)
            return self._log.read().decode(errors="replace")

    def _start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(self.devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in a quarter of the time
            "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, _end closes it
        for rank in range(self.processes):
            ours, theirs = connection.Pipe()
            numbers = map(str, (theirs.fileno(), rank, self.processes, port))
            process = subprocess.Popen(
                # -P: the folders beside this file are no packages to import
                [sys.executable, "-P", __file__, *numbers],
                env=env,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
            theirs.close()
            self._children.append((process, ours))
        self._answers("its start", START_TIMEOUT)

    def _answers(self, job: str, timeout: float) -> list:
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._children)}
        results: dict[int, object] = {}
        end = time.monotonic() + timeout
        while waiting := [pipe for pipe, rank in ranks.items() if rank not in results]:
            ready = connection.wait(waiting, max(0, end - time.monotonic()))
            if not ready:
                hung = ", ".join(str(ranks[pipe]) for pipe in waiting)
                self._fail(f"process {hung} gave no answer to {job} in {timeout} s")
            for pipe in ready:
                assert isinstance(pipe, connection.Connection)
                rank = ranks[pipe]
                try:
                    done, value = pipe.recv()
                except (EOFError, ConnectionError):
                    code = self._children[rank][0].wait()
                    self._fail(f"process {rank} died in {job} with exit code {code}")
                if not done:
                    self._fail(f"process {rank} failed in {job}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.processes)]

    def _fail(self, sentence: str):
        raise RuntimeError(f"{sentence}\n--- they had printed\n{self._end()[-4000:]}")


def _serve(pipe: connection.Connection, rank: int, count: int, port: int):
    """In a child: join the job, then run what the parent sends until it is gone."""
    parent = os.getppid()

    def leave_with_the_parent():  # also out of a collective that waits for ever
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_the_parent, daemon=True).start()
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
    pipe.send((True, None))
    while True:
        file, name, kwargs = pipe.recv()
        try:
            result = getattr(_load(file), name)(**kwargs)
            pipe.send((True, jax.device_get(result)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _load(file: str):
    """The module in a file, loaded once; test files are on no import path."""
    name = "cluster_" + "_".join(pathlib.Path(file).with_suffix("").parts[1:])
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:]]
    try:
        _serve(connection.Connection(numbers[0]), *numbers[1:])
    except EOFError:  # the parent closed its end
        os._exit(0)  # without the barrier that JAX puts before an orderly exit
