"""A model that is in memory already becomes ternary in place.

    import ternarize
    model = ternarize.ternarize(model, tokenizer, recipe="fast")

It is a checkpoint like any other to `conversion`, only that its blocks are copied from the model and not read from
files; what is finished goes to a temporary folder, packed, and from there into the model. So the same code runs as for
a folder, every recipe works, the result is the same to the last bit, and the model is not touched before all is done.
Beside the float model there is what a conversion holds (a block in float32 and its statistics; the recipes table of the
README), never a second float model on disk.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ternarize.architecture import UnfusedExperts
from ternarize.checkpoint import Checkpoint, read_float_config, tied_parameters
from ternarize.conversion import Job, carry_out
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.files import find_shards
from ternarize.plan import make_plan
from ternarize.progress import Progress
from ternarize.quantizer import TernarizeConfig, TernarizeQuantizer, check_names
from ternarize.recipe import Recipe
from ternarize.report import Report
from ternarize.runtime import TableEmbedding, TableHead, TernaryLinear
from ternarize.workspace import Workspace


def ternarize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe | str | Path = "fast",
    text: list[str] | str | None = None,
    *,
    budget: float | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Make a loaded model ternary, in place: the same as `convert` and `load` make of its folder.

    Args:
        model: a float causal language model of transformers, adapters merged. It computes where it lies.
        tokenizer: its own.
        recipe, text, budget, progress: as in `convert`.

    Returns:
        The model itself, ready to run and to `save_pretrained`; `model.ternarize_report` is the Report.

    Raises:
        TernarizeError: see its subclasses; the model is as it was before.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"a {type(model).__name__} is no model of transformers. Give one that from_pretrained returned; "
            "of a PEFT model, what merge_and_unload() returns."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TernarizeError(f"a {type(tokenizer).__name__} is no tokenizer of transformers. Give the model's own.")
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    training = model.training
    with tempfile.TemporaryDirectory(prefix="ternarize-") as scratch:
        try:
            model.eval()
            report = _convert(model, tokenizer, Path(scratch), chosen.with_text(text), budget, progress or Progress())
        except BaseException:
            model.train(training)
            raise
        _take_over(model, Path(scratch, "ternary"))
    model.ternarize_report = report  # type: ignore[assignment]
    return model


def _convert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    recipe: Recipe,
    budget: float | None,
    progress: Progress,
) -> Report:
    """Write the ternary folder of a model to scratch/ternary."""
    checkpoint = LoadedModel(model, tokenizer, scratch / "source")
    work = Workspace(scratch / "ternary", passing=True)
    name = model.name_or_path or type(model).__name__
    plan = make_plan(checkpoint, recipe)
    report = carry_out(Job(checkpoint, plan, recipe, work, progress, str(model.device), name, None), budget)
    verdict = report.run["verdict"]
    progress.say(f"{verdict['word']}: {verdict['why']}")
    return report


class LoadedModel(Checkpoint):
    """A loaded model, read as if it were a checkpoint.

    Args:
        model: in whatever float type, complete.
        folder: where its config and tokenizer are written; no weights.

    Raises:
        UnsupportedModelError: no causal language model of transformers as it came, or spread over devices.
        TernarizeError: already quantized, or incomplete.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise UnsupportedModelError(
                "the model is spread over several devices. Load it on one, or convert its folder: "
                "ternarize convert SOURCE --output FOLDER"
            )
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if isinstance(generation := getattr(model, "generation_config", None), GenerationConfig):
            generation.save_pretrained(folder)
        self.folder, self.model = folder, model
        self.config = read_float_config(folder)
        self.shards = []
        self._tensors = model.state_dict()
        own = {name: tensor for name, tensor in self._tensors.items() if name not in tied_parameters(model)}
        self.bytes = sum(tensor.nbytes for tensor in own.values())
        self.dtypes = {name: tensor.dtype for name, tensor in own.items() if tensor.is_floating_point()}
        self._sources = {name: [name] for name in own}

    def _map_names(self, model: PreTrainedModel) -> None:
        """Nothing to map: refuse a model that is not what its config says."""
        if type(model) is not type(self.model):
            raise UnsupportedModelError(
                f"the model is a {type(self.model).__name__}, but only {type(model).__name__}, the causal language "
                "model of its config, can become ternary. Load it with AutoModelForCausalLM."
            )
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = {name: tensor.shape for name, tensor in self._tensors.items()}
        if different := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
            raise UnsupportedModelError(
                f"the model has other tensors than {type(model).__name__} has by its config: {different[0]} and "
                f"{len(different) - 1} more. Merge adapters, and undo other changes to its modules."
            )

    def load(self, model: PreTrainedModel, *prefixes: str, exclude: str | None = None) -> None:
        """Copy the parameters under `prefixes` ("" is all) into the skeleton, as float32; see `Checkpoint.load`.

        Raises:
            TernarizeError: a tensor is not in memory, or holds NaN/Inf.
        """

        def wanted(target: str) -> bool:
            return target.startswith(prefixes) and not (exclude and target.startswith(exclude))

        for name in filter(wanted, self._sources):
            tensor = self._tensors[name].detach()
            if tensor.is_meta:
                raise TernarizeError(f"{name} is not in memory (offloaded?). Load the whole model first.")
            if tensor.is_floating_point():
                tensor = tensor.to("cpu", torch.float32, copy=True)
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            if last in module._parameters:
                module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[last] = tensor
        self._finish(model, wanted)


def _take_over(model: PreTrainedModel, folder: Path) -> None:
    """Put the packed modules of a ternary folder into the float model that it was made from."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantizer = TernarizeQuantizer(TernarizeConfig.from_dict(config["quantization_config"]), pre_quantized=True)
    quantizer.preprocess_model(model)
    shards = find_shards(folder)
    check_names(model, [str(shard) for shard in shards])
    kinds = (TernaryLinear, TableEmbedding, TableHead, UnfusedExperts)
    packed = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    places = {name: place for name, place in model.state_dict().items() if name.rpartition(".")[0] in packed}
    for shard in shards:
        tensors = {name: t.to(places[name].device) for name, t in load_file(shard).items() if name in places}
        model.load_state_dict(tensors, strict=False, assign=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model._weight_conversions = []  # type: ignore[assignment]  # it saves under the names that it has
    quantizer.postprocess_model(model)
