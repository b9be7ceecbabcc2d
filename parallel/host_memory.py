"""What becomes of memory that a process frees: kept for the next step, or given back.

XLA takes the temporaries of a program as one block for each call. glibc maps a block of
that size anew and gives it back afterwards, so that each step pays a page fault for
every 4 KiB: 13 % of the processor time of a step of 10 million parameters. A process
that brings over one large array after the other has the opposite trouble: after the
first of them glibc serves such blocks from an arena of each thread and keeps what is
freed there, several arrays a thread.
"""

import ctypes
import sys

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8


def keep_freed_memory() -> bool:
    """Let malloc of glibc hold what it frees, in one arena; False where there is none.

    Call it before jax starts its threads, which would have arenas of their own by then.
    The process stays as large as its largest moment.
    """
    return _set((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> bool:
    """Let malloc of glibc give large freed blocks back; False where there is none.

    Those of 1 MiB and more. It undoes `keep_freed_memory`, but for the one arena.
    """
    return _set(
        (M_MMAP_THRESHOLD, 2**20), (M_MMAP_MAX, 2**16), (M_TRIM_THRESHOLD, 2**20)
    )


def _set(*settings: tuple[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(name, value) == 1 for name, value in settings)
