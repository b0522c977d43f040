"""The whole student learns from the whole teacher: it gets nearer, resumes, stops in time, and runs under torchrun."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, contents, make_checkpoint, make_model, make_recipe, read_tensors
from torch import Tensor

from ternarize import Recipe, conversion, refine
from ternarize import distill as distillation
from ternarize import lesson as lesson_module
from ternarize.conversion import convert
from ternarize.distill import distill
from ternarize.errors import StoppedError, TernarizeError
from ternarize.evaluate import load_any
from ternarize.gate import HELD_OUT
from ternarize.lesson import Lesson, Reader, divergence, note_bytes
from ternarize.progress import Progress
from ternarize.recipe import Distillation
from ternarize.refine import distill_again
from ternarize.report import Report
from ternarize.tuning import off_loss
from ternarize.workspace import Workspace

QUIET = Progress(quiet=True)
SETTINGS = ["distill.samples=20", "distill.check=3", "distill.rate=0.02", "distill.level_rate=0.02"]


class Killed(BaseException):
    """Ends a run as SIGKILL would."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def models(folder: Path) -> tuple[Any, Any]:
    return load_any(folder, "cpu", torch.float32), make_model("llama")


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_divergence_is_kl_from_teacher_to_student() -> None:
    teacher, student = random(2, 5, 11), random(2, 5, 11, seed=1)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert float(divergence(teacher, student)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(teacher, student, 11)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(teacher, teacher)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("at_once", [2**21, 33, 1], ids=["all rows", "three rows", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_has_the_gradient_of_its_formula(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ternarize.lesson.LOGITS_AT_ONCE", at_once)
    teacher, student = random(2, 5, 11).to(dtype), random(2, 5, 11, seed=1).to(dtype).requires_grad_()
    log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    mean = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (expected,) = torch.autograd.grad(3 * mean, student)
    assert float(divergence(teacher, student.detach())) == pytest.approx(float(mean.detach()), rel=1e-5)
    (found,) = torch.autograd.grad(3 * divergence(teacher, student), student)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_tokens_beyond_the_likeliest_count_as_one_outcome() -> None:
    teacher, student = random(1, 7, 30), random(1, 7, 30, seed=1)
    p, q = teacher[0].double().softmax(-1), student[0].double().softmax(-1)
    total = 0.0
    for row in range(7):
        likeliest = p[row].argsort(descending=True)[:4].tolist()
        total += sum(float(p[row, i] * (p[row, i] / q[row, i]).log()) for i in likeliest)
        rest_p, rest_q = 1 - float(p[row, likeliest].sum()), 1 - float(q[row, likeliest].sum())
        total += rest_p * math.log(rest_p / rest_q)
    assert float(divergence(teacher, student, 4)) == pytest.approx(total / 7, rel=1e-4)
    assert total / 7 <= float(divergence(teacher, student)) + 1e-6


# -- a run -------------------------------------------------------------------------------------------------------------


def ids(count: int = 24, length: int = 32) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("changes", [{}, {"off": 0.2}, {"codes": "low-rank", "rank": 4}, {"checkpointing": True}])
def test_a_student_gets_nearer_to_its_teacher(ternary: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    student, teacher = models(ternary)
    settings = Distillation(epochs=1, batch=4, check=10, rate=5e-3, level_rate=5e-3, **changes)
    done = distill(student, teacher, "model.layers", ids(256), settings, 0.0625, tmp_path / "state", QUIET)
    assert done.after < 0.97 * done.before
    assert done.after == min(kl for _, kl in done.curve)
    assert (done.steps, done.tokens) == (60, 60 * 4 * 32)
    held = ids(256)[-16:]
    with torch.no_grad():
        kl = divergence(teacher(input_ids=held).logits, student(input_ids=held).logits)
    assert float(kl) == pytest.approx(done.after, rel=0.1)  # the packed student is the one that was measured


def test_a_run_that_only_loses_leaves_the_student_as_it_was(ternary: Path, tmp_path: Path) -> None:
    student, teacher = models(ternary)
    before = {name: t.clone() for name, t in student.state_dict().items()}
    settings = Distillation(epochs=9, batch=2, check=1, patience=3, rate=50.0, level_rate=50.0)
    done = distill(student, teacher, "model.layers", ids(), settings, 0.125, tmp_path / "state", QUIET)
    assert done.after == done.before
    assert done.steps == 3  # patience
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("changes", [{}, {"top": 8, "off": 0.1}])
def test_a_run_that_was_killed_goes_on_from_its_last_check(
    ternary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings = Distillation(epochs=2, batch=2, check=4, rate=1e-2, **changes)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, teacher = models(ternary)
    expected = distill(whole, teacher, "model.layers", ids(), settings, 0.125, tmp_path / "a" / "state", QUIET)

    taken = 0

    def step(*arguments: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == 11:
            raise Killed
        original(*arguments)

    original = distillation.step_optimizer
    cut, teacher = models(ternary)
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "step_optimizer", step)
        with pytest.raises(Killed):
            distill(cut, teacher, "model.layers", ids(), settings, 0.125, tmp_path / "b" / "state", QUIET)
    again, teacher = models(ternary)
    done = distill(again, teacher, "model.layers", ids(), settings, 0.125, tmp_path / "b" / "state", QUIET)
    assert done.curve == expected.curve
    state, reference = again.state_dict(), whole.state_dict()
    assert all(torch.equal(state[name], reference[name]) for name in reference)


@pytest.mark.parametrize("settings", [{"check": 4}, {"check": 3}, {"check": 2, "patience": 2, "rate": 50.0}])
def test_a_finished_run_gives_the_same_student_again_without_a_step(
    ternary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    given = Distillation(**{"epochs": 1, "batch": 2, "rate": 1e-2} | settings)
    first, teacher = models(ternary)
    expected = distill(first, teacher, "model.layers", ids(), given, 0.125, tmp_path / "state", QUIET)
    size = (tmp_path / "state").stat().st_size
    monkeypatch.setattr(distillation, "step_optimizer", None)
    again, teacher = models(ternary)
    done = distill(again, teacher, "model.layers", ids(), given, 0.125, tmp_path / "state", QUIET)
    assert replace(done, seconds=0) == replace(expected, seconds=0)
    state, reference = again.state_dict(), first.state_dict()
    assert all(torch.equal(state[name], reference[name]) for name in reference)
    assert (tmp_path / "state").stat().st_size == size


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_a_model_is_asked_in_two_steps_for_what_it_says_in_one(ternary: Path, off: float) -> None:
    """The loss goes from piece to piece of the tokens, and its gradient with it."""
    student, teacher = models(ternary)
    windows, depths = ids(4, 100), [1, 2] if off else []
    lesson = Lesson(Reader(student, "model.layers"), Reader(teacher, "model.layers"), depths, off)
    norm = student.model.norm.weight.requires_grad_()
    block = student.model.layers[0].input_layernorm.weight.requires_grad_()
    (own, other) = (m(input_ids=windows, output_hidden_states=True) for m in (student, teacher))
    expected = divergence(other.logits.detach(), own.logits)
    for depth in depths:
        expected = expected + off / 2 * off_loss(own.hidden_states[depth], other.hidden_states[depth].detach())
    found = lesson.loss(windows, [])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*(torch.autograd.grad(loss, block) for loss in (found, expected)), rtol=1e-4, atol=1e-7)
    assert norm.grad is None


def test_hidden_states_are_had_without_the_logits_of_all_tokens(ternary: Path) -> None:
    seen: list[int] = []
    for model in models(ternary):  # the student's own forward is what `decoder` put there
        model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
        Reader(model, "model.layers").hidden(ids(2), [])
    assert seen == [1, 1]


class Asked(Exception):
    """The teacher was asked when its answer should have been noted."""


def test_what_the_teacher_says_is_noted_once_and_read_again(
    ternary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = models(ternary)
    windows = ids(4)
    plain = Lesson(Reader(student, "model.layers"), Reader(teacher, "model.layers"), [1, 2], 0.1)
    noting = replace(plain, notes=tmp_path)

    def loss(lesson: Lesson, *order: int) -> float:
        return lesson.loss(windows[list(order)], list(order)).item()

    assert loss(noting, 3, 1, 0, 2) == pytest.approx(loss(plain, 3, 1, 0, 2), rel=2e-3)  # 16 bits
    headers = sum(file.stat().st_size for file in tmp_path.iterdir()) - note_bytes(windows.numel(), 32, 2)
    assert 0 < headers < 4 * 400

    def refuse(*_: Any) -> None:
        raise Asked

    monkeypatch.setattr(noting.teacher, "hidden", refuse)
    assert loss(noting, 2, 0, 1, 3) == pytest.approx(loss(noting, 3, 1, 0, 2), rel=1e-6)
    with pytest.raises(Asked):
        noting.loss(windows[:1], [7])


@pytest.mark.parametrize(("epochs", "free", "noted"), [(2, 1e12, 22), (1, 1e12, 0), (2, 1e3, 0)])
def test_notes_are_kept_where_they_spare_something_and_fit(
    ternary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: float, free: float, noted: int
) -> None:
    student, teacher = models(ternary)
    settings = Distillation(epochs=epochs, batch=2, check=4, off=0.1)
    written: list[Path] = []
    original = lesson_module.write_tensors
    monkeypatch.setattr(lesson_module, "write_tensors", lambda path, t: (written.append(path), original(path, t)))
    usage = shutil.disk_usage(tmp_path)._replace(free=int(free))
    monkeypatch.setattr(distillation.shutil, "disk_usage", lambda _: usage)
    done = distill(student, teacher, "model.layers", ids(), settings, 0.0625, tmp_path / "state", QUIET)
    assert done.steps == 11 * epochs
    assert len(written) == len(set(written)) == noted  # each window once, in two epochs of another order
    assert [path.name for path in tmp_path.iterdir()] == ["state"]  # no notes are left behind


def test_notes_are_read_in_the_teachers_type(text: Path, tmp_path: Path) -> None:
    """Gemma's norm keeps the type that it is given, and its head then wants that of its weight."""
    source = make_checkpoint(tmp_path / "gemma", "gemma3_text")
    convert(source, tmp_path / "ternary", make_recipe(text), progress=QUIET)
    report = distill_again(
        tmp_path / "ternary", source, tmp_path / "out", [*SETTINGS, "distill.epochs=2"], progress=QUIET
    )
    assert report is not None
    assert report.run["distill"]["after"] < report.run["distill"]["before"]


def test_a_time_budget_ends_the_run(ternary: Path, tmp_path: Path) -> None:
    student, teacher = models(ternary)
    settings = Distillation(epochs=100_000, batch=2, check=50, patience=10_000)
    started = time.monotonic()
    done = distill(student, teacher, "model.layers", ids(), settings, 0.125, tmp_path / "state", QUIET, budget=4.0)
    assert 1.0 < time.monotonic() - started < 20.0
    assert done.steps > 0
    assert done.after <= done.before


def test_too_little_text_is_refused(ternary: Path, tmp_path: Path) -> None:
    student, teacher = models(ternary)
    with pytest.raises(TernarizeError, match="fewer than one step of 16"):
        distill(student, teacher, "model.layers", ids(4), Distillation(epochs=1, batch=16), 0.5, tmp_path / "s", QUIET)


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def best(recipe: Recipe) -> Recipe:
    return recipe.with_settings([*SETTINGS, "distill.epochs=2", "tune.epochs=1"])


def test_a_conversion_that_ends_with_distillation(llama: Path, best: Recipe, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "best", best, progress=QUIET)
    without = convert(llama, tmp_path / "tuned", replace(best, distill=Distillation()), progress=QUIET)
    assert len(report.run["tune"]) == 2
    cards = [(tmp_path / name / "README.md").read_text() for name in ("best", "tuned")]
    assert ["before the distillation" in card for card in cards] == [True, False]
    assert report.run["distill"]["after"] < report.run["distill"]["before"]
    assert report.output_bytes == without.output_bytes
    changed = read_tensors(tmp_path / "best")
    before = read_tensors(tmp_path / "tuned")
    assert changed.keys() == before.keys()
    different = {name for name in before if not torch.equal(before[name], changed[name])}
    assert different
    assert all(name.rpartition(".")[2] in ("weight", "levels") for name in different)
    student = load_any(tmp_path / "best", "cpu", torch.float32)
    assert report.linears[0].zero_share == pytest.approx(
        student.get_submodule(report.linears[0].name).to_tensor().zero_share
    )


def test_a_conversion_stopped_while_distilling_resumes(
    llama: Path, best: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(llama, tmp_path / "whole", best, progress=QUIET)
    original = distillation._Run.check

    def check(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if self.step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distillation._Run, "check", check)
        with pytest.raises(StoppedError, match="--resume"):
            convert(llama, tmp_path / "cut", best, progress=QUIET)
    assert (tmp_path / "cut.partial" / "fitted.json").exists()  # the run that goes on may have a time budget
    fitted = monkeypatch.setattr(conversion, "convert_window", None)
    assert fitted is None
    convert(llama, tmp_path / "cut", best, resume=True, progress=QUIET)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("changed", [False, True])
def test_a_distillation_is_not_lost_by_what_comes_behind_it(
    llama: Path, best: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    convert(llama, tmp_path / "whole", best, progress=QUIET)

    def killed(*_: Any) -> None:
        raise Killed

    own = tmp_path / "text.txt"
    shutil.copy(best.calibration.text[0], own)
    recipe = best.with_text([str(own)])
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "judge", killed)
        with pytest.raises(Killed):
            convert(llama, tmp_path / "cut", recipe, progress=QUIET)
    if changed:
        own.write_text("another text, of which nothing may be learnt any more")
    monkeypatch.setattr(distillation, "step_optimizer", None)
    convert(llama, tmp_path / "cut", recipe, resume=True, progress=QUIET)
    cut, whole = read_tensors(tmp_path / "cut"), read_tensors(tmp_path / "whole")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_other_mistakes_leave_a_distillation_that_has_begun(
    ternary: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: Any) -> None:
        raise TernarizeError("something else is wrong")

    with monkeypatch.context() as patch:
        patch.setattr(refine, "rewrite_tensors", mistake)
        with pytest.raises(TernarizeError, match="something else"):
            distill_again(ternary, llama, tmp_path / "out", SETTINGS, progress=QUIET)
    monkeypatch.setattr(distillation, "step_optimizer", None)
    report = distill_again(ternary, llama, tmp_path / "out", SETTINGS, resume=True, progress=QUIET)
    assert report is not None
    assert report.run["distill"]["steps"] > 0


def test_biases_stay_as_the_source_has_them(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "qwen2")
    make_model("qwen2").bfloat16().save_pretrained(source)
    convert(source, tmp_path / "fitted", make_recipe(text), progress=QUIET)
    report = distill_again(tmp_path / "fitted", source, tmp_path / "out", SETTINGS, progress=QUIET)
    assert report is not None
    before, after = read_tensors(tmp_path / "fitted"), read_tensors(tmp_path / "out")
    biases = [name for name in before if name.endswith(".bias")]
    assert biases
    assert all(torch.equal(before[name], after[name]) for name in biases)
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    assert report.output_bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


def test_a_time_budget_is_for_all_runs_together(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "out")
    work.open({})
    work.started -= 40  # seconds of fit and tune
    assert work.fitted() == pytest.approx(40, abs=5)
    work.started -= 100  # of the distillation
    work.stopped("stopped")
    again = Workspace(tmp_path / "out", resume=True)
    again.open({})
    again.started -= 7  # of walking through what is there
    assert again.spent() == pytest.approx(147, abs=5)
    assert again.fitted() == work.fitted()


def test_no_time_left_means_no_distillation(llama: Path, best: Recipe, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "out", best, budget=1.0, progress=QUIET)
    assert "distill" not in report.run
    assert report.run["verdict"]["word"] in ("close", "weak", "collapsed")


def test_a_finished_folder_can_be_distilled(ternary: Path, llama: Path, tmp_path: Path) -> None:
    before = contents(ternary)
    report = distill_again(ternary, llama, tmp_path / "out", SETTINGS, progress=QUIET)
    assert report is not None
    assert report.run["distill"]["after"] < report.run["distill"]["before"]
    assert contents(ternary) == before
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").distill.epochs == 1
    assert Report.read(tmp_path / "out").run["distill"]["steps"] == report.run["distill"]["steps"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("samples", "measured"), [(16, 2), (80, 8)])
def test_what_was_learnt_from_is_not_called_held_out(
    samples: int, measured: int, ternary: Path, llama: Path, tmp_path: Path
) -> None:
    settings = [*SETTINGS, f"distill.samples={samples}", "calibration.held_out=0.125"]
    report = distill_again(ternary, llama, tmp_path / "out", settings, progress=QUIET)
    assert report is not None
    evaluation = report.run["verdict"]["evaluation"]
    assert (evaluation["text"], evaluation["windows"]) == (HELD_OUT, measured)


def test_two_processes_under_torchrun_share_the_work(ternary: Path, llama: Path, tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "ternarize.cli", "distill", str(ternary), "--teacher", str(llama)]
    command += ["-o", str(tmp_path / "out"), "--json", *(part for s in SETTINGS for part in ("--set", s))]
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ, timeout=240)
    assert ran.returncode in (0, 5), ran.stderr
    done = Report.read(tmp_path / "out").run["distill"]
    assert done["after"] < done["before"]
    assert done["tokens"] == done["steps"] * 2 * 2 * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
