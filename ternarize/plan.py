"""What a conversion will do, from config and headers alone: nothing is read but shapes.

What becomes ternary, what stays float and why, the bytes that will be written, and an estimate of memory and time.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ternarize.architecture import find_blocks, linear_shape, linears
from ternarize.calibration import BATCH_TOKENS
from ternarize.checkpoint import Checkpoint, tied_parameters
from ternarize.choice import Choice, choose, find_embeddings
from ternarize.errors import TernarizeError
from ternarize.lesson import DRAWN, PIECE_TOKENS
from ternarize.packing import level_row_bytes, packed_columns, table_row_bytes
from ternarize.progress import size
from ternarize.recipe import Calibration, Recipe
from ternarize.sources import resolve
from ternarize.tensor import group_count
from ternarize.text import WRITER_BATCH, split_source

RANK_WINDOWS, RANK_LENGTH = 4, 256  # text that a budget ranks the linears on
LOGITS = 24  # bytes for a logit that is compared or drawn from: two distributions in float32, and what is made of them
FROZEN = 3  # bytes for a weight whose scale learns: its code, and what a scale's learning takes, over 32 weights
# Bytes for an input or output of a linear that learns: 5 that its block keeps for its backward pass, all in all, and as
# much again for holes in the heap, where what is freed is kept for the next step (`process.kept_memory`).
KEPT = 10
LEARNING = 28  # bytes for a weight that learns: position, gradient, two moments, and the float weight made of them
REPEATED = 4  # times that a token of the vocabulary occurs in calibration text, if it does
PYTHON_AND_TORCH = 600_000_000  # bytes that the process holds before any tensor


@dataclass(frozen=True)
class Kept:
    """A parameter that stays float.

    Args:
        name, shape: as in the model.
        reason: why, in words.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """What will happen; see the module's docstring.

    Args:
        model: class name in transformers.
        blocks: path of the list of decoder layers.
        block_count: L.
        ternary: {name: (O, I)}.
        tables: {embedding or head: (V, H, bits of a code)}.
        kept: everything that stays float.
        weights: number of weights in the model, shared ones once.
        source_bytes, output_bytes: of the weight files.
        peak_memory: estimate, bytes.
        disk_bytes: in OUT.partial at its fullest, estimate.
        seconds: estimate for this machine, without writing text of its own.
        writes_text: whether the model writes its own calibration text first.
    """

    model: str
    blocks: str
    block_count: int
    ternary: dict[str, tuple[int, int]]
    tables: dict[str, tuple[int, int, int]]
    kept: list[Kept]
    weights: int
    source_bytes: int
    output_bytes: int
    peak_memory: int
    disk_bytes: int
    seconds: float
    writes_text: bool
    group_size: int | None
    kept_linears: list[str] = field(default_factory=list)

    @property
    def ternary_weights(self) -> int:
        """How many weights become ternary."""
        return sum(o * i for o, i in self.ternary.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"ternary_weights": self.ternary_weights}


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Plan the conversion of a checkpoint.

    Raises:
        UnsupportedModelError: a part of the model cannot be converted faithfully.
        TernarizeError: the recipe does not fit the model (a skip that matches nothing, too large a group).
    """
    model = checkpoint.skeleton()
    tied = tied_parameters(model)
    path, blocks = find_blocks(model)
    weights = sum(p.numel() for name, p in model.named_parameters() if name not in tied)
    choice = choose(model, recipe)
    ternary = choice.ternary
    tables = {name: (*_table_shape(model, name), bits) for name, bits in choice.tables.items()}
    kept = _kept(model, choice, recipe)
    output = _output_bytes(model, checkpoint, ternary, tables, recipe)
    memory = _peak_memory(model, blocks, path, recipe, weights)
    return Plan(
        model=type(model).__name__,
        blocks=path,
        block_count=len(blocks),
        ternary=ternary,
        tables=tables,
        kept=kept,
        weights=weights,
        source_bytes=checkpoint.bytes,
        output_bytes=output,
        peak_memory=memory,
        disk_bytes=_disk_bytes(output, len(blocks), ternary, recipe),
        seconds=_seconds(model, blocks, recipe, ternary),
        writes_text=_writes_text(recipe),
        group_size=recipe.group_size,
        kept_linears=sorted(choice.kept),
    )


def _table_shape(model: PreTrainedModel, name: str) -> tuple[int, int]:
    rows, columns = model.get_parameter(f"{name}.weight").shape
    return rows, columns


def _kept(model: PreTrainedModel, choice: Choice, recipe: Recipe) -> list[Kept]:
    packed = {f"{name}.weight" for name in [*choice.ternary, *choice.tables]}
    kept = []
    embedding, head = find_embeddings(model)
    tied = tied_parameters(model)
    for name, parameter in _floats(model):
        if name in packed or name in tied:
            continue
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if owner in choice.kept:
            reason = choice.kept[owner]
        elif f"{owner}.0.{last}" in choice.kept:
            reason = choice.kept[f"{owner}.0.{last}"]
        elif not isinstance(parameter, nn.Parameter):
            reason = "a buffer of the model's own"
        elif last == "bias" or parameter.ndim == 1:
            reason = "one value per feature (norm or bias)"
        elif owner in (embedding, head):
            reason = "recipe: keep" if "keep" in (recipe.embeddings, recipe.head) else "not a plain embedding or linear"
        elif isinstance(module, nn.Embedding):
            reason = "embedding other than the input's"
        elif not name.startswith(f"{choice.blocks}."):
            reason = "outside the blocks"
        else:
            reason = f"not a linear ({type(module).__name__})"
        kept.append(Kept(name, tuple(parameter.shape), reason))
    return kept


def _floats(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Everything that a file holds: parameters, and the buffers that are saved."""
    saved = model.state_dict().keys()
    buffers = [(n, b) for n, b in model.named_buffers() if n in saved and b.is_floating_point()]
    return [*model.named_parameters(), *buffers]


