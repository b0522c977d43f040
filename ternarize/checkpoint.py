"""Hugging Face folders: read tensors lazily into a skeleton, write files durably. Knows nothing of ternary.

A checkpoint's tensors do not always bear the names, or have the layout, of the model's parameters (experts are merged,
old names renamed). transformers' own conversion rules are applied, to one part of the model at a time: this file is the
only one that touches them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ternarize.errors import StoppedError, TernarizeError, UnsupportedModelError
from ternarize.progress import quiet_transformers

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
    "LICENSE*",
    "NOTICE*",
)
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """A folder with config.json and safetensors, opened but not read.

    Args:
        folder: as `sources.resolve` gives it.

    Raises:
        TernarizeError: not a checkpoint, a missing, truncated or misnamed shard, already quantized.
    """

    model: PreTrainedModel | None = None  # the loaded one that it stands for (`memory`)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_float_config(folder)
        self.shards = find_shards(folder)
        self._where: dict[str, Path] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._not_floats: dict[str, str] = {}
        self.bytes = 0
        for shard in self.shards:
            self.bytes += shard.stat().st_size
            for name, (dtype, _) in read_header(shard).items():
                self._where[name] = shard
                if dtype in SAFETENSORS_DTYPES:
                    self.dtypes[name] = SAFETENSORS_DTYPES[dtype]
                elif not dtype.startswith("F"):
                    self._not_floats[name] = dtype
        self._sources: dict[str, list[str]] = {}
        self._rules: list[Any] = []

    def skeleton(self) -> PreTrainedModel:
        """The model with parameters on the meta device (nothing read) and its buffers computed, in float32.

        Raises:
            UnsupportedModelError: transformers has no causal language model for this config.
            TernarizeError: the checkpoint lacks parameters that the model needs, or has others of another shape.
        """
        model = make_skeleton(self.config, self.folder)
        self._map_names(model)
        return model

    def _map_names(self, model: PreTrainedModel) -> None:
        """Which tensors of the files make up each parameter, by transformers' conversion rules."""
        self._rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in self._rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._rules if isinstance(rule, WeightConverter)]
        state = model.state_dict()
        for source in self._where:
            target, _ = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
            if target not in state and source in state:
                target, _ = rename_source_key(source, [], [], model.base_model_prefix, state)
            self._sources.setdefault(target, []).append(source)
        tied = set(tied_parameters(model))
        buffers = {name for name, _ in model.named_buffers()}
        converted = {target for rule in converters for target in rule.target_patterns}
        missing = [
            name
            for name in state
            if name not in self._sources and name not in tied | buffers and not _is_target(name, converted)
        ]
        for name, _ in model.named_parameters():
            for source in self._sources.get(name, []):
                if source in self._not_floats:
                    raise UnsupportedModelError(
                        f"{source} is stored as {self._not_floats[source]}, not as floats: {self.folder} seems "
                        "quantized, without a quantization_config that says how. Convert the original checkpoint."
                    )
        if missing:
            raise TernarizeError(
                f"{self.folder} lacks {len(missing)} of the parameters of {type(model).__name__}, such as "
                f"{', '.join(missing[:3])}. The checkpoint is incomplete, or of another architecture."
            )

    def source_dtype(self, parameter: str) -> torch.dtype:
        """The float type in which the files hold a parameter of the model; one of an expert has the fused one's."""
        fused = re.sub(r"(\.experts)\.\d+\.(\w+)\.weight$", r"\1.\2", parameter)
        fused = re.sub(r"(\.experts)\.\d+\.(\w+)\.bias$", r"\1.\2_bias", fused)
        sources = self._sources.get(parameter) or self._sources.get(fused) or [""]
        return self.dtypes.get(sources[0], torch.bfloat16)

    def load(self, model: PreTrainedModel, *prefixes: str, exclude: str | None = None) -> None:
        """Read the parameters under `prefixes` ("" is all) into the skeleton, as float32.

        Args:
            model: from `skeleton`.
            exclude: a prefix to leave on the meta device.

        Raises:
            TernarizeError: a tensor cannot be read, is missing, has another shape than the model's, or holds NaN/Inf.
        """

        def wanted(target: str) -> bool:
            return target.startswith(prefixes) and not (exclude and target.startswith(exclude))

        names = [source for target, sources in self._sources.items() if wanted(target) for source in sources]
        with contextlib.ExitStack() as stack:
            files: dict[Path, Any] = {}
            lazy = {}
            for name in names:
                shard = self._where[name]
                if shard not in files:
                    files[shard] = stack.enter_context(safe_open(shard, framework="pt"))
                lazy[name] = files[shard].get_slice(name)
            settings = LoadStateDictConfig(weight_mapping=self._rules, dtype=torch.float32)
            with quiet_transformers():
                try:
                    info, _ = convert_and_load_state_dict_in_model(model, lazy, settings)
                except SafetensorError as error:
                    raise TernarizeError(f"{self.folder}: cannot read the weights: {error}") from error
        for name, found, expected in sorted(info.mismatched_keys):
            raise TernarizeError(
                f"{name}: the file holds {list(found)}, but config.json asks for {list(expected)}. "
                "The checkpoint and its config do not belong together."
            )
        if info.conversion_errors:
            name, message = next(iter(info.conversion_errors.items()))
            raise TernarizeError(f"{name}: transformers could not convert the tensor from the file: {message}")
        self._finish(model, wanted)

    def _finish(self, model: PreTrainedModel, wanted: Callable[[str], bool]) -> None:
        """Tie what was read, and check it."""
        for name, source in tied_parameters(model).items():
            if wanted(name) or wanted(source):
                present = name if source not in self._sources and name in self._sources else source
                value = model.get_parameter(present)
                for other in (name, source):
                    owner, _, last = other.rpartition(".")
                    setattr(model.get_submodule(owner), last, value)
        for name, parameter in model.named_parameters():
            if not wanted(name):
                continue
            if parameter.is_meta:
                raise TernarizeError(f"{name}: not in the files of {self.folder}; the checkpoint is incomplete.")
            parameter.requires_grad_(False)
            if not bool(torch.isfinite(parameter).all()):
                bad = int((~torch.isfinite(parameter)).sum())
                raise TernarizeError(
                    f"{name}: {bad} of {parameter.numel()} weights are NaN or infinite. "
                    "The checkpoint is damaged; download it again or ask its author."
                )


