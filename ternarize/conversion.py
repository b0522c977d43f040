"""The story: a checkpoint goes in, a ternary one comes out, one block in memory at a time.

    for each block:
        capture   the inputs of its linears behind the ternary prefix, and the teacher's outputs
        fit       each linear that reads the same input in one go
        pack      TernaryLinear takes the linear's place
        write     the block's tensors, durably
        advance   the student's hidden states through the ternary block

Work goes to OUT.partial beside OUT; it is renamed at the end, so OUT is never half written. A run that was stopped goes
on from its last durable block: earlier blocks are read back and walked through, not fitted again, so the result is the
same to the last bit on the same machine.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize import hub
from ternarize.architecture import (
    choose_linears,
    find_blocks,
    linear_weight,
    replace_module,
    unfuse_experts,
)
from ternarize.calibration import Walk, batches, capture, start_walk
from ternarize.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    place,
    release,
    sync_folder,
    tied_parameters,
    write_tensors,
    write_text,
)
from ternarize.errors import StoppedError, TernarizeError, UnsupportedModelError
from ternarize.format import TRIPWIRE, Layout
from ternarize.plan import Plan, check_room, make_plan
from ternarize.progress import Progress, size
from ternarize.recipe import DEFAULT, Recipe
from ternarize.report import REPORT_FILE, LinearReport, Report
from ternarize.runtime import Int8Embedding, Int8Head, TernaryLinear, tie_int8_heads
from ternarize.solver import LinearStatistics, fit, relative_error
from ternarize.sources import resolve
from ternarize.text import calibration_windows, fingerprint

SHARD_BYTES = 1_000_000_000  # a shard is assembled in memory, so it stays small
FEWEST_TOKENS = 4  # an expert that saw fewer than in_features / FEWEST_TOKENS tokens is fitted without data
COPIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "*.jinja", "added_tokens.json")
COPIED += ("generation_config.json", "LICENSE*", "NOTICE*")


def convert(
    source: str | Path,
    output: str | Path,
    recipe: Recipe | str | Path = DEFAULT,
    *,
    revision: str | None = None,
    text: list[str] | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint to ternary.

    Args:
        source: a local folder, a Hub id, a .gguf file or sample:NAME.
        output: the folder to write; it must not exist, or be empty.
        recipe: a Recipe, the name of one that ships, or a YAML file.
        revision: of a Hub id.
        text: calibration sources, instead of the recipe's.
        device: where to compute, such as "cpu" or "cuda".
        resume: go on with an interrupted conversion of the same arguments.
        force: replace what is at `output`, once the new folder is complete, and forget an interrupted conversion.
        progress: where messages go.

    Returns:
        The report, also written to output/report.json.

    Raises:
        TernarizeError: see its subclasses; the message says what to do.
    """
    started = time.monotonic()
    progress = progress or Progress()
    output = Path(output)
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if text:
        chosen = Recipe.from_dict(chosen.to_dict() | {"calibration": asdict(chosen.calibration) | {"text": list(text)}})
    check_output(output, resume, force)
    checkpoint = Checkpoint(resolve(str(source), revision))
    plan = make_plan(checkpoint, chosen)
    check_room(plan, output)
    work = _Work(output, resume, force)
    try:
        work.open(_arguments(checkpoint, chosen, device))
        report = _convert(checkpoint, plan, chosen, work, progress, device, str(source), revision)
    except KeyboardInterrupt:
        raise StoppedError(work.stopped("stopped")) from None
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise StoppedError(
            work.stopped(f"out of memory; the plan expected {size(plan.peak_memory)}")
            + " Free some memory first, or start over with fewer calibration.samples or another machine."
        ) from error
    report.run.update(seconds=round(time.monotonic() - started, 1), peak_memory=peak_memory())
    work.finish(report)
    return report


