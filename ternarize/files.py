"""The files of a Hugging Face folder: which there are, and writing them so that each is either whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ternarize.errors import StoppedError, TernarizeError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
)
RIGHTS = ("LICENSE*", "NOTICE*")


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each present and whole.

    Raises:
        TernarizeError: none, a shard missing or truncated, or an index that points outside the folder.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if single.is_file():  # transformers, too, takes the single file where both are there
        shards = [single]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TernarizeError(f"{index} is not a safetensors index: {error!r}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
                raise TernarizeError(
                    f"{index} names the shard {name!r}, which is not a plain file name. "
                    "A checkpoint's shards lie in its own folder; do not use files from this source."
                )
        shards = [folder / name for name in names]
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f" It has {pickled[0]}, a pickle: load it with transformers and save_pretrained it as safetensors."
            if pickled
            else ""
        )
        raise TernarizeError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}.{hint}")
    for shard in shards:
        if not shard.is_file():
            raise TernarizeError(f"{shard} is named in {INDEX_FILE} but is not there. Download the checkpoint again.")
    return shards


def read_header(shard: Path) -> dict[str, tuple[str, list[int]]]:
    """{name: (dtype, shape)} of a safetensors file, from its header alone.

    Raises:
        TernarizeError: truncated, or not a safetensors file; the header's claims are checked against the file's size.
    """
    try:
        with safe_open(shard, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise TernarizeError(f"{shard} is truncated or not a safetensors file ({error}). Download it again.") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is either whole or not there: a temporary file, synced, renamed.

    Raises:
        StoppedError: the disk is full; nothing that was there is lost.
    """
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask allows; safetensors leaves files to their owner only
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        _sync_and_rename(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(path, error) from error


def rewrite_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Replace tensors in the shards of a folder, one shard in memory at a time; names that no shard has are ignored.

    Raises:
        StoppedError: the disk is full; the shard at hand is as it was.
    """
    for shard in find_shards(folder):
        with safe_open(shard, framework="pt") as file:
            held = {name: tensors.get(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        write_tensors(shard, held)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either whole or not there.

    Raises:
        StoppedError: the disk is full.
    """
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync_and_rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(path, error) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's contents.

    Raises:
        StoppedError: the disk is full.
    """
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise _disk_error(target, error) from error


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what a checkpoint has beside config and weights: tokenizer, chat template, generation settings, licence.

    Raises:
        StoppedError: the disk is full.
    """
    _copy_matching(source, target, SIDE_FILES + RIGHTS)


def copy_rights(source: Path, target: Path) -> None:
    """Copy licence and notice, which many licences ask for beside every copy of the weights.

    Raises:
        StoppedError: the disk is full.
    """
    _copy_matching(source, target, RIGHTS)


def _copy_matching(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                copy_file(file, target / file.name)


def _temporary(path: Path) -> Path:
    """Where a file is written before it is whole; a name of this process, as another may write the same file."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _sync_and_rename(temporary: Path, path: Path) -> None:
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_error(path: Path, error: Exception) -> StoppedError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else str(error)
    return StoppedError(
        f"cannot write {path}: {reason}. Make room (or mend the cause) and run the same command with --resume; "
        "the blocks written so far are kept."
    )
