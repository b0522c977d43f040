"""Which windows are fitted to, which decide, which are random; and that a walk in bfloat16 fits as well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY

from ternarize import Recipe, calibration
from ternarize.calibration import batches, first_held_out, mix_random, rounded_products
from ternarize.conversion import convert
from ternarize.progress import Progress
from ternarize.recipe import Calibration


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


@pytest.mark.parametrize(("windows", "length", "count"), [(64, 512, 14), (20, 512, 4), (33, 100, 7), (3, 600, 0)])
def test_random_windows_are_a_share_of_those_that_are_fitted_to(
    windows: int, length: int, count: int, llama: Path
) -> None:
    ids = torch.full((windows, length), 7)
    wanted = Calibration(random=0.25, held_out=0.125)
    mixed = mix_random(ids, wanted, llama, VOCABULARY)
    random = (mixed != ids).any(1).nonzero().flatten()
    parts = batches(ids)
    assert len(random) == count
    assert all(number < sum(map(len, parts[: first_held_out(len(parts), 0.125)])) for number in random.tolist())
    assert (ids == 7).all()
    assert torch.equal(mixed, mix_random(ids, wanted, llama, VOCABULARY))
    assert not count or not torch.equal(mixed, mix_random(ids, replace(wanted, seed=1), llama, VOCABULARY))


def test_without_a_share_no_window_is_random_and_no_tokenizer_is_read(tmp_path: Path) -> None:
    ids = torch.full((8, 16), 7)
    assert mix_random(ids, Calibration(), tmp_path, VOCABULARY) is ids


@pytest.mark.parametrize("columns", [3, 8, 20, 64])
def test_a_symmetric_sum_by_halves_is_the_whole_sum(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "GRAM_COLUMNS", columns)
    parts = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(20, 20, dtype=torch.float64)
    for part in parts:
        calibration._add_gram(total, part)
    torch.testing.assert_close(calibration._mirror(total), sum(part.t() @ part for part in parts))


@pytest.mark.parametrize("fast", [True, False])
def test_sums_over_inputs_are_rounded_where_products_are_and_the_setting_is_put_back(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "autocast_enabled", lambda device: fast)
    before = torch.get_float32_matmul_precision()
    with rounded_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == ("medium" if fast else before)
    assert torch.get_float32_matmul_precision() == before
