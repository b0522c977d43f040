"""Accuracy on benchmark tasks, scored by lm-eval: by its own definitions, or on local files, offline.

Tasks are named as in lm-eval, whose definitions fetch their items from the Hub or its cache. With a folder of data
nothing is fetched: it holds lm-eval definitions of its own (`*.yaml`, with `dataset_path: json`), or items of
arc_easy, hellaswag, piqa and winogrande in `NAME*.jsonl` or `.jsonl.gz`, with the fields that these benchmarks' authors
gave them. Prompts and metrics of these four are those of lm-eval's definitions, version 1.0; HellaSwag's contexts stand
as in the file, where the fragment that the ending goes on from keeps its small letter.

Each choice is scored by the log-probability of its tokens after the question (`acc`), or by that over its length in
characters (`acc_norm`); Winogrande scores the rest of the sentence after either name.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ternarize import hub
from ternarize.errors import TernarizeError, first_line
from ternarize.evaluate import computed_in, load_any
from ternarize.progress import Progress
from ternarize.reading import read_text
from ternarize.report import REPORT_FILE, Report
from ternarize.text import load_tokenizer

METRICS = ("acc_norm", "acc", "exact_match")  # the first of these that a task has; else the task's first
# lm-eval's prompts. Winogrande's are the wrong way round on purpose, as there: the "text" is the number of the right
# name, the "choices" are two beginnings, and the "target" is the end that both are scored by.
PROMPTS: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "doc_to_text": "Question: {{question.stem}}\nAnswer:",
        "doc_to_choice": lambda item: [choice["text"] for choice in item["question"]["choices"]],
        "doc_to_target": lambda item: [c["label"] for c in item["question"]["choices"]].index(item["answerKey"]),
    },
    "hellaswag": {"doc_to_text": "{{ctx}}", "doc_to_choice": "endings", "doc_to_target": "label"},
    "piqa": {
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
    },
    "winogrande": {
        "doc_to_text": lambda item: int(item["answer"]) - 1,
        "doc_to_choice": lambda item: [item["sentence"].split("_")[0] + item[name] for name in ("option1", "option2")],
        "doc_to_target": lambda item: item["sentence"].split("_", 1)[1].strip(),
    },
}


@dataclass(frozen=True)
class Score:
    """One task's result.

    Args:
        task, metric: as lm-eval names them.
        items: how many were scored.
        score, teacher: the metric, of the model and of its teacher; accuracies are shares of 1.
        stderr: standard error of an accuracy over the items.
        chance: what guessing scores, where the items have choices.
        lm_eval: its version.
        how: the model ran, where not all was float32: "int8 activations", "bfloat16".
    """

    task: str
    metric: str
    items: int
    score: float
    stderr: float | None
    chance: float | None
    lm_eval: str
    teacher: float | None = None
    how: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def version() -> str:
    """lm-eval's version.

    Raises:
        TernarizeError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise TernarizeError(
            "tasks are scored by lm-eval, which is not installed. Run: pip install 'ternarize[eval]'"
        ) from error
    return str(lm_eval.__version__)


def evaluate_tasks(
    folder: Path,
    teacher: Path | None,
    names: list[str],
    data: Path | None,
    items: int | None,
    device: str,
    dtype: torch.dtype,
    batch_size: int,
    progress: Progress,
    save: bool = True,
    activations: str = "float",
) -> list[Score]:
    """Score a folder (ternarize or float), beside its teacher, and write the result into a ternarize folder's report.

    Args:
        teacher: the float checkpoint; None scores the folder alone. One model is in memory at a time.
        names, data: tasks, and the folder of their files; see the module.
        items: at most so many of each task; None is all.
        save: whether report.json and the card of a ternarize folder take up the result.

    Raises:
        TernarizeError: lm-eval is missing, a task is not known, or its data cannot be read.
    """
    version()
    rows = []
    for which, path in (("student", folder), ("teacher", teacher)):
        if path is None:
            continue
        progress.say(f"scoring the {which} on {', '.join(names)}")
        model = load_any(path, device, dtype, activations)
        rows.append(score_tasks(model, load_tokenizer(path), names, data, items, batch_size, progress))
        del model
    how = ", ".join(computed_in(activations, dtype))
    found = [replace(mine, how=how) for mine in rows[0]]
    if teacher is not None:
        found = [replace(mine, teacher=other.score) for mine, other in zip(found, rows[1], strict=True)]
    if save and (folder / REPORT_FILE).is_file():
        save_scores(folder, found)
    return found


def save_scores(folder: Path, found: list[Score]) -> None:
    """Write scores into report.json and the card; a task scored again, run alike, replaces its old row.

    Not one that has the teacher beside it on as many items, where the new one has not.
    """
    report = Report.read(folder)
    rows = {(row["task"], row.get("how", "")): row for row in report.run.get("tasks", [])}
    for score in found:
        old = rows.get((score.task, score.how), {})
        if score.teacher is not None or old.get("teacher") is None or old["items"] < score.items:
            rows[score.task, score.how] = score.to_dict()
    report.run["tasks"] = list(rows.values())
    hub.save_report(folder, report)


