"""Peak memory of a conversion as the model gets deeper: a block and the calibration activations, not the model.

    python tests/benchmarks/memory.py

Random Llama-shaped checkpoints of the same width and growing depth are written to a temporary folder and converted,
each in a process of its own, whose peak resident memory the system reports. The first row, of one process that only
imports the package, is what Python and torch take.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ternarize.progress import size

CONVERT = """
import sys
from ternarize.conversion import convert, peak_memory
from ternarize.progress import Progress
from ternarize.recipe import Recipe
if len(sys.argv) > 1:
    recipe = Recipe.load("fast").with_settings(["calibration.samples=16", "calibration.length=256"])
    convert(sys.argv[1], sys.argv[2], recipe, text=["pydoc"], progress=Progress(quiet=True))
print(peak_memory())
"""


def peak(*arguments: str) -> int:
    """Peak memory of a fresh process that converts (or, without arguments, only imports), bytes."""
    done = subprocess.run([sys.executable, "-c", CONVERT, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    """Print one Markdown row per depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 48])
    parser.add_argument("--tokenizer", default="sample:smollm2-135m", help="checkpoint whose tokenizer is borrowed")
    arguments = parser.parse_args()

    from ternarize.sources import resolve
    from ternarize.text import load_tokenizer

    tokenizer = load_tokenizer(resolve(arguments.tokenizer))
    print("| blocks | checkpoint | as float32 | peak memory of the conversion |\n| --- | --- | --- | --- |")
    print(f"| imports only | | | {size(peak())} |", flush=True)
    for depth in arguments.depths:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.width,
            intermediate_size=3 * arguments.width,
            num_hidden_layers=depth,
            num_attention_heads=arguments.width // 64,
            tie_word_embeddings=True,
        )
        with tempfile.TemporaryDirectory(prefix="ternarize-memory-") as scratch:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            weights = sum(parameter.numel() for parameter in model.parameters())
            model.save_pretrained(Path(scratch) / "model")
            tokenizer.save_pretrained(Path(scratch) / "model")
            del model
            used = peak(str(Path(scratch) / "model"), str(Path(scratch) / "out"))
        print(f"| {depth} | {size(2 * weights)} | {size(4 * weights)} | {size(used)} |", flush=True)


if __name__ == "__main__":
    main()
