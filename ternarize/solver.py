"""Fit one weight: statistics of its inputs and a recipe in, a TernaryTensor out. Pure, and vectorised over rows.

The rows of a weight never look at each other, so any split of them gives the same answer; only the statistics are
shared. Columns are visited one by one, in descending curvature, while groups stay where they lie in memory ("static
groups"), so no permutation has to be stored.

Shapes: O out features, I in features, S group size, G groups in a row, N calibration tokens.
With X^ [N, I] the inputs that the linear gets behind the ternary prefix, and X [N, I] those behind the teacher's:

    second_moment  H = X^' X^ / N      [I, I]
    cross_moment   C = X^' X  / N      [I, I]        (X^' is the transpose)
    error          ||X^ What' - X W'||^2 / ||X W'||^2

Sources: GPTQ (arXiv 2210.17323) for the error feedback and the Cholesky form; PT2-LLM (arXiv 2510.03267, section 3.3)
for the refit with frozen codes, here for all groups of a row together; QEP (arXiv 2504.09629) for the correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ternarize.errors import TernarizeError
from ternarize.grids import fit_grid, nearest
from ternarize.packing import decode_levels, encode_levels
from ternarize.recipe import Recipe
from ternarize.tensor import SMALLEST_SCALE, Levels, TernaryTensor, expand_groups, sum_groups

COLUMN_BLOCK = 64  # columns whose feedback is applied to the rest of the row in one product
REFIT_RIDGE = 1e-4  # pull of the refit towards the values it starts from, as a share of the diagonal
REFIT_ROWS = 256  # rows of a weight that the refit solves at once,
REFIT_FLOATS = 1 << 24  # and most float64 in their matrices (128 MiB)


@dataclass(frozen=True)
class LinearStatistics:
    """What calibration knows about the inputs of one linear.

    Args:
        second_moment: float32 [I, I], X^' X^ / N: accumulated in float32, since sums in bfloat16 lose definiteness.
        cross_moment: float32 [I, I], X^' X / N, or None where student and teacher saw different tokens (experts).
        teacher_energy: ||X W'||^2 / N, the error's denominator; None as above. Linears that read the same input share
            everything but this.
        tokens: N.
        held_out: the same of other tokens, to which nothing is fitted; None where there are none.
    """

    second_moment: Tensor
    cross_moment: Tensor | None
    teacher_energy: float | None
    tokens: int
    held_out: LinearStatistics | None = None


def fit(weight: Tensor, statistics: LinearStatistics | None, recipe: Recipe) -> TernaryTensor:
    """Ternarize one weight.

    Args:
        weight: float [O, I], finite.
        statistics: of the linear's inputs; None fits without data: the grid under equal weights, nearest codes.
        recipe: which steps to take.

    Returns:
        The ternary weight, scale and shift already rounded to their stored form (fp16).

    Raises:
        TernarizeError: the second moment is not positive definite even when damped.
    """
    weight = weight.float()
    in_features = weight.shape[1]
    group_size = min(recipe.group_size or in_features, in_features)
    if statistics is None or not recipe.needs_statistics:
        stored = Stored.round(*fit_grid(weight, weight.new_ones(in_features), group_size, recipe.grid), recipe)
        return stored.with_trits(nearest(weight, *stored.per_column(in_features, group_size)), group_size)

    damped = _damp(statistics.second_moment, recipe.damping)
    order = _processing_order(damped, recipe.order)
    factor = inverse_factor(damped[order][:, order])  # U [I, I] in processing order
    target = weight
    if recipe.correction and statistics.cross_moment is not None:
        target = correct_for_prefix(weight, statistics, damped, recipe.correction)

    importance = weight.new_ones(in_features)
    if recipe.curvature:
        importance[order] = factor.diagonal() ** -2
    stored = Stored.round(*fit_grid(target, importance, group_size, recipe.grid), recipe)
    scale, shift = stored.per_column(in_features, group_size)
    if recipe.feedback:
        trits = torch.empty_like(target)
        trits[:, order] = round_with_feedback(target[:, order], scale[:, order], shift[:, order], factor)
    else:
        trits = nearest(target, scale, shift)
    if recipe.refit:
        with_shift = recipe.grid == "dlt"
        scale, shift, trits = refit(target, trits, stored.scale, stored.shift, damped, group_size, with_shift)
        stored = Stored.round(scale, shift, recipe)
    if recipe.sweeps:
        scale, shift = stored.per_column(in_features, group_size)
        swept = sweep(target, trits, scale, shift, damped, order, recipe.sweeps)
        better = _rows_that_gain(weight, scale * trits + shift, scale * swept + shift, statistics.held_out)
        trits = torch.where(better[:, None], swept, trits)
    return stored.with_trits(trits, group_size)


@dataclass(frozen=True)
class Stored:
    """Scales and shifts as the file will give them back, and the codes that say so.

    Args:
        scale, shift: float32 [O, G]; shift is zero where the grid has none.
        levels: the codes, or None where the file holds fp16.
        with_shift: whether the grid has a shift.
    """

    scale: Tensor
    shift: Tensor
    levels: Levels | None
    with_shift: bool

    @classmethod
    def round(cls, scale: Tensor, shift: Tensor, recipe: Recipe) -> Stored:
        """The nearest values that can be stored.

        Raises:
            TernarizeError: a value does not fit in fp16.
        """
        with_shift = recipe.grid == "dlt"
        scale, shift = _fp16(scale).clamp(min=SMALLEST_SCALE), _fp16(shift)
        if recipe.scale_bits == 16:
            return cls(scale, shift, None, with_shift)
        levels = encode_levels(scale, shift if with_shift else None, recipe.scale_bits, recipe.shift_bits)
        coded, coded_shift = decode_levels(levels, scale.shape[1])
        return cls(coded.float(), shift if coded_shift is None else coded_shift.float(), levels, with_shift)

    def per_column(self, in_features: int, group_size: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of every weight, [O, I]."""
        return expand_groups(self.scale, in_features, group_size), expand_groups(self.shift, in_features, group_size)

    def with_trits(self, trits: Tensor, group_size: int) -> TernaryTensor:
        """The weight that is stored; trits [O, I]."""
        shift = self.shift.half() if self.with_shift else None
        return TernaryTensor(trits.to(torch.int8), self.scale.half(), shift, group_size, self.levels)


