"""What a setting is worth: the first blocks of a model converted with it and without it, the others left float.

    python tests/benchmarks/ablation.py sample:smollm2-135m --recipe balanced --set calibration.samples=64
        --text wiki.jsonl.gz --text c4.jsonl.gz --eval other_wiki.jsonl.gz --variant "" --variant grid=symmetric
        --variant "tune.codes=low-rank tune.rate=0.003" --seeds 2 --out ablation.json

KL to the float model, nats a token, on windows of the evaluation text and on windows of the calibration sources that
were not drawn for calibration; a seed draws other calibration windows. A few blocks take minutes where a whole model
takes an hour, and what is measured is what the converter runs: `start_walk`, `convert_window`. Do not choose settings
on a test set.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ternarize.architecture import find_blocks, unfuse_experts
from ternarize.block import convert_window
from ternarize.calibration import batches, mix_random, start_walk
from ternarize.evaluate import load_any
from ternarize.lesson import divergence
from ternarize.progress import Progress
from ternarize.recipe import Recipe
from ternarize.report import dump_json
from ternarize.sources import resolve
from ternarize.swap import dequantize_modules
from ternarize.text import calibration_windows, evaluation_windows, load_tokenizer, read_whole


@torch.no_grad()
def convert_first(teacher: PreTrainedModel, recipe: Recipe, ids: Tensor, count: int) -> tuple[PreTrainedModel, float]:
    """A copy of the teacher whose first `count` blocks are ternary, and its bits per ternary weight.

    Args:
        ids: calibration windows, int64 [B, T].
    """
    student = copy.deepcopy(teacher)
    path, blocks = find_blocks(student)
    batched = batches(ids)
    walks = [start_walk(student, blocks, path, batched) for _ in range(2)]
    width = recipe.tune.window if recipe.tune.epochs else 1
    entries = []
    for first in range(0, count, width):
        window = {f"{path}.{index}": blocks[index] for index in range(first, min(first + width, count))}
        for name, block in window.items():
            unfuse_experts(block, name, recipe.skip)
        made, _ = convert_window(window, first, recipe, *walks)
        entries += [entry for block in made for entry in block]
    weights = [entry.shape[0] * entry.shape[1] for entry in entries]
    bits = sum(entry.bits * weight for entry, weight in zip(entries, weights, strict=True)) / sum(weights)
    return student, bits


@torch.no_grad()
def divergences(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor) -> list[float]:
    """Mean KL(teacher || student) per token of every window int64 [B, T], nats."""
    found = []
    for window in windows:
        said, answer = (model(window[None], use_cache=False).logits for model in (teacher, student))
        found.append(float(divergence(said, answer)))
    return found


def main() -> None:
    """Measure each variant with each seed; print a Markdown table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--blocks", type=int, default=5, help="how many are converted")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--set", action="append", default=[], help="a setting of all variants")
    parser.add_argument("--variant", action="append", default=[], help='settings of one variant; "" is none')
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--text", action="append", required=True, help="calibration source; repeat for a mixture")
    parser.add_argument("--eval", required=True, help="other text to measure on")
    parser.add_argument("--windows", type=int, default=6, help="of 1024 tokens, from --eval")
    parser.add_argument("--held-out", type=int, default=32, help="windows of the calibration sources to measure on")
    parser.add_argument("--out", type=Path, help="JSON file; rows are added to those it has")
    arguments = parser.parse_args()

    progress = Progress()
    folder = resolve(arguments.source)
    teacher = load_any(folder, "cpu", torch.float32)
    base = Recipe.load(arguments.recipe).with_settings(arguments.set).with_text(arguments.text)
    tokenizer = load_tokenizer(folder)
    other = evaluation_windows(read_whole(arguments.eval), tokenizer, 1024, arguments.windows)
    print("| settings | seed | bits | KL, other text | KL, same sources | worst window | seconds |")
    for variant in arguments.variant or [""]:
        recipe = base.with_settings(variant.split())
        rows: list[dict[str, Any]] = []
        for seed in range(arguments.seeds):
            wanted = recipe.calibration
            drawn = wanted.samples + arguments.held_out
            ids = calibration_windows(wanted.text, folder, drawn, wanted.length, seed, progress)
            started = time.monotonic()
            fitted = mix_random(ids[: wanted.samples], wanted, folder, teacher.config.get_text_config().vocab_size)
            student, bits = convert_first(teacher, recipe, fitted, arguments.blocks)
            seconds = time.monotonic() - started
            dequantize_modules(student, torch.float32)  # to measure it sooner
            same = divergences(student, teacher, ids[wanted.samples :])
            row = {"variant": variant, "seed": seed, "blocks": arguments.blocks, "recipe": recipe.to_dict()}
            row |= {"bits": bits, "other": divergences(student, teacher, other), "same": same, "seconds": seconds}
            rows.append(row)
            print(_line(variant, str(seed), [row]), flush=True)
            if arguments.out:
                before = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
                arguments.out.write_text(dump_json([*before, row]) + "\n")
        if len(rows) > 1:
            print(_line(variant, "all", rows), flush=True)


def _line(variant: str, seed: str, rows: list[dict[str, Any]]) -> str:
    """A row of the table; the mean where there are several."""
    means = [statistics.mean(statistics.mean(row[key]) for row in rows) for key in ("other", "same")]
    worst = max(max(row["same"]) for row in rows)
    seconds = statistics.mean(row["seconds"] for row in rows)
    cells = [variant or "as it is", seed, f"{rows[0]['bits']:.3f}", *(f"{kl:.4f}" for kl in means)]
    return f"| {' | '.join([*cells, f'{worst:.2f}', f'{seconds:.0f}'])} |"


if __name__ == "__main__":
    main()
