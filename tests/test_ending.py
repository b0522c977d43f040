"""The last blocks learn once more: what changes, what does not; a run stopped there goes on to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import contents, make_checkpoint, make_recipe, read_tensors
from torch import nn

from ternarize import Recipe, conversion
from ternarize.calibration import finish_walk
from ternarize.checkpoint import Checkpoint
from ternarize.conversion import convert
from ternarize.errors import StoppedError
from ternarize.lesson import SampledHead, divergence, piecewise_mean
from ternarize.plan import make_plan
from ternarize.progress import Progress
from ternarize.report import Report

QUIET = Progress(quiet=True)
TUNE: dict[str, Any] = {"epochs": 1, "rate": 0.02, "level_rate": 0.03}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "source", num_hidden_layers=4)


def with_ending(text: Path, ending: int | str = 2, **changes: Any) -> Recipe:
    return make_recipe(text, tune=TUNE | {"ending": ending, "ending_epochs": 6.0, "ending_rate": 0.03} | changes)


@pytest.fixture(scope="module")
def ended(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ended") / "out"
    convert(source, output, with_ending(text), progress=QUIET)
    return output


@pytest.mark.parametrize(
    ("ending", "window", "blocks", "first"),
    [(4, 1, 30, 26), (0, 1, 30, 30), (40, 1, 30, 0), ("all", 1, 30, 0), ("all", 4, 6, 0), (5, 2, 30, 24), (3, 4, 6, 0)],
)
def test_where_it_begins(ending: Any, window: int, blocks: int, first: int) -> None:
    recipe = Recipe.from_dict({"tune": TUNE | {"ending": ending, "window": window}})
    assert recipe.tune.first_of_ending(blocks) == first
    assert Recipe.from_dict({"tune": {"ending": ending}}).tune.first_of_ending(blocks) == blocks  # nothing is tuned


@pytest.fixture(scope="module")
def plain(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without an ending."""
    output = tmp_path_factory.mktemp("plain") / "out"
    convert(source, output, with_ending(text, ending=0), progress=QUIET)
    return output


def test_it_lowers_the_divergence_from_the_teacher_and_leaves_the_other_blocks(ended: Path, plain: Path) -> None:
    report = Report.read(ended)
    *_, last = report.run["tune"]
    assert last["ending"]
    assert last["kept"]
    assert last["blocks"] == ["model.layers.2", "model.layers.3"]
    assert last["after"] < last["before"]
    # the gate measures the same windows with the student's own int8 head
    assert report.run["verdict"]["evaluation"]["kl"] == pytest.approx(last["after"], rel=0.1)
    assert report.run["verdict"]["evaluation"]["kl"] < Report.read(plain).run["verdict"]["evaluation"]["kl"]
    before, after = read_tensors(plain), read_tensors(ended)
    assert before.keys() == after.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in changed)
    assert not any(name.endswith("proj.weight") for name in changed)  # scales and shifts learn, codes do not