def sweep(
    target: Tensor, trits: Tensor, scale: Tensor, shift: Tensor, moment: Tensor, order: Tensor, sweeps: int
) -> Tensor:
    """Coordinate descent on the trits: each column in turn takes the level that lowers the error most.

    With What = scale * trits + shift and P = (What - W) H, the best value for column j alone is What_j - P_j / H_jj.

    Args:
        target, trits, scale, shift: [O, I]; moment: H [I, I]; order: the columns' order of visit.
        sweeps: how often all columns are visited.

    Returns:
        trits [O, I]; the error under H is at most what it was.
    """
    moment = moment[order][:, order]
    difference = (scale * trits + shift - target)[:, order]
    slope = moment @ difference.t()  # P, [I, O]: a column is one contiguous row
    scale_IO, trits_IO = scale.t()[order].contiguous(), trits.t()[order].contiguous()
    position = scale_IO * trits_IO
    for _ in range(sweeps):
        for start in range(0, len(order), COLUMN_BLOCK):
            block = slice(start, start + COLUMN_BLOCK)
            inner, local = moment[block, block], slope[block].clone()
            before = position[block].clone()
            for j in range(len(local)):
                column = start + j
                best = position[column] - local[j] / inner[j, j]
                moved = nearest(best, scale_IO[column], 0.0) * scale_IO[column]
                local[j:].addr_(inner[j, j:], moved - position[column])
                position[column] = moved
            slope.addmm_(moment[:, block], position[block] - before)
    swept = torch.empty_like(trits)
    swept[:, order] = (position / scale_IO).round_().t()
    return swept


