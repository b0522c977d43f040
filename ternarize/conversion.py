"""The story: a checkpoint goes in, a ternary one comes out, one window in memory at a time.

    for each block, or window of blocks that learn together (`block`):
        capture   the inputs of its linears behind the ternary prefix, and the teacher's outputs
        fit       each linear that reads the same input in one go
        pack      TernaryLinear takes the linear's place
        tune      codes, scales and shifts against the teacher's output, where the recipe says so
        advance   the student's hidden states through the ternary block
        write     the block's tensors, durably
    ending        the last blocks, or all, together, against the teacher's predictions, where the recipe says so
    distill       the whole student against the whole teacher, where the recipe says so

Work goes to OUT.partial beside OUT; it is renamed at the end, so OUT is never half written. A run that was stopped goes
on from its last durable window: earlier blocks are read back and walked through, not fitted again, so the result is the
same to the last bit on the same machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize import hub
from ternarize.architecture import find_blocks, unfuse_experts
from ternarize.block import advance, convert_window, pack_embeddings, replay_block
from ternarize.budget import spend
from ternarize.calibration import Walk, batches, mix_random, start_walk
from ternarize.checkpoint import Checkpoint, place, release, tied_parameters
from ternarize.choice import make_layout
from ternarize.distill import check_windows
from ternarize.ending import tune_ending
from ternarize.errors import TernarizeError
from ternarize.evaluate import Evaluation, load_any
from ternarize.export import find_targets
from ternarize.export.export import check_places, export, export_places
from ternarize.export.planned import check_before
from ternarize.files import copy_side_files, write_tensors, write_text
from ternarize.format import TRIPWIRE, Layout
from ternarize.gate import compare_walks, judge
from ternarize.plan import RANK_LENGTH, RANK_WINDOWS, Plan, check_room, make_plan
from ternarize.process import kept_memory
from ternarize.progress import Progress
from ternarize.recipe import DEFAULT, Recipe
from ternarize.refine import distill_folder
from ternarize.report import RECIPE_FILE, LinearReport, Report, memory_used, versions
from ternarize.runtime import TernaryLinear
from ternarize.sources import describe, resolve
from ternarize.text import draw_windows, fingerprint, load_tokenizer, read_files
from ternarize.workspace import ENDING, OUTSIDE, Workspace, arguments

LEAST_TIME = 60.0  # seconds, below which a distillation is not begun


def convert(
    source: str | Path,
    output: str | Path,
    recipe: Recipe | str | Path = DEFAULT,
    *,
    revision: str | None = None,
    text: list[str] | str | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    budget: float | None = None,
    formats: list[str] | None = None,
    allow_lossy: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
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
        budget: seconds for all of it; the distillation gets what fit and tune leave. Only where the recipe has one.
        formats: other formats to write beside `output`, see `ternarize.export`; refused before anything is computed
            where one of them cannot hold what the recipe makes.
        allow_lossy: write those, too.
        progress: where messages go.
        command: what the user typed, for the report and the card.

    Returns:
        The report, also written to output/report.json.

    Raises:
        TernarizeError: see its subclasses; the message says what to do.
    """
    work = Workspace(Path(output), resume, force)
    chosen = (recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)).with_text(text)
    work.refuse_inside(*read_files(str(source), chosen.calibration.text))
    checkpoint = Checkpoint(resolve(str(source), revision))
    work.refuse_inside(checkpoint.folder)
    progress = progress or Progress()
    job = Job(checkpoint, make_plan(checkpoint, chosen), chosen, work, progress, device, str(source), revision)
    if formats:
        check_before(checkpoint, job.plan, chosen, formats, allow_lossy)
        check_places(work.output, export_places(work.output, find_targets(formats), None), force)
    report = carry_out(job, budget, command)
    if formats:
        export(work.output, formats, allow_lossy=allow_lossy, force=force, progress=progress)
    return report


@dataclass(frozen=True)
class Job:
    """What one conversion works with; `source` and `revision` as the user named them."""

    checkpoint: Checkpoint
    plan: Plan
    recipe: Recipe
    work: Workspace
    progress: Progress
    device: str
    source: str
    revision: str | None


