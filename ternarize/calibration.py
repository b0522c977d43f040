"""Walk a model block by block, and gather the statistics of its linears' inputs.

The model itself says how its blocks are called: one pass over the embeddings records every block's arguments (masks,
position embeddings, whatever the architecture hands down), with each block standing in for itself by passing its input
on. After that a block can be run alone, from stored hidden states.

Shapes: B windows in a batch, T tokens in a window, H hidden, I in features, N = B T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.architecture import UnfusedExperts
from ternarize.errors import TernarizeError, UnsupportedModelError
from ternarize.solver import LinearStatistics

BATCH_TOKENS = 4096


class _AllBlocksSeen(Exception):
    """Ends the recording pass before the final norm and head, which may not be loaded."""


@dataclass
class BlockCall:
    """How the model calls one block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tuple_output: bool

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for hidden states [B, T, H]."""
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
        hidden = _record(model, blocks, path, batch, calls)
        if recorded and _equal([(c.args, c.kwargs) for c in calls], [(c.args, c.kwargs) for c in recorded[0]]):
            calls = recorded[0]
        entrances.append(hidden)
        recorded.append(calls)
    return Walk(entrances, recorded)


def _record(model: nn.Module, blocks: nn.ModuleList, path: str, ids: Tensor, calls: list[BlockCall]) -> Tensor:
    """One pass with every block replaced by its own stand-in; returns the hidden states that enter block 0."""
    previous: Tensor | None = None
    entrance: Tensor | None = None
    tuple_output = False

    def stand_in(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal previous, entrance, tuple_output
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                raise UnsupportedModelError(f"{path}.{index} is not called with hidden states [B, T, H].")
            if index != len(calls):
                raise UnsupportedModelError(f"{path}.{index} runs as number {len(calls)}: blocks run out of order.")
            if index == 0:
                output = original(*args, **kwargs)
                tuple_output = isinstance(output, tuple)
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
            calls.append(BlockCall(rest, kwargs, tuple_output))
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


class _Moments:
    """Running sums over tokens of one input, shared by the linears that read it."""

    def __init__(self, in_features: int, device: torch.device, paired: bool) -> None:
        self.second = torch.zeros(in_features, in_features, device=device)
        self.cross = torch.zeros_like(self.second) if paired else None
        self.tokens = 0


@torch.no_grad()
def capture(
    block: nn.Module,
    index: int,
    linears: dict[str, nn.Module],
    teacher: Walk,
    student: Walk,
) -> dict[str, LinearStatistics]:
    """Statistics of the inputs of a float block's linears, from the student's prefix; the teacher walks on.

    Each batch runs through the block twice: from the student's hidden states, whose inputs X^ the ternary linears
    will really get, then from the teacher's, whose inputs X give the target. The teacher's hidden states are replaced
    by the block's outputs; the student's stay, until the block is ternary.

    Args:
        linears: those that will be ternary, by full name.

    Returns:
        {name: statistics}; linears that read the same tensor share theirs. A linear that never ran is not there.
    """
    unpaired = {
        id(child)  # experts: teacher and student send different tokens to them
        for module in block.modules()
        if isinstance(module, UnfusedExperts)
        for child in module.modules()
    }
    moments: dict[str, _Moments] = {}
    leader: dict[str, str] = {}
    energy: dict[str, float] = {}
    seen: dict[str, Tensor] = {}  # the student's inputs of this batch

    def student_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            x = args[0]
            paired = id(module) not in unpaired
            if name not in leader:
                leader[name] = next((leader[n] for n, other in seen.items() if other is x), name)
            own = leader[name]
            seen[name] = x
            if own != name:
                return
            x_NI = x.reshape(-1, x.shape[-1]).float()
            if own not in moments:
                moments[own] = _Moments(x_NI.shape[1], x_NI.device, paired)
            sums = moments[own]
            sums.second.addmm_(x_NI.t(), x_NI)
            sums.tokens += len(x_NI)

        return hook

    def teacher_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            own = leader.get(name)
            if own is None or moments[own].cross is None:
                return
            bias = getattr(module, "bias", None)
            out = output if bias is None else output - bias
            energy[name] = energy.get(name, 0.0) + float(out.square().sum(dtype=torch.float64))
            if own == name:
                x_NI = args[0].reshape(-1, args[0].shape[-1]).float()
                student_NI = seen[name].reshape(x_NI.shape).float()
                moments[own].cross.addmm_(student_NI.t(), x_NI)  # type: ignore[union-attr]

        return hook

    for batch in range(len(student.hidden)):
        call = teacher.calls[batch][index]
        _run_hooked(block, linears, student_hook, call, student.hidden[batch])
        teacher.hidden[batch] = _run_hooked(block, linears, teacher_hook, call, teacher.hidden[batch])
        seen.clear()

    statistics: dict[str, LinearStatistics] = {}
    shared: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, own in leader.items():
        sums = moments[own]
        if own not in shared:
            cross = None if sums.cross is None else sums.cross.div_(sums.tokens)
            shared[own] = (sums.second.div_(sums.tokens), cross)
        second, cross = shared[own]
        own_energy = None if cross is None else energy[name] / sums.tokens
        statistics[name] = LinearStatistics(second, cross, own_energy, sums.tokens)
    return statistics


def _run_hooked(
    block: nn.Module,
    linears: dict[str, nn.Module],
    make: Callable[[str], Callable[..., None]],
    call: BlockCall,
    hidden: Tensor,
) -> Tensor:
    handles = [module.register_forward_hook(make(name)) for name, module in linears.items()]
    try:
        return call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
