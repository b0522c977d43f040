"""What suits a process that computes for minutes beside others: threads that sleep while they wait, memory in large
pages, and memory that is kept between steps. None needs torch; the first two must come before it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"}
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # that glibc takes, and comes to by itself


@contextmanager
def torch_settings() -> Iterator[None]:
    """Let what is imported inside, torch, find `ENVIRONMENT`, as far as the environment does not say otherwise.

    OMP_WAIT_POLICY: an OpenMP library's threads sleep while they wait. They spin by default. Where another program
    wants the cores too, each then waits for one that does not run: a conversion beside a compiler took eight times as
    long so. On idle cores nothing was lost by sleeping.

    THP_MEM_ALLOC_ENABLE: torch asks Linux for pages of 2 MiB where a tensor has as much. What glibc does not keep,
    pieces of more than 32 MiB, comes as new pages in every step, each of them zeroed: a quarter of a step's processor
    time where a linear has 14 million weights, a twentieth with large pages.

    Both are read once. The environment is put back: programs that are started from here decide for themselves.
    """
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


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
