"""Who takes part, and the worker that each is timed in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ternarize.errors import TernarizeError
from ternarize.progress import Progress

from ..quality.contenders import environment, run_logged
from ..quality.peers._common import make
from .models import Model
from .workers import ROOT, Worker

TERNARIZE = "ternarize"
CONTENDERS = (
    TERNARIZE,
    "transformers:bfloat16",
    "transformers:int8",
    *(f"llama_cpp:{kind}" for kind in ("TQ2_0", "Q2_K", "Q4_0", "Q4_K_M", "F16")),
    "bitnet_cpp:I2_S",
)
BITNET = "BITNET_CPP"  # in the environment: the folder in which bitnet.cpp was built
PACKAGE = "tests.benchmarks.speed"


def choose(patterns: list[str]) -> list[str]:
    """Names by name, tool or pattern, in the order of `CONTENDERS`; all where there are no patterns.

    llama_cpp: takes other types of llama.cpp as well.

    Raises:
        TernarizeError: a pattern fits none.
    """
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        found = {name for name in CONTENDERS if fnmatch(name, pattern) or name.startswith(f"{pattern}:")}
        if not found and pattern.startswith("llama_cpp:"):
            found = {pattern}
        if not found:
            raise TernarizeError(f"no contender is called {pattern!r}. There are {', '.join(CONTENDERS)}.")
        chosen |= found
    return [name for name in CONTENDERS if name in chosen] + sorted(chosen - set(CONTENDERS))


@dataclass(frozen=True)
class Setting:
    """How everybody is timed.

    Args:
        threads: numbers of threads; a worker loads with the most of them.
        contexts: tokens of the prompts.
        tokens: that come out behind each.
        rounds: how often.
        restart: whether one process lives at a time, a new one each round.
        patience: seconds, as in `Worker`.
        environments: where peers' virtual environments are kept.
    """

    threads: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int
    rounds: int
    restart: bool
    patience: float
    environments: Path

    def to_dict(self) -> dict[str, Any]:
        """What must be equal for two results to be comparable, as plain values for JSON."""
        numbers: dict[str, Any] = {"threads": list(self.threads), "contexts": list(self.contexts)}
        return numbers | {"tokens": self.tokens, "rounds": self.rounds, "restart": self.restart}


class Contestant:
    """A contender in the race.

    Args:
        name: from `choose`.
        logs: the folder for what its processes say.

    Attributes:
        row: what the results say of it: facts, "runs", or "error", after which it takes no more part.
    """

    def __init__(self, name: str, logs: Path) -> None:
        self.row: dict[str, Any] = {"contender": name, "load": [], "runs": []}
        self.log = logs / f"{name.replace(':', '-')}.log"
        self.log.unlink(missing_ok=True)
        self.command: list[str] = []
        self.worker: Worker | None = None

    def prepare(self, model: Model, setting: Setting, progress: Progress) -> None:
        """Make its files."""
        try:
            self.command, facts = self._prepare(model, setting, progress)
            self.row |= facts
        except Exception as error:  # whatever a tool does with a model, the others go on
            self._fail(error)

    def start(self, setting: Setting) -> None:
        """Load the model in a process of its own, and let it read a prompt untimed; nothing to do where it lives."""
        if "error" in self.row or self.worker is not None:
            return
        try:
            self.worker = Worker(self.command, self.log, setting.patience)
            facts = dict(self.worker.facts)
            self.row["load"].append(facts.pop("load"))
            self.row |= facts
            for threads in setting.threads:
                self.worker.ask(threads=threads, prompt=min(setting.contexts), tokens=1)
        except TernarizeError as error:
            self._fail(error)

    def run(self, number: int, threads: int, prompt: int, tokens: int) -> None:
        """Time it once, for this round."""
        if self.worker is None:
            return
        try:
            speed = self.worker.ask(threads=threads, prompt=prompt, tokens=tokens)
        except TernarizeError as error:
            self._fail(error)
            return
        self.row["peak_memory"] = max(speed.pop("peak_memory"), self.row.get("peak_memory", 0))
        self.row["runs"].append({"round": number, "threads": threads, "prompt": prompt} | speed)

    def stop(self) -> None:
        """End its process."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def _fail(self, error: Exception) -> None:
        reason = (str(error).strip().splitlines() or [""])[-1]
        self.row["error"] = reason if isinstance(error, TernarizeError) else f"{type(error).__name__}: {reason}"
        self.stop()

    def _prepare(self, model: Model, setting: Setting, progress: Progress) -> tuple[list[str], dict[str, Any]]:
        """The worker's command, and what is known of its files."""
        tool, _, kind = self.row["contender"].partition(":")
        if tool == "llama_cpp":
            return self._prepare_llama(model, setting, kind)
        if tool == "bitnet_cpp":
            return self._prepare_bitnet(model, setting, kind)
        folder = model.ternary(progress) if tool == TERNARIZE else model.source
        arguments = [kind or tool, str(folder), str(max(setting.threads))]
        size = sum(read_through(file) for file in folder.glob("*.safetensors"))
        return [sys.executable, "-m", f"{PACKAGE}.torch_worker", *arguments], {"file_bytes": size}

    def _prepare_llama(self, model: Model, setting: Setting, kind: str) -> tuple[list[str], dict[str, Any]]:
        facts = self._make_llama(model, setting, kind)
        return self._llama_worker("llama_cpp", model.place / f"{kind}.gguf", setting), facts

    def _prepare_bitnet(self, model: Model, setting: Setting, kind: str) -> tuple[list[str], dict[str, Any]]:
        """From the same F16 file, by its own `llama-quantize`, which leaves embedding and head as they are."""
        library, quantize, commit = built_bitnet()
        whole = self._make_llama(model, setting, "F16")
        float_file, file = (model.place / f"{name}.gguf" for name in ("F16", kind))
        make(file, lambda partial: run_logged([str(quantize), str(float_file), str(partial), kind], self.log))
        size = file.stat().st_size
        facts = {
            "bytes_per_token": size - (whole["file_bytes"] - whole["bytes_per_token"]),  # less what no token reads
            "types": {kind: sum(whole["types"].values()) - 1, "F16": 1},
            "file_bytes": size,
            "version": {"bitnet.cpp": commit},
        }
        worker = self._llama_worker("bitnet_cpp", file, setting)
        return ["env", f"LLAMA_CPP_LIB_PATH={library.parent}", *worker], facts

    def _make_llama(self, model: Model, setting: Setting, kind: str) -> dict[str, Any]:
        python = environment("llama_cpp", setting.environments, self.log).absolute()
        made = [str(model.source), str(model.place), kind, str(max(setting.threads))]
        run_logged([str(python), "-m", f"{PACKAGE}.llama_files", *made], self.log, folder=ROOT)
        facts: dict[str, Any] = json.loads((model.place / f"{kind}.json").read_text(encoding="utf-8"))
        return facts

    def _llama_worker(self, peer: str, file: Path, setting: Setting) -> list[str]:
        python = environment(peer, setting.environments, self.log).absolute()
        read_through(file)
        context = max(setting.contexts) + setting.tokens + 1
        arguments = [str(file), str(max(setting.threads)), str(context)]
        return [str(python), "-m", f"{PACKAGE}.llama_worker", *arguments]


def built_bitnet() -> tuple[Path, Path, str]:
    """bitnet.cpp's libllama.so and llama-quantize, and the commit that they were built from.

    Raises:
        TernarizeError: `BITNET` names no folder in which it was built.
    """
    root = os.environ.get(BITNET)
    names = ("libllama.so", "llama-quantize")
    library, quantize = (next(Path(root).absolute().rglob(name), None) if root else None for name in names)
    if root is None or library is None or quantize is None:
        raise TernarizeError(
            f"{BITNET} in the environment is to name a folder in which bitnet.cpp was built, with "
            "-DBUILD_SHARED_LIBS=ON."
        )
    asked = ["git", "-C", root, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return library, quantize, commit or "of an unknown commit"


def read_through(file: Path) -> int:
    """Bytes of a file, which the system has in memory afterwards: nobody's load is to wait for the disk."""
    with file.open("rb") as bytes_:
        return sum(len(part) for part in iter(lambda: bytes_.read(1 << 24), b""))