def score_tasks(
    model: Any,
    tokenizer: Any,
    names: list[str],
    data: Path | None,
    items: int | None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Score]:
    """Score a loaded model; arguments as in `evaluate_tasks`.

    Raises:
        TernarizeError: lm-eval is missing, a task is not known, or its data cannot be read.
    """
    installed = version()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    wanted = _load(names, data, items)
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    bars = progress is not None and not progress.quiet and sys.stderr.isatty()
    with contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO()):  # lm-eval's bars ask nobody
        found: Any = evaluate(scorer, wanted, limit=items, bootstrap_iters=0, log_samples=False)
    values = {name: _values(found["results"].get(name, {})) for name in (*names, *wanted["tasks"])}
    members = {name: [task.task_name for task in group.get_all_tasks()] for name, group in wanted["groups"].items()}
    shown = [name for name in names if values[name]]  # a group's mean, where it has one, stands for its tasks
    covered = {task for name in shown for task in members.get(name, [])}
    shown += [name for name in wanted["tasks"] if name not in covered and name not in shown]
    scores = []
    for name in shown:
        metric = next((metric for metric in METRICS if metric in values[name]), None) or next(iter(values[name]))
        count = sum(found["n-samples"][task]["effective"] for task in members.get(name, [name]))
        chance = _chance(wanted["tasks"].get(name), count)
        score = values[name][metric]
        stderr = math.sqrt(score * (1 - score) / max(1, count - 1)) if metric in METRICS else None
        scores.append(Score(name, metric, count, score, stderr, chance, installed))
    return scores


def _values(results: dict[str, Any]) -> dict[str, float]:
    """lm-eval's figures of one task by metric; of several filters' the first one's."""
    values: dict[str, float] = {}
    for key, value in results.items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            values.setdefault(metric, float(value))
    return values


def _chance(task: Any, count: int) -> float | None:
    """What guessing scores on the first `count` items of a task with choices."""
    if task is None or task.OUTPUT_TYPE != "multiple_choice":
        return None
    documents = list(task.eval_docs)[:count]
    return sum(1 / len(task.doc_to_choice(document)) for document in documents) / len(documents)


def _load(names: list[str], data: Path | None, items: int | None) -> Any:
    """lm-eval's tasks: from the data's items, from the data's definitions, or lm-eval's own."""
    from lm_eval.tasks import TaskManager

    if data is not None and not data.is_dir():
        raise TernarizeError(f"{data} is no folder. Give --task-data the folder that holds the tasks' files.")
    files = {name: _file_of(name, data) for name in names}
    local = {name: _local_task(name, file, items) for name, file in files.items() if file is not None}
    manager = TaskManager(include_path=data, include_defaults=data is None)
    others = [name for name in names if name not in local]
    for name in others:
        if name not in manager.all_tasks:
            known = [*manager.all_tasks, *(PROMPTS if data is not None else ())]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists those of lm-eval."
            where = "lm-eval has no task" if data is None else f"{data} has neither {name}.yaml nor items of a task"
            raise TernarizeError(f"{where} {name!r}. {hint}")
    try:
        loaded = manager.load(others)
    except Exception as error:  # definitions run code of their own, and datasets raises what its readers raise
        raise TernarizeError(
            f"lm-eval cannot load {', '.join(others)}: {first_line(error)} Check the connection, "
            "or give --task-data a folder with the tasks' files."
        ) from error
    tasks = local | loaded["tasks"]
    return loaded | {"tasks": {name: tasks[name] for name in names if name in tasks} | tasks}


def _file_of(name: str, data: Path | None) -> Path | None:
    """The file with a task's items, if there is one and its prompts are known."""
    if data is None or name not in PROMPTS:
        return None
    return next((path for path in sorted(data.glob(f"{name}*")) if ".jsonl" in path.name), None)


def _local_task(name: str, path: Path, items: int | None) -> Any:
    """lm-eval's task on the items of a file."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    try:
        records = [json.loads(line) for line in read_text(path).split("\n") if line.strip()][:items]
        split = {"test": Dataset.from_list(records)}
        config = {
            "task": name,
            "custom_dataset": lambda **_: split,
            "test_split": "test",
            "output_type": "multiple_choice",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in _metrics(name)],
            "metadata": {"version": 1.0},
        }
        return ConfigurableTask(config=config | PROMPTS[name])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise TernarizeError(f"{path} does not hold items of {name}, one JSON record a line: {error!r}") from error


def _metrics(name: str) -> list[str]:
    return ["acc"] if name == "winogrande" else ["acc", "acc_norm"]
