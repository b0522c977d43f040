"""What every peer adapter shares: the command line, the clock, the dense checkpoint and `result.json`.

An adapter is run in its peer's own environment, so this file needs torch, transformers and safetensors only:

    python NAME.py SOURCE_FOLDER CALIBRATION.safetensors OUT_FOLDER [--set key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

try:
    from ._peak import peak_memory
except ImportError:  # run as a script's neighbour, not as part of the package
    from _peak import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# An adapter bears the name of the package it drives; its folder must not hide that package, neither from the adapter
# nor from transformers, which looks for it. Hence no transformers above this line.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]

WEIGHT_FILES = (".safetensors", ".bin", ".npz", ".pt", ".pth", ".gguf")


@dataclass
class Job:
    """One conversion: where it reads, where it writes, how it is set, and what it took."""

    peer: str
    source: Path
    ids: Tensor
    out: Path
    settings: dict[str, Any]
    seconds: float = 0.0
    peak_memory: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def stored(self) -> Path:
        return self.out / "stored"

    @property
    def dense(self) -> Path:
        return self.out / "dense"

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Time a stretch of the conversion; stretches add up. The peak is the process's up to here."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.peak_memory = peak_memory()

    def write_dense(self, weights: dict[str, Tensor]) -> None:
        """The source checkpoint with `weights` in the place of its own, everything in float32."""
        self.dense.mkdir(parents=True, exist_ok=True)
        tensors = dict(read_checkpoint(self.source))
        for name, value in weights.items():
            if tensors[name].shape != value.shape:
                raise ValueError(f"{name}: the source has {tuple(tensors[name].shape)}, not {tuple(value.shape)}")
            tensors[name] = value
        tensors = {name: value.detach().float().contiguous() for name, value in tensors.items()}
        save_file(tensors, self.dense / "model.safetensors", metadata={"format": "pt"})
        for file in self.source.iterdir():
            if file.is_file() and not file.name.endswith((*WEIGHT_FILES, ".index.json")):
                shutil.copyfile(file, self.dense / file.name)
        config = json.loads((self.source / "config.json").read_text())
        config["dtype"] = config["torch_dtype"] = "float32"
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope:  # where transformers 4 looks for it
            config.setdefault("rope_theta", rope["rope_theta"])
        (self.dense / "config.json").write_text(json.dumps(config, indent=2))

    def write_result(self, linear_bytes: int, weights: dict[str, Tensor], packages: list[str]) -> None:
        result = {
            "peer": self.peer,
            "settings": {key: value for key, value in self.settings.items() if key != "verify"},
            "version": {name: metadata.version(name) for name in ["torch", "transformers", *packages]},
            "seconds": round(self.seconds, 2),
            "peak_memory": self.peak_memory,
            "linear_bytes": int(linear_bytes),
            "linear_weights": sum(value.numel() for value in weights.values()),
            "file_bytes": sum(f.stat().st_size for f in self.stored.rglob("*") if f.suffix in WEIGHT_FILES),
            "note": " ".join(self.notes),
        }
        (self.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        bits = 8 * result["linear_bytes"] / result["linear_weights"]
        print(f"{self.peer}: {bits:.3f} bits, {result['seconds']} s, {result['note']}")

    def verify(self, load: Callable[[], PreTrainedModel]) -> None:
        """With `--set verify=1`: compare the logits of the model that the tool loads with the dense checkpoint's.

        Both compute in the type the tool computes in, so that what differs is the weights and not the arithmetic.
        """
        if not self.settings["verify"]:
            return
        from transformers import AutoModelForCausalLM

        own = load().eval()
        dtype = own.get_input_embeddings().weight.dtype
        dense = AutoModelForCausalLM.from_pretrained(self.dense, dtype=dtype).eval()
        ids = self.ids[:1, :128]
        with torch.no_grad():
            theirs, ours = own(ids).logits.float(), dense(ids).logits.float()
        worst = (ours - theirs).abs().max().item()
        text = f"The logits of the tool's own model and of the dense one differ by at most {worst:.2g} in {dtype}"
        self.notes.append(f"{text} (standard deviation {ours.std().item():.2g}).")


def start(peer: str, defaults: dict[str, Any]) -> Job:
    """Read the command line. A setting has the type of its default; one that is not in `defaults` is an error."""
    parser = argparse.ArgumentParser(prog=f"{peer}.py")
    parser.add_argument("source", type=Path, help="folder of the float checkpoint")
    parser.add_argument("calibration", type=Path, help='safetensors file with int64 "ids" [sequences, tokens]')
    parser.add_argument("out", type=Path, help="folder to write stored/, dense/ and result.json to")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", dest="changes")
    given = parser.parse_args()
    settings = {**defaults, "verify": False}
    for change in given.changes:
        key, _, value = change.partition("=")
        if key not in settings:
            parser.error(f"unknown setting {key!r}, there are {', '.join(settings)}")
        kind = type(settings[key])
        settings[key] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
    shutil.rmtree(given.out, ignore_errors=True)
    job = Job(peer, given.source, load_file(given.calibration)["ids"], given.out, settings)
    job.stored.mkdir(parents=True)
    torch.manual_seed(0)
    return job


def make(file: Path, write: Callable[[Path], object]) -> None:
    """Have a file written, unless it is there; what fails on the way leaves none."""
    if not file.exists():
        partial = file.with_suffix(".partial")
        write(partial)
        os.replace(partial, file)


def read_checkpoint(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the safetensors files of a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                yield name, tensors.get_tensor(name)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the decoder blocks, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"}


def stored_bytes(folder: Path, linears: list[str]) -> int:
    """Bytes of all tensors in `folder` that belong to one of `linears`, biases left out."""
    total = 0
    for name, value in read_checkpoint(folder):
        if any(name.startswith(f"{linear}.") for linear in linears) and not name.endswith(".bias"):
            total += value.nbytes
    return total


def pack_trits(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 [rows, columns] to bytes [rows, ceil(columns / 5)], five trits in each."""
    digits = nn.functional.pad(codes.to(torch.int16) + 1, (0, -codes.shape[1] % 5))
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int16)
    return (digits.view(len(codes), -1, 5) * powers).sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """Undo `pack_trits`."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int16)
    digits = packed.to(torch.int16)[..., None] // powers % 3 - 1
    return digits.view(len(packed), -1)[:, :columns].to(torch.int8)
