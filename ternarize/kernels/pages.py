"""Memory for weights that are read from end to end for every token: in large pages where the system has them.

With pages of 4 KiB the processor looks up a new one every 64 cache lines, on virtual machines through two layers of
tables. Linux gives pages of 2 MiB to whom asks (`transparent_hugepage/enabled`: madvise or always); elsewhere all is as
it would be without asking.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path

import torch
from torch import Tensor

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE_PAGE = 2 << 20
CHUNK = 8 * LARGE_PAGE  # what is smaller shares one
LINE = 64  # bytes of a cache line, at whose beginning all of it starts

_lock = threading.Lock()
_chunk: list[tuple[mmap.mmap, int]] = []  # the last one, and how much of it is taken


def allocate(size: int) -> Tensor:
    """Memory of its own, uint8 [size], contents undefined; it begins at a multiple of 64 bytes."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.empty(size, dtype=torch.uint8)
    wanted = -(-size // LINE) * LINE
    if wanted > CHUNK // 2:
        return _view(_map(wanted), 0, size)
    with _lock:
        if not _chunk or _chunk[0][1] + wanted > CHUNK:
            _chunk[:] = [(_map(CHUNK), 0)]
        memory, taken = _chunk[0]
        _chunk[0] = memory, taken + wanted
    return _view(memory, taken, size)


def trim() -> None:
    """Let the system have what the C library keeps of freed memory, where that can be said (glibc).

    Between objects that stay it keeps holes, and does not fill them with what is larger.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def large_pages() -> str:
    """Whether the system gives large pages: "yes", or why not."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not SETTING.exists():
        return "not asked for on this system"
    return "no, transparent_hugepage is off" if "[never]" in SETTING.read_text(encoding="utf-8") else "yes"


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _view(memory: mmap.mmap, start: int, size: int) -> Tensor:
    """A tensor with a storage of its own, which keeps the mapping alive."""
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
