"""The README.md of an export: what it is, how exact, how to load it, and the model that it was made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from ternarize.hub import CARD_FILE, PLACE
from ternarize.progress import size

CARD = """\
---
{metadata}
---

# {title}

A model with ternary weights in the format `{format}`, written by [ternarize](https://pypi.org/project/ternarize/)
{version}.

| | |
| --- | --- |
| bits per ternary weight | {bits:.3f} |
| weight files | {bytes} |
| weights against the ternarize folder's | {exactness} |

{quality}## Load

```{language}
{snippet}
```

The base model's licence and limits apply.
"""

TRANSFORMERS = """\
{install}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}"{arguments})
tokenizer = AutoTokenizer.from_pretrained("{place}")"""
MLX = """\
# pip install mlx-lm
from mlx_lm import load

model, tokenizer = load("{place}")"""
GPTQ = """\
# pip install gptqmodel
from gptqmodel import GPTQModel

model = GPTQModel.load("{place}")"""
GGUF = """\
llama-cli -hf {place}                 # or, of a local file: llama-cli -m {file}"""


def export_card(source: Path, format_: str, fields: dict[str, Any], exactness: str) -> str:
    """Markdown with the Hub's metadata on top.

    Args:
        source: the ternarize folder, whose own card says what is known of the base model.
        fields: of export.json (see `export`).
        exactness: in words.
    """
    try:
        known: dict[str, Any] = metadata_load(source / CARD_FILE) or {}
        text = (source / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError, YAMLError):  # an imported folder has no card
        known, text = {}, ""
    measured = re.search(r"^## Quality\n[^#]*?^\|[^#]*?\n\n", text, re.MULTILINE)  # down to the table's end
    kind = format_.partition("-")[0]
    library = {"mlx": "mlx", "gguf": "gguf"}.get(kind, "transformers")
    taken = {key: value for key, value in known.items() if key not in ("library_name", "tags", "model-index")}
    data = ModelCardData(library_name=library, tags=["ternarize", "ternary", format_], **taken)
    name = str(known.get("base_model") or source.resolve().name).rpartition("/")[2]
    return CARD.format(
        metadata=data.to_yaml(),
        title=f"{name}, ternary, {format_}",
        format=format_,
        version=fields["versions"]["ternarize"],
        bits=fields["bits_per_ternary_weight"],
        bytes=size(fields["bytes"]),
        exactness=exactness,
        quality=measured.group() if measured else "",
        language="bash" if kind == "gguf" else "python",
        snippet=_snippet(kind, format_, fields["file"]),
    )


def _snippet(kind: str, format_: str, file: str | None) -> str:
    """How its readers load it, from the place that `PLACE` stands for."""
    if kind == "gguf":
        return GGUF.format(place=PLACE, file=file)
    if kind in ("mlx", "gptq"):
        return {"mlx": MLX, "gptq": GPTQ}[kind].format(place=PLACE)
    install = "# pip install compressed-tensors\n" if format_ == "compressed-tensors" else ""
    arguments = ', device_map="cpu"' if kind == "metal" else ""  # elsewhere than on a Mac
    return TRANSFORMERS.format(install=install, place=PLACE, arguments=arguments)
