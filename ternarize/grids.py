"""One group of weights -> its three levels. Pure functions, all rows and groups at once.

Shapes: O out features, I in features, S group size, G groups in a row. A grid gives `scale` and `shift` [O, G]; which
trit each weight takes is decided later, by `nearest` or by the solver's error feedback.

Sources: PT2-LLM (arXiv 2510.03267), iterative ternary fitting, eq. in section 3.2, here with a weight per column;
TWN (arXiv 1605.04711) for the threshold; BitNet b1.58 (arXiv 2402.17764) for absmean; TernaryLLM (arXiv 2406.07177)
for a scale and a shift per group (DLT).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ternarize.tensor import SMALLEST_SCALE, group_count

Grid = Literal["dlt", "symmetric", "absmean"]
GRIDS: tuple[Grid, ...] = ("dlt", "symmetric", "absmean")

THRESHOLD = 0.75  # of mean |w|: Lloyd-Max for a Gaussian, up to 0.1 % of its error
ITERATIONS = 20


def nearest(weight: Tensor, scale: Tensor, shift: Tensor | float) -> Tensor:
    """The trit whose level is nearest to each weight, in `weight`'s dtype; arguments broadcast."""
    return ((weight - shift) / scale).round_().clamp_(-1, 1)


def fit_grid(weight: Tensor, importance: Tensor, group_size: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and shift of every group of a weight.

    Args:
        weight: float [O, I].
        importance: float [I], how much a squared error in that column costs; positive (curvature, or ones).
        group_size: S; the last group may be short.
        grid: "dlt" (scale and shift), "symmetric" (scale alone), or "absmean" (BitNet's mean of |w|, no fit).

    Returns:
        scale [O, G], positive; shift [O, G], zero unless the grid is "dlt".
    """
    out_features, in_features = weight.shape
    groups = group_count(in_features, group_size)
    padding = groups * group_size - in_features
    w = torch.nn.functional.pad(weight, (0, padding)).view(out_features, groups, group_size)
    c = torch.nn.functional.pad(importance.to(weight.dtype), (0, padding)).view(1, groups, group_size)
    c = c / c.sum(-1, keepdim=True).clamp(min=torch.finfo(c.dtype).tiny)  # sums to 1 in each group; padding weighs 0

    if grid == "absmean":
        present = torch.nn.functional.pad(torch.ones(in_features, dtype=w.dtype, device=w.device), (0, padding))
        scale = w.abs().sum(-1) / present.view(groups, group_size).sum(-1)
        return _positive(scale), torch.zeros_like(scale)
    return _fit(w, c, with_shift=grid == "dlt")


def _fit(w: Tensor, c: Tensor, with_shift: bool) -> tuple[Tensor, Tensor]:
    """Alternate between the nearest trits and the weighted least-squares scale and shift (PT2-LLM's ITF).

    w [O, G, S], c [1, G, S] with unit sums. Every step lowers the weighted error of a group, or leaves it as it was,
    so the iteration ends; it is cut after `ITERATIONS`.
    """
    mean_w = (c * w).sum(-1)  # [O, G]
    shift = mean_w if with_shift else torch.zeros_like(mean_w)
    centred = w - shift[..., None]
    threshold = THRESHOLD * (c * centred.abs()).sum(-1, keepdim=True)
    trits = torch.sign(centred) * (centred.abs() > threshold)
    scale = _positive((c * centred.abs()).sum(-1))
    for _ in range(ITERATIONS):
        mean_t = (c * trits).sum(-1)
        mean_tt = (c * trits * trits).sum(-1)
        mean_tw = (c * trits * w).sum(-1)
        if with_shift:
            variance = mean_tt - mean_t * mean_t
            covariance = mean_tw - mean_t * mean_w
        else:
            variance, covariance = mean_tt, mean_tw
        # A group of one level only has no slope: it keeps its scale, and only the shift follows.
        fitted = covariance / variance.clamp(min=1e-12)
        scale = torch.where((variance > 1e-8) & (fitted > 0), fitted, scale)
        if with_shift:
            shift = mean_w - scale * mean_t
        renewed = nearest(w, scale[..., None], shift[..., None])
        if torch.equal(renewed, trits):
            break
        trits = renewed
    return _positive(scale), shift


def _positive(scale: Tensor) -> Tensor:
    """Keep a scale off zero (a group of equal weights) without moving any other."""
    return scale.clamp(min=SMALLEST_SCALE)
