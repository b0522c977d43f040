"""Who takes part, and how each makes its model: ternarize by its command line, peers in environments of their own.

A peer is `peers/NAME.py SOURCE CALIBRATION OUT --set key=value`, run with the packages of `peers/requirements/NAME.txt`
(without such a file: with this Python). It writes OUT/dense, an ordinary checkpoint of the dequantized weights;
OUT/stored, what its users would keep; and OUT/result.json with the fields of `RESULT`.

`linear_bytes` counts every stored byte of the quantized linears but biases: codes, scales, zero points, permutations.
`file_bytes` counts all weight files that a user needs to run the model, embeddings included.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ternarize import __version__
from ternarize.errors import TernarizeError
from ternarize.recipe import RECIPE_FOLDER, Recipe, shipped
from ternarize.report import Report
from ternarize.text import fingerprint

PEERS = Path(__file__).parent / "peers"
RESULT = ("seconds", "peak_memory", "linear_bytes", "linear_weights", "file_bytes", "version", "note")


@dataclass(frozen=True)
class Contender:
    """A tool and its settings; `tool` is a peer, or "ternarize", with "recipe", its keys, and "device"."""

    tool: str
    settings: dict[str, str] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What a result stands for: settings and versions. The recipe goes in by its contents."""
        if self.tool == "ternarize":
            return {"settings": self.settings | {"recipe": self.recipe().to_dict()}, "version": __version__}
        lines = [line for file in requirements(self.tool) for line in file.read_text(encoding="utf-8").splitlines()]
        pins = [pin for line in lines if (pin := line.partition("#")[0].strip())]
        return {"settings": self.settings, "version": " ".join(pins)}

    def recipe(self) -> Recipe:
        """ternarize's recipe, settings applied."""
        return Recipe.load(self.settings["recipe"]).with_settings(self.changes())

    def changes(self) -> list[str]:
        """Of the recipe, `key=value`."""
        return [f"{key}={value}" for key, value in self.settings.items() if key not in ("recipe", "device")]


CONTENDERS = {
    **{f"ternarize:{name}": Contender("ternarize", {"recipe": name}) for name in shipped()},
    "gptq:g128": Contender("gptq", {"group_size": "128"}),
    "gptq:g64": Contender("gptq", {"group_size": "64"}),
    "hqq:g64": Contender("hqq", {"group_size": "64"}),
    "auto_round:g128": Contender("auto_round", {"group_size": "128"}),
    "auto_round:g64": Contender("auto_round", {"group_size": "64"}),
    "ternary_quant:1": Contender("ternary_quant", {"planes": "1"}),
    "ternary_quant:2": Contender("ternary_quant", {"planes": "2"}),
    "pt2_llm": Contender("pt2_llm"),
    "ternaryllm": Contender("ternaryllm"),
    **{f"llama_cpp:{kind}": Contender("llama_cpp", {"type": kind}) for kind in ("Q2_K", "IQ2_XS", "TQ2_0", "TQ1_0")},
}


def choose(patterns: list[str]) -> dict[str, Contender]:
    """Contenders by name: `hqq:g64`; `gptq` or `*:g64` for several; `ternarize:mine.yaml`; `,key=value` adds a setting.

    Raises:
        TernarizeError: a name fits none.
    """
    chosen: dict[str, Contender] = {}
    for pattern in patterns or list(CONTENDERS):
        name, *changes = pattern.split(",")
        found = {known: c for known, c in CONTENDERS.items() if fnmatch(known, name) or known.startswith(f"{name}:")}
        if name.startswith("ternarize:") and name.endswith((".yaml", ".yml")):
            path = name.removeprefix("ternarize:")
            found = {f"ternarize:{Path(path).name}": Contender("ternarize", {"recipe": path})}
        if not found or not all("=" in change for change in changes):
            raise TernarizeError(
                f"contender {pattern!r} is not NAME or NAME,key=value. Names, which may have wildcards: "
                f"{', '.join(CONTENDERS)}, ternarize:RECIPE.yaml."
            )
        settings = dict(change.split("=", 1) for change in changes)
        for known, contender in found.items():
            changed = dataclasses.replace(contender, settings=contender.settings | settings)
            chosen[",".join([known, *changes])] = changed
    for contender in chosen.values():
        contender.identity()  # an unknown recipe or setting is better known now than in hours
    return chosen


@dataclass(frozen=True)
class Inputs:
    """What everybody gets.

    Args:
        source: the teacher as the user named it.
        folder: where it lies.
        calibration: safetensors file with the calibration tokens, "ids" [B, T].
        ids: those.
        texts: the files that they were drawn from.
        environments: where peers' virtual environments are kept.
    """

    source: str
    folder: Path
    calibration: Path
    ids: Tensor
    texts: tuple[Path, ...]
    seed: int
    environments: Path


