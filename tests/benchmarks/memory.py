"""Peak memory as the model gets deeper: of a conversion (a block and the activations, not the model) and of generating.

    python tests/benchmarks/memory.py

Random Llama-shaped checkpoints of the same width and growing depth are written to a temporary folder and converted,
each in a process of its own, whose peak resident memory the system reports; then each generates 16 tokens from the
source and from the ternary folder, in bfloat16. The first row, of a process that only imports, is what Python and torch
take.
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
GENERATE = """
import sys, torch
from pathlib import Path
from ternarize.conversion import peak_memory
from ternarize.evaluate import load_any
model = load_any(Path(sys.argv[1]), "cpu", torch.bfloat16)
model.generate(torch.arange(3, 11)[None], max_new_tokens=16, do_sample=False, pad_token_id=0)
print(peak_memory())
"""


def peak(program: str, *arguments: str) -> int:
    """Peak memory of a fresh process that runs `program`, bytes."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
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
    print("| blocks | checkpoint, bfloat16 | conversion | generate, source | generate, ternary |")
    print(f"| --- | --- | --- | --- | --- |\n| imports only | | {size(peak(CONVERT))} | | |", flush=True)
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
            source, output = str(Path(scratch) / "model"), str(Path(scratch) / "out")
            used = [peak(CONVERT, source, output), peak(GENERATE, source), peak(GENERATE, output)]
        print(f"| {depth} | {size(2 * weights)} | {' | '.join(map(size, used))} |", flush=True)


if __name__ == "__main__":
    main()
