"""Tensors that lie in a mapped file: their pages can be given back, and come again from the file where they are needed.

safetensors maps a file and copies nothing. Its pages count as memory of the process once they were looked at.
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")


class MappedFiles:
    """Where this process has mapped files of weights, at the moment of making; nowhere on systems without /proc."""

    def __init__(self, suffix: str = ".safetensors") -> None:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines() if MAPS.exists() else []
        mapped = (line.split()[0].split("-") for line in lines if line.endswith(suffix))
        self._ranges = sorted((int(start, 16), int(end, 16)) for start, end in mapped)

    def hold(self, tensor: Tensor) -> bool:
        """Whether all of a tensor lies in one of them."""
        start = tensor.data_ptr()
        at = bisect_right(self._ranges, (start, 1 << 64)) - 1
        return at >= 0 and start + tensor.nbytes <= self._ranges[at][1]

    def give_back(self, tensor: Tensor) -> None:
        """Let the system have the pages that lie wholly in a tensor, if it lies in a file.

        Only for a tensor that is as it was loaded: what was written into it is forgotten.
        """
        if not tensor.is_contiguous() or tensor.device.type != "cpu" or not self.hold(tensor):
            return
        page = mmap.PAGESIZE
        first = -(-tensor.data_ptr() // page) * page
        size = (tensor.data_ptr() + tensor.nbytes) // page * page - first
        if size > 0:
            madvise = ctypes.CDLL(None).madvise
            madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            madvise(first, size, mmap.MADV_DONTNEED)