def produce(contender: Contender, inputs: Inputs, out: Path, log: Path) -> tuple[Path, dict[str, Any]]:
    """Let a contender make its model.

    Returns:
        The folder to load, and the fields of `RESULT` with "calibration_tokens".

    Raises:
        TernarizeError: it failed; the message ends with the last line that it wrote.
    """
    if contender.tool == "ternarize":
        run_logged(ternarize_command(contender, inputs, out), log)
        return out, ternarize_result(out, inputs.ids)
    script = PEERS / f"{contender.tool}.py"
    if not script.is_file():
        raise TernarizeError(f"peers/{script.name} does not exist. Write it as the docstring of contenders.py says.")
    python = environment(contender.tool, inputs.environments, log)
    settings = [f"--set={key}={value}" for key, value in contender.settings.items()]
    paths = [str(path.absolute()) for path in (python, script, inputs.folder, inputs.calibration, out)]
    run_logged([*paths, *settings], log, folder=out.parent)  # some write logs where they are started
    result = json.loads((out / "result.json").read_text())
    if missing := [key for key in RESULT if key not in result]:
        raise TernarizeError(f"peers/{script.name} wrote a result.json without {', '.join(missing)}. Add them there.")
    return out / "dense", {key: result[key] for key in RESULT} | {"calibration_tokens": inputs.ids.numel()}


def ternarize_command(contender: Contender, inputs: Inputs, out: Path) -> list[str]:
    """`ternarize convert` on the shared text; what a recipe says about its amount of text holds, else what all get."""
    recipe = contender.settings["recipe"]
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPE_FOLDER / f"{recipe}.yaml"
    stated = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("calibration", {})
    shared = {"samples": inputs.ids.shape[0], "length": inputs.ids.shape[1], "seed": inputs.seed}
    settings = [f"calibration.{key}={value}" for key, value in shared.items() if key not in stated]
    settings += contender.changes()
    command = [sys.executable, "-m", "ternarize.cli", "convert", inputs.source, "--output", str(out)]
    command += ["--recipe", recipe, *(f"--text={text}" for text in inputs.texts)]
    command += ["--device", contender.settings.get("device", "cpu")]
    return command + [f"--set={setting}" for setting in settings]


def ternarize_result(folder: Path, ids: Tensor) -> dict[str, Any]:
    """The fields of `RESULT` for a ternarize folder, sizes counted in its files' headers."""
    report = Report.read(folder)
    data = report.data
    other = "tokens" in data and data["sha256"] != fingerprint(ids)
    return {
        "seconds": report.run["seconds"],
        "peak_memory": report.run["peak_memory"],
        "linear_bytes": stored_bytes(folder, [entry.name for entry in report.linears]),
        "linear_weights": sum(entry.shape[0] * entry.shape[1] for entry in report.linears),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "version": report.versions,
        "note": f"calibrated on {data['tokens']:,} tokens of the same sources, as its recipe says" if other else "",
        "calibration_tokens": data.get("tokens", 0),
    }


def stored_bytes(folder: Path, linears: list[str]) -> int:
    """Bytes of the tensors under these linears' names, biases left out, by the headers of the safetensors files."""
    names, total = set(linears), 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for key, entry in header.items():
            under = any(key[:place] in names for place, letter in enumerate(key) if letter == ".")
            if under and not key.endswith(".bias"):
                start, end = entry["data_offsets"]
                total += end - start
    return total


def requirements(peer: str) -> list[Path]:
    """What pip installs for a peer, in this order; NAME-no-deps.txt is for packages whose own pins contradict it."""
    files = [PEERS / "requirements" / f"{peer}{ending}.txt" for ending in ("", "-no-deps")]
    return [file for file in files if file.is_file()]


def environment(peer: str, folder: Path, log: Path) -> Path:
    """The Python of a peer's virtual environment, made on first use; this Python where it requires nothing.

    Raises:
        TernarizeError: pip could not install.
    """
    required = requirements(peer)
    if not required:
        return Path(sys.executable)
    key = hashlib.sha256(sys.version.encode() + b"".join(file.read_bytes() for file in required)).hexdigest()[:12]
    made = folder / f"{peer}-{key}"
    python, ready = made / "bin" / "python", made / "ready"
    if not ready.exists():
        venv.create(made, clear=True, with_pip=True)
        for file in required:
            alone = ["--no-deps", "--no-build-isolation"] if file.stem.endswith("-no-deps") else []
            command = [str(python), "-m", "pip", "install", *alone, "--requirement", str(file)]
            run_logged(command, log, offline=False)
        ready.touch()
    return python


def run_logged(command: list[str], log: Path, offline: bool = True, folder: Path | None = None) -> None:
    """Run to the end, in `folder` where one is given, all output into `log`.

    Raises:
        TernarizeError: the exit code is not 0.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} if offline else {}
    with log.open("a", encoding="utf-8") as file:
        print("$", " ".join(command), file=file, flush=True)
        done = subprocess.run(command, stdout=file, stderr=file, env=os.environ | quiet, cwd=folder, check=False)
    if done.returncode:
        raise TernarizeError(f"exit code {done.returncode}: {failure(log)}")


def failure(log: Path) -> str:
    """What a process that failed said: the last error of its log, or the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = re.findall(r"^(?:error: |[\w.]*(?:Error|Exception)\b).*", text, re.MULTILINE)
    return str((errors or text.strip().splitlines() or ["it said nothing"])[-1].strip())
