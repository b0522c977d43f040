"""What all tests share: no network, caches and outputs in temporary folders, and one small conversion to read from.

The environment is set before transformers is imported, which reads it once.
"""

# ruff: noqa: E402 - imports follow the environment

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CACHE = Path(tempfile.mkdtemp(prefix="ternarize-tests-"))
os.environ |= {
    "HF_HOME": str(_CACHE / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TERNARIZE_CACHE": str(_CACHE / "ternarize"),
    "TOKENIZERS_PARALLELISM": "false",
    # One thread here and in the processes that tests start: tiny models are faster so, and sums come out the same.
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
    # The same arithmetic on every machine; what bfloat16 changes is tested where it is meant (test_calibration.py).
    "TERNARIZE_BFLOAT16": "0",
    # Loaded models compute what the reference does, up to rounding; int8 is tested in test_kernels.py.
    "TERNARIZE_ACTIVATIONS": "float",
}

import pytest
import torch
from hub_server import WRITER, Hub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from tiny import make_checkpoint, make_recipe, make_text
from transformers.utils import logging

from ternarize import Recipe, cli
from ternarize.conversion import convert
from ternarize.kernels import cpu
from ternarize.progress import Progress


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file for calibration and measuring."""
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def recipe(text: Path) -> Recipe:
    """A recipe whose sizes fit the tiny models; a conversion with it takes half a second."""
    return make_recipe(text)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float checkpoint; copy it before changing it."""
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "llama", chat=True)


@pytest.fixture(scope="session")
def ternary(llama: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` converted with `recipe`; copy it before changing it."""
    output = tmp_path_factory.mktemp("ternary") / "ternary"
    convert(llama, output, recipe, progress=Progress(quiet=True))
    return output


@pytest.fixture
def quiet() -> Progress:
    """Says nothing."""
    return Progress(quiet=True)


@pytest.fixture(params=("scalar", "avx2", "avx512vnni", "avx512vbmi", "amx", "neon"))
def path(request: pytest.FixtureRequest) -> Iterator[cpu.Native]:
    """Each path of the native library in turn, in use."""
    if not cpu.paths().get(request.param):
        missing = "not on this processor" if request.param in cpu.paths() else "another build"
        pytest.skip(f"{request.param}: {missing}")
    with cpu.using(request.param) as native:
        assert native is not None
        yield native


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Call the command line: (exit code, standard output, standard error)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ternarize", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.run()
            code: Any = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the client in this process talks to, with a token that may write; retries do not wait."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server
