"""Tasks by lm-eval on local files: scores, teacher beside student, where they are kept, what is refused.

That the scores are those of a direct computation is tested with the benchmark, in test_quality_benchmark.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import TASK, copy_folder, logits

import ternarize
from ternarize.errors import TernarizeError
from ternarize.progress import Progress
from ternarize.report import Report
from ternarize.tasks import Score, evaluate_tasks

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items of piqa, and a task of its own."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    piqa = [{"goal": f"go {i}", "sol1": "left abc", "sol2": f"right {i}", "label": i % 2} for i in range(12)]
    own = [{"question": f"a{i} b", "choices": ["c", "dd", "eee"], "right": i % 3} for i in range(9)]
    (folder / "piqa_valid.jsonl").write_text("".join(json.dumps(item) + "\n" for item in piqa))
    (folder / "items.json").write_text("".join(json.dumps(item) + "\n" for item in own))
    (folder / "own.yaml").write_text(TASK.format(name="own", items=folder / "items.json"))
    (folder / "all.yaml").write_text("group: all\ntask: [own]\naggregate_metric_list: [{metric: acc}]\n")
    (folder / "loose.yaml").write_text("group: loose\ntask: [own]\n")
    return folder


def score(folder: Path, data: Path | None, *names: str, teacher: Path | None = None, **changes: Any) -> list[Score]:
    settings: dict[str, Any] = {"items": None, "device": "cpu", "dtype": torch.float32, "batch_size": 4, "save": False}
    return evaluate_tasks(folder, teacher, list(names), data, progress=Progress(quiet=True), **(settings | changes))


def test_teacher_stands_beside_student_in_report_and_card(
    ternary: Path, llama: Path, data: Path, run: Run, tmp_path: Path
) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    wanted = ["evaluate", folder, "--teacher", llama, "--tasks", "piqa,own", "--task-data", data, "--quiet"]
    code, out, err = run(*wanted)
    assert code == 0, err
    assert "piqa (acc_norm, 12 items, guessing 50 %)" in out
    assert "own (acc, 9 items, guessing 33 %)" in out
    assert "perplexity" not in out
    rows = Report.read(folder).run["tasks"]
    assert [(row["task"], row["items"]) for row in rows] == [("piqa", 12), ("own", 9)]
    (alone,) = score(llama, data, "piqa")
    assert rows[0]["teacher"] == alone.score
    assert rows[0]["score"] == score(folder, data, "piqa")[0].score
    card = ModelCard((folder / "README.md").read_text())
    assert f"| piqa | 12 | acc_norm | {100 * alone.score:.1f} % | {100 * rows[0]['score']:.1f} %" in card.text
    (index,) = card.data.to_dict()["model-index"]
    assert {result["dataset"]["type"] for result in index["results"]} == {"piqa", "own"}
    code, out, _ = run(*wanted, "--json", "--items", 4, "--no-save")
    assert [row["items"] for row in json.loads(out)] == [4, 4]
    assert Report.read(folder).run["tasks"] == rows


def test_scores_of_other_runs_stand_beside_each_other(
    ternary: Path, llama: Path, data: Path, run: Run, tmp_path: Path
) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    wanted = ["evaluate", folder, "--tasks", "piqa", "--task-data", data, "--quiet"]
    for options, how in (
        (["--teacher", llama], ""),
        (["--dtype", "bfloat16", "--activations", "int8"], ", int8 activations, bfloat16"),
        ([], ""),
    ):
        code, out, err = run(*wanted, *options)
        assert code == 0, err
        assert f"piqa (acc_norm, 12 items, guessing 50 %{how})" in out
    first, second = Report.read(folder).run["tasks"]
    assert first["how"] == ""
    assert first["teacher"] is not None  # not replaced by the last, which has none
    assert second["how"] == "int8 activations, bfloat16"
    card = ModelCard((folder / "README.md").read_text())
    assert "| piqa | 12 |" in card.text
    assert "| piqa, int8 activations, bfloat16 | 12 |" in card.text
    (index,) = card.data.to_dict()["model-index"]
    names = [metric["name"] for result in index["results"] for metric in result["metrics"]]
    assert names == ["acc_norm, 12 items", "acc_norm, 12 items, int8 activations, bfloat16"]


def test_perfect_scores_are_counted(llama: Path, data: Path, tmp_path: Path) -> None:
    """Items whose label is what the model chose are all right, and with the other label all wrong."""
    items = [json.loads(line) for line in (data / "piqa_valid.jsonl").read_text().splitlines()]

    def scored(label: int, item: dict[str, Any]) -> float:
        (tmp_path / "piqa.jsonl").write_text(json.dumps(item | {"label": label}) + "\n")
        return score(llama, tmp_path, "piqa")[0].score

    right = [{**item, "label": int(scored(1, item))} for item in items[:3]]
    for wrong in (0, 1):
        records = [item | {"label": item["label"] ^ wrong} for item in right]
        (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, records)))
        assert score(llama, tmp_path, "piqa")[0].score == 1 - wrong


def test_groups_and_tags_stand_for_their_tasks(llama: Path, data: Path) -> None:
    (own,) = score(llama, data, "own")
    for name, shown in (("some", "own"), ("loose", "own"), ("all", "all")):
        found, piqa = sorted(score(llama, data, "piqa", name), key=lambda row: row.task == "piqa")
        assert (found.task, found.metric, found.items, found.score) == (shown, "acc", 9, own.score)
        assert piqa.task == "piqa"


def test_unknown_task_is_answered_with_the_nearest(llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TernarizeError, match=r"neither arc_eazy\.yaml nor items of a task 'arc_eazy'.*'arc_easy'"):
        score(llama, data, "arc_eazy")
    with pytest.raises(TernarizeError, match=r"has neither arc_easy\.yaml"):
        score(llama, data, "arc_easy")
    from lm_eval import tasks

    few = tasks.TaskManager(include_path=data, include_defaults=False)  # lm-eval's own take half a minute to list
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: few)
    with pytest.raises(TernarizeError, match=r"lm-eval has no task 'owm'\. Did you mean 'own'"):
        score(llama, None, "owm")


def test_what_cannot_be_read_is_said(llama: Path, data: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(TernarizeError, match="is no folder"):
        score(llama, tmp_path / "none", "piqa")
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x"}\n')
    with pytest.raises(TernarizeError, match=r"piqa\.jsonl does not hold items of piqa"):
        score(llama, tmp_path, "piqa")
    (tmp_path / "bad.yaml").write_text(TASK.format(name="bad", items=tmp_path / "none.json"))
    with pytest.raises(TernarizeError, match=r"lm-eval cannot load bad.*Check the connection"):
        score(llama, tmp_path, "bad")
    assert run("evaluate", llama, "--task-data", data)[0] == 2


def test_extra_is_named_where_lm_eval_is_missing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TernarizeError, match=r"pip install 'ternarize\[eval\]'"):
        score(llama, None, "piqa")


def test_tying_weights_again_changes_nothing(ternary: Path) -> None:
    """lm-eval does so with every model that it is given."""
    model, _ = ternarize.load(ternary)
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
