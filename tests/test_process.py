"""A process that computes for minutes: its threads sleep while they wait, its tensors lie in large pages, and freed
memory is kept and given back.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ternarize.kernels.pages import SETTING

SHOW = "import {first}, {second}, os; print('left', os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.skipif(platform.system() != "Linux", reason="GNU's OpenMP tells its settings on Linux")
@pytest.mark.parametrize(
    ("first", "second", "asked", "sleeps"),
    [("ternarize", "torch", None, True), ("ternarize", "torch", "active", False), ("torch", "ternarize", None, False)],
)
def test_threads_sleep_unless_somebody_said_otherwise(first: str, second: str, asked: str | None, sleeps: bool) -> None:
    """How often the threads of torch's libgomp, the first that is loaded, look before they sleep; and what is left of
    the setting for other programs.
    """
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    code = SHOW.format(first=first, second=second)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    spins = [int(line.split("'")[1]) for line in ran.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert (spins[0] == 0) == sleeps
    assert f"left {asked}" in ran.stdout


PAGES = """
import os, ternarize, torch
from pathlib import Path
made = torch.ones(16 << 20)  # 64 MiB
print(Path("/proc/self/smaps_rollup").read_text().split("AnonHugePages:")[1].split()[0])
print(os.environ.get("THP_MEM_ALLOC_ENABLE"))
"""


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="large pages are there on Linux, where allowed"
)
@pytest.mark.parametrize(("asked", "large"), [(None, True), ("0", False)])
def test_large_tensors_lie_in_large_pages_unless_somebody_said_otherwise(asked: str | None, large: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": asked} if asked else {}
    ran = subprocess.run(
        [sys.executable, "-c", PAGES], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    kilobytes, left = ran.stdout.split()
    assert (int(kilobytes) > 32 << 10) == large or "[always]" in SETTING.read_text()
    assert left == str(asked)


KEEPING = """
import resource, torch
from pathlib import Path
from ternarize.process import kept_memory

def held():  # MiB
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

def new_pages():  # for 400 MiB in 100 pieces that come and go together
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(1 << 20) for _ in range(100)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = held()
with kept_memory():
    print(new_pages(), new_pages(), held() - before)
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_and_then_given_back() -> None:
    """In a process of its own: in this one, what other tests left between its pieces decides what can be kept."""
    ran = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, timeout=120, check=True)
    first, second, kept, left = map(int, ran.stdout.split())
    assert second < first / 10
    assert kept > 300
    assert left < 100
