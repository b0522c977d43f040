"""End to end and brief: the whole student learns from the whole teacher, after every block was fitted.

What is taught is `lesson`'s business. What learns is what `tuning` lets learn: codes, scales and shifts, in their
stored form. Held-out KL decides: the best state is kept, the state before the first step included, and patience ends a
run that no longer gains. A run that was stopped goes on from its last check. Under torchrun every process takes its
share of the batches and gradients are averaged, so all hold the same student; the first one writes.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.architecture import linear_weight, linears
from ternarize.calibration import product_dtype
from ternarize.errors import TernarizeError
from ternarize.files import write_tensors
from ternarize.gradients import Gradients
from ternarize.lesson import Lesson, Reader, note_bytes
from ternarize.progress import Progress, size
from ternarize.recipe import Distillation
from ternarize.runtime import unpacked
from ternarize.tuning import (
    TrainableTernary,
    learning_parameters,
    make_optimizer,
    make_ternary,
    make_trainable,
    restore,
    schedule,
    step_optimizer,
)

HELD_OUT_WINDOWS = 16  # at most: every check measures them all
NOTES = "teacher"  # the folder of what the teacher said, beside the state


@dataclass(frozen=True)
class Distilled:
    """How a distillation went.

    Args:
        before, after: held-out KL to the teacher per token, nats.
        steps, tokens: taken, and seen by all processes together.
        seconds: of this and earlier runs.
        curve: (tokens, held-out KL) at every check.
    """

    before: float
    after: float
    steps: int
    tokens: int
    seconds: float
    curve: list[tuple[int, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    path: str,
    ids: Tensor,
    settings: Distillation,
    held_out: float,
    state: Path,
    progress: Progress,
    budget: float | None = None,
) -> Distilled:
    """Let a ternary model learn from its teacher, in place.

    Args:
        student: as `load` gives it, float32; its TernaryLinears hold what was learnt afterwards.
        teacher: the float model.
        path: of the list of decoder layers.
        ids: int64 [B, T], the text; the last share `held_out` of the windows (16 at most) decides, unlearnt from.
        state: file in which an interrupted run is continued. A finished one leaves it: who calls again gets the same
            student without a step, until the caller, once that is safe, removes it.
        budget: seconds after which the run ends, whatever is left; learning rates fall towards that moment.

    Raises:
        TernarizeError: too few windows for one step beside the held-out ones.
    """
    _, world = _place()
    taught, measured = set_apart(ids.to(next(teacher.parameters()).device), held_out)
    check_windows(len(ids), settings, held_out, world)
    modules = _make_learner(student, teacher, path, settings)
    depths = _depths(settings, len(list(student.get_submodule(path).children())))
    size_of_notes = note_bytes(taught.numel(), student.config.get_text_config().hidden_size, len(depths))
    notes = _notes(settings, state, size_of_notes, taught.device, progress)
    lesson = Lesson(Reader(student, path), Reader(teacher, path), depths, settings.off, settings.top, notes)
    with unpacked(student, product_dtype(taught.device)):  # its head; the blocks' linears are learners
        run = _teach(lesson, modules, taught, measured, settings, state, progress, budget)
    for block in student.get_submodule(path).children():
        make_ternary(block)
    together()
    if is_first() and notes:
        shutil.rmtree(notes)
    tokens = run.step * settings.batch * world * taught.shape[1]
    return Distilled(run.curve[0][1], run.best, run.step, tokens, run.seconds, run.curve)


def _teach(
    lesson: Lesson,
    modules: dict[str, TrainableTernary],
    taught: Tensor,
    measured: Tensor,
    settings: Distillation,
    state: Path,
    progress: Progress,
    budget: float | None,
) -> _Run:
    """All steps, from the beginning or from where an earlier run stopped; the modules have the best state's values.

    Args:
        taught, measured: windows to learn from, and those that decide, int64 [B, T].
    """
    rank, world = _place()
    held = [(windows, lesson.ask(windows)[0]) for windows in measured.split(settings.batch)]
    run = _Run.start(modules, settings, lambda: lesson.held_out(held), state)
    gradients = Gradients(lesson.loss, list(run.learning.values()))
    batches = len(taught) // (settings.batch * world)
    order = _order(len(taught), batches * settings.batch * world, settings).to(taught.device)
    steps = math.ceil(batches * settings.epochs)
    tokens_a_step = settings.batch * world * taught.shape[1]
    started = time.monotonic() - run.seconds
    with progress.bar("distilling", total=steps, unit="step") as bar:
        bar.update(run.step)
        while run.step < steps and not run.finished:
            share = run.step / steps
            if budget is not None:
                share = max(share, _agree((time.monotonic() - started) / max(budget - 1.5 * run.check_seconds, 1.0)))
            if share >= 1 or run.since_best >= settings.patience:
                break
            first = (run.step * world + rank) * settings.batch
            numbers = order[first : first + settings.batch]
            gradients(taught[numbers], numbers.tolist())
            run.learn(share)
            run.seconds = time.monotonic() - started
            bar.update(1)
            if run.step % settings.check == 0:
                run.check(tokens_a_step, state if rank == 0 else None)
                run.seconds = time.monotonic() - started
    if run.curve[-1][0] < run.step * tokens_a_step:
        run.check(tokens_a_step, None)
        run.seconds = time.monotonic() - started
    run.finish(state if rank == 0 else None)
    return run


def set_apart(ids: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The windows that are learnt from, and those that decide: the last `share`, at least one, at most 16."""
    apart = _count_apart(len(ids), share)
    return ids[:-apart], ids[-apart:]


