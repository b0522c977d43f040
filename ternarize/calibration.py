"""Walk a model block by block, and gather the statistics of its linears' inputs.

The model itself says how its blocks are called: one pass over the embeddings records every block's arguments (masks,
position embeddings, whatever the architecture hands down), with each block standing in for itself by passing its input
on. After that a block can be run alone, from stored hidden states.

Shapes: B windows in a batch, T tokens in a window, H hidden, I in features, N = B T tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.architecture import UnfusedExperts
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.recipe import Calibration
from ternarize.solver import LinearStatistics
from ternarize.text import load_tokenizer, random_windows

BATCH_TOKENS = 1024
GRAM_COLUMNS = 1024  # side of the blocks in which a symmetric sum is computed


class _AllBlocksSeen(Exception):
    """Ends the recording pass before the final norm and head, which may not be loaded."""


@dataclass
class BlockCall:
    """How the model calls one block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tuple_output: bool

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for hidden states [B, T, H]; the products inside it in bfloat16 where that is fast."""
        with autocast(hidden.device):
            if "hidden_states" in self.kwargs:
                output = block(*self.args, **(self.kwargs | {"hidden_states": hidden}))
            else:
                output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class Walk:
    """Hidden states at the entrance of a block, per batch, and how each block is called.

    `calls[batch][block]`; batches whose arguments are equal share them.
    """

    hidden: list[Tensor]
    calls: list[list[BlockCall]]

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by what block number `index` makes of them."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self.calls[batch][index].run(block, hidden)

    def through(self, window: list[nn.Module], first: int, batch: int, hidden: Tensor) -> Tensor:
        """What the blocks of a window, number `first` and on, make of a batch's hidden states [B, T, H]."""
        for offset, block in enumerate(window):
            hidden = self.calls[batch][first + offset].run(block, hidden)
        return hidden