def _convert(
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    work: _Work,
    progress: Progress,
    device: str,
    source: str,
    revision: str | None,
) -> Report:
    ids = work.calibration(checkpoint, recipe, progress)
    model = checkpoint.skeleton()
    path, blocks = find_blocks(model)
    checkpoint.load(model, "", exclude=f"{path}.")
    checkpoint.load(model, f"{path}.0.")
    place(model, device)
    batched = [batch.to(device) for batch in batches(ids)] if ids is not None else []
    teacher = start_walk(model, blocks, path, batched)
    int8 = pack_embeddings(model, plan, recipe)
    student = start_walk(model, blocks, path, batched)
    if not work.has("outside"):
        work.write("outside", _outside_tensors(model, path, checkpoint), [])
    release(model)  # what is outside the blocks has been written and used; blocks are read one by one

    entries: list[LinearReport] = []
    with progress.bar("converting", total=len(blocks), unit="block") as bar:
        for index, block in enumerate(blocks):
            name = f"{path}.{index}"
            checkpoint.load(model, f"{name}.")
            place(block, device)
            unfuse_experts(block, name, recipe.skip)
            key = f"block-{index:05d}"
            if work.has(key):
                entries += work.replay(key, block, name, index, recipe, teacher, student)
            else:
                done = convert_block(block, name, index, recipe, teacher, student)
                work.write(key, _block_tensors(block, name, checkpoint), done)
                entries += done
            release_packed(block)
            blocks[index] = nn.Identity()
            bar.update(1)
    layout = Layout(
        blocks=path,
        group_size=recipe.group_size,
        shift=recipe.grid == "dlt",
        kept=tuple(plan.kept_linears),
        int8=int8,
        int8_group_size=recipe.int8_group_size,
    )
    return work.assemble(checkpoint, plan, recipe, layout, entries, ids, source, revision)


def convert_block(
    block: nn.Module, name: str, index: int, recipe: Recipe, teacher: Walk, student: Walk
) -> list[LinearReport]:
    """Capture, fit, pack, advance: make one float block (experts unfused) ternary in place.

    Args:
        name: full name of the block; its linears are reported with it.
        teacher, student: hidden states at the block's entrance; both are advanced to its exit.

    Raises:
        UnsupportedModelError: a linear never ran, so nothing is known about its inputs.
    """
    chosen = choose_linears(block, name, recipe.skip).ternary
    statistics: dict[str, LinearStatistics] = {}
    if recipe.needs_statistics:
        statistics = capture(block, index, chosen, teacher, student, recipe.token_weight)
    groups: dict[int, list[str]] = {}
    for linear in chosen:
        known = statistics.get(linear)
        if known is None and recipe.needs_statistics and ".experts." not in linear:
            raise UnsupportedModelError(
                f"{linear} never ran on the calibration text, or the model uses its weight without calling it. "
                f"Add {linear!r} to skip in the recipe."
            )
        groups.setdefault(id(known.second_moment) if known else hash(linear), []).append(linear)
    entries = {}
    for members in groups.values():
        for member, entry in zip(members, _fit_together(block, name, members, chosen, statistics, recipe), strict=True):
            entries[member] = entry
    if recipe.needs_statistics:
        student.advance(index, block)
    return [entries[linear] for linear in chosen]


