"""Walking in bfloat16: where a machine has it, the fit it leads to is as good."""

from __future__ import annotations

from pathlib import Path

import pytest

from ternarize import Recipe, calibration
from ternarize.calibration import first_held_out
from ternarize.conversion import convert
from ternarize.progress import Progress


def test_a_walk_in_bfloat16_fits_as_well(
    llama: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = convert(llama, tmp_path / "float32", recipe, progress=Progress(quiet=True))
    monkeypatch.setattr(calibration, "autocast_enabled", lambda device: True)  # as on a machine that has it
    rough = convert(llama, tmp_path / "bfloat16", recipe, progress=Progress(quiet=True))
    assert rough.mean_error != exact.mean_error
    assert rough.mean_error == pytest.approx(exact.mean_error, rel=0.05)


@pytest.mark.parametrize(
    ("batches", "share", "first"), [(8, 0.125, 7), (8, 0.0, 8), (8, 0.5, 4), (9, 0.125, 7), (1, 0.5, 1), (0, 0.5, 0)]
)
def test_the_last_batches_are_held_out_and_one_is_always_fitted_to(batches: int, share: float, first: int) -> None:
    assert first_held_out(batches, share) == first
