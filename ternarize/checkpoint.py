"""Hugging Face folders: tensors are read lazily into a skeleton. Knows nothing of ternary.

A checkpoint's tensors do not always bear the names, or have the layout, of the model's parameters (experts are merged,
old names renamed). transformers' own conversion rules are applied, to one part of the model at a time: this file is the
only one that touches them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
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

from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.files import find_shards, read_header
from ternarize.progress import quiet_transformers

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
            check_finite(name, parameter)


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that is damaged.

    Its sum is looked at first, which takes no memory: it is finite unless a value is not, or values are huge.

    Raises:
        TernarizeError: it has NaN or infinite values.
    """
    if not bool(torch.isfinite(weight.sum())) and (bad := int((~torch.isfinite(weight)).sum())):
        raise TernarizeError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite. "
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