def _fit_together(
    block: nn.Module,
    name: str,
    members: list[str],
    modules: dict[str, nn.Module],
    statistics: dict[str, LinearStatistics],
    recipe: Recipe,
) -> list[LinearReport]:
    """Fit linears that read the same input as one weight: rows are independent, so the columns are visited once."""
    known = statistics.get(members[0])
    weights = [linear_weight(modules[member]).float() for member in members]
    tokens = known.tokens if known else 0
    if known and ".experts." in members[0] and tokens < weights[0].shape[1] / FEWEST_TOKENS:
        known = None
    try:
        fitted = fit(torch.cat(weights), known, recipe)
    except TernarizeError as error:
        raise TernarizeError(f"{', '.join(members)}: {error}") from error
    entries = []
    start = 0
    for member, weight in zip(members, weights, strict=True):
        rows = slice(start, start + len(weight))
        start += len(weight)
        tensor = type(fitted)(
            fitted.trits[rows],
            fitted.scale[rows],
            None if fitted.shift is None else fitted.shift[rows],
            fitted.group_size,
        )
        linear = TernaryLinear.from_tensor(tensor, getattr(modules[member], "bias", None))
        replace_module(block, member, linear, name)
        own = statistics[member] if known else None
        stored = sum(b.numel() * b.element_size() for b in linear.buffers())
        entries.append(
            LinearReport(
                name=member,
                shape=tensor.shape,
                zero_share=tensor.zero_share,
                error=relative_error(weight, tensor.dequantize(), own),
                bits=8 * stored / weight.numel(),
                tokens=tokens,
                data_free=known is None,
            )
        )
    return entries


def pack_embeddings(model: PreTrainedModel, plan: Plan, recipe: Recipe) -> dict[str, float]:
    """Put the int8 embedding and head that the plan names in their places; returns {name: multiplier}."""
    int8: dict[str, float] = {}
    for name in plan.int8:
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            int8[name] = embedding_multiplier(module, name)
            new: nn.Module = Int8Embedding.from_weight(module.weight, recipe.int8_group_size, int8[name])
        else:
            assert isinstance(module, nn.Linear)
            int8[name] = 1.0
            new = Int8Head.from_weight(module.weight, recipe.int8_group_size, module.bias)
        replace_module(model, name, new)
    tie_int8_heads(model, tied_parameters(model))
    return int8


@torch.no_grad()
def embedding_multiplier(module: nn.Embedding, name: str) -> float:
    """The constant that an embedding's own forward puts on its rows (Gemma: sqrt(H)); 1.0 for a plain one.

    Raises:
        UnsupportedModelError: it does more than that.
    """
    ids = torch.arange(min(64, module.num_embeddings), device=module.weight.device)
    rows, out = module.weight[ids], module(ids)
    used = rows.abs() > 1e-3 * rows.abs().max()
    multiplier = float((out[used] / rows[used]).median()) if bool(used.any()) else 1.0
    if not torch.allclose(out, rows * multiplier, rtol=1e-4, atol=1e-6):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) is more than a table of rows times a constant. "
            "Set embeddings: keep in the recipe."
        )
    return multiplier


def release_packed(block: nn.Module) -> None:
    """Drop a finished block's tensors."""
    release(block)
    for module in block.modules():
        for key in list(module._buffers):
            module._buffers[key] = None


