"""On a CUDA device a model is converted, distilled, measured and run as on a CPU, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint, make_recipe

from ternarize import Recipe, conversion, load, text
from ternarize import distill as distillation
from ternarize.conversion import convert
from ternarize.evaluate import load_any
from ternarize.gradients import Gradients
from ternarize.in_place import ternarize
from ternarize.progress import Progress
from ternarize.refine import distill_again
from ternarize.report import Report
from ternarize.text import self_windows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QUIET = Progress(quiet=True)
GPU = "cuda"
LEARNING: dict[str, Any] = {"tune": {"epochs": 2, "ending": "all"}, "distill": {"epochs": 2, "samples": 24, "check": 4}}


class Killed(BaseException):
    """Ends a run as SIGKILL would."""


@pytest.fixture(params=["bfloat16", "float32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What products are rounded to, as a GPU has it and as the CPU's tests do."""
    if request.param == "bfloat16":
        monkeypatch.delenv("TERNARIZE_BFLOAT16")
    return str(request.param)


def held_out_kl(report: Report) -> float:
    return float(report.run["verdict"]["evaluation"]["kl"])


@pytest.mark.parametrize(
    "changes", [{}, LEARNING, {"grid": "symmetric", "scale_bits": 16, "shift_bits": 16}, {"budget": 2.6}]
)
def test_a_conversion_is_as_good_as_on_a_cpu(
    llama: Path, text: Path, tmp_path: Path, products: str, changes: dict[str, Any]
) -> None:
    recipe = make_recipe(text, **changes)
    own = convert(llama, tmp_path / "gpu", recipe, device=GPU, progress=QUIET)
    other = convert(llama, tmp_path / "cpu", recipe, progress=QUIET)
    assert own.bits_per_ternary_weight == other.bits_per_ternary_weight
    assert own.mean_error == pytest.approx(other.mean_error, rel=0.1)
    assert held_out_kl(own) == pytest.approx(held_out_kl(other), rel=0.1)
    assert own.run["device"]
    assert own.run["device_memory"] > 0


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "qwen3_moe"])
def test_other_families_are_converted_there(family: str, text: Path, tmp_path: Path, products: str) -> None:
    source = make_checkpoint(tmp_path / family, family)
    report = convert(source, tmp_path / "out", make_recipe(text, tune={"epochs": 1}), device=GPU, progress=QUIET)
    assert 0 < held_out_kl(report) < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through", [{"device_map": "cuda"}, {"device_map": "auto"}, {}])
def test_a_model_computes_there_what_it_does_on_a_cpu(
    ternary: Path, through: dict[str, Any], dtype: torch.dtype
) -> None:
    expected, _ = load(ternary, dtype=torch.float32)
    model, _ = load(ternary, dtype=dtype, **through)
    model = model.to(GPU)  # type: ignore[arg-type]
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        own = model(input_ids=ids.to(GPU)).logits
        other = expected(input_ids=ids).logits
    assert own.device.type == GPU
    near = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert float((own.cpu().float() - other).norm() / other.norm()) < near


def test_a_model_writes_there_with_its_cache(ternary: Path) -> None:
    model, _ = load(ternary, dtype=torch.float32, device_map=GPU)
    ids = torch.arange(3, 13)[None].to(GPU)
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    cached, whole = (model.generate(ids, use_cache=use, **arguments) for use in (True, False))  # type: ignore[operator]
    assert torch.equal(cached, whole)


def test_a_loaded_model_is_made_ternary_where_it_lies(llama: Path, recipe: Recipe) -> None:
    model, tokenizer = load_any(llama, GPU, torch.float32), text.load_tokenizer(llama)
    made = ternarize(model, tokenizer, recipe, progress=QUIET)
    assert {parameter.device.type for parameter in made.parameters()} == {GPU}
    assert {buffer.device.type for buffer in made.buffers()} == {GPU}
    assert made(input_ids=torch.arange(3, 43, device=GPU)[None]).logits.isfinite().all()


