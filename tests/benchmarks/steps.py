"""What each step of the fit buys: perplexity after round-to-nearest, grid, error feedback, order and refit.

    python tests/benchmarks/steps.py sample:smollm2-135m --eval wiki.test.raw --text self --out steps.json

Every row is one whole conversion by `ternarize.convert` and one evaluation of the folder that it wrote, loaded as a
user would load it. Rows without statistics do not depend on the calibration text. With --set a variant of the default
recipe is measured instead, for choosing settings; choose on text that is not the test's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ternarize import convert
from ternarize.evaluate import compare, load_any
from ternarize.progress import Progress, duration
from ternarize.recipe import Recipe
from ternarize.sources import resolve
from ternarize.text import evaluation_windows, load_tokenizer, read_whole

FP16 = {"scale_bits": 16, "shift_bits": 16, "sweeps": 0}
DATA_FREE = {"feedback": False, "curvature": False, "refit": False, "correction": 0.0, **FP16}
STEPS: dict[str, dict[str, Any]] = {
    "nearest, absmean, one scale a row": {"grid": "absmean", "group_size": None, **DATA_FREE},
    "nearest, absmean, groups": {"grid": "absmean", **DATA_FREE},
    "nearest, DLT grid": DATA_FREE,
    "+ error feedback, curvature-weighted grid": {"order": "natural", "refit": False, "correction": 0.0, **FP16},
    "+ order": {"refit": False, "correction": 0.0, **FP16},
    "+ refit": {"correction": 0.0, **FP16},
    "+ correction towards the teacher": FP16,
    "+ scales and shifts in 4 bits": {"sweeps": 0},
    "+ sweeps, a share held out": {},
}


def step(base: Recipe, name: str) -> Recipe:
    """The recipe of one row; only sweeps have a use for windows that nothing is fitted to."""
    values = base.to_dict() | STEPS[name]
    if not values["sweeps"]:
        values["calibration"] = values["calibration"] | {"held_out": 0.0}
    return Recipe.from_dict(values)


def main() -> None:
    """Convert and evaluate each step; print a Markdown table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--eval", required=True, help="text to measure on")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--text", action="append", default=[], help="calibration source; repeat for a mixture")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--set", action="append", default=[], help="measure the recipe with these settings only")
    parser.add_argument("--step", action="append", default=[], choices=list(STEPS), help="only these steps")
    parser.add_argument("--teacher", action="store_true", help="measure the teacher too, and KL")
    parser.add_argument("--out", type=Path, help="JSON file; rows are added to those it has")
    arguments = parser.parse_args()

    progress = Progress()
    folder = resolve(arguments.source)
    ids = evaluation_windows(read_whole(arguments.eval), load_tokenizer(folder), arguments.length, arguments.windows)
    base = Recipe.load(arguments.recipe).with_settings(arguments.set)
    if arguments.text:
        base = base.with_settings([f"calibration.text={json.dumps(arguments.text)}"])
    names = arguments.step or list(STEPS)
    variants = {", ".join(arguments.set): base} if arguments.set else {name: step(base, name) for name in names}
    teacher = load_any(folder, "cpu", torch.float32) if arguments.teacher else None
    label = " + ".join(Path(text).name for text in base.calibration.text)
    rows = []
    for name, recipe in variants.items():
        with tempfile.TemporaryDirectory(prefix="ternarize-steps-") as scratch:
            report = convert(arguments.source, Path(scratch) / "out", recipe, progress=progress)
            student = load_any(Path(scratch) / "out", "cpu", torch.float32)
            result = compare(student, teacher, ids, Path(arguments.eval).name, progress)
        row = {
            "step": name,
            "calibration": label if recipe.needs_statistics else "none",
            "mean_error": report.mean_error,
            "bits": report.bits_per_ternary_weight,
            "seconds": report.run["seconds"],
            **result.to_dict(),
        }
        rows.append(row)
        kl = "" if result.kl is None else f"{result.kl:.3f}"
        cells = [name, row["calibration"], f"{report.bits_per_ternary_weight:.3f}", f"{report.mean_error:.4f}"]
        cells += [f"{result.perplexity:.5g}", kl, duration(row["seconds"])]
        print(f"| {' | '.join(cells)} |", flush=True)
        if arguments.out:
            before = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
            arguments.out.write_text(json.dumps([*before, row], indent=1) + "\n")
    if teacher is not None:
        print(f"teacher perplexity: {rows[-1]['teacher_perplexity']:.3f}")


if __name__ == "__main__":
    main()