def budget_for_size(source: str, revision: str | None, recipe: Recipe, target: int) -> Recipe:
    """The recipe with the budget that makes the weight files as large as wanted.

    Args:
        target: bytes of the weight files.

    Raises:
        TernarizeError: what is not ternary takes so much that too little or too much is left for what is.
    """
    plan = make_plan(Checkpoint(resolve(source, revision)), replace(recipe, budget=None))
    ternary = sum(ternary_bytes(*shape, recipe) for shape in plan.ternary.values())
    names = [*plan.ternary, *plan.ternary, *plan.ternary, *plan.tables, *(kept.name for kept in plan.kept)]
    headers = sum(len(name) + 85 for name in names)  # of the files: name, dtype, shape and place of every tensor
    left = 8 * (target - (plan.output_bytes - ternary) - headers) / plan.ternary_weights
    if not 1.6 < left <= 4:
        raise TernarizeError(
            f"a target of {size(target)} leaves {left:.2f} bits for each ternary weight, but 1.6 to 4 can be had: "
            f"embeddings and all else that is not ternary take {size(plan.output_bytes - ternary)}. "
            f"This recipe alone gives {size(plan.output_bytes)}; choose a target near that."
        )
    return replace(recipe, budget=left)


def ternary_bytes(out_features: int, in_features: int, recipe: Recipe) -> int:
    """Stored bytes of one ternary weight, scales and shifts counted."""
    groups = group_count(in_features, min(recipe.group_size or in_features, in_features))
    shift = recipe.grid == "dlt"
    if recipe.scale_bits == 16:
        return out_features * (packed_columns(in_features) + 2 * (1 + shift) * groups)
    row = packed_columns(in_features) + level_row_bytes(groups, recipe.scale_bits, recipe.shift_bits if shift else 0)
    return out_features * row + 16  # the limits


def _output_bytes(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    ternary: dict[str, tuple[int, int]],
    tables: dict[str, tuple[int, int, int]],
    recipe: Recipe,
) -> int:
    total = 0
    if recipe.budget is not None:
        total += int(recipe.budget * sum(o * i for o, i in ternary.values()) / 8)
    else:
        total += sum(ternary_bytes(*shape, recipe) for shape in ternary.values())
    for rows, columns, bits in tables.values():
        total += rows * table_row_bytes(columns, recipe.int8_group_size, bits)
    packed = {f"{name}.weight" for name in [*ternary, *tables]}
    tied = tied_parameters(model)
    for name, parameter in _floats(model):
        if name not in packed and name not in tied:
            total += parameter.numel() * checkpoint.source_dtype(name).itemsize
    return total


