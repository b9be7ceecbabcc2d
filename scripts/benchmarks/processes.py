"""JAX processes that do what they are told, a line of JSON at a time.

`started` gives a function `ask(job, **arguments)`: every process calls that method of
its own object, and what process 0 returned comes back. Processes join one
`jax.distributed` job; a prefix of the command puts each where it is to run, such as a
network namespace.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Ask = Callable[..., Any]
CHILD = "from narrows.scripts.benchmarks.processes import serve; serve()"


@contextlib.contextmanager
def started(
    make: str, options: dict[str, Any], prefixes: Sequence[Sequence[str]], address: str
) -> Iterator[Ask]:
    """`make`, written "package.module:name", is called with `options` in each process.

    address: host:port of process 0. Raises RuntimeError with what the processes had
    printed when one of them ends.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    env.pop("XLA_FLAGS", None)
    children: list[subprocess.Popen] = []
    with tempfile.TemporaryFile("w+") as log:

        def ask(job: str, **arguments: Any) -> Any:
            line = json.dumps([job, arguments]) + "\n"
            answers = []
            for child in children:
                with contextlib.suppress(BrokenPipeError):  # told below, by its silence
                    child.stdin.write(line)  # type: ignore[union-attr]
                    child.stdin.flush()  # type: ignore[union-attr]
            for rank, child in enumerate(children):
                answer = child.stdout.readline()  # type: ignore[union-attr]
                if not answer:
                    log.seek(0)
                    said = log.read()[-4000:]
                    raise RuntimeError(f"process {rank} ended in {job}:\n{said}")
                answers.append(json.loads(answer))
            return answers[0]

        try:
            for rank, prefix in enumerate(prefixes):
                joined = {"address": address, "count": len(prefixes), "rank": rank}
                said = json.dumps({"make": make, "options": options, "join": joined})
                children.append(
                    subprocess.Popen(
                        [*prefix, sys.executable, "-c", CHILD, said],
                        env=env,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )
            yield ask
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()


def serve() -> None:
    """In a child: join the job, make the object, answer until the parent is gone."""
    import importlib

    import jax

    said = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    join = said["join"]
    jax.distributed.initialize(join["address"], join["count"], join["rank"])
    module, name = said["make"].split(":")
    made = getattr(importlib.import_module(module), name)(**said["options"])
    for line in sys.stdin:
        job, arguments = json.loads(line)
        print(json.dumps(getattr(made, job)(**arguments)), file=answers, flush=True)
    os._exit(0)  # without the barrier of an orderly exit: peers may be gone
