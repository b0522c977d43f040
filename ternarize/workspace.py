"""The folder OUT.partial beside OUT, where a conversion's work is kept until it is complete.

    OUT.partial/
      state.json               the arguments, so that a continuation with others is refused
      seconds.json             time spent so far, by earlier runs too
      calibration.safetensors  the token ids, fixed by the first run
      group_sizes.json         what a budget gives each linear
      outside.safetensors      what lies outside the blocks
      block-00000.safetensors  one part per finished block; its .json is written after it and makes it count
      ending.safetensors       the blocks that learnt once more, together; takes the place of their own parts
      fitted.json              seconds that it took up to here, where a distillation follows
      lesson.safetensors       the token ids of the distillation, fixed by its first run
      distill.safetensors      a distillation under way, or what came of it
      teacher/                 what the teacher said, where a distillation sees its text again
      final/                   the finished folder, renamed to OUT

A part is durable before the next is begun, so a run that is killed at any point loses one block's work at most.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ternarize.checkpoint import Checkpoint
from ternarize.errors import StoppedError, TernarizeError
from ternarize.files import INDEX_FILE, SINGLE_FILE, copy_file, sync_folder, write_tensors, write_text
from ternarize.progress import size
from ternarize.recipe import Recipe
from ternarize.report import LinearReport, versions

SHARD_BYTES = 1_000_000_000  # a shard is assembled in memory, so it stays small
OUTSIDE = "outside"
ENDING = "ending"


class Workspace:
    """OUT.partial and what may be done with it.

    Args:
        output: OUT.
        resume: go on with what is there.
        force: replace OUT at the end, and forget what is there.
        passing: nobody can go on with what is in here; it is removed with its surroundings.

    Raises:
        TernarizeError: OUT holds something, or an interrupted conversion waits there, and neither flag says what to do.
    """

    def __init__(self, output: Path, resume: bool = False, force: bool = False, passing: bool = False) -> None:
        self.output = output.resolve()
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.final = self.folder / "final"
        self.replaced = self.folder / "replaced"
        self.resume, self.passing = resume, passing
        self.fresh = False
        self.started, self.earlier = time.monotonic(), 0.0
        for path in (output, *self.output.parents):
            if path.is_file():
                raise TernarizeError(f"{path} is a file. Choose another --output.")
        if self.folder.is_file() or (self.folder.is_dir() and not all(map(_is_ours, self.folder.iterdir()))):
            raise TernarizeError(
                f"{self.folder}, where the work would go, is there and not ternarize's. "
                "Move it away, or choose another --output."
            )
        if output.is_dir() and any(output.iterdir()) and not force:
            raise TernarizeError(
                f"{output} exists and is not empty. Choose another --output, or --force to replace it."
            )
        if (self.folder / "state.json").exists() and not (resume or force):
            raise TernarizeError(
                f"{self.folder} holds an interrupted conversion. "
                "Add --resume to go on with it, or --force to start over."
            )

    def refuse_inside(self, *sources: Path) -> None:
        """Refuse an output that is one of the sources (folders or files), or a folder that holds one.

        Raises:
            TernarizeError: it would be lost.
        """
        for held in (source.resolve() for source in sources):
            if self.output in (held, *held.parents):
                raise TernarizeError(
                    f"{self.output} holds {held}, which is read and would be lost. Choose another --output."
                )

    def open(self, arguments: dict[str, Any]) -> None:
        """Start afresh, or check that an interrupted conversion had the same arguments.

        Raises:
            TernarizeError: it had others; each difference is named.
        """
        state = self.folder / "state.json"
        if self.resume and state.exists():
            before = json.loads(state.read_text(encoding="utf-8"))
            if differences := list(_differences(before, arguments)):
                raise TernarizeError(
                    f"{self.folder} was started with other arguments ({'; '.join(differences)}). "
                    "Resume with those, or use --force to start over."
                )
            if self.seconds.exists():
                self.earlier = json.loads(self.seconds.read_text(encoding="utf-8"))
            return
        self.fresh = True
        if self.folder.exists():
            if self.replaced.exists() and not self.output.exists():
                os.rename(self.replaced, self.output)
            state.unlink(missing_ok=True)  # first: what is half removed must not be resumed
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_text(state, json.dumps(arguments, indent=1))

    def held_bytes(self) -> int:
        """Bytes on the disk of an interrupted run, which this one goes on from, or removes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def close(self) -> None:
        """After bad input: leave nothing behind of a run that was begun here and finished no block and no check."""
        if self.fresh and not list(self.folder.glob("block-*.json")) and not self.distillation.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def calibration(self) -> Path:
        """Where the token ids are kept."""
        return self.folder / "calibration.safetensors"

    @property
    def group_sizes(self) -> Path:
        """Where the group sizes that a budget led to are kept."""
        return self.folder / "group_sizes.json"

    @property
    def lesson(self) -> Path:
        """Where the token ids of a distillation are kept."""
        return self.folder / "lesson.safetensors"

    @property
    def distillation(self) -> Path:
        """Where a distillation keeps what it needs to go on."""
        return self.folder / "distill.safetensors"

    @property
    def seconds(self) -> Path:
        """Where the time spent is kept."""
        return self.folder / "seconds.json"

    def spent(self) -> float:
        """Seconds of this run and of those that it goes on from, as far as they got to write it down."""
        return self.earlier + time.monotonic() - self.started

    def fitted(self) -> float:
        """Seconds until a distillation could begin, of the run that got so far first."""
        kept = self.folder / "fitted.json"
        if not kept.exists():
            write_text(kept, json.dumps(self.spent()))
        seconds: float = json.loads(kept.read_text(encoding="utf-8"))
        return seconds

    @staticmethod
    def block(index: int) -> str:
        """The name of a block's part."""
        return f"block-{index:05d}"

    def has(self, part: str) -> bool:
        """Whether a part is durably on disk: its entries are written last."""
        return (self.folder / f"{part}.json").exists()

    def write(
        self, part: str, tensors: dict[str, Tensor], entries: list[LinearReport], tuned: dict[str, Any] | None = None
    ) -> None:
        """Make one part durable.

        Args:
            tuned: how the tuning of its window ended, kept with the window's first block.

        Raises:
            StoppedError: the disk is full; earlier parts are safe.
        """
        write_tensors(self.folder / f"{part}.safetensors", tensors)
        facts = {"linears": [asdict(entry) for entry in entries], "tuned": tuned}
        write_text(self.folder / f"{part}.json", json.dumps(facts))
        write_text(self.seconds, json.dumps(self.spent()))

    def read(self, part: str) -> tuple[dict[str, Tensor], list[LinearReport], dict[str, Any] | None]:
        """A part's tensors, entries, and how its window's tuning ended."""
        facts = json.loads((self.folder / f"{part}.json").read_text(encoding="utf-8"))
        tensors = load_file(self.folder / f"{part}.safetensors")
        entries = [LinearReport(**(entry | {"shape": tuple(entry["shape"])})) for entry in facts["linears"]]
        return tensors, entries, facts["tuned"]

    def start_final(self, parts: list[str]) -> int:
        """Make `final` anew with the weight files of these parts in it; returns their bytes."""
        if self.final.exists():
            shutil.rmtree(self.final)
        self.final.mkdir()
        return write_shards(self.final, [self.folder / f"{part}.safetensors" for part in parts])

    def copy_final(self, folder: Path) -> None:
        """Make `final` anew as a copy of a finished folder."""
        if self.final.exists():
            shutil.rmtree(self.final)
        self.final.mkdir()
        for path in folder.iterdir():
            if path.is_file():
                copy_file(path, self.final / path.name)

    def publish(self) -> None:
        """Put `final` in OUT's place in one rename, and clean up."""
        if self.output.exists():
            os.rename(self.output, self.replaced)
        os.rename(self.final, self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(self.folder)

    @contextmanager
    def stoppable(self, expected_memory: int | None = None) -> Iterator[None]:
        """Say what is safe and how to go on when the work inside is stopped or runs out of memory."""
        try:
            yield
        except KeyboardInterrupt:
            raise StoppedError(self.stopped("stopped")) from None
        except TernarizeError as error:
            if not isinstance(error, StoppedError):
                self.close()
            raise
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            why = "out of memory" + (f"; the plan expected {size(expected_memory)}" if expected_memory else "")
            raise StoppedError(
                self.stopped(why)
                + " Free some memory first, or start over with fewer calibration.samples or another machine."
            ) from error

    def stopped(self, why: str) -> str:
        """What to tell the user when the work ends early; the time spent is written down."""
        if self.passing:
            return f"{why}: the model is as it was before."
        done = 0
        if self.folder.exists():
            done = len(list(self.folder.glob("block-*.json")))
            write_text(self.seconds, json.dumps(self.spent()))
        safe = f"{done} blocks are safe in {self.folder}"
        if self.distillation.exists():
            safe = f"the distillation's last check is safe in {self.folder}"
        return f"{why}: {safe}. Run the same command with --resume to go on."


def _differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What two sets of arguments differ in, settings within settings by their own names."""
    for key in sorted(then.keys() | now.keys()):
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before!r} then, {after!r} now"


def _is_ours(path: Path) -> bool:
    """Whether a conversion may have put this into OUT.partial."""
    return (
        re.fullmatch(
            r"((state|group_sizes|seconds|fitted)\.json"
            r"|(calibration|lesson|distill|outside|ending|block-\d{5})\.(safetensors|json))(\.\d+\.tmp)?"
            r"|final|replaced|teacher",
            path.name,
        )
        is not None
    )


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
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weight_map |= dict.fromkeys(tensors, name)
        write_tensors(folder / name, tensors)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=1))
    return total


def arguments(checkpoint: Checkpoint, recipe: Recipe, device: str) -> dict[str, Any]:
    """What an interrupted conversion and its continuation must have in common."""
    files = {shard.name: [shard.stat().st_size, shard.stat().st_mtime_ns] for shard in checkpoint.shards}
    return {
        "source": str(checkpoint.folder.resolve()),
        "files": files,
        "recipe": recipe.to_dict(),
        "device": device,
    } | (versions())


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
