"""ternarize beside other tools: how much of a model is left, at how many bits.

    python -m tests.benchmarks.quality sample:smollm2-135m --data DATA --out results.json
    python -m tests.benchmarks.quality --table results.json > results.md

DATA holds calib_wiki.jsonl.gz, calib_c4.jsonl.gz, wikitext2_raw_test.txt.gz and the items of `zero_shot`. Everyone is
calibrated on one draw of tokens: half from calib_wiki, half from the first 80 % of calib_c4's documents. Each contender
(`contenders.py`) makes its model in a process of its own, one after the other. What comes out is loaded as a float32
model, and measured beside the teacher:

    wiki        WikiText-2, raw test file, joined as in the papers, windows without overlap
    c4          the last 20 % of calib_c4's documents, joined by blank lines, windows without overlap
    zero_shot   four tasks by lm-eval; --zero-shot-dtype bfloat16 computes these alone in bfloat16

wiki and c4 give perplexity, mean KL(teacher || student) in nats a token and the share of tokens with the same likeliest
token (`ternarize.evaluate.compare`). Bits are stored bytes over weights: of the quantized linears, and of whole weight
files over all weights. Seconds and peak memory are what a contender reports of its own process.

Rows are written as they come. A contender that is there with the same settings and versions is not run again, one that
failed is; --again NAME runs it in any case, as after a change of code under the same version.
"""

from __future__ import annotations

import argparse
import copy
import gc
import gzip
import hashlib
import json
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ternarize.errors import TernarizeError
from ternarize.evaluate import compare, load_any
from ternarize.files import write_tensors, write_text
from ternarize.progress import Progress
from ternarize.quantizer import quant_method
from ternarize.report import dump_json
from ternarize.sources import cache_folder, resolve
from ternarize.text import calibration_windows, evaluation_windows, fingerprint, load_tokenizer, read_whole

from ..results import command, rows_of
from . import zero_shot
from .contenders import Contender, Inputs, choose, produce
from .table import draw, markdown

TEACHER = "teacher"
WIKITEXT = "wikitext2_raw_test.txt.gz"
HELD_OUT = 0.2  # share of C4's documents, the last ones, that calibration never sees


@dataclass(frozen=True)
class Yardstick:
    """What every model is measured with.

    Args:
        texts: name -> windows of tokens, int64 [B, T].
        data: the folder with the zero-shot items.
        items: of each zero-shot task; 0 leaves them out.
        dtype: that zero-shot scores are computed in.
    """

    teacher: PreTrainedModel
    tokenizer: Any
    texts: dict[str, Tensor]
    data: Path
    items: int
    batch_size: int
    dtype: torch.dtype

    def measure(self, model: PreTrainedModel, progress: Progress) -> dict[str, Any]:
        """Perplexity and distance to the teacher on each text, and zero-shot scores."""
        teacher = None if model is self.teacher else self.teacher
        found: dict[str, Any] = {
            name: compare(model, teacher, ids, name, progress).to_dict() for name, ids in self.texts.items()
        }
        if self.items:
            model = model if model.dtype == self.dtype else copy.deepcopy(model).to(self.dtype)
            found["zero_shot"] = zero_shot.zero_shot(model, self.tokenizer, self.data, self.items, self.batch_size)
        return found