def _rows_that_gain(weight: Tensor, before: Tensor, after: Tensor, held_out: LinearStatistics | None) -> Tensor:
    """Which rows have a smaller error on held-out tokens; all of them where there are none. bool [O]."""
    if held_out is None:
        return torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    cross = held_out.second_moment if held_out.cross_moment is None else held_out.cross_moment
    # The difference of two ||X^ What' - X W'||^2 / N, in which H is symmetric and X W' is common to both.
    slope = (after + before) @ held_out.second_moment - 2 * (weight @ cross.t())
    return (slope * (after - before)).sum(1, dtype=torch.float64) < 0


def round_with_feedback(weight: Tensor, scale: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Choose trits column by column, each column's error pushed on to the columns not yet visited.

    Args:
        weight, scale, shift: [O, I], columns already in processing order; scale and shift one value per weight.
        factor: [I, I], upper Cholesky factor U of H^-1 = U' U in the same order.

    Returns:
        trits [O, I] in weight's dtype. GPTQ, algorithm 1, without its block-wise grid: groups are static.
    """
    remaining = weight.t().clone(memory_format=torch.contiguous_format)  # [I, O]: a column is one contiguous row
    scale, shift = scale.t().contiguous(), shift.t().contiguous()
    trits = torch.empty_like(remaining)
    for start in range(0, remaining.shape[0], COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, remaining.shape[0])
        block = remaining[start:stop].clone()
        error = torch.empty_like(block)
        inner = factor[start:stop, start:stop]
        for j in range(stop - start):
            column = start + j
            trits[column] = nearest(block[j], scale[column], shift[column])
            level = scale[column] * trits[column] + shift[column]
            error[j] = (block[j] - level) / inner[j, j]
            if j + 1 < stop - start:
                block[j + 1 :].addr_(inner[j, j + 1 :], error[j], alpha=-1)
        remaining[stop:].addmm_(factor[start:stop, stop:].t(), error, alpha=-1)
    return trits.t().contiguous()


def refit(
    target: Tensor, trits: Tensor, scale: Tensor, shift: Tensor, moment: Tensor, group_size: int, with_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve all scales and shifts of each row together, codes frozen, under the full second moment.

    Minimises (w - A p)' H (w - A p) per row, where p holds the row's 2G scales and shifts, and A [I, 2G] spreads them
    over the columns (trits in the scales' columns, ones in the shifts'). A ridge draws p to where it started, so a
    group whose trits are all alike, where scale and shift cannot be told apart, stays put.

    Args:
        target, trits: [O, I]; scale, shift: [O, G], the start; moment: H [I, I].
        with_shift: False solves the scales alone.

    Returns:
        scale [O, G], positive; shift [O, G]; trits [O, I], negated in the groups whose solved scale was negative.
    """
    out_features, in_features = trits.shape
    groups = scale.shape[1]
    unknowns = 2 * groups if with_shift else groups
    short = groups * group_size - in_features  # columns that the last group lacks
    moment = F.pad(moment, (0, short, 0, short)) if short else moment
    ones_moment = sum_groups(moment, group_size)  # H 1_g, [I, G]
    scales, shifts = torch.empty_like(scale), shift.clone()
    chunk = max(1, min(REFIT_ROWS, REFIT_FLOATS // unknowns**2))
    for rows in torch.arange(out_features, device=trits.device).split(chunk):
        t, w = F.pad(trits[rows], (0, short)), F.pad(target[rows], (0, short))
        w_moment = w @ moment  # [R, I]
        right, start = sum_groups(w_moment * t, group_size), scale[rows]
        matrix = t.new_zeros(len(rows), unknowns, unknowns, dtype=torch.float64)  # the lower triangle of A' H A
        for group in range(groups):
            first = group * group_size
            own = slice(first, first + group_size)
            matrix[:, group:groups, group] = sum_groups(t[:, own] @ moment[own, first:] * t[:, first:], group_size)
            if with_shift:
                matrix[:, groups:, group] = t[:, own] @ ones_moment[own]
        if with_shift:
            matrix[:, groups:, groups:] = sum_groups(ones_moment.t(), group_size)
            right = torch.cat([right, sum_groups(w_moment, group_size)], dim=1)
            start = torch.cat([start, shift[rows]], dim=1)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        ridge = REFIT_RIDGE * diagonal.maximum(diagonal.mean(1, keepdim=True) * 1e-6 + 1e-30)
        diagonal += ridge
        # torch.linalg.solve is wrong for batches of 160 unknowns and more, with two threads (torch 2.13, MKL 2024.2).
        factor, fault = torch.linalg.cholesky_ex(matrix)
        solution = torch.cholesky_solve((right + ridge * start)[:, :, None], factor)[:, :, 0]
        solution = torch.where((fault == 0)[:, None], solution, start)  # a row that cannot be solved stays
        scales[rows] = solution[:, :groups].to(scale.dtype)
        if with_shift:
            shifts[rows] = solution[:, groups:].to(scale.dtype)
    negative = scales < 0
    flip = expand_groups(torch.where(negative, -1.0, 1.0).to(trits.dtype), in_features, group_size)
    return scales.abs().clamp(min=SMALLEST_SCALE), shifts, trits * flip


def correct_for_prefix(weight: Tensor, statistics: LinearStatistics, damped: Tensor, strength: float) -> Tensor:
    """The weight that makes up, from the student's inputs, for the error that the ternary prefix left in them.

    QEP, eq. 8: W* = W + strength * W (X - X^)' X^ (X^' X^)^-1, so W* X^ is near W X.
    """
    assert statistics.cross_moment is not None
    difference = statistics.cross_moment - statistics.second_moment  # X^' (X - X^) / N
    step = torch.cholesky_solve(difference @ weight.t(), torch.linalg.cholesky(damped))  # [I, O]
    return weight + strength * step.t()


def relative_error(weight: Tensor, fitted: Tensor, statistics: LinearStatistics | None) -> float:
    """||X^ What' - X W'||^2 / ||X W'||^2 over the calibration tokens, no unit; over the weights without statistics.

    Args:
        weight, fitted: float [O, I].
    """
    if statistics is None:
        return float((fitted - weight).square().sum() / weight.square().sum().clamp(min=1e-30))

    def energy(a: Tensor, moment: Tensor, b: Tensor) -> float:
        return float(((a @ moment) * b).sum(dtype=torch.float64))

    if statistics.cross_moment is None or statistics.teacher_energy is None:
        difference = fitted - weight
        own = energy(weight, statistics.second_moment, weight)
        return energy(difference, statistics.second_moment, difference) / max(own, 1e-30)
    own = statistics.teacher_energy
    squared = energy(fitted, statistics.second_moment, fitted) - 2 * energy(fitted, statistics.cross_moment, weight)
    return max(squared + own, 0.0) / max(own, 1e-30)


def inverse_factor(moment: Tensor) -> Tensor:
    """U [I, I], upper, with moment^-1 = U' U.

    Raises:
        TernarizeError: `moment` is not positive definite in float32.
    """
    lower, fault = torch.linalg.cholesky_ex(moment)
    if int(fault) == 0:
        upper, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(fault) == 0:
            return upper
    raise TernarizeError(
        f"the inputs' second moment [{moment.shape[0]}, {moment.shape[0]}] is not positive definite: too few "
        "calibration tokens, or the model's activations overflow. Raise calibration.samples, or damping."
    )


def _damp(moment: Tensor, damping: float) -> Tensor:
    """H with a share of its mean diagonal added, so that columns which never fire stay solvable."""
    mean = moment.diagonal().mean().clamp(min=1e-20)
    return moment + torch.diag(moment.new_full((moment.shape[0],), float(damping * mean)))


def _processing_order(moment: Tensor, order: str) -> Tensor:
    if order == "natural":
        return torch.arange(moment.shape[0], device=moment.device)
    return torch.argsort(moment.diagonal(), descending=True, stable=True)


def _fp16(value: Tensor) -> Tensor:
    """The value rounded to fp16, in float32.

    Raises:
        TernarizeError: it does not fit in fp16.
    """
    rounded = value.half()
    if not bool(torch.isfinite(rounded).all()):
        raise TernarizeError(
            f"a scale or shift of {float(value.abs().max()):.3g} does not fit in fp16 (largest 65504): "
            "the weight has extreme values. Add this linear to skip in the recipe."
        )
    return rounded.float()
