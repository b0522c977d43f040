"""Keys and values where the native library and transformers both find them: a dynamic cache with room behind it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ternarize import kernels
from ternarize.decoder.plan import Plan
from ternarize.kernels.decoder import NativeCache

# What models call their cache, as an argument and in what they return: "past_key_values" before transformers 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
ROOM = 256  # positions by which a cache grows, at least


class Shelf:
    """Keys and values of blocks that are cached alike, in one tensor with room behind them; layers hold views of it.

    What a view shows is never written again: a layer whose tensors are not the last views was cropped, reordered or
    filled by someone else, and gets another shelf.

    Args:
        layers: of the cache.
        window: of layers that keep only the last positions; 0 where they keep all.
        memory: [2 L, 1, key heads, P, D], L the layers.
        end: positions that are there.
    """

    def __init__(self, layers: list[Any], window: int, memory: Tensor, end: int) -> None:
        self.layers, self.window, self.memory, self.first, self.end = layers, window, memory, 0, end
        self.show()

    def show(self) -> None:
        """Let the layers hold what is there."""
        self.views = self.memory[:, :, :, self.first : self.end].unbind()
        for layer, keys, values in zip(self.layers, self.views[::2], self.views[1::2], strict=True):
            layer.keys, layer.values = keys, values

    def has_room(self) -> bool:
        """For one position more."""
        return self.end < self.memory.shape[-2]

    def goes_on(self, past: int) -> bool:
        """Whether the layers still hold what they were shown, of `past` tokens, and there is room for one more."""
        held = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        same = all(map(operator.is_, held, self.views))
        return same and self.has_room() and _filled(self.layers, self.window, past)

    def native(self) -> NativeCache:
        """As the library takes it."""
        return NativeCache.of(self.memory, self.first, self.end)

    def advance(self) -> None:
        """Count the position that a step added."""
        self.end += 1
        if self.window:
            self.first = max(self.first, self.end - self.window + 1)
            for layer in self.layers:
                layer.cumulative_length += 1


@dataclass(frozen=True)
class Sequence:
    """The tokens of a cache, and the plan that its next one follows."""

    plan: Plan
    shelves: list[Shelf]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.shelves[0].memory.dtype

    def goes_on(self, cache: DynamicCache, past: int) -> bool:
        """Whether the cache is as the last step left it, with room for another, and no hook has come."""
        layers = [cache.layers[i] for _, blocks in self.plan.kinds for i in blocks]
        known = [layer for shelf in self.shelves for layer in shelf.layers]
        same = all(map(operator.is_, layers, known)) and len(cache.layers) == len(known)
        return same and all(shelf.goes_on(past) for shelf in self.shelves) and self.plan.facts.undisturbed()

    def has_room(self) -> bool:
        """For one token more."""
        return all(shelf.has_room() for shelf in self.shelves)

    def takes(self, hidden: Tensor) -> bool:
        """Whether `step` serves this embedded token."""
        return kernels.usable(hidden) and hidden.dtype == self.dtype

    def step(self, hidden: Tensor, ropes: Tensor) -> Tensor:
        """One token: [1, 1, H] and float32 ropes [R, 2, D] -> [1, 1, H]; the cache does not show it until `show`."""
        x = hidden.float().flatten()
        out = self.plan.decoder.step(x, ropes, [shelf.native() for shelf in self.shelves])
        for shelf in self.shelves:
            shelf.advance()
        return out.to(hidden.dtype).view_as(hidden)

    def show(self) -> None:
        """Let the layers of the cache hold what is there."""
        for shelf in self.shelves:
            shelf.show()


def start_sequence(plan: Plan, cache: DynamicCache, past: int) -> Sequence | None:
    """From what a cache with `past` tokens holds; None where that is not what the model's blocks leave there."""
    if len(cache.layers) != plan.decoder.shape.blocks:
        return None
    made = [make_shelf([cache.layers[i] for i in blocks], window, plan, past) for window, blocks in plan.kinds]
    shelves = [shelf for shelf in made if shelf is not None]
    if len(shelves) < len(made) or len({shelf.memory.dtype for shelf in shelves}) > 1:
        return None
    return Sequence(plan, shelves)


def make_shelf(layers: list[Any], window: int, plan: Plan, past: int) -> Shelf | None:
    """Copy what layers of a cache hold to a shelf; None where they are not as blocks of this window fill them.

    Args:
        window: of the blocks; 0 is none.
        past: tokens that were cached.
    """
    kind = type(layers[0])
    limit = window if kind is DynamicSlidingWindowLayer else 0
    if kind not in (DynamicLayer, DynamicSlidingWindowLayer) or any(type(layer) is not kind for layer in layers):
        return None
    if (limit == 0 and kind is DynamicSlidingWindowLayer) or not _filled(layers, limit, past):
        return None
    shape, length = plan.decoder.shape, min(past, limit - 1) if limit else past
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    wanted = (1, shape.key_heads, length, shape.head_size)
    if any(tensor.shape != wanted or not kernels.usable(tensor) or tensor.dtype != held[0].dtype for tensor in held):
        return None
    capacity = length + max(ROOM, length // 2)
    memory = held[0].new_empty(len(held), 1, shape.key_heads, capacity, shape.head_size)
    for row, tensor in zip(memory, held, strict=True):
        row[:, :, :length] = tensor
    return Shelf(layers, limit, memory, length)


def _filled(layers: list[Any], window: int, past: int) -> bool:
    """Whether layers have seen `past` tokens; what they hold is looked at elsewhere."""
    if not window:
        return all(layer.is_initialized for layer in layers)
    return all(
        layer.is_initialized
        and layer.sliding_window == window
        and layer.cumulative_length == past
        and not layer.record_past
        for layer in layers
    )