def carry_out(job: Job, budget: float | None = None, command: str | None = None) -> Report:
    """Convert an opened checkpoint into a workspace's output; arguments, result and errors are those of `convert`."""
    recipe, work = job.recipe, job.work
    if recipe.distill.epochs:
        check_windows(recipe.distill.samples, recipe.distill, recipe.calibration.held_out)
    elif budget is not None:
        raise TernarizeError(
            "a time budget ends the distillation, which this recipe has not: its fit and tuning take what they take. "
            "Leave --time-budget out, or choose a recipe with distill.epochs, such as best."
        )
    check_room(job.plan.disk_bytes - work.held_bytes(), work.output)
    with work.stoppable(job.plan.peak_memory), kept_memory():
        work.open(arguments(job.checkpoint, recipe, job.device))
        report, evaluation, ids = _convert(job)
        if recipe.distill.epochs:
            fitted = work.fitted()  # noted without a budget, too: the run that goes on from here may have one
            left = None if budget is None else budget - fitted
            if left is not None and left < LEAST_TIME and not work.distillation.exists():
                job.progress.say(f"no distillation: fit and tune took all but {max(left, 0):.0f} s of the time budget.")
            else:
                report, evaluation = distill_folder(
                    work.final, job.checkpoint, report, recipe, work, job.progress, job.device, left
                )
        student = load_any(work.final, job.device, torch.float32)
        report.run["verdict"] = judge(student, load_tokenizer(work.final), evaluation, ids).to_dict()
    report.run.update(seconds=round(work.spent(), 1), commands=[command] if command else [], **memory_used(job.device))
    hub.save_report(work.final, report)
    work.publish()
    return report


@torch.no_grad()
def _convert(job: Job) -> tuple[Report, Evaluation | None, Tensor | None]:
    """Everything up to the finished folder, the comparison with the teacher, and a held-out window int64 [T]."""
    checkpoint, recipe, work = job.checkpoint, job.recipe, job.work
    ids = _calibration_ids(job)
    group_sizes = _group_sizes(job, ids)
    model = checkpoint.skeleton()
    path, blocks = find_blocks(model)
    checkpoint.load(model, "", exclude=f"{path}.")
    checkpoint.load(model, f"{path}.0.")
    place(model, job.device)
    batched = [batch.to(job.device) for batch in batches(ids)] if ids is not None else []
    teacher = start_walk(model, blocks, path, batched)
    tables = pack_embeddings(model, job.plan, recipe)
    student = start_walk(model, blocks, path, batched)
    if not work.has(OUTSIDE):
        work.write(OUTSIDE, _outside_tensors(model, path, checkpoint), [])
    release(model)  # what is outside the blocks has been written and used; blocks are read one by one

    entries: list[LinearReport] = []
    tunings: list[dict[str, Any]] = []
    parts = [OUTSIDE, *map(work.block, range(len(blocks)))]
    end = recipe.tune.first_of_ending(len(blocks))
    width = recipe.tune.window if recipe.tune.epochs else 1
    with job.progress.bar("converting", total=len(blocks), unit="block") as bar:
        for first in range(0, len(blocks), width):
            if first == end:
                entrance = list(student.hidden)
            window = {f"{path}.{index}": blocks[index] for index in range(len(blocks))[first : first + width]}
            made, tuned = _convert_window(job, model, window, first, teacher, student, group_sizes)
            entries += [entry for block in made for entry in block]
            tunings += [tuned] if tuned else []
            for index in range(first, min(first + len(window), end)):
                blocks[index] = nn.Identity()
            bar.update(len(window))
    if end < len(blocks):
        student.hidden = entrance
        window = {f"{path}.{index}": blocks[index] for index in range(end, len(blocks))}
        tunings.append(_convert_ending(job, window, end, teacher, student, batched))
        parts[1 + end :] = [ENDING]
    layout = make_layout(recipe, job.plan.blocks, job.plan.kept_linears, tables, group_sizes)
    report = _assemble(job, parts, layout, entries, ids)
    if tunings:
        report.run["tune"] = tunings
    if ids is None:
        return report, None, None
    return report, compare_walks(checkpoint, job.plan, recipe, teacher, student, batched), ids[-1]