def make_skeleton(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The float32 model of a config, its parameters on the meta device and its buffers computed.

    Args:
        folder: where the config comes from, for messages.

    Raises:
        UnsupportedModelError: transformers has no causal language model for this config.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, experts_implementation="eager", trust_remote_code=False
            )
    except Exception as error:  # a model class raises whatever its arithmetic on a strange config raises
        raise UnsupportedModelError(
            f"{folder}: transformers cannot build a causal language model of type {config.model_type!r}: {error}"
        ) from error
    return model.eval().requires_grad_(False)


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """{parameter: the parameter whose tensor it shares}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def release(module: nn.Module) -> None:
    """Put a module's parameters back on the meta device; its memory is free once nobody else holds them."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def place(module: nn.Module, device: str) -> None:
    """Move what has been read to a device; what has not stays on the meta device."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


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


def read_config(folder: Path) -> PreTrainedConfig:
    """A folder's config.json, whatever it says of quantization.

    Raises:
        TernarizeError: not a checkpoint.
        UnsupportedModelError: transformers cannot read it.
    """
    if not folder.is_dir():
        raise TernarizeError(f"{folder} is not a folder.")
    path = folder / "config.json"
    if not path.is_file():
        raise TernarizeError(f"{folder} is not a checkpoint: it has no config.json.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # config classes raise whatever their arithmetic raises
        raise UnsupportedModelError(f"{path}: transformers cannot read this config: {error}") from error


def read_float_config(folder: Path) -> PreTrainedConfig:
    """The config of a float checkpoint.

    Raises:
        TernarizeError: as in `read_config`.
        UnsupportedModelError: already quantized.
    """
    config = read_config(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UnsupportedModelError(
            f"{folder} is already quantized ({method}). Convert the original checkpoint, "
            "or load this one with transformers, dequantize() it and save_pretrained the result."
        )
    return config


def _is_target(name: str, patterns: set[str]) -> bool:
    """Whether a converter can produce `name`; one source tensor may make several parameters."""
    return any(pattern.strip("^$").replace("\\", "") in name for pattern in patterns)


# -- writing -------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is either whole or not there: a temporary file, synced, renamed.

    Raises:
        StoppedError: the disk is full; nothing that was there is lost.
    """
    temporary = path.with_name(path.name + ".tmp")
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
    temporary = path.with_name(path.name + ".tmp")
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
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                copy_file(file, target / file.name)


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
