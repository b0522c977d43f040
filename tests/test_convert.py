"""A conversion as a whole: what it writes, that it is atomic, resumes to the same bits, and holds one block."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import contents, copy_folder, logits, make_checkpoint, make_recipe, read_config, read_tensors
from torch import nn
from transformers import AutoModelForCausalLM

import ternarize
from ternarize import Recipe, conversion, files, workspace
from ternarize.checkpoint import Checkpoint
from ternarize.conversion import convert
from ternarize.errors import StoppedError, TernarizeError
from ternarize.files import write_tensors, write_text
from ternarize.progress import Progress
from ternarize.report import Report

QUIET = Progress(quiet=True)


class Killed(BaseException):
    """Ends a conversion as SIGKILL would: no handler of ours may run on it."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of six blocks."""
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=6)


# -- the folder -------------------------------------------------------------------------------------------------------


def test_output_holds_weights_config_tokenizer_recipe_report_and_card_and_nothing_else(
    ternary: Path, llama: Path
) -> None:
    own = {"model.safetensors", "config.json", "recipe.yaml", "report.json", "README.md"}
    copied = {path.name for path in llama.iterdir()} - {"model.safetensors", "config.json"}
    assert "tokenizer.json" in copied
    assert {path.name for path in ternary.iterdir()} == own | copied
    assert all((ternary / name).read_bytes() == (llama / name).read_bytes() for name in copied)
    assert sorted(path.name for path in ternary.parent.iterdir()) == ["ternary"]


def test_peak_memory_is_that_of_the_process_itself() -> None:
    ballast = torch.ones(1 << 28)  # 1 GiB that a process started from here does not hold
    code = "from ternarize.report import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 27 < int(done.stdout) < ballast.nbytes


def test_config_is_the_sources_plus_how_to_read_the_weights(ternary: Path, llama: Path) -> None:
    before, after = read_config(llama), read_config(ternary)
    added = {key: value for key, value in after.items() if before.get(key) != value}
    assert added.keys() == {"quantization_config", "transformers_weights"}
    assert before.keys() <= after.keys()


def test_report_counts_every_stored_byte(ternary: Path, llama: Path) -> None:
    report = Report.read(ternary)
    tensors = read_tensors(ternary)
    size = (ternary / "model.safetensors").stat().st_size
    weights = AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    names = {entry.name for entry in report.linears}
    stored = sum(
        tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name.rpartition(".")[0] in names
    )
    linear_weights = sum(entry.shape[0] * entry.shape[1] for entry in report.linears)
    assert report.output_bytes == size
    assert report.source_bytes == (llama / "model.safetensors").stat().st_size
    assert report.bits_per_weight == pytest.approx(8 * size / weights)
    assert report.bits_per_ternary_weight == pytest.approx(8 * stored / linear_weights)


def test_returned_report_is_the_written_one(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "out", recipe, progress=QUIET)
    assert (tmp_path / "out" / "report.json").read_text() == report.to_json() == Report.read(tmp_path / "out").to_json()
    assert report.run["seconds"] > 0
    assert report.run["peak_memory"] > 1_000_000


