"""Freed memory is kept, so that no page is faulted in anew, or it is given back."""

import subprocess
import sys

import pytest

START = """
import ctypes, pathlib, resource, sys
from narrows.parallel.host_memory import give_back_freed_memory, keep_freed_memory
if sys.argv[1] != "fresh":
    assert keep_freed_memory()
if sys.argv[1] == "give":
    assert give_back_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
"""

FAULTS = """
size, counts = 2**26, []  # beyond what malloc would ever keep by itself
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*counts)
"""


def faults(way: str) -> list[int]:
    """Pages faulted in by each turn of taking, writing and freeing 64 MiB."""
    run = [sys.executable, "-c", START + FAULTS, way]
    said = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return [int(count) for count in said.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's, on Linux")
def test_a_block_that_is_taken_again_faults_no_pages_in():
    fresh, kept = faults("fresh"), faults("keep")
    assert min(fresh) > 20  # huge pages at the least, in every turn
    assert max(kept[1:]) < min(fresh) / 10 + 5


BLOCKS = """
def resident():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()

before = resident()
blocks = [libc.malloc(2**24) for _ in range(5)]
for block in blocks:
    ctypes.memset(block, 1, 2**24)
for block in blocks[:4]:  # the last one stays, on top of them
    libc.free(block)
print((resident() - before) / 2**24)
"""


def left(way: str) -> float:
    run = [sys.executable, "-c", START + BLOCKS, way]
    return float(subprocess.run(run, check=True, capture_output=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's, on Linux")
def test_blocks_that_are_freed_are_given_back():
    assert left("keep") > 4.5
    assert left("give") < 1.5
