"""A ternarize folder that is not there yet: what a format would make of it is known before calibration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ternarize.budget import group_sizes
from ternarize.checkpoint import Checkpoint, read_config
from ternarize.export import find_targets
from ternarize.export.export import refuse_lossy
from ternarize.export.target import TernaryFolder
from ternarize.format import Layout
from ternarize.plan import Plan
from ternarize.recipe import Recipe
from ternarize.tensor import TernaryTensor, group_count


class PlannedFolder(TernaryFolder):
    """What a plan and its recipe will lead to, with random weights; one linear of each kind stands for all.

    Args:
        checkpoint: the source.
        plan, recipe: of the conversion. A budget may choose among several group sizes, and a format has to take all:
            their greatest common divisor stands for them.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, recipe: Recipe) -> None:
        shift = recipe.grid == "dlt"
        layout = Layout(
            blocks=plan.blocks,
            group_size=recipe.group_size,
            shift=shift,
            kept=tuple(plan.kept_linears),
            int8={name: 1.0 for name, (_, _, bits) in plan.tables.items() if bits == 8},
            int8_group_size=recipe.int8_group_size,
            int6={name: 1.0 for name, (_, _, bits) in plan.tables.items() if bits == 6},
        )
        self._checkpoint = checkpoint
        self._open(checkpoint.folder, read_config(checkpoint.folder), layout)
        if recipe.budget is not None:
            self.group_sizes = {name: math.gcd(*group_sizes(recipe, shape[1])) for name, shape in self.linears.items()}
        kinds: dict[tuple[int, ...], str] = {}
        for name, shape in self.linears.items():
            kinds.setdefault((*shape, self.group_sizes[name]), name)
        self.linears = {name: self.linears[name] for name in kinds.values()}

    def ternary(self, name: str) -> TernaryTensor:
        """Random trits, scales and shifts."""
        rows, columns = self.linears[name]
        generator = torch.Generator().manual_seed(0)
        groups = rows, group_count(columns, self.group_sizes[name])
        trits = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
        scale = torch.rand(groups, generator=generator) + 0.5
        shift = torch.randn(groups, generator=generator) / 4 if self.layout.shift else None
        return TernaryTensor(trits, scale.half(), None if shift is None else shift.half(), self.group_sizes[name])

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros."""
        return torch.zeros(self.shape(name), dtype=dtype or self.stored(name))

    def stored(self, name: str) -> torch.dtype:
        """The source's type."""
        return self.table_dtype if name in self.tables else self._checkpoint.source_dtype(name)


def check_before(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, formats: list[str], allow_lossy: bool) -> None:
    """Refuse formats that will not hold exactly what this recipe makes of this model.

    Raises:
        TernarizeError: an unknown format, or one that is not exact.
    """
    if not formats:
        return
    folder = PlannedFolder(checkpoint, plan, recipe)
    targets = find_targets(formats)
    refuse_lossy(targets, [target.check(folder) for target in targets], allow_lossy)