def test_same_command_gives_the_same_bytes(ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    convert(llama, tmp_path / "ternary", recipe, progress=QUIET)
    assert contents(tmp_path / "ternary") == contents(ternary)


def test_recipe_in_the_folder_makes_the_same_folder_again(ternary: Path, llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "ternary", ternary / "recipe.yaml", progress=QUIET)
    assert contents(tmp_path / "ternary") == contents(ternary)


def test_text_argument_takes_the_place_of_the_recipes(llama: Path, text: Path, tmp_path: Path) -> None:
    other = make_recipe(tmp_path / "not there.txt")
    report = convert(llama, tmp_path / "out", other, text=[str(text)], progress=QUIET)
    assert report.data["text"] == [str(text)]


def test_another_seed_draws_other_windows_and_gives_other_weights(
    ternary: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    report = convert(llama, tmp_path / "out", make_recipe(text, calibration={"seed": 1, "samples": 5}), progress=QUIET)
    assert report.data["sha256"] != Report.read(ternary).data["sha256"]
    assert contents(tmp_path / "out")["model.safetensors"] != contents(ternary)["model.safetensors"]


def test_sharded_source_gives_the_weights_of_the_unsharded_one(
    ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    source = copy_folder(llama, tmp_path / "source")
    (source / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    convert(source, tmp_path / "out", recipe, progress=QUIET)
    before, after = read_tensors(ternary), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_large_output_is_sharded_with_an_index_and_loads(
    ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "SHARD_BYTES", 10_000)
    report = convert(llama, tmp_path / "out", recipe, progress=QUIET)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_tensors(ternary).keys()
    assert report.output_bytes == sum(shard.stat().st_size for shard in shards)
    model, _ = ternarize.load(tmp_path / "out")
    assert torch.equal(logits(model), logits(ternarize.load(ternary)[0]))


def test_model_can_write_its_own_calibration_text(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text, calibration={"text": ["self"], "samples": 4, "length": 32})
    first = convert(llama, tmp_path / "first", recipe, progress=QUIET)
    assert (first.data["windows"], first.data["tokens"]) == (4, 128)
    convert(llama, tmp_path / "second", recipe, progress=QUIET)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_output_may_be_an_empty_folder_or_lie_in_one_that_is_not_there(
    llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "not" / "there"):
        convert(llama, output, recipe, progress=QUIET)
        assert ternarize.load(output)
        assert [path.name for path in output.parent.glob("*.partial")] == []


def test_relative_output_stays_where_it_was_meant(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(llama, "out", recipe, progress=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_the_output_once_the_new_one_is_complete(
    ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    output = tmp_path / "ternary"
    output.mkdir()
    (output / "old.txt").write_text("old")
    convert(llama, output, recipe, force=True, progress=QUIET)
    assert contents(output) == contents(ternary)
    assert [path.name for path in tmp_path.iterdir()] == ["ternary"]


# -- stopping and resuming --------------------------------------------------------------------------------------------


def kill_before(step: int | None, root: Path, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Raise `Killed` before the given renaming or removal below `root`; the returned function counts them.

    Every change that counts is one of those: files are written aside, then renamed.
    """
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            if isinstance(path, (str, Path)) and str(path).startswith(str(root)):
                if count == step:
                    raise Killed
                count += 1
            return original(path, *arguments, **keywords)

        return call

    for module, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree"), (shutil, "copyfile")):
        patch.setattr(module, name, counted(getattr(module, name)))
    return lambda: count


def test_killed_at_any_point_it_resumes_to_the_same_bytes(
    ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    expected = contents(ternary)
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_before(None, tmp_path, patch)
        convert(llama, tmp_path / "whole" / "ternary", recipe, progress=QUIET)
    assert steps() > 12  # state, ids, three parts of two files, weights, config, recipe, report, card, the folder
    for step in range(steps()):
        output = tmp_path / str(step) / "ternary"
        with pytest.MonkeyPatch.context() as patch:
            kill_before(step, output.parent, patch)
            with pytest.raises(Killed):
                convert(llama, output, recipe, progress=QUIET)
        if not output.exists():
            convert(llama, output, recipe, resume=True, progress=QUIET)
            assert not output.with_name("ternary.partial").exists(), step
        assert contents(output) == expected, step


def test_killed_while_replacing_it_never_loses_both_folders(
    ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    def start(name: str) -> Path:
        output = tmp_path / name / "ternary"
        output.mkdir(parents=True)
        (output / "old.txt").write_text("old")
        return output

    with pytest.MonkeyPatch.context() as patch:
        steps = kill_before(None, tmp_path, patch)
        convert(llama, start("whole"), recipe, force=True, progress=QUIET)
    for step in range(steps() - 8, steps()):  # from the finished weights on
        output = start(str(step))
        with pytest.MonkeyPatch.context() as patch:
            kill_before(step, output.parent, patch)
            with pytest.raises(Killed):
                convert(llama, output, recipe, force=True, progress=QUIET)
        complete = output.exists() and not (output / "old.txt").exists()
        assert complete or list(output.parent.rglob("old.txt")), step
        if not complete:
            assert not (output / "config.json").exists(), step
            convert(llama, output, recipe, resume=True, force=True, progress=QUIET)
        assert contents(output) == contents(ternary), step


def stop_at(block: int, error: BaseException, patch: pytest.MonkeyPatch) -> list[str]:
    """Raise `error` instead of converting the given block; returns the list of blocks that were converted."""
    original = conversion.convert_window
    converted: list[str] = []

    def convert_window(window: dict[str, nn.Module], first: int, *arguments: Any) -> Any:
        if first == block:
            raise error
        converted.extend(window)
        return original(window, first, *arguments)

    patch.setattr(conversion, "convert_window", convert_window)
    return converted


def test_resumed_run_fits_only_what_was_not_finished(
    deep: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(deep, tmp_path / "whole", recipe, progress=QUIET)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(4, KeyboardInterrupt(), patch)
        with pytest.raises(StoppedError):
            convert(deep, tmp_path / "out", recipe, progress=QUIET)
    converted = stop_at(-1, Killed(), monkeypatch)
    convert(deep, tmp_path / "out", recipe, resume=True, progress=QUIET)
    assert converted == ["model.layers.4", "model.layers.5"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "gemma3_text"])
def test_other_families_resume_to_the_same_bytes(
    family: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "source", family)
    convert(source, tmp_path / "whole", recipe, progress=QUIET)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, Killed(), patch)
        with pytest.raises(Killed):
            convert(source, tmp_path / "out", recipe, progress=QUIET)
    convert(source, tmp_path / "out", recipe, resume=True, progress=QUIET)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_recipe_without_data_resumes_to_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text, feedback=False, curvature=False, refit=False, correction=0)
    convert(llama, tmp_path / "whole", recipe, progress=QUIET)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, Killed(), patch)
        with pytest.raises(Killed):
            convert(llama, tmp_path / "out", recipe, progress=QUIET)
    convert(llama, tmp_path / "out", recipe, resume=True, progress=QUIET)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_interruption_says_what_is_safe_and_how_to_go_on(deep: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, KeyboardInterrupt(), patch)
        with pytest.raises(StoppedError, match=r"2 blocks are safe in .*out\.partial.* --resume"):
            convert(deep, tmp_path / "out", recipe, progress=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def interrupted(llama: Path, recipe: Recipe, tmp_path: Path) -> Path:
    """Where a conversion of `llama` would have gone, had it not stopped before block 1."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, Killed(), patch)
        with pytest.raises(Killed):
            convert(llama, tmp_path / "ternary", recipe, progress=QUIET)
    return tmp_path / "ternary"


def test_windows_of_the_first_run_are_kept_though_the_text_is_gone(ternary: Path, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copyfile(Report.read(ternary).data["text"][0], text)
    recipe = make_recipe(text)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, Killed(), patch)
        with pytest.raises(Killed):
            convert(llama, tmp_path / "ternary", recipe, progress=QUIET)
    text.unlink()
    convert(llama, tmp_path / "ternary", recipe, resume=True, progress=QUIET)
    before, after = read_tensors(ternary), read_tensors(tmp_path / "ternary")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_resuming_with_another_recipe_is_refused_and_names_the_difference(
    interrupted: Path, ternary: Path, llama: Path, recipe: Recipe, text: Path
) -> None:
    partial = interrupted.with_name("ternary.partial")
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    with pytest.raises(TernarizeError, match=r"other arguments \(recipe\.group_size: 12 then, 16 now\)"):
        convert(llama, interrupted, make_recipe(text, group_size=16), resume=True, progress=QUIET)
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before
    convert(llama, interrupted, recipe, resume=True, progress=QUIET)
    assert contents(interrupted) == contents(ternary)


def test_resuming_with_another_source_or_a_changed_one_is_refused(
    interrupted: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    other = copy_folder(llama, tmp_path / "other")
    with pytest.raises(TernarizeError, match=r"other arguments .*source"):
        convert(other, interrupted, recipe, resume=True, progress=QUIET)
    weights = llama / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    os.utime(weights, ns=(times[0], times[1] + 1_000_000_000))
    try:
        with pytest.raises(TernarizeError, match=r"other arguments .*files"):
            convert(llama, interrupted, recipe, resume=True, progress=QUIET)
    finally:
        os.utime(weights, ns=times)


def test_the_time_of_earlier_runs_counts(interrupted: Path, llama: Path, recipe: Recipe) -> None:
    seconds = interrupted.with_name("ternary.partial") / "seconds.json"
    assert 0 < json.loads(seconds.read_text()) < 1000
    seconds.write_text("1000.0")
    assert convert(llama, interrupted, recipe, resume=True, progress=QUIET).run["seconds"] > 1000


def test_interrupted_conversion_is_neither_continued_nor_dropped_without_a_word(
    interrupted: Path, ternary: Path, llama: Path, recipe: Recipe
) -> None:
    with pytest.raises(TernarizeError, match=r"interrupted conversion.*--resume.*--force"):
        convert(llama, interrupted, recipe, progress=QUIET)
    assert (interrupted.with_name("ternary.partial") / "block-00000.json").exists()
    convert(llama, interrupted, recipe, force=True, progress=QUIET)
    assert contents(interrupted) == contents(ternary)


def test_resume_with_nothing_to_resume_starts_afresh(
    ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    convert(llama, tmp_path / "ternary", recipe, resume=True, progress=QUIET)
    assert contents(tmp_path / "ternary") == contents(ternary)


# -- no room ----------------------------------------------------------------------------------------------------------


def full_disk(write: int, patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Raise `error` at the given write of tensors."""
    original = files.save_file
    count = 0

    def save_file(*arguments: Any, **keywords: Any) -> None:
        nonlocal count
        count += 1
        if count > write:
            Path(arguments[1]).write_bytes(b"half")
            raise error
        original(*arguments, **keywords)

    patch.setattr(files, "save_file", save_file)


@pytest.mark.parametrize("write", [write_text, write_tensors])
def test_two_processes_may_write_one_file(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one does so where this one has written all and not yet renamed it."""
    value: Any = "whole" if write is write_text else {"a": torch.ones(3)}
    original = files._sync_and_rename

    def meanwhile(temporary: Path, path: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(files, "_sync_and_rename", original)
            patch.setattr(os, "getpid", lambda: -1)
            write(path, value)
        original(temporary, path)

    monkeypatch.setattr(files, "_sync_and_rename", meanwhile)
    write(tmp_path / "file", value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), files.SafetensorError("Io: No space left on device (28)")],
    ids=["OSError", "SafetensorError"],
)
@pytest.mark.parametrize("write", range(5))  # token ids, outside, two blocks, the finished file
def test_full_disk_leaves_what_is_done_and_resumes_to_the_same_bytes(
    write: int, error: Exception, ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    output = tmp_path / "ternary"
    with pytest.MonkeyPatch.context() as patch:
        full_disk(write, patch, error)
        with pytest.raises(StoppedError, match=r"the disk is full.*--resume"):
            convert(llama, output, recipe, progress=QUIET)
    assert not output.exists()
    partial = output.with_name("ternary.partial")
    assert len(list(partial.glob("*.safetensors"))) == min(write, 4)
    assert not list(partial.rglob("*.tmp"))
    convert(llama, output, recipe, resume=True, progress=QUIET)
    assert contents(output) == contents(ternary)


@pytest.mark.parametrize("write", range(8))
def test_full_disk_while_writing_small_files_is_no_different(
    write: int, ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    output, count, original = tmp_path / "ternary", 0, Path.write_text

    def write_text(path: Path, *arguments: Any, **keywords: Any) -> int:
        nonlocal count
        count += 1
        if count > write:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(StoppedError, match=r"the disk is full.*--resume"):
            convert(llama, output, recipe, progress=QUIET)
    assert not output.exists()
    convert(llama, output, recipe, resume=True, progress=QUIET)
    assert contents(output) == contents(ternary)


def test_full_disk_while_copying_the_tokenizer_is_no_different(
    ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    def copyfile(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "ternary"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "copyfile", copyfile)
        with pytest.raises(StoppedError, match=r"the disk is full.*--resume"):
            convert(llama, output, recipe, progress=QUIET)
    convert(llama, output, recipe, resume=True, progress=QUIET)
    assert contents(output) == contents(ternary)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_for_a_block_says_what_was_expected_and_resumes(
    error: BaseException, ternary: Path, llama: Path, recipe: Recipe, tmp_path: Path
) -> None:
    output = tmp_path / "ternary"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, error, patch)
        with pytest.raises(StoppedError, match=r"out of memory; the plan expected .*B: 1 blocks are safe.*--resume"):
            convert(llama, output, recipe, progress=QUIET)
    convert(llama, output, recipe, resume=True, progress=QUIET)
    assert contents(output) == contents(ternary)


def test_other_errors_are_not_dressed_up_as_missing_memory(llama: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, RuntimeError("a bug"), patch)
        with pytest.raises(RuntimeError, match=r"^a bug$"):
            convert(llama, tmp_path / "out", recipe, progress=QUIET)


# -- memory is a block ------------------------------------------------------------------------------------------------


def test_at_most_one_block_is_materialised(
    deep: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Checkpoint.load
    loads: list[tuple[set[str], set[str]]] = []

    def materialised(model: nn.Module) -> set[str]:
        return {name for name, parameter in model.named_parameters() if not parameter.is_meta}

    def load(self: Checkpoint, model: Any, *prefixes: str, **keywords: Any) -> None:
        before = materialised(model)
        original(self, model, *prefixes, **keywords)
        loads.append((before, materialised(model)))

    monkeypatch.setattr(Checkpoint, "load", load)
    convert(deep, tmp_path / "out", recipe, progress=QUIET)
    outside, *blocks, teacher, student = loads
    for _, at_the_gate in (teacher, student):
        assert not any(name.startswith("model.layers.") for name in at_the_gate)
    assert not any(name.startswith("model.layers.") for name in outside[1])
    assert len(blocks) == 7  # block 0 once for the walk's start, then all six
    for index, (_, after) in enumerate(blocks[1:]):
        assert {name.split(".")[2] for name in after if name.startswith("model.layers.")} == {str(index)}
        assert not any(not name.startswith("model.layers.") for name in after), "what is outside was not released"
        assert len(after) == 9


def test_live_tensors_do_not_grow_with_the_number_of_blocks(
    deep: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = conversion.convert_window
    live: list[int] = []

    def convert_window(*arguments: Any) -> Any:
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
        }
        live.append(sum(storages.values()))
        return original(*arguments)

    convert(deep, tmp_path / "before", recipe, progress=QUIET)  # what a process makes once is there
    monkeypatch.setattr(conversion, "convert_window", convert_window)
    convert(deep, tmp_path / "out", recipe, progress=QUIET)
    assert len(live) == 6
    packed_block = Report.read(tmp_path / "out").output_bytes / 6
    assert max(live) - min(live) < 0.2 * packed_block, live
