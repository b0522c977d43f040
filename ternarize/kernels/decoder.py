"""All blocks of a decoder as the native library sees them: described once, then one call a token, or two a block.

Shapes: L blocks, H hidden, F inner features of the feed-forward, N heads, K key heads, D head size, R ropes, T tokens,
P positions that a cache has room for.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ternarize.kernels.cpu import DTYPES, Native, PackedTernary, require_memory

ACTIVATIONS = ("silu", "gelu_tanh")  # as the library numbers them
LINEARS = ("query", "key", "value", "out", "gate", "up", "down")
NORMS = ("attention", "query", "key", "attention_end", "feed", "feed_end")
LARGEST_HEAD = 512


class NativeCache(ctypes.Structure):
    """`tz_cache`: float [blocks, 2, key heads, P, D] and which positions are there."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    )

    @classmethod
    def of(cls, memory: Tensor, first: int, end: int) -> NativeCache:
        """Of a tensor whose last dimensions are P and D."""
        return cls(memory.data_ptr(), memory.shape[-2], first, end, DTYPES[memory.dtype])


@dataclass(frozen=True)
class Shape:
    """What all blocks have in common; `activation` is one of ACTIVATIONS."""

    blocks: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    activation: str


class NativeDecoder:
    """A `tz_decoder`, and all that it points to.

    Args:
        path: whose kernels; the linears are laid out for it.
        shape: of the blocks.
        exact: float activations, else int8.
    """

    def __init__(self, path: Native, shape: Shape, exact: bool) -> None:
        sizes = (shape.blocks, shape.hidden, shape.inner, shape.heads, shape.key_heads, shape.head_size)
        self.path, self.shape, self.exact = path, shape, exact
        self._library = path.library
        self._kept: list[Any] = []
        self._pointer = path.library.tz_make_decoder(path.index, *sizes, ACTIVATIONS.index(shape.activation), exact)
        if self._pointer is None:
            raise MemoryError(f"no memory to describe {shape.blocks} blocks")

    def __del__(self) -> None:
        if getattr(self, "_pointer", None) is not None:
            self._library.tz_free_decoder(self._pointer)

    def set_linear(self, block: int, name: str, packed: PackedTernary) -> None:
        """One of LINEARS."""
        bias = None if packed.bias is None else packed.bias.data_ptr()
        self._library.tz_set_linear(
            self._pointer, block, LINEARS.index(name), packed.shape, packed.packed.data_ptr(), bias
        )
        self._kept.append(packed)

    def set_norm(self, block: int, name: str, weight: Tensor, epsilon: float) -> None:
        """One of NORMS, with a float32 weight; "attention" behind the last block is the norm of the result."""
        self._library.tz_set_norm(self._pointer, block, NORMS.index(name), weight.data_ptr(), epsilon)
        self._kept.append(weight)

    def set_attention(self, block: int, scale: float, window: int, rope: int, cache: int, place: int) -> None:
        """See `csrc/ternarize.h`."""
        self._library.tz_set_attention(self._pointer, block, scale, window, rope, cache, place)

    def step(self, x: Tensor, ropes: Tensor, caches: list[NativeCache]) -> Tensor:
        """One token: float32 x [H] and ropes [R, 2, D] -> float32 [H]; its keys and values are added to the caches.

        Raises:
            MemoryError: there is none for a token.
        """
        out = torch.empty_like(x)
        array = (NativeCache * len(caches))(*caches)
        arguments = (x.data_ptr(), out.data_ptr(), ropes.data_ptr(), array, torch.get_num_threads())
        if self._library.tz_step(self._pointer, *arguments):
            raise MemoryError("no memory for a token")
        return out

    def room(self, tokens: int) -> Tensor:
        """Memory for what the next two compute in between; one serves all blocks, one after the other."""
        return torch.empty(self._library.tz_prompt_floats(self._pointer, tokens), dtype=torch.float32, device="cpu")

    def enter_attention(self, block: int, x: Tensor, ropes: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a block attends with: queries [T, N, D], keys and values [T, K, D], all float32.

        Args:
            x: float32 [T, H], the block's input.
            ropes: float32 [T, R, 2, D].

        Raises:
            MemoryError: there is none for the activations.
        """
        shape, tokens = self.shape, len(x)
        out = [x.new_empty(tokens, heads, shape.head_size) for heads in (shape.heads, *[shape.key_heads] * 2)]
        pointers = (part.data_ptr() for part in (x, ropes, *out, room))
        failed = self._library.tz_enter_attention(self._pointer, block, *pointers, tokens, torch.get_num_threads())
        require_memory(failed, tokens)
        query, key, value = out
        return query, key, value

    def leave_attention(self, block: int, mixed: Tensor, x: Tensor, room: Tensor) -> None:
        """The rest of a block, whose output takes the place of its input x, float32 [T, H].

        Args:
            mixed: float32 [T, N, D], what its heads attended to.

        Raises:
            MemoryError: there is none for the activations.
        """
        pointers = (part.data_ptr() for part in (mixed, x, room))
        failed = self._library.tz_leave_attention(self._pointer, block, *pointers, len(x), torch.get_num_threads())
        require_memory(failed, len(x))
