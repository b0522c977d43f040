"""How transformers loads a ternarize folder, or makes a float model ternary: registered when `ternarize` is imported.

    import ternarize
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(float_model, quantization_config=ternarize.TernarizeConfig())

A folder's names are those of the packed modules, so nothing is converted while loading one; a strict check of names,
shapes and types against the files' headers comes first, because transformers itself only warns about what is missing.
A float model is converted without data, weight by weight (`onload`).
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ternarize.errors import FormatError, TernarizeError, first_line
from ternarize.files import find_shards, read_header
from ternarize.format import QUANT_METHOD, TRIPWIRE, Layout
from ternarize.grids import Grid
from ternarize.kernels import cpu
from ternarize.recipe import DATA_FREE, Recipe
from ternarize.swap import dequantize_modules, lay_out, replace_float_modules, run_natively

if TYPE_CHECKING:
    from ternarize.onload import PackOnLoad


@register_quantization_config(QUANT_METHOD)
class TernarizeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to make a float model ternary while it is loaded, without data; or the config of a folder (see `format`).

    Such a model is poor: `ternarize.convert` fits it to data, in minutes, at the same size.

    Args:
        grid, group_size, scale_bits, skip: as in `Recipe`; shifts are stored in as many bits as scales.

    `recipe` is what that means in full, for `convert` too; `layout` is a folder's, None before there is one.

    Raises:
        TernarizeError: a value breaks its rule.
    """

    def __init__(
        self,
        grid: Grid = "symmetric",
        group_size: int | None = 32,
        scale_bits: int = 4,
        skip: Sequence[str] = (),
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        options = {"grid": grid, "group_size": group_size, "scale_bits": scale_bits, "skip": skip}
        self.recipe = Recipe.from_dict(DATA_FREE | options | {"shift_bits": scale_bits}, where="TernarizeConfig")
        self.layout: Layout | None = None

    @classmethod
    def of(cls, layout: Layout) -> TernarizeConfig:
        """The config of a folder with this layout."""
        config = cls()
        config.layout = layout
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From config.json, or from a dictionary of the arguments above.

        Raises:
            FormatError: an unknown version or packing, or damaged fields.
            TernarizeError: a value breaks its rule.
        """
        options = {key: value for key, value in config_dict.items() if key != "quant_method"}
        if options.keys() <= inspect.signature(cls).parameters.keys():
            config = cls(**options)
        else:
            config = cls.of(Layout.from_config({"quant_method": QUANT_METHOD} | config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it; the arguments above where there is no folder yet."""
        if self.layout is not None:
            return self.layout.to_config()
        recipe = self.recipe
        options = {"grid": recipe.grid, "group_size": recipe.group_size, "scale_bits": recipe.scale_bits}
        return {"quant_method": QUANT_METHOD, **options, "skip": list(recipe.skip)}

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: a reader must not depend on our defaults."""
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class TernarizeQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules into a skeleton before transformers fills it, from a ternarize folder or from float weights.

    Raises:
        FormatError: a folder's config.json does not say what is in it.
    """

    requires_calibration = False
    quantization_config: TernarizeConfig

    def __init__(self, quantization_config: TernarizeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._packing: PackOnLoad | None = None
        if self.pre_quantized and quantization_config.layout is None:
            Layout.from_config(quantization_config.to_dict())

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse to convert into files: only a folder's packed weights can stay on the disk.

        Raises:
            TernarizeError: float weights, and a device_map that names the disk.
        """
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise TernarizeError(
                "a device_map with 'disk' cannot take a model that becomes ternary while it is loaded. "
                "Convert it first: ternarize convert SOURCE --output FOLDER"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the model's config before the weight files are looked up: disarm the tripwire for us."""
        _disarm(config)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        _eager_experts(model)
        layout = self.quantization_config.layout
        if layout is None:
            from ternarize.onload import PackOnLoad, prepare

            self._packing = PackOnLoad(self.quantization_config.recipe)
            self.quantization_config = TernarizeConfig.of(prepare(model, self._packing.recipe))
            return model
        replace_float_modules(model, layout)
        if checkpoint_files:
            check_places(model, checkpoint_files)
            check_names(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self._packing is not None:
            from ternarize.onload import finish

            self._packing.check(model)
            finish(model)
            model._weight_conversions = []  # type: ignore[assignment]  # it saves under the names that it has
            _say_what_is_lost()
        model.requires_grad_(False)  # so that products run natively outside of torch.no_grad() too
        run_natively(model)
        lay_out(model)
        _say_what_is_missing()
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """None for a folder: names and layouts in its files are already the model's (5.20 to 5.22 pass no model)."""
        return [] if self.pre_quantized else weight_conversions

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether a float parameter is to be packed."""
        return self._packing is not None and self._packing.takes(model, param_name)

    def get_quantize_ops(self) -> Any:
        """What packs it."""
        return self._packing

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if isinstance(dtype, str):  # save_pretrained leaves a name in model.config.dtype
            dequantize_modules(model, getattr(torch, dtype))
        else:
            dequantize_modules(model, dtype or model.dtype)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Packed modules save as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False


def check_places(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse an index that leads out of the folder that is being loaded.

    Raises:
        FormatError: naming the file.
    """
    folder = Path(model.name_or_path or "")
    for file in map(Path, files):
        if folder.is_dir() and not file.parent.resolve().is_relative_to(folder.resolve()):
            raise FormatError(
                f"{folder} names the shard {file}, which lies outside it; do not use files from this source."
            )


def check_names(model: PreTrainedModel, files: list[str]) -> None:
    """Compare every name, shape and packed type in the files with what the model expects.

    Raises:
        FormatError: listing the missing, the unexpected and the misshapen.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        found |= read_header(Path(file))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    prefix = f"{model.base_model_prefix}."
    whole = hasattr(model, model.base_model_prefix)
    if not whole:  # a base model reads the files of the whole one; its head has no place here
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)} or found
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - tied)
    wrong = []
    for name in sorted(expected.keys() & found.keys()):
        dtype, shape = found[name]
        tensor = expected[name]
        if list(tensor.shape) != shape or (tensor.dtype == torch.uint8 and dtype != "U8"):
            wrong.append(f"{name} ({dtype} {shape}, expected {list(tensor.shape)})")
    if missing or unexpected or wrong:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if names
        ]
        raise FormatError(
            f"the files of {Path(files[0]).parent} do not hold what config.json promises: {'; '.join(parts)}. "
            "Nothing was loaded. Download or convert the model again."
        )


def load(
    folder: str | Path,
    device_map: Any = None,
    dtype: torch.dtype | str = "auto",
    activations: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a ternarize folder (or Hub id) and its tokenizer.

    Args:
        folder: what `ternarize convert` wrote.
        device_map, dtype, **kwargs: as in `from_pretrained`; dtype is that of activations and of what stayed float.
        activations: what the native CPU kernels round activations to: "int8" (the default; bfloat16 where
            AMX multiplies a prompt), or "float" for none.

    Returns:
        (model, tokenizer)

    Raises:
        FormatError: not a ternarize folder, or damaged.
        TernarizeError: a local folder that is not a checkpoint, or no such activations.
    """
    model = load_model(folder, device_map=device_map, dtype=dtype, activations=activations, **kwargs)
    with _explained(folder):
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=kwargs.get("trust_remote_code", False))


def load_model(folder: str | Path, *, activations: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """The model alone, which spares a second or two where a tokenizer is large; arguments and errors as in `load`."""
    if activations is not None:
        cpu.check_activations(activations)
    path = Path(folder)
    if path.is_dir():
        if quant_method(path) != QUANT_METHOD:
            raise _another(folder)
        find_shards(path)
    with _explained(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, **{"trust_remote_code": False} | kwargs)
    if not isinstance(getattr(model, "hf_quantizer", None), TernarizeQuantizer):
        raise _another(folder)
    if activations is not None:
        run_natively(model, activations)
    return model


def _another(folder: str | Path) -> FormatError:
    return FormatError(f"{folder} is not a ternarize folder: its config.json has no ternarize quantization_config.")


@contextmanager
def _explained(folder: str | Path) -> Iterator[None]:
    """transformers' own errors become ours."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TernarizeError(f"{folder}: transformers cannot load it: {first_line(error)} Check the path.") from error


def check_folder(folder: Path) -> None:
    """The strict check of a ternarize folder from its files' headers; no weight is read.

    Raises:
        FormatError: not a ternarize folder, or names, shapes or types that are not what config.json promises.
        TernarizeError: a file is missing or truncated.
    """
    if quant_method(folder) != QUANT_METHOD:
        raise _another(folder)
    shards = [str(shard) for shard in find_shards(folder)]
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{folder / 'config.json'}: transformers cannot build its model: {error}") from error
    _eager_experts(model)
    replace_float_modules(model, Layout.from_config(config.quantization_config))
    check_names(model, shards)


def quant_method(folder: Path) -> str | None:
    """The quantization that config.json names, if any.

    Raises:
        TernarizeError: the folder is no checkpoint.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise TernarizeError(f"{folder} is not a checkpoint: it has no config.json.")
    try:
        quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
        return None if quantization is None else str(quantization.get("quant_method"))
    except (ValueError, AttributeError) as error:
        raise TernarizeError(f"{config} is damaged: {error}. Download or convert the model again.") from error


@cache  # once in a process
def _say_what_is_lost() -> None:
    logging.getLogger("ternarize").warning(
        "the model was made ternary without data, which leaves little of most models. "
        "ternarize.convert(source, folder) fits it to data, at the same size."
    )


@cache
def _say_what_is_missing() -> None:
    reason = cpu.missing()
    if reason is not None:
        logging.getLogger("ternarize").warning(
            "%s: products run on torch's own operators, ten times slower or more. `ternarize doctor` says what to do.",
            reason,
        )


def _disarm(config: Any) -> None:
    if getattr(config, "transformers_weights", None) == TRIPWIRE:
        del config.transformers_weights


def _eager_experts(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
