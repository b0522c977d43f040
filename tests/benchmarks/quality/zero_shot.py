"""Zero-shot accuracy on four multiple-choice tasks, scored by lm-eval on local files, offline.

Each choice is scored by the log-probability of its tokens after the question (`acc`), or by that over its length in
characters (`acc_norm`); Winogrande scores the rest of the sentence after either name. Prompts and metrics are those of
lm-eval's own definitions (arc_easy, hellaswag, piqa, winogrande, version 1.0); only where the items come from differs.
HellaSwag's contexts stand as in the file, where the fragment that the ending goes on from keeps its small letter.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
from pathlib import Path
from typing import Any

from ternarize.errors import TernarizeError

METRICS = {"arc_easy": "acc_norm", "hellaswag": "acc_norm", "piqa": "acc_norm", "winogrande": "acc"}
FILES = {
    "arc_easy": "arc_easy_test_first500.jsonl.gz",
    "hellaswag": "hellaswag_val_first500.jsonl.gz",
    "piqa": "piqa_valid_first500.jsonl.gz",
    "winogrande": "winogrande_dev_first500.jsonl.gz",
}
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


def version() -> str:
    """lm-eval's version.

    Raises:
        TernarizeError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise TernarizeError(
            "zero-shot scores need lm-eval, which is not installed. Run: pip install 'ternarize[eval]', "
            "or leave them out with --items 0."
        ) from error
    return str(lm_eval.__version__)


def zero_shot(model: Any, tokenizer: Any, data_folder: Path, items: int, batch_size: int = 8) -> dict[str, Any]:
    """Score a loaded model on the first `items` of each task.

    Returns:
        {"mean", "chance", "stderr", "tasks": {name: {"score", "chance", "items"}}}, shares of 1; chance is what
        guessing scores. `lm_eval`'s requests are sorted by length before they are batched.

    Raises:
        TernarizeError: lm-eval or a file is missing.
    """
    version()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = {name: _task(name, read_items(data_folder / file, items)) for name, file in FILES.items()}
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    wanted: Any = {"tasks": tasks, "groups": {}, "group_map": {}}
    found: Any = evaluate(scorer, wanted, bootstrap_iters=0, log_samples=False)
    scores, variance = {}, 0.0
    for name, task in tasks.items():
        score, documents = float(found["results"][name][f"{METRICS[name]},none"]), list(task.test_docs())
        chance = sum(1 / len(task.doc_to_choice(document)) for document in documents) / len(documents)
        scores[name] = {"score": score, "chance": chance, "items": len(documents)}
        variance += score * (1 - score) / max(1, len(documents) - 1)
    mean, chance = (sum(task[key] for task in scores.values()) / len(scores) for key in ("score", "chance"))
    return {"mean": mean, "chance": chance, "stderr": math.sqrt(variance) / len(scores), "tasks": scores}


def _task(name: str, items: list[dict[str, Any]]) -> Any:
    """lm-eval's task on these items."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    split = {"test": Dataset.from_list(items)}
    config = {
        "task": name,
        "custom_dataset": lambda **_: split,
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": METRICS[name], "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return ConfigurableTask(config=config | PROMPTS[name])


def read_items(path: Path, items: int) -> list[dict[str, Any]]:
    """The first `items` records of a .jsonl.gz file.

    Raises:
        TernarizeError: it cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for _, line in zip(range(items), file, strict=False)]
    except (OSError, EOFError, ValueError) as error:
        raise TernarizeError(
            f"{path} cannot be read as gzipped jsonl: {error}. Give the folder with --data."
        ) from error