def _peak_memory(model: PreTrainedModel, blocks: nn.ModuleList, path: str, recipe: Recipe, weights: int) -> int:
    """A block in float32 with its twin unpacked, its statistics, two sets of hidden states; or the text's writer."""
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks)
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(f"{path}."))
    outside -= sum(model.get_parameter(name).numel() for name in tied_parameters(model))
    inside = list(linears(blocks[0], f"{path}.0"))
    widths = [linear_shape(module)[1] for _, module in inside]
    moments = 2 * sum(width * width for width in widths) + 4 * max(widths) ** 2
    calibration = recipe.calibration
    hidden = getattr(model.config.get_text_config(), "hidden_size", max(widths))
    activations = 2 * calibration.samples * calibration.length * hidden
    largest = max(o * i for o, i in (linear_shape(module) for _, module in inside))
    walking = 4 * (2 * block + moments + activations + 8 * largest)
    first = 4 * 2 * outside
    writing = 4 * weights * 1.1 + _writer_bytes(model, len(blocks), hidden, calibration) if _writes_text(recipe) else 0
    tuning = LEARNING * recipe.tune.window * block if recipe.tune.epochs else 0
    logits = LOGITS * PIECE_TOKENS * model.config.get_text_config().vocab_size
    ending = 0
    if ended := len(blocks) - recipe.tune.first_of_ending(len(blocks)):
        kept = max(BATCH_TOKENS, calibration.length) * sum(sum(linear_shape(module)) for _, module in inside)
        ending = ended * (FROZEN * block + KEPT * kept) + 4 * outside + 6 * activations + logits
    distilling = (LEARNING + 4) * weights if recipe.distill.epochs else 0
    ranking = 2 * 4 * weights if recipe.budget is not None else 0
    judging = 4 * (activations + 2 * outside) + logits
    phases = (walking + 4 * block + tuning, ending, judging, first, writing, distilling, ranking)
    return PYTHON_AND_TORCH + int(max(phases))


def _writes_text(recipe: Recipe) -> bool:
    return any(split_source(source)[0] == "self" for source in recipe.calibration.text)


def _writer_bytes(model: PreTrainedModel, blocks: int, hidden: int, calibration: Calibration) -> int:
    """Keys and values of the windows that a model writes side by side, in float32, and what a token is drawn from."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or hidden // heads
    key = size * (getattr(config, "num_key_value_heads", None) or heads)
    windows = min(calibration.samples, WRITER_BATCH)
    return windows * (calibration.length * blocks * 2 * 4 * key + LOGITS * config.vocab_size)


def _seconds(
    model: PreTrainedModel, blocks: nn.ModuleList, recipe: Recipe, ternary: dict[str, tuple[int, int]]
) -> float:
    """Products of walk, learning and ranking over a rate measured now, plus the column loops."""
    rate = _matmul_rate()
    tokens = recipe.calibration.samples * recipe.calibration.length
    forward = sum(2 * o * i for o, i in ternary.values()) * tokens
    moments = sum(2 * 2 * i * i for _, i in ternary.values()) * tokens / 2  # half of them share their input
    solving = sum(6 * o * i * i for o, i in ternary.values())
    columns = sum(i for _, i in ternary.values()) * 60e-6 * (1 + recipe.sweeps)
    once = forward / tokens  # of one token through all ternary linears
    ended = recipe.tune.share_of_ending(len(blocks))
    learning = 3 * forward * (recipe.tune.epochs + recipe.tune.ending_epochs * ended)
    distilled = recipe.distill.samples * recipe.calibration.length * recipe.distill.epochs
    embedding: Any = model.get_input_embeddings()
    sampled = min(1.0, (tokens / REPEATED + DRAWN) / embedding.weight.shape[0])
    predicted = distilled + (tokens * recipe.tune.ending_epochs * sampled if ended else 0)
    heads = 3 * 2 * embedding.weight.numel() * predicted  # the teacher's; the student's, and back
    ranking = len(ternary) * once * RANK_WINDOWS * RANK_LENGTH if recipe.budget is not None else 0
    return (3 * forward + moments + solving + learning + 4 * once * distilled + heads + ranking) / rate + columns


def _matmul_rate() -> float:
    """Multiply-adds times two per second of a float32 product of the usual shape, on this machine, now."""
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    torch.mm(a, b)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        torch.mm(a, b)
        count += 1
    return count * 2 * 512 * 1024 * 1024 / (time.perf_counter() - started)


def _disk_bytes(output: int, blocks: int, ternary: dict[str, tuple[int, int]], recipe: Recipe) -> int:
    """Blocks, those of them that learnt together, the folder made of them, and what a distillation goes on from."""
    return int((2 + recipe.tune.share_of_ending(blocks)) * output) + distillation_bytes(ternary, recipe)


def distillation_bytes(ternary: dict[str, tuple[int, int]], recipe: Recipe) -> int:
    """What a distillation keeps on the disk to go on from, at most: four floats for all that learns, old beside new."""
    if not recipe.distill.epochs:
        return 0
    codes = sum(o * i for o, i in ternary.values()) if recipe.distill.codes == "latent" else 0
    groups = sum(o * group_count(i, recipe.group_size or i) for o, i in ternary.values())
    return 2 * 4 * 4 * (codes + (2 if recipe.grid == "dlt" else 1) * groups)


def check_room(needed: int, folder: Path) -> None:
    """Refuse work that does not fit on the disk, before anything is computed.

    Raises:
        TernarizeError: with both figures.
    """
    parent = next(p for p in [folder, *folder.resolve().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise TernarizeError(
            f"{parent} has {size(free)} free, but this needs about {size(needed)} more at its fullest. "
            "Make room, or choose another --output."
        )
