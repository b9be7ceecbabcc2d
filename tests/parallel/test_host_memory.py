"""Freed memory is kept: repeated calls of a program do not fault its pages in anew."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, statistics, sys
if sys.argv[1] == "keep":
    from narrows.parallel.host_memory import keep_freed_memory
    assert keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def program(u):  # all scores at once: 64 MiB of temporaries
    scores = u @ u.T
    return jnp.exp(scores) @ u + scores[0, 0]

x = jnp.ones((4096, 4))
assert program.lower(x).compile().memory_analysis().temp_size_in_bytes >= 2**26
counts = []
for turn in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(counts))
"""


def faults(way: str) -> float:
    """Pages faulted in by the median call.

    A call may begin before the temporaries of the last are freed; then it takes a block
    of its own, once. So single calls of a process that keeps its memory may fault too.
    """
    run = [sys.executable, "-c", PROGRAM, way]
    return float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's, on Linux")
def test_a_repeated_program_faults_no_pages_in():
    fresh, kept = faults("fresh"), faults("keep")
    assert fresh > 2**26 // 4096  # the temporaries, page by page
    assert kept < fresh / 10
