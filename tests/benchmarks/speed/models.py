"""What is measured: a checkpoint, or a random one of a given shape; and the ternary folder that goes with it."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ternarize import Recipe, __version__
from ternarize.conversion import convert
from ternarize.errors import TernarizeError
from ternarize.progress import Progress, quiet_transformers
from ternarize.sources import resolve

RANDOM = "random:"
SHAPE = ("hidden", "inner", "layers", "heads", "kv heads", "vocabulary")

# Groups of 32 with 4-bit scales, as the recipes that ship have them, fitted to the weights alone: minutes instead of
# hours, and as fast afterwards.
DATA_FREE = Recipe(
    grid="symmetric",
    group_size=32,
    feedback=False,
    order="natural",
    curvature=False,
    refit=False,
    sweeps=0,
    correction=0.0,
)


@dataclass(frozen=True)
class Model:
    """A model, by the files that contenders are made from.

    Args:
        name: as the user gave it, of a path the last part.
        source: the float checkpoint's folder.
        given: a ternary folder of it, if the user has one.
        place: the folder for what is made of it, kept for the next run.
    """

    name: str
    source: Path
    given: Path | None
    place: Path

    def ternary(self, progress: Progress) -> Path:
        """The ternary folder: the user's, or a data-free conversion.

        Raises:
            TernarizeError: it cannot be converted.
        """
        if self.given is not None:
            return self.given
        folder = self.place / f"ternary-{__version__}"
        if not folder.is_dir():
            convert(self.source, folder, DATA_FREE, resume=True, progress=progress)
            gc.collect()
        return folder


def find(text: str, work: Path, progress: Progress) -> Model:
    """The model that `SOURCE`, `SOURCE=TERNARY_FOLDER` or `random:...` stands for.

    Raises:
        TernarizeError: there is none.
    """
    name, equals, folder = text.partition("=")
    given = Path(folder).absolute() if equals else None
    if given is not None and not given.is_dir():
        raise TernarizeError(f"{text}: {folder} is not a folder. Give one that `ternarize convert` wrote, or none.")
    source = random_checkpoint(name, work, progress) if name.startswith(RANDOM) else resolve(name).absolute()
    key = hashlib.sha256((source / "config.json").read_bytes())
    for file in sorted(source.glob("*.safetensors")):
        key.update(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}".encode())
    place = work / key.hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    return Model(Path(name).name if Path(name).exists() else name, source, given, place)


def random_checkpoint(name: str, work: Path, progress: Progress) -> Path:
    """A Llama with random weights in bfloat16, written once.

    Args:
        name: "random:" and the numbers of `SHAPE` with an x between them.

    Raises:
        TernarizeError: these are no such numbers.
    """
    parts = name.removeprefix(RANDOM).split("x")
    if len(parts) != len(SHAPE) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise TernarizeError(
            f"{name!r} is no shape. Write {RANDOM}{'x'.join(SHAPE).replace(' ', '_').upper()}, such as "
            f"{RANDOM}2048x5632x22x32x4x32000."
        )
    hidden, inner, layers, heads, kv_heads, vocabulary = map(int, parts)
    folder = work / name.replace(":", "-")
    if folder.is_dir():
        return folder
    progress.say(f"{name}: writing random weights")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 15,
        dtype=torch.bfloat16,
    )
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        torch.manual_seed(0)
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(partial)  # nobody reads text here, but a checkpoint has one
    os.replace(partial, folder)
    gc.collect()
    return folder
