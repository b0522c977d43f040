"""Memory for weights: aligned, apart from each other, and freed."""

from __future__ import annotations

import itertools
import mmap
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ternarize.kernels import pages

SIZES = [1, 63, 64, 65, 4096, pages.CHUNK // 2, pages.CHUNK // 2 + 1, 3 * pages.CHUNK]


def test_every_piece_is_aligned_and_nobody_elses() -> None:
    with ThreadPoolExecutor(4) as threads:
        sizes = random.Random(0).choices(SIZES[:-2], k=200) + SIZES
        pieces = list(threads.map(pages.allocate, sizes))
    ranges = sorted((piece.data_ptr(), piece.data_ptr() + len(piece)) for piece in pieces)
    assert [len(piece) for piece in pieces] == sizes
    assert all(start % pages.LINE == 0 for start, _ in ranges)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    storages = {piece.untyped_storage().data_ptr(): piece.untyped_storage().nbytes() for piece in pieces}
    assert sorted(storages.values()) == sorted(sizes), "safetensors would take them for one tensor"


def test_memory_outlives_the_call_and_holds_what_is_written() -> None:
    pieces = [pages.allocate(1000).fill_(number) for number in range(200)]
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))


def test_nothing_is_allocated_for_nothing() -> None:
    assert pages.allocate(0).shape == (0,)


def test_a_mapping_ends_with_its_last_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("no large pages here")
    made = []

    class Watched(mmap.mmap):
        def __del__(self) -> None:
            made.remove(id(self))

    def watch(size: int) -> mmap.mmap:
        found = Watched(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        made.append(id(found))
        return found

    monkeypatch.setattr(pages, "_map", watch)
    monkeypatch.setattr(pages, "_chunk", [])
    for _ in range(10):
        pages.allocate(pages.CHUNK // 2)  # two to a chunk
    pages.allocate(2 * pages.CHUNK)
    assert len(made) == 1, "the chunk that has room"
    pages._chunk.clear()
    assert not made


def test_where_large_pages_are_unknown_memory_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(pages, "_map", lambda size: pytest.fail("mapped"))
    piece = pages.allocate(1000)
    assert (piece.dtype, piece.shape) == (torch.uint8, (1000,))


@pytest.mark.parametrize(
    ("setting", "says"),
    [("always [madvise] never", "yes"), ("[always] madvise never", "yes"), ("always madvise [never]", "no, ")],
)
def test_doctor_says_whether_there_are_large_pages(
    setting: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    monkeypatch.setattr(pages, "SETTING", tmp_path / "enabled")
    assert pages.large_pages() == "not asked for on this system"
    (tmp_path / "enabled").write_text(setting)
    assert pages.large_pages().startswith(says)
