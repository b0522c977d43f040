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
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize import hub
from ternarize.architecture import (
    choose_linears,
    find_blocks,
    linear_shape,
    linear_weight,
    replace_module,
    unfuse_experts,
)
from ternarize.calibration import Walk, batches, capture, start_walk
from ternarize.checkpoint import Checkpoint, copy_file, place, release, tied_parameters, write_tensors, write_text
from ternarize.errors import StoppedError, TernarizeError, UnsupportedModelError
from ternarize.format import TRIPWIRE, Layout
from ternarize.plan import Plan, check_room, make_plan
from ternarize.progress import Progress, size
from ternarize.recipe import DEFAULT, Recipe
from ternarize.report import RECIPE_FILE, REPORT_FILE, LinearReport, Report
from ternarize.runtime import Int8Embedding, Int8Head, TernaryLinear, tie_int8_heads
from ternarize.solver import LinearStatistics, fit, relative_error
from ternarize.sources import resolve
from ternarize.text import calibration_windows, fingerprint
from ternarize.workspace import OUTSIDE, Workspace

FEWEST_TOKENS = 4  # an expert that saw fewer than in_features / FEWEST_TOKENS tokens is fitted without data
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


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
    work = Workspace(Path(output), resume, force)
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if text:
        chosen = Recipe.from_dict(chosen.to_dict() | {"calibration": asdict(chosen.calibration) | {"text": list(text)}})
    checkpoint = Checkpoint(resolve(str(source), revision))
    held = checkpoint.folder.resolve()
    if work.output in (held, *held.parents):
        raise TernarizeError(f"{output} holds the source {held}, which would be lost. Choose another --output.")
    plan = make_plan(checkpoint, chosen)
    check_room(plan, work.output)
    try:
        work.open(_arguments(checkpoint, chosen, device))
        report = _convert(_Job(checkpoint, plan, chosen, work, progress, device, str(source), revision))
    except KeyboardInterrupt:
        raise StoppedError(work.stopped("stopped")) from None
    except TernarizeError as error:
        if not isinstance(error, StoppedError):
            work.close()
        raise
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise StoppedError(
            work.stopped(f"out of memory; the plan expected {size(plan.peak_memory)}")
            + " Free some memory first, or start over with fewer calibration.samples or another machine."
        ) from error
    report.run.update(seconds=round(time.monotonic() - started, 1), peak_memory=peak_memory())
    write_text(work.final / REPORT_FILE, report.to_json())
    recipe_text = (work.final / RECIPE_FILE).read_text(encoding="utf-8")
    write_text(work.final / "README.md", hub.model_card(report, recipe_text))
    work.publish()
    return report


@dataclass(frozen=True)
class _Job:
    """What one conversion works with; `source` and `revision` as the user named them."""

    checkpoint: Checkpoint
    plan: Plan
    recipe: Recipe
    work: Workspace
    progress: Progress
    device: str
    source: str
    revision: str | None


@torch.no_grad()
def _convert(job: _Job) -> Report:
    checkpoint, recipe, work = job.checkpoint, job.recipe, job.work
    ids = _calibration_ids(job)
    model = checkpoint.skeleton()
    path, blocks = find_blocks(model)
    checkpoint.load(model, "", exclude=f"{path}.")
    checkpoint.load(model, f"{path}.0.")
    place(model, job.device)
    batched = [batch.to(job.device) for batch in batches(ids)] if ids is not None else []
    teacher = start_walk(model, blocks, path, batched)
    int8 = pack_embeddings(model, job.plan, recipe)
    student = start_walk(model, blocks, path, batched)
    if not work.has(OUTSIDE):
        work.write(OUTSIDE, _outside_tensors(model, path, checkpoint), [])
    release(model)  # what is outside the blocks has been written and used; blocks are read one by one

    entries: list[LinearReport] = []
    with job.progress.bar("converting", total=len(blocks), unit="block") as bar:
        for index, block in enumerate(blocks):
            name, part = f"{path}.{index}", work.block(index)
            checkpoint.load(model, f"{name}.")
            place(block, job.device)
            unfuse_experts(block, name, recipe.skip)
            if work.has(part):
                tensors, done = work.read(part)
                replay_block(block, name, index, recipe, teacher, student, tensors)
            else:
                done = convert_block(block, name, index, recipe, teacher, student)
                work.write(part, _block_tensors(block, name, checkpoint), done)
            entries += done
            blocks[index] = nn.Identity()
            bar.update(1)
    layout = Layout(
        blocks=path,
        group_size=recipe.group_size,
        shift=recipe.grid == "dlt",
        kept=tuple(job.plan.kept_linears),
        int8=int8,
        int8_group_size=recipe.int8_group_size,
    )
    return _assemble(job, layout, entries, ids)


def _calibration_ids(job: _Job) -> Tensor | None:
    """The calibration windows, int64 [B, T]; fixed by the first run, so that a resumed one sees the same."""
    if not job.recipe.needs_statistics:
        return None
    kept = job.work.calibration
    if not kept.exists():
        wanted = job.recipe.calibration
        ids = calibration_windows(
            wanted.text, job.checkpoint.folder, wanted.samples, wanted.length, wanted.seed, job.progress
        )
        write_tensors(kept, {"ids": ids})
    return load_file(kept)["ids"]


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
        statistics = capture(block, index, chosen, teacher, student)
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


def replay_block(
    block: nn.Module,
    name: str,
    index: int,
    recipe: Recipe,
    teacher: Walk,
    student: Walk,
    tensors: dict[str, Tensor],
) -> None:
    """Walk teacher and student through a block that an earlier run finished, read back from `tensors`."""
    if not recipe.needs_statistics:
        return
    teacher.advance(index, block)
    for linear, module in choose_linears(block, name, recipe.skip).ternary.items():
        packed = TernaryLinear.from_packed(
            linear_shape(module),
            recipe.group_size,
            tensors[f"{linear}.weight"],
            tensors[f"{linear}.scale"],
            tensors.get(f"{linear}.shift"),
            getattr(module, "bias", None),
        )
        replace_module(block, linear, packed.to(student.hidden[0].device), name)
    student.advance(index, block)


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
        shift = None if fitted.shift is None else fitted.shift[rows]
        tensor = replace(fitted, trits=fitted.trits[rows], scale=fitted.scale[rows], shift=shift)
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


def _assemble(job: _Job, layout: Layout, entries: list[LinearReport], ids: Tensor | None) -> Report:
    """Make the finished folder from the parts, still inside OUT.partial."""
    plan, recipe, final = job.plan, job.recipe, job.work.final
    output_bytes = job.work.start_final()
    for pattern in COPIED:
        for file in job.checkpoint.folder.glob(pattern):
            if file.is_file():
                copy_file(file, final / file.name)
    config = json.loads((job.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
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
        source=job.source,
        revision=job.revision,
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
    facts = {"source": job.source, "revision": job.revision, **report.versions, **report.data}
    header = "".join(f"# {key}: {value}\n" for key, value in facts.items())
    write_text(final / RECIPE_FILE, header + recipe.to_yaml())
    return report


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


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
