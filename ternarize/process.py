"""What suits a process that computes for minutes beside others: threads that sleep while they wait, and memory that is
kept between steps. Neither needs torch; the first must come before it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_POLICY = "OMP_WAIT_POLICY"
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # that glibc takes, and comes to by itself


@contextmanager
def sleeping_threads() -> Iterator[None]:
    """Let the threads of an OpenMP library that is loaded here sleep while they wait, unless the environment says how.

    They spin by default. Where another program wants the cores too, each then waits for one that does not run: a
    conversion beside a compiler took eight times as long so. On idle cores nothing was lost by sleeping. The library
    reads the environment once; it is put back, and other programs that are started from here decide for themselves.
    """
    if WAIT_POLICY in os.environ:
        yield
        return
    os.environ[WAIT_POLICY] = "passive"
    try:
        yield
    finally:
        del os.environ[WAIT_POLICY]


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library (glibc) keep what is freed for what comes next, and give all of it back at the end.

    It hands larger pieces back to the system, and the next step's come as new pages, each of them zeroed: a quarter of
    the time of a training step.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)  # as where it came to that by itself
        library.malloc_trim(0)