def test_a_conversion_that_was_stopped_goes_on(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(text, **LEARNING | {"distill": {"epochs": 2, "samples": 40, "check": 4}})
    expected = convert(llama, tmp_path / "whole", recipe, device=GPU, progress=QUIET)

    def stop_after(calls: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise Killed
            return original(*arguments)

        return run

    for module, name, calls in ((conversion, "convert_window", 1), (distillation, "step_optimizer", 6)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop_after(calls, getattr(module, name)))
            with pytest.raises(Killed):
                convert(llama, tmp_path / "cut", recipe, device=GPU, resume=True, progress=QUIET)
    report = convert(llama, tmp_path / "cut", recipe, device=GPU, resume=True, progress=QUIET)
    assert [tokens for tokens, _ in report.run["distill"]["curve"]] == [
        tokens for tokens, _ in expected.run["distill"]["curve"]
    ]
    assert held_out_kl(report) == pytest.approx(held_out_kl(expected), rel=0.02)


@pytest.mark.parametrize("changes", [["distill.checkpointing=true"], ["distill.off=0.1", "distill.top=8"]])
def test_a_finished_folder_is_distilled_there(
    ternary: Path, llama: Path, tmp_path: Path, products: str, changes: list[str]
) -> None:
    settings = ["distill.samples=40", "distill.check=3", "distill.rate=0.02", "distill.level_rate=0.02", *changes]
    report = distill_again(ternary, llama, tmp_path / "out", settings, device=GPU, progress=QUIET)
    assert report is not None
    assert report.run["distill"]["after"] < report.run["distill"]["before"]


def test_replayed_gradients_are_those_that_are_computed() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8, device=GPU))
    unused = torch.nn.Parameter(torch.zeros(2, device=GPU))

    def loss(windows: torch.Tensor, _numbers: list[int]) -> torch.Tensor:
        return (windows.float() * weight).sin().sum()

    replayed = Gradients(loss, [weight, unused])
    for seed in range(3):
        windows = torch.arange(16, device=GPU).view(2, 8) * seed
        replayed(windows, [])
        assert replayed.graph is not None
        assert weight.grad is not None
        computed = (windows * (windows.float() * weight.detach()).cos()).sum(0)
        assert torch.allclose(weight.grad, computed, atol=1e-5)
        assert unused.grad is None


def test_a_loss_that_looks_at_values_is_computed_anew() -> None:
    weight = torch.nn.Parameter(torch.ones(8, device=GPU))
    computed = Gradients(lambda windows, _: weight.sum() * int(windows.max()), [weight])
    for seed in (2, 3):
        computed(torch.full((2, 8), seed, device=GPU), [])
        assert computed.graph is None
        assert weight.grad is not None
        assert weight.grad.tolist() == [seed] * 8


@pytest.mark.parametrize(("family", "recorded"), [("llama", True), ("gemma3_text", True), ("qwen3_moe", False)])
def test_a_distillation_by_a_graph_is_the_one_without(
    family: str, recorded: bool, text: Path, tmp_path: Path, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / family, family)
    convert(source, tmp_path / "ternary", make_recipe(text), progress=QUIET)
    made: list[Gradients] = []
    monkeypatch.setattr(distillation, "Gradients", lambda *given: made.append(Gradients(*given)) or made[-1])
    settings = ["distill.samples=40", "distill.check=3", "distill.off=0.1", "distill.rate=0.01", "distill.epochs=2"]
    arguments = (tmp_path / "ternary", source)
    own = distill_again(*arguments, tmp_path / "own", settings, device=GPU, progress=QUIET)
    monkeypatch.setattr(Gradients, "_record", lambda *_: None)
    other = distill_again(*arguments, tmp_path / "other", settings, device=GPU, progress=QUIET)
    assert own is not None
    assert other is not None
    assert [gradients.graph is not None for gradients in made] == [recorded, False]
    assert own.run["distill"]["curve"] == [pytest.approx(point, rel=0.05) for point in other.run["distill"]["curve"]]


def test_a_model_writes_its_own_text_there(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERNARIZE_CACHE", str(tmp_path))
    ids = self_windows(llama, 6, 24, 0, QUIET, GPU)
    assert ids.shape == (6, 24)
    assert ids.device.type == "cpu"
    assert torch.equal(self_windows(llama, 6, 24, 0, QUIET, GPU), ids)  # from the cache
    assert not torch.equal(self_windows(llama, 6, 24, 0, QUIET), ids)  # a CPU draws others


def test_the_commands_run_there(
    ternary: Path, llama: Path, text: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    some = ("--set", "calibration.samples=8", "--set", "calibration.length=32")
    for command in (
        ("evaluate", ternary, "--teacher", llama, "--text", text, "--length", "32", "--device", GPU, "--no-save"),
        ("generate", ternary, "Once upon a time", "--device", GPU, "-n", "4"),
        ("bench", ternary, "--device", GPU, "--prompt", "8", "-n", "4", "--rounds", "1"),
        ("convert", llama, "-o", tmp_path / "out", "--recipe", "fast", "--text", text, *some, "--device", GPU),
    ):
        code, out, err = run(*command)
        assert code == 0, err
        assert out
    assert torch.cuda.get_device_name() in out
