"""The model card: what was done, how good it is, how many bits it takes, how to load it and how to make it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ternarize.checkpoint import write_text
from ternarize.progress import size
from ternarize.report import RECIPE_FILE, REPORT_FILE, Report
from ternarize.sources import SAMPLES

CARD = """\
---
{metadata}
---

# {title}

{source} with ternary weights, made by [ternarize](https://pypi.org/project/ternarize/) {version}.
Every weight of the {count} linears inside its decoder layers is `scale * trit + shift`, trit in {{-1, 0, 1}}.

## Size, all stored bytes counted

| | |
| --- | --- |
| bits per ternary weight | {ternary_bits:.3f} (trits, scales and shifts) |
| bits per weight of the whole file | {file_bits:.3f} ({weights:,} weights) |
| weight files | {output} (source: {input}) |
| ternary | {ternary_weights:,} of {weights:,} weights |
| int8 | {int8} |

## Quality

{quality}

Relative error of the linears' outputs on the calibration text: {error:.3f} (mean by weights{distilled});
each one stands in `report.json`.

## Load

```bash
pip install ternarize
```

```python
import ternarize

model, tokenizer = ternarize.load("PATH_OR_REPO")
```

or, after `import ternarize`, with `AutoModelForCausalLM.from_pretrained("PATH_OR_REPO")`.
Without the package transformers refuses to load this folder; it never loads with random weights.

## Make it again

```bash
ternarize convert {command_source} -o OUT --recipe recipe.yaml
```

with `recipe.yaml` from this folder:

```yaml
{recipe}
```

## Limits

Ternary weights cost quality, most in small models and on what the calibration text did not cover. Measure on your own
task before you rely on it. The base model's licence and limits apply.
"""

NOT_MEASURED = """\
Not measured yet. `ternarize evaluate FOLDER --teacher SOURCE` measures perplexity, KL to the teacher and agreement,
and writes the result here."""


def save_report(folder: Path, report: Report) -> None:
    """Write report.json, and the card that follows from it, into a ternarize folder."""
    write_text(folder / REPORT_FILE, report.to_json())
    recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    write_text(folder / "README.md", model_card(report, recipe, report.run.get("evaluation")))


def model_card(report: Report, recipe: str, evaluation: list[dict[str, Any]] | None = None) -> str:
    """The card as Markdown with the Hub's metadata on top.

    Args:
        report: of the conversion.
        recipe: recipe.yaml's text.
        evaluation: results of `evaluate`, if any.
    """
    sample = SAMPLES.get(report.source.removeprefix("sample:"))
    base = sample.base_model if sample else report.source if _is_repo(report.source) else None
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        license=sample.license if sample else None,
        pipeline_tag="text-generation",
        tags=["ternarize", "ternary"],
    )
    name = (base or report.source).rstrip("/").rpartition("/")[2]
    return CARD.format(
        metadata=data.to_yaml(),
        title=f"{name}, ternary",
        source=f"[{base}](https://huggingface.co/{base})" if base else f"`{name}`",
        version=report.versions["ternarize"],
        count=len(report.linears),
        ternary_bits=report.bits_per_ternary_weight,
        file_bits=report.bits_per_weight,
        output=size(report.output_bytes),
        input=size(report.source_bytes),
        weights=report.weights,
        ternary_weights=report.ternary_weights,
        int8=", ".join(f"`{n}`" for n in report.int8) or "nothing",
        quality=quality_table(evaluation) if evaluation else NOT_MEASURED,
        error=report.mean_error,
        distilled=", before the distillation" if "distill" in report.run else "",
        command_source=report.source + (f" --revision {report.revision}" if report.revision else ""),
        recipe=recipe.strip(),
    )


def quality_table(evaluation: list[dict[str, Any]]) -> str:
    """Markdown rows of perplexities, KL and agreement."""
    lines = [
        "| text | tokens | teacher perplexity | perplexity | KL to the teacher, nats | same top token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in evaluation:
        teacher = "" if row["teacher_perplexity"] is None else f"{row['teacher_perplexity']:.2f}"
        perplexity = "beyond counting" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        kl = "" if row["kl"] is None else f"{row['kl']:.3f}"
        agreement = "" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %"
        lines.append(f"| {row['text']} | {row['tokens']:,} | {teacher} | {perplexity} | {kl} | {agreement} |")
    return "\n".join(lines)


def _is_repo(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))
