"""The README.md of an imported folder: what it was, that nothing was changed, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ternarize import __version__
from ternarize.files import find_shards, write_text
from ternarize.format import TRIPWIRE, Layout
from ternarize.hub import CARD_FILE, LOADING, PLACE, describe_levels, describe_tables
from ternarize.progress import size

CARD = (
    """\
---
{metadata}
---

# {title}, ternary

{source}, whose weights were ternary already, as a folder of [ternarize](https://pypi.org/project/ternarize/) {version}.
Nothing was fitted or rounded: every weight of the {count} linears inside its decoder layers is what it was,
`{formula}`, trit in {{-1, 0, 1}}, with {levels}.

| | |
| --- | --- |
| bits per ternary weight | {bits:.3f} ({parts}, all stored bytes counted) |
| weight files | {bytes} |
| embeddings and head | {tables} |

"""
    + LOADING
    + """\
The base model's licence and limits apply.
"""
)


def write_card(folder: Path, name: str, known: dict[str, Any], layout: Layout, linears: int, bits: float) -> None:
    """Write README.md, Markdown with the Hub's metadata on top, into a folder whose weights are written.

    Args:
        folder: where.
        name: of the source, as the user gave it.
        known: of the base model, what `sources.describe` says.
        layout: of the folder.
        linears: how many are ternary; bits: per ternary weight.
    """
    base = known.get("name")
    formula, levels, parts = describe_levels(layout)
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ternarize", "ternary"],
        **{key: value for key, value in known.items() if key not in ("name", "gated")},
    )
    text = CARD.format(
        metadata=data.to_yaml(),
        title=str(base or name).rstrip("/").rpartition("/")[2],
        source=f"[{base}](https://huggingface.co/{base})" if base else f"`{name}`",
        version=__version__,
        count=linears,
        formula=formula,
        levels=levels,
        bits=bits,
        parts=parts,
        bytes=size(sum(shard.stat().st_size for shard in find_shards(folder))),
        tables=describe_tables(layout.int8, layout.int6),
        place=PLACE,
        tripwire=TRIPWIRE,
    )
    write_text(folder / CARD_FILE, text)