def _convert_window(
    job: Job,
    model: PreTrainedModel,
    window: dict[str, nn.Module],
    first: int,
    teacher: Walk,
    student: Walk,
    group_sizes: dict[str, int],
) -> tuple[list[list[LinearReport]], dict[str, Any] | None]:
    """Convert a window of blocks and make it durable, or walk through what an earlier run made of it.

    Args:
        window: blocks of `model` by full name; they are read from the checkpoint here, and ternary afterwards.

    Returns:
        One entry per linear, block by block; and how the tuning ended, if there was one.
    """
    work, recipe = job.work, job.recipe
    for name, block in window.items():
        job.checkpoint.load(model, f"{name}.")
        place(block, job.device)
        unfuse_experts(block, name, recipe.skip)
    parts = [work.block(first + offset) for offset in range(len(window))]
    if all(map(work.has, parts)):
        found = [work.read(part) for part in parts]
        for offset, ((name, block), (tensors, _, _)) in enumerate(zip(window.items(), found, strict=True)):
            replay_block(block, name, first + offset, recipe, teacher, student, tensors, group_sizes)
        return [entries for _, entries, _ in found], found[0][2]
    made, outcome = convert_window(window, first, recipe, teacher, student, group_sizes)
    tuned = asdict(outcome) | {"blocks": list(window)} if outcome else None
    for offset, ((name, block), part) in enumerate(zip(window.items(), parts, strict=True)):
        work.write(part, _block_tensors(block, name, job.checkpoint), made[offset], None if offset else tuned)
    return made, tuned


def _convert_ending(
    job: Job,
    window: dict[str, nn.Module],
    first: int,
    teacher: Walk,
    student: Walk,
    ids: list[Tensor],
) -> dict[str, Any]:
    """Let the last blocks, or all, which are ternary, learn once more and make them durable; or walk through what an
    earlier run made of them. Returns how it ended.
    """
    work = job.work
    if work.has(ENDING):
        tensors, _, ended = work.read(ENDING)
        for offset, (name, block) in enumerate(window.items()):
            block.load_state_dict({key: tensors[f"{name}.{key}"] for key in block.state_dict()})
            advance(student, first + offset, block)
        assert ended is not None
        return ended
    outcome = tune_ending(window, first, teacher, student, job.checkpoint, job.recipe, ids, job.progress)
    tensors = {}
    for name, block in window.items():
        tensors |= _block_tensors(block, name, job.checkpoint)
    ended = asdict(outcome) | {"blocks": list(window), "ending": True}
    work.write(ENDING, tensors, [], ended)
    return ended


def _calibration_ids(job: Job) -> Tensor | None:
    """The calibration windows, int64 [B, T]; fixed by the first run, so that a resumed one sees the same."""
    if not job.recipe.needs_statistics:
        return None
    kept = job.work.calibration
    if not kept.exists():
        wanted = job.recipe.calibration
        ids = draw_windows(job.checkpoint, wanted, job.progress, job.device)
        vocabulary = job.checkpoint.config.get_text_config().vocab_size
        write_tensors(kept, {"ids": mix_random(ids, wanted, job.checkpoint.folder, vocabulary)})
    return load_file(kept)["ids"]


def _group_sizes(job: Job, ids: Tensor | None) -> dict[str, int]:
    """What the budget gives each linear; nothing where there is no budget. Fixed by the first run."""
    if job.recipe.budget is None or ids is None:
        return {}
    kept = job.work.group_sizes
    if not kept.exists():
        teacher = job.checkpoint.skeleton()
        job.checkpoint.load(teacher, "")
        teacher.to(job.device)  # type: ignore[arg-type]
        few = ids[-RANK_WINDOWS:, :RANK_LENGTH]
        write_text(kept, json.dumps(spend(teacher, job.plan.ternary, job.recipe, few, job.progress)))
    sizes: dict[str, int] = json.loads(kept.read_text(encoding="utf-8"))
    return sizes


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


def _assemble(job: Job, parts: list[str], layout: Layout, entries: list[LinearReport], ids: Tensor | None) -> Report:
    """Make the finished folder from these parts, still inside OUT.partial."""
    plan, recipe, final = job.plan, job.recipe, job.work.final
    output_bytes = job.work.start_final(parts)
    copy_side_files(job.checkpoint.folder, final)
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
        int6=sorted(layout.int6),
        kept=[asdict(kept) for kept in plan.kept],
        bits_per_ternary_weight=stored / plan.ternary_weights,
        bits_per_weight=8 * output_bytes / plan.weights,
        weights=plan.weights,
        ternary_weights=plan.ternary_weights,
        source_bytes=plan.source_bytes,
        output_bytes=output_bytes,
        data=data,
        versions=versions(),
        base=describe(job.source, job.checkpoint.folder),
    )
    facts = {"source": job.source, "revision": job.revision, **report.versions, **report.data}
    header = "".join(f"# {key}: {value}\n" for key, value in facts.items())
    write_text(final / RECIPE_FILE, header + recipe.to_yaml())
    return report
