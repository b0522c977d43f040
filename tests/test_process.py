"""A process that computes for minutes: its threads sleep while they wait, and freed memory is kept and given back."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ternarize.process import WAIT_POLICY, kept_memory

SHOW = "import {first}, {second}, os; print('left', os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.skipif(platform.system() != "Linux", reason="GNU's OpenMP tells its settings on Linux")
@pytest.mark.parametrize(
    ("first", "asked", "found", "left"),
    [
        ("ternarize", None, "PASSIVE", "None"),
        ("ternarize", "active", "ACTIVE", "active"),
        ("torch", None, None, "None"),
    ],
)
def test_threads_sleep_unless_somebody_said_otherwise(
    first: str, asked: str | None, found: str | None, left: str
) -> None:
    """What libgomp read when torch was loaded; and nothing is handed on to other programs."""
    environment = {key: value for key, value in os.environ.items() if key != WAIT_POLICY}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({WAIT_POLICY: asked} if asked else {})
    code = SHOW.format(first=first, second="torch" if first == "ternarize" else "ternarize")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    shown = [line.split("'")[1] for line in ran.stderr.splitlines() if WAIT_POLICY in line]
    assert shown
    assert all(value == found for value in shown) if found else "ACTIVE" not in shown
    assert f"left {left}" in ran.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_and_then_given_back() -> None:
    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def new_pages() -> int:
        """For 400 MiB in pieces that come and go together."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _ = [torch.ones(5 << 20) for _ in range(20)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    before = held()
    with kept_memory():
        first, second = new_pages(), new_pages()
        kept = held()
    assert second < first / 10
    assert kept > before + (300 << 20) > held() + (200 << 20)