def autocast_enabled(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast there: on accelerators, and on processors with instructions for it.

    TERNARIZE_BFLOAT16=0 in the environment keeps all products in float32, for the same numbers on every machine.
    """
    if os.environ.get("TERNARIZE_BFLOAT16") == "0":
        return False
    if device.type != "cpu":
        return True
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def product_dtype(device: torch.device) -> torch.dtype:
    """What weights are rounded to before products there."""
    return torch.bfloat16 if autocast_enabled(device) else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where they are fast, in float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocast_enabled(device))


@contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """Products of float32 with both sides rounded as in `autocast`, where that is faster, and sums in float32.

    For sums over inputs, which autocast would sum in bfloat16, and which reach a linear rounded in any case.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if autocast_enabled(device) else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def batches(ids: Tensor) -> list[Tensor]:
    """Windows [B, T] in equal batches of at most `BATCH_TOKENS` tokens (or one window)."""
    count, length = ids.shape
    size = max(s for s in range(1, count + 1) if count % s == 0 and (s * length <= BATCH_TOKENS or s == 1))
    return list(ids.split(size))


@torch.no_grad()
def start_walk(model: nn.Module, blocks: nn.ModuleList, path: str, ids: list[Tensor]) -> Walk:
    """Run the model up to its first block for every batch, and record how it would call all of them.

    Args:
        model: everything outside the blocks loaded, and block 0.
        ids: int64 [B, T] per batch.

    Raises:
        UnsupportedModelError: the model does something between its blocks, skips or repeats one, or hands on no
            hidden states; such a model cannot be walked block by block.
    """
    entrances: list[Tensor] = []
    recorded: list[list[BlockCall]] = []
    for batch in ids:
        calls: list[BlockCall] = []
        hidden = _record(model, blocks, path, batch, calls, recorded[0][0].tuple_output if recorded else None)
        if recorded and _equal([(c.args, c.kwargs) for c in calls], [(c.args, c.kwargs) for c in recorded[0]]):
            calls = recorded[0]
        entrances.append(hidden)
        recorded.append(calls)
    return Walk(entrances, recorded)


def _record(
    model: nn.Module, blocks: nn.ModuleList, path: str, ids: Tensor, calls: list[BlockCall], tuple_output: bool | None
) -> Tensor:
    """One pass with every block replaced by its own stand-in; returns the hidden states that enter block 0.

    Whether blocks return tuples is known from an earlier pass, or found by running block 0.
    """
    previous: Tensor | None = None
    entrance: Tensor | None = None

    def stand_in(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal previous, entrance, tuple_output
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                raise UnsupportedModelError(f"{path}.{index} is not called with hidden states [B, T, H].")
            if index != len(calls):
                raise UnsupportedModelError(f"{path}.{index} runs as number {len(calls)}: blocks run out of order.")
            if index == 0:
                if tuple_output is None:
                    tuple_output = isinstance(original(*args, **kwargs), tuple)
                entrance = previous = hidden
            elif hidden is not previous:
                raise UnsupportedModelError(
                    f"{type(model).__name__} changes the hidden states between {path}.{index - 1} and {path}.{index}; "
                    "it cannot be converted block by block."
                )
            if "hidden_states" in kwargs:
                rest: tuple[Any, ...] = args
                kwargs = kwargs | {"hidden_states": None}
            else:
                rest = args[1:]
            calls.append(BlockCall(rest, kwargs, bool(tuple_output)))
            if len(calls) == len(blocks):
                raise _AllBlocksSeen
            return (hidden,) if tuple_output else hidden

        return forward

    for index, block in enumerate(blocks):
        block.forward = stand_in(index, block.forward)  # type: ignore[method-assign]
    try:
        check_ids(model, ids)
        model(input_ids=ids, use_cache=False)
    except _AllBlocksSeen:
        pass
    except IndexError as error:
        raise TernarizeError(
            f"{type(model).__name__} cannot take windows of {ids.shape[1]} tokens: {error}. "
            "Choose a smaller calibration.length."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModelError(f"{type(model).__name__} does not run on plain token ids: {error}") from error
    else:
        raise UnsupportedModelError(f"{type(model).__name__} ran only {len(calls)} of its {len(blocks)} blocks.")
    finally:
        for block in blocks:
            del block.forward
    assert entrance is not None
    return entrance


def finish_walk(model: nn.Module, blocks: nn.ModuleList, hidden: Tensor, ids: Tensor, tuple_output: bool) -> Tensor:
    """Logits [B, T, V] that the model makes of the hidden states behind its last block.

    Args:
        model: everything outside the blocks loaded; the blocks need not be.
        hidden: [B, T, H]; ids: int64 [B, T], of the same tokens.
        tuple_output: whether the blocks return tuples, as their calls were recorded.
    """
    for block in blocks:
        block.forward = lambda *args, **kwargs: (hidden,) if tuple_output else hidden  # type: ignore[method-assign]
    try:
        return model(input_ids=ids, use_cache=False).logits
    finally:
        for block in blocks:
            del block.forward


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        TernarizeError: the tokenizer has more tokens than the model.
    """
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if ids.numel() and int(ids.max()) >= rows:
        raise TernarizeError(
            f"the text has token {int(ids.max())}, but {type(model).__name__} has {rows} tokens: "
            "this tokenizer is another model's. Put the right one into the folder."
        )


def _equal(a: Any, b: Any) -> bool:
    """Deep equality that compares tensors by value, and unknown objects by identity."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or (isinstance(a, (int, float, str, bool, type(None))) and a == b)


# -- statistics ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def capture(
    block: nn.Module, index: int, linears: dict[str, nn.Module], teacher: Walk, student: Walk, held_out: float
) -> dict[str, LinearStatistics]:
    """Statistics of the inputs of a float block's linears, from the student's prefix; the teacher walks on.

    Each batch runs through the block twice: from the student's hidden states, whose inputs X^ the ternary linears
    will really get, then from the teacher's, whose inputs X give the target. The teacher's hidden states are replaced
    by the block's outputs; the student's stay, until the block is ternary.

    Args:
        index: the block's number in the walks.
        linears: those that will be ternary, by full name.
        held_out: share of the batches, the last ones, whose statistics stand apart.

    Returns:
        {name: statistics}; linears that read the same tensor share theirs. A linear that never ran is not there.
    """
    # Teacher and student may send different tokens to an expert: its inputs cannot be paired.
    experts = {id(child) for m in block.modules() if isinstance(m, UnfusedExperts) for child in m.modules()}
    unpaired = {name for name, module in linears.items() if id(module) in experts}
    fitted, apart = _Sums(unpaired), _Sums(unpaired)
    first_apart = first_held_out(len(student.hidden), held_out)
    for batch, hidden in enumerate(student.hidden):
        sums = fitted if batch < first_apart else apart
        call = teacher.calls[batch][index]
        _run_hooked(block, linears, sums.add_student, call, hidden)
        teacher.hidden[batch] = _run_hooked(block, linears, sums.add_teacher, call, teacher.hidden[batch])
        sums.inputs.clear()
    aside = apart.statistics()
    return {name: replace(own, held_out=aside.get(name)) for name, own in fitted.statistics().items()}


def mix_random(ids: Tensor, wanted: Calibration, folder: Path, vocabulary: int) -> Tensor:
    """Windows int64 [B, T]; of those that are fitted to, a share as the recipe says is made of random tokens.

    Args:
        folder: the teacher's checkpoint, for its tokenizer.
        vocabulary: how many tokens the teacher has an embedding for.
    """
    parts = batches(ids)
    fitted = sum(map(len, parts[: first_held_out(len(parts), wanted.held_out)]))
    count = round(wanted.random * fitted)
    if not count:
        return ids
    mixed = ids.clone()
    places = ((torch.arange(count) + 0.5) * fitted / count).long()
    mixed[places] = random_windows(count, ids.shape[1], load_tokenizer(folder), vocabulary, wanted.seed)
    return mixed


def first_held_out(batches: int, share: float) -> int:
    """Number of the first batch that is held out; `batches` where none is. One batch alone is always fitted to."""
    return max(1, batches - math.ceil(share * batches)) if batches else 0


def _run_hooked(
    block: nn.Module,
    linears: dict[str, nn.Module],
    hook: Callable[[str, nn.Module, Tensor, Tensor], None],
    call: BlockCall,
    hidden: Tensor,
) -> Tensor:
    """The block's output for `hidden`, with `hook(name, module, input, output)` called for each linear that runs."""
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: hook(name, m, args[0], output))
        for name, module in linears.items()
    ]
    try:
        return call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Running sums over tokens. Linears that read the same tensor have one leader, which keeps their sums.

    Args:
        unpaired: names of linears whose student and teacher inputs are of different tokens.
    """

    def __init__(self, unpaired: set[str]) -> None:
        self.unpaired = unpaired
        self.inputs: dict[str, Tensor] = {}  # the student's, of the batch at hand
        self.leader: dict[str, str] = {}
        self.second: dict[str, Tensor] = {}  # X^' X^
        self.cross: dict[str, Tensor] = {}  # X^' X
        self.tokens: dict[str, int] = {}
        self.energy: dict[str, float] = {}  # ||X W'||^2

    def add_student(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Take in the student's input x [..., I] of one linear."""
        if name not in self.leader:
            self.leader[name] = next((self.leader[n] for n, other in self.inputs.items() if other is x), name)
        self.inputs[name] = x
        if self.leader[name] == name:
            x_NI = x.reshape(-1, x.shape[-1]).float()
            if name not in self.second:
                self.second[name] = x_NI.new_zeros(x_NI.shape[1], x_NI.shape[1])
            with rounded_products(x.device):
                _add_gram(self.second[name], x_NI)
            self.tokens[name] = self.tokens.get(name, 0) + len(x_NI)

    def add_teacher(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Take in the teacher's input x [..., I] and output [..., O] of one linear, after the student's."""
        if name in self.unpaired or name not in self.leader:
            return
        bias = getattr(module, "bias", None)
        product = output if bias is None else output - bias
        norms = torch.linalg.vector_norm(product.float(), dim=-1)  # a sixth of the time of sums in float64
        self.energy[name] = self.energy.get(name, 0.0) + float(norms.square().sum(dtype=torch.float64))
        if self.leader[name] == name:
            x_NI = x.reshape(-1, x.shape[-1]).float()
            student_NI = self.inputs[name].reshape(x_NI.shape).float()
            if name not in self.cross:
                self.cross[name] = torch.zeros_like(self.second[name])
            with rounded_products(x.device):
                self.cross[name].addmm_(student_NI.t(), x_NI)

    def statistics(self) -> dict[str, LinearStatistics]:
        """Means over the tokens."""
        second = {name: _mirror(total).div_(self.tokens[name]) for name, total in self.second.items()}
        cross = {name: total.div_(self.tokens[name]) for name, total in self.cross.items()}
        result = {}
        for name, own in self.leader.items():
            tokens = self.tokens[own]
            energy = self.energy[name] / tokens if name in self.energy else None
            result[name] = LinearStatistics(second[own], cross.get(own), energy, tokens)
        return result


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add X' X [I, I] of x [N, I] to the total: only the blocks of columns on and above its diagonal."""
    for start in range(0, x.shape[1], GRAM_COLUMNS):
        stop = start + GRAM_COLUMNS
        total[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])


def _mirror(total: Tensor) -> Tensor:
    """Fill in, in place, the blocks below the diagonal of what `_add_gram` summed."""
    for start in range(0, len(total), GRAM_COLUMNS):
        stop = start + GRAM_COLUMNS
        total[stop:, start:stop] = total[start:stop, stop:].t()
    return total