def _count_apart(windows: int, share: float) -> int:
    return min(max(1, math.ceil(share * windows)), HELD_OUT_WINDOWS)


def check_windows(windows: int, settings: Distillation, held_out: float, processes: int = 1) -> None:
    """Refuse a distillation on so many windows that could not take a step.

    Args:
        held_out: share of the windows that decide.

    Raises:
        TernarizeError: with the figures.
    """
    left = windows - _count_apart(windows, held_out)
    if left < settings.batch * processes:
        raise TernarizeError(
            f"{windows} windows leave {left} to learn from, fewer than one step of {settings.batch} for each "
            f"of {processes} processes. Raise distill.samples, or lower distill.batch."
        )


def _make_learner(
    student: PreTrainedModel, teacher: PreTrainedModel, path: str, settings: Distillation
) -> dict[str, TrainableTernary]:
    """Make the student's ternary linears trainable, and freeze all else; returns them by full name."""
    blocks = student.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    for module in (student, teacher):
        module.requires_grad_(False)
    for index, block in enumerate(blocks):
        make_trainable(block, _float_weights(teacher, path, index), f"{path}.{index}", settings)
    if settings.checkpointing:
        _checkpoint_blocks(student, blocks)
    return {name: m for name, m in student.named_modules() if isinstance(m, TrainableTernary)}


def _depths(settings: Distillation, blocks: int) -> list[int]:
    """Numbers of the hidden states that OFF compares, evenly spaced, the last one among them."""
    return [round((d + 1) * blocks / settings.depths) for d in range(settings.depths)] if settings.off else []


def _notes(settings: Distillation, state: Path, needed: int, device: torch.device, progress: Progress) -> Path | None:
    """Where to keep what the teacher says: beside `state`, if text is seen again and the disk has room for it.

    An accelerator asks the teacher again sooner than it reads from a disk.
    """
    if settings.epochs <= 1 or device.type != "cpu":
        return None
    free = shutil.disk_usage(state.parent).free
    if needed > free:
        progress.say(
            f"the teacher is asked again in every epoch: its answers take {size(needed)}, {size(free)} are free."
        )
        return None
    folder = state.with_name(NOTES)
    folder.mkdir(exist_ok=True)
    return folder


def _order(windows: int, used: int, settings: Distillation) -> Tensor:
    """Which windows are learnt from, one after the other: `used` of them in each epoch, int64."""
    generator = torch.Generator().manual_seed(settings.seed)
    epochs = math.ceil(settings.epochs)
    return torch.cat([torch.randperm(windows, generator=generator)[:used] for _ in range(epochs)])


