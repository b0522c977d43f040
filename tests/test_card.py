"""The model card: right for every layout, with what the Hub reads on top, and the licence of what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny import copy_folder, make_checkpoint, make_recipe

from ternarize import Recipe
from ternarize.conversion import convert
from ternarize.hub import save_report
from ternarize.progress import Progress
from ternarize.report import Report
from ternarize.sources import describe

QUIET = Progress(quiet=True)
ROW = {"text": "wiki.txt", "windows": 2, "length": 32, "tokens": 62, "perplexity": 71.25, "teacher_perplexity": 19.5}
ROW |= {"kl": 1.25, "agreement": 0.45}


def card_after(folder: Path, tmp_path: Path, base: dict[str, Any] | None = None, **run: Any) -> ModelCard:
    """The card of a copy whose report says more."""
    copy = copy_folder(folder, tmp_path / "copy")
    report = Report.read(copy)
    report.run.update(run)
    report.base.update(base or {})
    save_report(copy, report)
    return ModelCard((copy / "README.md").read_text())


@pytest.mark.parametrize(
    ("settings", "formula", "levels"),
    [
        (
            {"grid": "symmetric", "scale_bits": 16, "shift_bits": 16},
            "`scale * trit`,",
            "one scale of 16 bits for each group of 12 columns",
        ),
        (
            {"grid": "dlt", "scale_bits": 16, "shift_bits": 16},
            "`scale * trit + shift`,",
            "one scale and shift of 16 bits for each group of 12 columns",
        ),
        ({"grid": "symmetric", "scale_bits": 4, "shift_bits": 4}, "`scale * trit`,", "one scale of 4 bits"),
        ({"grid": "dlt", "scale_bits": 8, "shift_bits": 4}, "+ shift`,", "one scale and shift of 8 bits and 4 bits"),
        ({"grid": "symmetric", "group_size": None}, "`scale * trit`,", "bits for each row"),
    ],
)
def test_formula_and_levels_are_those_of_the_layout(
    settings: dict[str, Any], formula: str, levels: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    convert(llama, tmp_path / "out", make_recipe(text, **settings), progress=QUIET)
    card = (tmp_path / "out" / "README.md").read_text()
    assert formula in card
    assert levels in card
    assert ("shift" in card.split("## Make it again")[0]) == (settings["grid"] == "dlt")


def test_metadata_says_what_the_hub_asks_for(ternary: Path, tmp_path: Path) -> None:
    base = {
        "name": "you/tiny",
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE",
        "language": ["en"],
    }
    data = card_after(ternary, tmp_path, base, evaluation=[ROW]).data.to_dict()
    assert {key: data[key] for key in ("base_model", "base_model_relation", "library_name", "pipeline_tag")} == {
        "base_model": "you/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny", "LICENSE")
    assert data["language"] == ["en"]
    assert data["tags"] == ["ternarize", "ternary"]
    (index,) = data["model-index"]
    assert index["name"] == "tiny, ternary"
    found = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert found == {"perplexity": 71.25, "kl": 1.25, "agreement": 0.45}
    assert {result["dataset"]["name"] for result in index["results"]} == {"wiki.txt"}


def test_base_that_is_not_on_the_hub_is_not_claimed(ternary: Path) -> None:
    data = ModelCard((ternary / "README.md").read_text()).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "model-index", "model_name"} & set(data)


def test_figures_without_a_value_are_left_out_of_the_metadata(ternary: Path, tmp_path: Path) -> None:
    rows = [ROW | {"kl": None, "agreement": None, "perplexity": float("inf")}]
    card = card_after(ternary, tmp_path, evaluation=rows)
    assert "model-index" not in card.data.to_dict()
    assert "beyond counting" in card.text


def test_unmeasured_model_shows_what_the_gate_saw(ternary: Path, tmp_path: Path) -> None:
    text = (ternary / "README.md").read_text()
    gate = Report.read(ternary).run["verdict"]["evaluation"]
    assert f"| {gate['teacher_perplexity']:.2f} | {gate['perplexity']:.2f} |" in text
    assert "calibration text that it was fitted to" in text
    assert "calibration text that it was fitted to" not in card_after(ternary, tmp_path, evaluation=[ROW]).text


def test_commands_are_those_that_were_typed(ternary: Path, tmp_path: Path) -> None:
    assert "ternarize convert" in (ternary / "README.md").read_text()
    commands = ["ternarize convert a -o b --recipe best", "ternarize distill b --teacher a -o c"]
    assert "```bash\n" + "\n".join(commands) + "\n```" in card_after(ternary, tmp_path, commands=commands).text


def test_collapsed_and_gated_are_said(ternary: Path, tmp_path: Path) -> None:
    verdict = {"word": "collapsed", "why": "it repeats itself", "evaluation": None, "text": ""}
    text = card_after(ternary, tmp_path, {"gated": True}, verdict=verdict).text
    assert "**This model has collapsed and is of no use:** it repeats itself" in text
    assert "The base model is gated" in text
    assert "Not measured yet" in text


# -- what is known of a source ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit\nlanguage: en", {"license": "mit", "language": "en"}),
        (
            "license: other\nlicense_name: x\nextra_gated_prompt: Agree",
            {"license": "other", "license_name": "x", "gated": True},
        ),
        ("base_model: you/tiny", {}),  # what the source was made from, not what it is
        ("license: [", {}),
    ],
)
def test_licence_comes_from_the_sources_own_card(front: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# x\n")
    assert describe(str(tmp_path), tmp_path) == expected
    assert describe("you/tiny", tmp_path) == expected | {"name": "you/tiny"}


def test_name_is_that_on_the_hub_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    assert describe("models/tiny", folder) == {}
    assert describe("./tiny", folder) == {}
    assert describe("models/tiny.gguf", folder) == {}
    assert describe("sample:smollm2-135m", folder)["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_licence_is_carried_over_by_a_conversion(text: Path, recipe: Recipe, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    convert(source, tmp_path / "out", recipe, progress=QUIET)
    assert ModelCard((tmp_path / "out" / "README.md").read_text()).data.license == "mit"
    assert Report.read(tmp_path / "out").base == {"license": "mit"}
