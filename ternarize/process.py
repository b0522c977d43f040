"""What suits a process that computes for minutes beside others: threads that sleep while they wait, and memory that is
kept between steps. Neither needs torch; the first must come before it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # that glibc takes
DEFAULT_THRESHOLD = 128 << 10  # of glibc, for both


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep while they wait for each other, where torch is not loaded and nobody said otherwise.

    They spin by default. Where another program wants the cores too, each then waits for one that does not run: a
    conversion beside a compiler took eight times as long so. On idle cores nothing was lost by sleeping.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library (glibc) keep what is freed for what comes next, and give all of it back at the end.

    It hands larger pieces back at once, and the next step's come as new pages, each of them zeroed: a quarter of the
    time of a training step.
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
        library.mallopt(MMAP_THRESHOLD, DEFAULT_THRESHOLD)
        library.mallopt(TRIM_THRESHOLD, DEFAULT_THRESHOLD)
        library.malloc_trim(0)
