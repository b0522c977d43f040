"""A finished folder learns on: the whole student from the whole teacher, and the files are written anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ternarize import hub
from ternarize.architecture import find_blocks
from ternarize.calibration import autocast_enabled
from ternarize.checkpoint import Checkpoint
from ternarize.distill import distill, is_first, set_apart, together
from ternarize.errors import TernarizeError
from ternarize.evaluate import Evaluation, compare, load_any
from ternarize.files import rewrite_tensors, write_tensors, write_text
from ternarize.gate import HELD_OUT, judge
from ternarize.plan import check_room, distillation_bytes
from ternarize.process import kept_memory
from ternarize.progress import Progress
from ternarize.recipe import Recipe
from ternarize.report import RECIPE_FILE, Report, memory_used
from ternarize.runtime import TernaryLinear
from ternarize.sources import resolve
from ternarize.text import draw_windows, fingerprint, load_tokenizer, read_files
from ternarize.workspace import Workspace, arguments

GATE_WINDOWS = 8  # at most, on which a distilled student is compared with its teacher


def distill_folder(
    folder: Path,
    checkpoint: Checkpoint,
    report: Report,
    recipe: Recipe,
    work: Workspace,
    progress: Progress,
    device: str = "cpu",
    budget: float | None = None,
) -> tuple[Report, Evaluation]:
    """Let the student in a ternarize folder learn from its source as a whole; its weight files are rewritten.

    Args:
        folder: a ternarize folder, changed in place (by the first process, under torchrun).
        checkpoint: the source.
        report: of the folder so far.
        recipe: its `distill` and `calibration` say how, and on what text.
        work: where the text that is learnt from and the state of the distillation are kept.
        budget: as in `distill.distill`.

    Returns:
        The report with the codes' new figures, whose `run` tells how the distillation went; and a comparison with the
        teacher on held-out windows.

    Raises:
        TernarizeError: as `distill.distill`.
    """
    wanted = recipe.calibration
    ids = _lesson_ids(work, checkpoint, recipe, progress, device)
    teacher = checkpoint.skeleton()
    checkpoint.load(teacher, "")
    if autocast_enabled(torch.device(device)):
        teacher.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    teacher.to(device)  # type: ignore[arg-type]
    student = load_any(folder, device, torch.float32)
    path, _ = find_blocks(teacher)
    done = distill(student, teacher, path, ids, recipe.distill, wanted.held_out, work.distillation, progress, budget)
    modules = {name: m for name, m in student.named_modules() if isinstance(m, TernaryLinear)}
    if is_first():
        tensors = {f"{name}.{key}": t.cpu() for name, m in modules.items() for key, t in m.named_buffers()}
        rewrite_tensors(folder, tensors)
    linears = [replace(entry, zero_share=modules[entry.name].to_tensor().zero_share) for entry in report.linears]
    report = replace(report, linears=linears)
    report.run["distill"] = done.to_dict() | {"windows": len(ids), "sha256": fingerprint(ids)}
    _, held_out = set_apart(ids, wanted.held_out)
    return report, compare(student, teacher, held_out[-GATE_WINDOWS:], HELD_OUT, progress)


def _lesson_ids(work: Workspace, checkpoint: Checkpoint, recipe: Recipe, progress: Progress, device: str) -> Tensor:
    """The windows of a distillation, int64 [B, T]; fixed by the first process of the first run, for all to see."""
    wanted = recipe.calibration
    if is_first() and not work.lesson.exists():
        others = replace(wanted, samples=recipe.distill.samples, seed=wanted.seed + 1)
        ids = draw_windows(checkpoint, others, progress, device)
        write_tensors(work.lesson, {"ids": ids})
    together()
    return load_file(work.lesson)["ids"]


def _recipe_of(folder: Path, settings: list[str]) -> Recipe:
    """A folder's own recipe, with at least an epoch of distillation, and `settings` of that and of its text."""
    for setting in settings:
        if not setting.startswith(("distill.", "calibration.")):
            raise TernarizeError(
                f"{setting!r} would change how {folder} was fitted, which is done. A distillation takes settings of "
                "distill and calibration, such as distill.epochs=2; convert again for others."
            )
    recipe = Recipe.load(folder / RECIPE_FILE)
    if not recipe.distill.epochs:
        recipe = recipe.with_settings(["distill.epochs=1"])
    return recipe.with_settings(settings)


def distill_again(
    folder: str | Path,
    source: str | Path,
    output: str | Path,
    settings: list[str] | None = None,
    *,
    revision: str | None = None,
    text: list[str] | str | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    budget: float | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Report | None:
    """Distil a finished ternarize folder into a new one, by its own recipe with `settings` applied.

    Args:
        folder: what `convert` wrote; it is not changed.
        source: what it was converted from.
        output: the folder to write.
        settings: `key=value` for the recipe, such as "distill.epochs=2"; one epoch where the recipe has none.
        revision, text, device, resume, force, progress, command: as in `convert`.
        budget: seconds.

    Returns:
        The report, also written to output/report.json; None in all processes but the first under torchrun.

    Raises:
        TernarizeError: see its subclasses; the message says what to do.
    """
    folder, progress = Path(folder), progress or Progress()
    report = Report.read(folder)
    recipe = _recipe_of(folder, settings or []).with_text(text)
    work = Workspace(Path(output), resume, force)
    work.refuse_inside(folder, *read_files(str(source), recipe.calibration.text))
    checkpoint = Checkpoint(resolve(str(source), revision))
    work.refuse_inside(checkpoint.folder)
    shapes = {entry.name: entry.shape for entry in report.linears}
    check_room(report.output_bytes + distillation_bytes(shapes, recipe) - work.held_bytes(), work.output)
    first = is_first()
    together()  # all have looked at the output before the first writes there
    if first:
        work.open(arguments(checkpoint, recipe, device) | {"student": str(folder.resolve())})
        work.copy_final(folder)
    together()
    with work.stoppable(), kept_memory():
        report, evaluation = distill_folder(work.final, checkpoint, report, recipe, work, progress, device, budget)
    together()
    if not first:
        return None
    student = load_any(work.final, device, torch.float32)
    report.run["verdict"] = judge(student, load_tokenizer(work.final), evaluation, None).to_dict()
    report.run.update(seconds=round(report.run["seconds"] + work.spent(), 1), **memory_used(device))
    for measured in ("evaluation", "tasks"):
        report.run.pop(measured, None)  # of the student before
    if command:
        report.run["commands"] = [*report.run.get("commands", []), command]
    write_text(work.final / RECIPE_FILE, recipe.to_yaml())
    hub.save_report(work.final, report)
    work.publish()
    return report