def main() -> None:
    """Parse, run, print the table."""
    command(_parser().parse_args(), run, markdown, draw)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("source", nargs="?", help="the teacher: a checkpoint's folder, a Hub id or sample:NAME")
    option("--data", type=Path, help="folder of texts and items")
    option("--contender", action="append", default=[], help="NAME, pattern or NAME,key=value; repeat; default: all")
    option("--again", action="append", default=[], help="run these although they are done; patterns")
    option("--out", type=Path, default=Path("quality.json"))
    option("--table", type=Path, help="only print this results file and draw its plot")
    option("--samples", type=int, default=64, help="calibration windows")
    option("--length", type=int, default=512, help="tokens in one of them")
    option("--seed", type=int, default=0)
    option("--windows", type=int, default=20, help="at most so many of WikiText-2")
    option("--c4-windows", type=int, default=8)
    option("--window-length", type=int, default=2048)
    option("--items", type=int, default=500, help="of each zero-shot task; 0 leaves them out")
    option("--batch-size", type=int, default=8, help="of zero-shot requests")
    option("--zero-shot-dtype", choices=["float32", "bfloat16"], default="float32")
    option("--environments", type=Path, default=cache_folder() / "peers", help="peers' virtual environments")
    option("--work", type=Path, help="folder for logs and models (default: beside --out)")
    option("--keep", action="store_true", help="keep the models once they are measured")
    return parser


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Make, measure and write down every contender that is not done.

    Raises:
        TernarizeError: a missing argument, file or package, or results of another protocol under the same name.
    """
    if arguments.source is None or arguments.data is None:
        raise TernarizeError("SOURCE and --data FOLDER say what to measure, and on what; --table FILE needs neither.")
    contenders = {TEACHER: Contender(TEACHER)} | choose(arguments.contender)
    lm_eval = zero_shot.version() if arguments.items else None
    work = arguments.work or arguments.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    inputs, held_out = prepare(arguments, work, progress)
    tokenizer = load_tokenizer(inputs.folder)
    files = {"wiki": (arguments.data / WIKITEXT, arguments.windows), "c4": (held_out, arguments.c4_windows)}
    texts = {
        name: evaluation_windows(read_whole(str(file)), tokenizer, arguments.window_length, most)
        for name, (file, most) in files.items()
    }
    results = {
        "source": arguments.source,
        "checkpoint": checkpoint_hash(inputs.folder),
        "calibration": {"windows": list(inputs.ids.shape), "seed": arguments.seed, "sha256": fingerprint(inputs.ids)},
        "texts": {name: {"windows": list(ids.shape), "sha256": fingerprint(ids)} for name, ids in texts.items()},
        "zero_shot": {"items": arguments.items, "dtype": arguments.zero_shot_dtype, "lm_eval": lm_eval},
    }
    rows = rows_of(arguments.out, results, "contender")
    measured_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    dtype = getattr(torch, arguments.zero_shot_dtype)
    teacher = load_any(inputs.folder, "cpu", torch.float32)
    yardstick = Yardstick(teacher, tokenizer, texts, arguments.data, arguments.items, arguments.batch_size, dtype)
    for name, contender in contenders.items():
        row: dict[str, Any] = {"contender": name, "identity": contender.identity() | measured_with}
        again = any(fnmatch(name, pattern) for pattern in arguments.again)
        old = rows.get(name, {"error": "not run"})
        if "error" not in old and old["identity"] == row["identity"] and not again:
            progress.say(f"{name}: done before")
            continue
        place = work / "".join(letter if letter.isalnum() else "-" for letter in name)
        progress.say(f"{name}: running, output in {place}.log")
        try:
            row |= compete(contender, inputs, yardstick, place, again, progress)
        except Exception as error:  # a peer, and the model it made, can fail in any way; the others go on
            reason = (str(error).strip().splitlines() or [""])[-1]
            row["error"] = reason if isinstance(error, TernarizeError) else f"{type(error).__name__}: {reason}"
            progress.say(f"{name}: failed, {row['error']}")
        rows[name] = row
        write_text(arguments.out, dump_json(results | {"rows": list(rows.values())}) + "\n")
        if not arguments.keep and "error" not in row:
            shutil.rmtree(place, ignore_errors=True)
        gc.collect()


def prepare(arguments: argparse.Namespace, work: Path, progress: Progress) -> tuple[Inputs, Path]:
    """What everybody gets, and the file of the C4 documents that calibration does not see.

    Raises:
        TernarizeError: the data folder lacks a file.
    """
    wiki, c4 = arguments.data / "calib_wiki.jsonl.gz", arguments.data / "calib_c4.jsonl.gz"
    for file in (wiki, c4, arguments.data / WIKITEXT):
        if not file.is_file():
            raise TernarizeError(f"{file}: no such file. Give the folder of the texts with --data.")
    documents = gzip.decompress(c4.read_bytes()).decode().rstrip("\n").split("\n")
    seen = round(len(documents) * (1 - HELD_OUT))
    train, held_out = work / "c4_calibration.jsonl", work / "c4_held_out.jsonl"
    write_text(train, "\n".join(documents[:seen]))
    write_text(held_out, "\n".join(documents[seen:]))
    folder, samples, length, seed = resolve(arguments.source), arguments.samples, arguments.length, arguments.seed
    ids = calibration_windows((str(wiki), str(train)), folder, samples, length, seed, progress)
    calibration = work / "calibration.safetensors"
    write_tensors(calibration, {"ids": ids})
    return Inputs(arguments.source, folder, calibration, ids, (wiki, train), seed, arguments.environments), held_out


def compete(
    contender: Contender, inputs: Inputs, yardstick: Yardstick, place: Path, again: bool, progress: Progress
) -> dict[str, Any]:
    """Make one model and measure it; one that was made before and not measured to the end is taken up as it is."""
    weights = {"weights": sum(parameter.numel() for parameter in yardstick.teacher.parameters())}
    if contender.tool == TEACHER:
        size = sum(file.stat().st_size for file in inputs.folder.glob("*.safetensors"))
        return weights | {"file_bytes": size} | yardstick.measure(yardstick.teacher, progress)
    identity, made = dump_json([contender.identity(), fingerprint(inputs.ids)]), place / "made.json"
    known = json.loads(made.read_text()) if made.is_file() else {}
    if again or known.get("identity") != identity:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        place.with_suffix(".log").unlink(missing_ok=True)
        folder, numbers = produce(contender, inputs, place / "out", place.with_suffix(".log"))
        known = {"identity": identity, "folder": str(folder.relative_to(place)), "numbers": numbers}
        write_text(made, dump_json(known))
    model: Any = load_any(place / known["folder"], "cpu", torch.float32)
    if quant_method(place / known["folder"]) is not None:
        model = model.dequantize()  # the same weights, faster
    return weights | known["numbers"] | yardstick.measure(model, progress)


def checkpoint_hash(folder: Path) -> str:
    """Of a checkpoint's config and weights; which version of transformers wrote the config does not matter."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
