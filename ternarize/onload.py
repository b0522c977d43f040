"""A float checkpoint becomes ternary while transformers loads it: nearest trits, no data, one weight at a time.

    AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", quantization_config=TernarizeConfig())

The skeleton gets empty packed modules before a weight is read, as for a ternarize folder (`swap`). transformers then
hands each float weight to `PackOnLoad` as it comes from the file, the experts of a mixture fused, and keeps the packed
tensors in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from ternarize.architecture import UnfusedExperts
from ternarize.checkpoint import check_finite
from ternarize.choice import choose, embedding_multiplier, find_embeddings, make_layout
from ternarize.errors import TernarizeError
from ternarize.format import Layout, Table
from ternarize.packing import quantize_table
from ternarize.recipe import Recipe
from ternarize.runtime import TableEmbedding, TableHead, TernaryLinear
from ternarize.solver import fit
from ternarize.swap import replace_float_modules

PACKED = (TernaryLinear, TableEmbedding, TableHead)
BIAS = "_bias"  # ends the name of the fused biases of a mixture's experts


def prepare(model: PreTrainedModel, recipe: Recipe) -> Layout:
    """Put empty packed modules into a skeleton; returns the layout of the folder that it will save.

    Raises:
        UnsupportedModelError: a part of the model cannot be converted faithfully.
        TernarizeError: the recipe does not fit the model.
    """
    choice = choose(model, recipe)
    embedding, _ = find_embeddings(model)
    tables = {
        name: Table(bits, _multiplier(model, name) if name == embedding else 1.0)
        for name, bits in choice.tables.items()
    }
    layout = make_layout(recipe, choice.blocks, list(choice.kept), tables)
    dtype = model.dtype
    replace_float_modules(model, layout)
    for experts in _mixtures(model):
        for projection in (experts.up_name, "down_proj"):
            if experts.experts()[0].get_submodule(projection).bias is not None:
                experts.register_buffer(projection + BIAS, torch.empty(0))
    for name, place in model.named_buffers():
        if PackOnLoad.takes(model, name):  # 5.20 to 5.22 cast what they read to the type of the place that it goes to
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = place.to(dtype)
    return layout


def finish(model: nn.Module) -> None:
    """Take away the places at which the fused biases of experts arrived."""
    for experts in _mixtures(model):
        for name in [name for name in experts._buffers if name.endswith(BIAS)]:
            del experts._buffers[name]


def _mixtures(model: nn.Module) -> list[UnfusedExperts]:
    return [module for module in model.modules() if isinstance(module, UnfusedExperts)]


def _multiplier(model: PreTrainedModel, name: str) -> float:
    """What the embedding's own forward puts on its rows, found on a twin of the model, which has its constants."""
    if type(model.get_submodule(name)) is nn.Embedding:
        return 1.0
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            embedding = type(model)(model.config).get_submodule(name)
    finally:
        torch.set_default_dtype(before)
    assert isinstance(embedding, nn.Embedding)
    row = torch.ones(1, embedding.embedding_dim, device="cpu", dtype=torch.float32)
    embedding.weight = nn.Parameter(row.expand(embedding.num_embeddings, -1), requires_grad=False)
    return embedding_multiplier(embedding, name)


class PackOnLoad(ConversionOps):  # type: ignore[misc]
    """Float tensors in, the tensors of packed modules out.

    transformers would make a line in a table of an error raised here, so the first one is kept for `check`.

    Args:
        recipe: a data-free one.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.error: TernarizeError | None = None
        self.done: set[str] = set()

    @staticmethod
    def takes(model: nn.Module, name: str) -> bool:
        """Whether a parameter of the file becomes packed tensors."""
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, UnfusedExperts):
            return last in module._buffers
        return isinstance(module, PACKED) and last == "weight"

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **_: Any) -> Any:  # type: ignore[override]
        """{parameter: float tensor} -> {packed tensor: its bytes}, all by full name."""
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            if self.error is None:
                try:
                    result |= self._pack(model, name, value[0] if isinstance(value, list) else value)
                except TernarizeError as error:
                    self.error = error
        return result

    def check(self, model: nn.Module) -> None:
        """Refuse a model that did not become whole.

        Raises:
            TernarizeError: a weight was refused, or the files lacked some.
        """
        if self.error is not None:
            raise self.error
        packed = {name for name, module in model.named_modules() if isinstance(module, PACKED)}
        if missing := sorted(packed - self.done):
            raise TernarizeError(
                f"the checkpoint lacks the weights of {len(missing)} modules of {type(model).__name__}, such as "
                f"{', '.join(missing[:3])}. It is incomplete, or of another architecture."
            )

    def _pack(self, model: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
        check_finite(name, value)
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if not isinstance(module, UnfusedExperts):
            return self._pack_module(owner, module, value)
        result = {name: torch.empty(0, dtype=torch.uint8, device=value.device)}  # see `UnfusedExperts`
        for e, expert in enumerate(module.experts()):
            linear = f"{owner}.{e}.{last.removesuffix(BIAS)}"
            if last.endswith(BIAS):
                result[f"{linear}.bias"] = value[e].clone()
            else:
                matrix = value[e].t() if module.transposed else value[e]
                result |= self._pack_module(linear, expert.get_submodule(last), matrix)
        return result

    def _pack_module(self, name: str, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        self.done.add(name)
        if isinstance(module, (TableEmbedding, TableHead)):
            return {f"{name}.weight": quantize_table(weight, module.group_size, module.bits)}
        if not isinstance(module, TernaryLinear):  # of an expert that stays float
            return {f"{name}.weight": weight.contiguous()}
        matrix = weight.t() if module.replaces is Conv1D else weight
        try:
            packed = TernaryLinear.from_tensor(fit(matrix, None, self.recipe))
        except TernarizeError as error:
            raise TernarizeError(f"{name}: {error}") from error
        return {f"{name}.{key}": tensor for key, tensor in packed.state_dict().items()}
