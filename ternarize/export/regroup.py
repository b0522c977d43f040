"""A ternary weight in the groups that another format has: the same numbers where that can be, the nearest otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ternarize.export.target import TernaryFolder
from ternarize.grids import fit_grid, nearest
from ternarize.tensor import TernaryTensor, expand_groups


def fitting_group_size(folder: TernaryFolder, sizes: tuple[int, ...]) -> int | None:
    """The largest of `sizes` into which every group of every linear can be cut, or None; a scale is then repeated."""
    for size in sorted(sizes, reverse=True):
        if all(is_cut(folder, name, size) for name in folder.linears):
            return size
    return None


def is_cut(folder: TernaryFolder, name: str, size: int) -> bool:
    """Whether groups of `size` subdivide those of a linear, the last one of a row included."""
    columns, own = folder.linears[name][1], folder.group_sizes[name]
    return columns % size == 0 and (own == columns or own % size == 0)


def regroup(tensor: TernaryTensor, group_size: int, shift: bool) -> TernaryTensor:
    """A weight in groups of another size.

    Args:
        shift: whether the format has one.

    Returns:
        The same trits under repeated (or joined, where they are equal) scales and shifts, float16; or, where that
        cannot be, the nearest by squared error, refitted.
    """
    columns = tensor.shape[1]
    scale = _respread(tensor.scale, columns, tensor.group_size, group_size)
    if tensor.shift is None:
        if scale is not None:
            return TernaryTensor(tensor.trits, scale, None, group_size)
    elif shift:
        moved = _respread(tensor.shift, columns, tensor.group_size, group_size)
        if scale is not None and moved is not None:
            return TernaryTensor(tensor.trits, scale, moved, group_size)
    return fit_again(tensor.dequantize(), group_size, shift)


def fit_again(weight: Tensor, group_size: int, shift: bool) -> TernaryTensor:
    """The nearest ternary weight, by squared error, to a float one [O, I]; scale and shift in float16."""
    columns = weight.shape[1]
    scale, moved = (
        t.half() for t in fit_grid(weight, torch.ones(columns), group_size, "dlt" if shift else "symmetric")
    )
    levels = expand_groups(scale.float(), columns, group_size), expand_groups(moved.float(), columns, group_size)
    return TernaryTensor(nearest(weight, *levels).to(torch.int8), scale, moved if shift else None, group_size)


def relative_error(weight: Tensor, written: Tensor) -> float:
    """||w - w'|| / ||w||; 0 for a weight of zeros that stays so."""
    norm = float(weight.norm())
    return float((weight - written).norm()) / norm if norm else float(written.norm())


def weights(folder: TernaryFolder) -> Iterator[tuple[str, TernaryTensor]]:
    """Every ternary weight of a folder, one in memory at a time."""
    for name in folder.linears:
        yield name, folder.ternary(name)


def _respread(values: Tensor, columns: int, old: int, new: int) -> Tensor | None:
    """Values [O, G] for groups of `old` as values for groups of `new`; None where one of those holds two values."""
    if old % new == 0 and columns % new == 0:
        return expand_groups(values, columns // new, old // new)
    wide = expand_groups(values.float(), columns, old)
    padding = -columns % new
    if padding:
        wide = torch.cat([wide, wide[:, -1:].expand(-1, padding)], 1)
    low, high = wide.unflatten(1, (-1, new)).aminmax(dim=-1)
    return low.to(values.dtype) if torch.equal(low, high) else None