def _outside_tensors(model: PreTrainedModel, path: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{path}.")}
    tied = tied_parameters(model)
    return {name: _as_source(name, tensor, checkpoint) for name, tensor in state.items() if name not in tied}


def _block_tensors(block: nn.Module, name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    state = block.state_dict(prefix=f"{name}.")
    packed = {
        f"{path}.{buffer}"
        for path, module in block.named_modules(prefix=name)
        if isinstance(module, TernaryLinear)
        for buffer in module._buffers
    }
    return {
        key: tensor.cpu() if key in packed else _as_source(key, tensor, checkpoint) for key, tensor in state.items()
    }


def _as_source(name: str, tensor: Tensor, checkpoint: Checkpoint) -> Tensor:
    """What stays float goes back to the type it had in the source; that loses nothing."""
    tensor = tensor.detach().cpu()
    return tensor.to(checkpoint.source_dtype(name)) if tensor.is_floating_point() else tensor


# -- the work folder ----------------------------------------------------------------------------------------------------


def check_output(output: Path, resume: bool, force: bool) -> None:
    """Refuse, before any work, an output folder that holds something, and a name that cannot be a folder.

    Raises:
        TernarizeError: with what to do.
    """
    if output.is_file():
        raise TernarizeError(f"{output} is a file. Choose another --output.")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise TernarizeError(f"{output} exists and is not empty. Choose another --output, or --force to replace it.")
    partial = partial_folder(output)
    if (partial / "state.json").exists() and not (resume or force):
        raise TernarizeError(
            f"{partial} holds an interrupted conversion. Add --resume to go on with it, or --force to start over."
        )


def partial_folder(output: Path) -> Path:
    """Where the work on `output` goes until it is complete."""
    output = output.resolve()
    return output.with_name(output.name + ".partial")


class _Work:
    """The folder OUT.partial: arguments, calibration tokens, one durable file per finished block."""

    def __init__(self, output: Path, resume: bool, force: bool) -> None:
        self.output, self.folder = output.resolve(), partial_folder(output)
        self.resume, self.force = resume, force
        self.blocks = 0

    def open(self, arguments: dict[str, Any]) -> None:
        """Start afresh, or check that an interrupted conversion had the same arguments.

        Raises:
            TernarizeError: it had others; each difference is named.
        """
        state = self.folder / "state.json"
        if self.resume and state.exists():
            before = json.loads(state.read_text(encoding="utf-8"))
            differences = [
                f"{key}: {before.get(key)!r} then, {arguments.get(key)!r} now"
                for key in sorted(before.keys() | arguments.keys())
                if before.get(key) != arguments.get(key)
            ]
            if differences:
                raise TernarizeError(
                    f"{self.folder} was started with other arguments ({'; '.join(differences)}). "
                    "Resume with those, or use --force to start over."
                )
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_text(state, json.dumps(arguments, indent=1))

    def has(self, key: str) -> bool:
        """Whether a part is durably on disk: its report entries are written last."""
        return (self.folder / f"{key}.json").exists()

    def write(self, key: str, tensors: dict[str, Tensor], entries: list[LinearReport]) -> None:
        """Make one part durable."""
        write_tensors(self.folder / f"{key}.safetensors", tensors)
        write_text(self.folder / f"{key}.json", json.dumps([asdict(entry) for entry in entries]))

    def calibration(self, checkpoint: Checkpoint, recipe: Recipe, progress: Progress) -> Tensor | None:
        """The calibration windows, int64 [B, T]; fixed by the first run, so that a resumed one sees the same."""
        if not recipe.needs_statistics:
            return None
        path = self.folder / "calibration.safetensors"
        if not path.exists():
            wanted = recipe.calibration
            ids = calibration_windows(
                wanted.text, checkpoint.folder, wanted.samples, wanted.length, wanted.seed, progress
            )
            write_tensors(path, {"ids": ids})
        return load_file(path)["ids"]

    def replay(
        self, key: str, block: nn.Module, name: str, index: int, recipe: Recipe, teacher: Walk, student: Walk
    ) -> list[LinearReport]:
        """Walk teacher and student through a block that an earlier run finished."""
        if recipe.needs_statistics:
            with torch.no_grad():
                teacher.advance(index, block)
            tensors = load_file(self.folder / f"{key}.safetensors")
            for linear, module in choose_linears(block, name, recipe.skip).ternary.items():
                packed = _read_back(linear, module, tensors, recipe)
                replace_module(block, linear, packed.to(student.hidden[0].device), name)
            with torch.no_grad():
                student.advance(index, block)
        entries = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        return [LinearReport(**(entry | {"shape": tuple(entry["shape"])})) for entry in entries]

    def stopped(self, why: str) -> str:
        """What to tell the user when the work ends early."""
        done = len(list(self.folder.glob("block-*.json"))) if self.folder.exists() else 0
        return f"{why}: {done} blocks are safe in {self.folder}. Run the same command with --resume to go on."

    def assemble(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        recipe: Recipe,
        layout: Layout,
        entries: list[LinearReport],
        ids: Tensor | None,
        source: str,
        revision: str | None,
    ) -> Report:
        """Make the finished folder from the parts, still inside OUT.partial."""
        final = self.folder / "final"
        if final.exists():
            shutil.rmtree(final)
        final.mkdir()
        parts = [self.folder / "outside.safetensors", *sorted(self.folder.glob("block-*.safetensors"))]
        output_bytes = write_shards(final, parts)
        for pattern in COPIED:
            for file in checkpoint.folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, final / file.name)
        config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        config |= {
            "architectures": [plan.model],
            "quantization_config": layout.to_config(),
            "transformers_weights": TRIPWIRE,
        }
        write_text(final / "config.json", json.dumps(config, indent=2) + "\n")
        stored = sum(entry.bits * entry.shape[0] * entry.shape[1] for entry in entries)
        data: dict[str, Any] = {"text": list(recipe.calibration.text) if ids is not None else []}
        if ids is not None:
            data |= {"windows": len(ids), "tokens": ids.numel(), "sha256": fingerprint(ids)}
        report = Report(
            source=source,
            revision=revision,
            model=plan.model,
            linears=entries,
            int8=sorted(layout.int8),
            kept=[asdict(kept) for kept in plan.kept],
            bits_per_ternary_weight=stored / plan.ternary_weights,
            bits_per_weight=8 * output_bytes / plan.weights,
            weights=plan.weights,
            ternary_weights=plan.ternary_weights,
            source_bytes=plan.source_bytes,
            output_bytes=output_bytes,
            data=data,
            versions=versions(),
        )
        header = "".join(
            f"# {key}: {value}\n" for key, value in {"source": source, **report.versions, **report.data}.items()
        )
        write_text(final / "recipe.yaml", header + recipe.to_yaml())
        return report

    def finish(self, report: Report) -> None:
        """Write report and card, and put the folder in its place in one rename."""
        final = self.folder / "final"
        write_text(final / REPORT_FILE, report.to_json())
        write_text(final / "README.md", hub.model_card(report, (final / "recipe.yaml").read_text(encoding="utf-8")))
        old = None
        if self.output.exists():
            old = self.output.with_name(self.output.name + ".replaced")
            if old.exists():
                shutil.rmtree(old)
            os.rename(self.output, old)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        os.rename(final, self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(self.folder)
        if old is not None:
            shutil.rmtree(old)


def _read_back(name: str, module: nn.Module, tensors: dict[str, Tensor], recipe: Recipe) -> TernaryLinear:
    """A finished linear as `TernaryLinear`, from the tensors of its block."""
    out_features, in_features = linear_weight(module).shape
    group_size = min(recipe.group_size or in_features, in_features)
    bias = getattr(module, "bias", None)
    linear = TernaryLinear(in_features, out_features, group_size, f"{name}.shift" in tensors, device="meta")
    linear.weight, linear.scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
    linear.shift = tensors.get(f"{name}.shift")
    linear.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def write_shards(folder: Path, parts: list[Path]) -> int:
    """Copy the tensors of `parts` into shards of at most `SHARD_BYTES` with an index; returns the files' bytes."""
    groups: list[list[Path]] = [[]]
    filled = 0
    for part in parts:
        if groups[-1] and filled + part.stat().st_size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.stat().st_size
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for part in group:
            with safe_open(part, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        weight_map |= dict.fromkeys(tensors, name)
        write_tensors(folder / name, tensors)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=1))
    return total


def versions() -> dict[str, str]:
    """Of everything that can change the numbers."""
    from ternarize import __version__

    return {
        "ternarize": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _arguments(checkpoint: Checkpoint, recipe: Recipe, device: str) -> dict[str, Any]:
    """What an interrupted conversion and its continuation must have in common."""
    files = {shard.name: [shard.stat().st_size, shard.stat().st_mtime_ns] for shard in checkpoint.shards}
    return {
        "source": str(checkpoint.folder.resolve()),
        "files": files,
        "recipe": recipe.to_dict(),
        "device": device,
    } | (versions())


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
