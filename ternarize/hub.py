"""The model card: what was done, how good it is, how many bits it takes, how to load it and how to make it again."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ternarize.files import write_text
from ternarize.format import TRIPWIRE, Layout
from ternarize.progress import size
from ternarize.report import RECIPE_FILE, REPORT_FILE, Report

CARD_FILE = "README.md"
PLACE = "PATH_OR_REPO"  # stands in a card for where the folder lies, until it is pushed
LOADING = """\
## Load

```bash
pip install ternarize
```

```python
import ternarize

model, tokenizer = ternarize.load("{place}")
```

or, after `import ternarize`, with `AutoModelForCausalLM.from_pretrained("{place}")`. From a shell:
`ternarize generate {place} "Once upon a time"`.

Without the package, or without its import, transformers stops: it warns that it does not know the quantization type
`ternarize`, then finds no weights (in a folder on disk it misses `{tripwire}`).
It never goes on with random ones.

"""
CARD = (
    """\
---
{metadata}
---

# {title}

{warning}{source} with ternary weights, made by [ternarize](https://pypi.org/project/ternarize/) {version}.
Every weight of the {count} linears inside its decoder layers is `{formula}`, trit in {{-1, 0, 1}}, with {levels}.

## Size, all stored bytes counted

| | |
| --- | --- |
| bits per ternary weight | {ternary_bits:.3f} ({parts}) |
| bits per weight of the whole file | {file_bits:.3f} ({weights:,} weights) |
| weight files | {output} (source: {input}) |
| ternary | {ternary_weights:,} of {weights:,} weights |
| embeddings and head | {tables} |

## Quality

{quality}

Relative error of the linears' outputs on the calibration text: {error:.3f} (mean by weights{distilled});
each one stands in `report.json`.

"""
    + LOADING
    + """\
## Make it again

```bash
{commands}
```

with the settings in `recipe.yaml`, which `--recipe recipe.yaml` takes:

```yaml
{recipe}
```

## Limits

Ternary weights cost quality, most in small models and on what the calibration text did not cover. Measure on your own
task before you rely on it. {rights}
"""
)

NOT_MEASURED = """\
Not measured yet. `ternarize evaluate FOLDER --teacher SOURCE` measures perplexity, KL to the teacher and agreement,
and writes the result here."""


def save_report(folder: Path, report: Report) -> None:
    """Write report.json, and the card that follows from it, into a ternarize folder."""
    write_text(folder / REPORT_FILE, report.to_json())
    recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layout = Layout.from_config(config["quantization_config"])
    write_text(folder / CARD_FILE, model_card(report, layout, recipe))


def model_card(report: Report, layout: Layout, recipe: str) -> str:
    """The card as Markdown with the Hub's metadata on top.

    Args:
        report: of the conversion, with what was measured since.
        layout: of the folder.
        recipe: recipe.yaml's text.
    """
    base = report.base.get("name")
    name = (base or report.source.removeprefix("sample:")).rstrip("/").rpartition("/")[2]
    formula, levels, parts = describe_levels(layout)
    return CARD.format(
        metadata=_metadata(report, f"{name}, ternary").to_yaml(),
        title=f"{name}, ternary",
        warning=_warning(report),
        source=f"[{base}](https://huggingface.co/{base})" if base else f"`{name}`",
        version=report.versions["ternarize"],
        count=len(report.linears),
        formula=formula,
        levels=levels,
        ternary_bits=report.bits_per_ternary_weight,
        parts=parts,
        file_bits=report.bits_per_weight,
        output=size(report.output_bytes),
        input=size(report.source_bytes),
        weights=report.weights,
        ternary_weights=report.ternary_weights,
        tables=describe_tables(report.int8, report.int6),
        quality=_quality(report),
        error=report.mean_error,
        distilled=", before the distillation" if "distill" in report.run else "",
        place=PLACE,
        tripwire=TRIPWIRE,
        commands="\n".join(report.run.get("commands") or [_command(report)]),
        recipe=recipe.strip(),
        rights=_rights(report),
    )


def _metadata(report: Report, name: str) -> ModelCardData:
    base, results = report.base, _results(report)
    return ModelCardData(
        base_model=base.get("name"),
        base_model_relation="quantized" if "name" in base else None,
        library_name="transformers",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        language=base.get("language"),
        pipeline_tag="text-generation",
        tags=["ternarize", "ternary"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _results(report: Report) -> list[EvalResult]:
    """What was measured, for the Hub's model-index."""

    def result(dataset: str, metric: str, name: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )

    found = []
    for row in report.run.get("evaluation", []):
        for metric, name in (
            ("perplexity", "perplexity"),
            ("kl", "KL to the teacher, nats a token"),
            ("agreement", "share of tokens with the teacher's likeliest"),
        ):
            if _known(row[metric]):
                found.append(result(row["text"], metric, name, row[metric]))
    for row in report.run.get("tasks", []):
        label = ", ".join(filter(None, [row["metric"], f"{row['items']} items", row.get("how")]))
        found.append(result(row["task"], row["metric"], label, row["score"]))
    return found


def describe_levels(layout: Layout) -> tuple[str, str, str]:
    """The formula of a weight, what its levels are shared by, and what is stored of them."""
    sides, bits = "scale", f"{layout.scale_bits} bits"
    if layout.shift:
        sides = "scale and shift"
        bits += "" if layout.shift_bits == layout.scale_bits else f" and {layout.shift_bits} bits"
    where = "row" if layout.group_size is None else f"group of {layout.group_size} columns"
    if layout.group_sizes:
        where += " (other group sizes where the budget gave them: see config.json)"
    formula = "scale * trit + shift" if layout.shift else "scale * trit"
    return (
        formula,
        f"one {sides} of {bits} for each {where}",
        "trits, scales and shifts" if layout.shift else "trits and scales",
    )


def describe_tables(int8: Collection[str], int6: Collection[str]) -> str:
    """How embeddings and head are stored, in Markdown."""
    stored = (("int8", int8), ("int6", int6))
    parts = [f"{' and '.join(f'`{name}`' for name in names)} in {kind}" for kind, names in stored if names]
    return ", ".join(parts) or "floats, as in the source"


def _warning(report: Report) -> str:
    verdict = report.run.get("verdict", {})
    if verdict.get("word") != "collapsed":
        return ""
    return f"**This model has collapsed and is of no use:** {verdict['why']}\n\n"


def _quality(report: Report) -> str:
    """What was measured on texts and tasks; the gate's comparison where nothing else was."""
    rows = report.run.get("evaluation")
    gate = report.run.get("verdict", {}).get("evaluation")
    if not rows and gate and "tasks" not in report.run:
        note = (
            "On text like the calibration's, that nothing was fitted to; `ternarize evaluate` measures on other text."
        )
        return f"{quality_table([gate])}\n\n{note}"
    tasks = report.run.get("tasks")
    parts = [quality_table(rows)] if rows else []
    parts += [task_table(tasks)] if tasks else []
    return "\n\n".join(parts) or NOT_MEASURED


def _command(report: Report) -> str:
    """The conversion as a command, where it was called from Python."""
    revision = f" --revision {report.revision}" if report.revision else ""
    return f"ternarize convert {report.source}{revision} --output OUT --recipe recipe.yaml"


def _rights(report: Report) -> str:
    if report.base.get("gated"):
        return (
            "The base model is gated: the terms that its owner asks to be accepted hold for this model too, "
            "and so do its limits."
        )
    return "The base model's licence and limits apply."


def _known(value: float | None) -> bool:
    """Whether there is a figure: a hopeless perplexity is infinite, and null in JSON."""
    return value is not None and math.isfinite(value)


def quality_table(evaluation: list[dict[str, Any]]) -> str:
    """Markdown rows of perplexities, KL and agreement."""
    lines = [
        "| text | tokens | teacher perplexity | perplexity | KL to the teacher, nats | same top token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in evaluation:
        teacher = "" if row["teacher_perplexity"] is None else f"{row['teacher_perplexity']:.2f}"
        perplexity = f"{row['perplexity']:.2f}" if _known(row["perplexity"]) else "beyond counting"
        kl = "" if row["kl"] is None else f"{row['kl']:.3f}"
        agreement = "" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %"
        lines.append(f"| {row['text']} | {row['tokens']:,} | {teacher} | {perplexity} | {kl} | {agreement} |")
    return "\n".join(lines)


def task_table(tasks: list[dict[str, Any]]) -> str:
    """Markdown rows of the tasks' scores by lm-eval."""
    lines = ["| task | items | metric | teacher | this model | guessing |", "| --- | --- | --- | --- | --- | --- |"]
    for row in tasks:
        percent = [f"{100 * row[key]:.1f} %" if row[key] is not None else "" for key in ("teacher", "score", "chance")]
        if row["stderr"] is not None:
            percent[1] += f" (standard error {100 * row['stderr']:.1f})"
        task = ", ".join(filter(None, [row["task"], row.get("how")]))
        lines.append(f"| {task} | {row['items']:,} | {row['metric']} | {' | '.join(percent)} |")
    return "\n".join([*lines, "", f"Scored by lm-eval {tasks[-1]['lm_eval']}, without examples in the prompt."])