def test_all_blocks_can_learn_together(source: Path, text: Path, plain: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", with_ending(text, ending="all"), progress=QUIET)
    last = report.run["tune"][-1]
    assert last["blocks"] == [f"model.layers.{index}" for index in range(4)]
    assert last["kept"]
    assert last["after"] < last["before"]
    before, after = read_tensors(plain), read_tensors(tmp_path / "out")
    changed = {name.split(".")[2] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"0", "1", "2", "3"}


def test_a_step_looks_at_some_tokens_and_the_guard_at_all(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", vocab_size=400)  # the tokenizer has 64
    looked: set[tuple[int, bool]] = set()

    def watched(model: Any, *arguments: Any) -> torch.Tensor:
        logits = finish_walk(model, *arguments)
        looked.add((logits.shape[-1], logits.requires_grad))
        return logits

    reports = {}
    for drawn in (400, 48):
        looked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ternarize.lesson.DRAWN", drawn)
            patch.setattr("ternarize.ending.finish_walk", watched)
            report = convert(source, tmp_path / f"{drawn}", with_ending(text), progress=QUIET)
        reports[drawn] = report.run["tune"][-1]
        learnt_from = {width for width, learning in looked if learning}
        assert (400, False) in looked  # held out
        assert learnt_from == {400} if drawn == 400 else max(learnt_from) <= 64 + drawn
    everything, some = reports[400], reports[48]
    assert some["before"] == everything["before"]
    assert some["kept"]
    assert some["before"] - some["after"] > 0.8 * (everything["before"] - everything["after"])


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_sampled_head_estimates_what_the_whole_one_says(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 300, bias=bias)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    expected, hidden = (torch.randn(2, 40, 16, generator=generator) for _ in range(2))
    known = torch.arange(0, 300, 3)
    whole = divergence(head(expected), head(hidden))
    mass = head(expected).softmax(-1)[..., known].sum(-1)  # of the known tokens

    def estimates(drawn: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr("ternarize.lesson.DRAWN", drawn)
        sampled = SampledHead(head, known, seed=0)
        found, masses = [], []
        for _ in range(count):
            sampled.choose(some=True)
            assert head(hidden).shape == (2, 40, 100 + drawn)
            likely = sampled.weigh(head(expected))
            found.append(divergence(likely, sampled.weigh(head(hidden))))
            masses.append(likely.softmax(-1)[..., :100].sum(-1))
        sampled.choose(some=False)
        assert torch.equal(divergence(sampled.weigh(head(expected)), sampled.weigh(head(hidden))), whole)
        return torch.stack(found), torch.stack(masses)

    everything, masses = estimates(200, 1)  # all of the others are drawn
    torch.testing.assert_close(everything[0], whole)
    torch.testing.assert_close(masses[0], mass)
    some, masses = estimates(50, 200)
    torch.testing.assert_close(some.mean(), whole, rtol=0.02, atol=0)
    torch.testing.assert_close(masses.mean(0), mass, rtol=0.05, atol=0)
    assert some.std() < 0.1 * whole


@pytest.mark.parametrize(("shape", "at_once"), [((1, 7, 4), 3), ((3, 8, 4), 6), ((2, 5, 4), 1), ((2, 5, 4), 99)])
def test_a_mean_by_pieces_is_the_mean(shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ternarize.lesson.PIECE_TOKENS", at_once)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    seen: list[int] = []

    def loss(piece: torch.Tensor, part: slice) -> torch.Tensor:
        seen.append(piece.shape[0] * piece.shape[1])
        return (piece.square() * weight[:, part]).sum(-1).mean()

    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    (3 * piecewise_mean(inputs[0], loss)).backward()
    assert max(seen) <= max(at_once, shape[0])
    (3 * loss(inputs[1], slice(None))).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    with torch.no_grad():
        assert float(piecewise_mean(hidden, loss)) == pytest.approx(float(loss(hidden, slice(None))))


def test_it_is_taken_back_where_it_lost(source: Path, text: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "fitted", make_recipe(text), progress=QUIET)
    report = convert(
        source, tmp_path / "out", with_ending(text, rate=50.0, level_rate=50.0, ending_rate=50.0), progress=QUIET
    )
    *_, last = report.run["tune"]
    assert last["ending"]
    assert not last["kept"]
    assert not any(tuned["kept"] for tuned in report.run["tune"])
    fitted = read_tensors(tmp_path / "fitted")
    assert all(torch.equal(tensor, fitted[name]) for name, tensor in read_tensors(tmp_path / "out").items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_stopped_inside_or_behind_it_the_run_goes_on_to_the_same_bytes(family: str, text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", family)
    recipe = with_ending(text)
    convert(source, tmp_path / "whole", recipe, progress=QUIET)

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    for place in ("tune_ending", "_assemble"):
        output = tmp_path / place
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conversion, place, stop)
            with pytest.raises(StoppedError, match="2 blocks are safe"):
                convert(source, output, recipe, progress=QUIET)
        with pytest.MonkeyPatch.context() as patch:
            if place == "_assemble":  # what was finished is not done again
                patch.setattr(conversion, "tune_ending", stop)
            convert(source, output, recipe, resume=True, progress=QUIET)
        assert contents(output) == contents(tmp_path / "whole")


def test_blocks_without_a_ternary_linear_end_as_they_are(source: Path, text: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text, tune=TUNE | {"ending": 2}, skip=["model.layers.[23].*"])
    report = convert(source, tmp_path / "out", recipe, progress=QUIET)
    last = report.run["tune"][-1]
    assert (last["kept"], last["steps"]) == (False, 0)
    assert last["before"] == last["after"]


def test_the_plan_knows_of_it(source: Path, text: Path) -> None:
    without, small, large = (make_plan(Checkpoint(source), with_ending(text, ending=n)) for n in (0, 1, 4))
    assert without.peak_memory < small.peak_memory < large.peak_memory
    assert without.disk_bytes < small.disk_bytes < large.disk_bytes