class _Run:
    """What changes while a distillation runs, and its copy on disk; `measure` gives the held-out KL."""

    def __init__(
        self, modules: dict[str, TrainableTernary], settings: Distillation, measure: Callable[[], float]
    ) -> None:
        self.measure = measure
        self.learning = learning_parameters(modules)
        self.optimizer = make_optimizer(self.learning, settings)
        self.step = self.since_best = 0
        self.seconds = self.check_seconds = 0.0
        self.finished = False
        self.best = math.inf
        self.best_values: dict[str, Tensor] = {}
        self.curve: list[tuple[int, float]] = []

    @classmethod
    def start(
        cls, modules: dict[str, TrainableTernary], settings: Distillation, measure: Callable[[], float], state: Path
    ) -> _Run:
        """From the beginning, or from where `state` says that an earlier run stopped."""
        run = cls(modules, settings, measure)
        if state.exists():
            run._read(state)
        else:
            run.check(0, None)
        return run

    def learn(self, share: float) -> None:
        """One step down the gradients, `share` of the run being over."""
        step_optimizer(self.optimizer, schedule(share))
        self.step += 1

    def check(self, tokens_a_step: int, state: Path | None) -> None:
        """Measure on held-out text, remember the best, and make the run durable in `state`."""
        started = time.monotonic()
        kl = _agree(self.measure())
        self.curve.append((self.step * tokens_a_step, kl))
        if kl < self.best:
            self.best, self.since_best = kl, 0
            self.best_values = {n: p.detach().cpu().clone() for n, p in self.learning.items()}
        else:
            self.since_best += 1
        if state is not None:
            self._write(state)
        self.check_seconds = time.monotonic() - started

    def finish(self, state: Path | None) -> None:
        """Give the modules the values of the best check; in `state` nothing else is left."""
        restore(self.learning, self.best_values)
        if state is not None and not self.finished:
            write_tensors(state, self._best_tensors())
        self.finished = True

    def _best_tensors(self) -> dict[str, Tensor]:
        numbers = [self.step, self.since_best, self.seconds, self.best, *(v for point in self.curve for v in point)]
        best = {f"best/{name}": value for name, value in self.best_values.items()}
        return {"numbers": torch.tensor(numbers, dtype=torch.float64)} | best

    def _write(self, state: Path) -> None:
        tensors = self._best_tensors()
        for name, parameter in self.learning.items():
            moments = self.optimizer.state[parameter]
            tensors[f"now/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq", "step") if key in moments}
        write_tensors(state, tensors)

    def _read(self, state: Path) -> None:
        with safe_open(state, framework="pt") as file, torch.no_grad():
            keys = set(file.keys())
            step, since_best, self.seconds, self.best, *curve = file.get_tensor("numbers").tolist()
            self.step, self.since_best = int(step), int(since_best)
            self.curve = [(int(tokens), kl) for tokens, kl in zip(curve[::2], curve[1::2], strict=True)]
            self.best_values = {name: file.get_tensor(f"best/{name}") for name in self.learning}
            self.finished = not any(key.startswith("now/") for key in keys)
            for name, parameter in self.learning.items() if not self.finished else ():
                parameter.copy_(file.get_tensor(f"now/{name}"))
                moments = {key: f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step")}
                self.optimizer.state[parameter] = {
                    key: file.get_tensor(stored).to(parameter.device)  # `step` too: the optimizer is a fused one
                    for key, stored in moments.items()
                    if stored in keys
                }


def _float_weights(teacher: PreTrainedModel, path: str, index: int) -> dict[str, Tensor]:
    """The teacher's weights of one block by name, where codes start inside their cells; fused experts have none."""
    name = f"{path}.{index}"
    return {linear: linear_weight(module).float() for linear, module in linears(teacher.get_submodule(name), name)}


def _place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this is the process that writes."""
    return _place()[0] == 0


def together() -> None:
    """Wait for all processes, where there are several."""
    if dist.is_initialized():
        dist.barrier()


def _agree(value: float) -> float:
    """The mean of a number over all processes, so that all take the same decisions."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _checkpoint_blocks(student: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Keep only what enters each block for the backward pass, and compute the rest again."""
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks:
        block.training = True  # of the block alone: its dropout, if any, stays off
