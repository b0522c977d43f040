"""Zero-shot accuracy on four multiple-choice tasks: the mean of what `ternarize.tasks` scores on local files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ternarize.errors import TernarizeError
from ternarize.tasks import PROMPTS, score_tasks
from ternarize.tasks import version as installed


def version() -> str:
    """lm-eval's version.

    Raises:
        TernarizeError: it is not installed.
    """
    try:
        return installed()
    except TernarizeError as error:
        raise TernarizeError(f"{error}, or leave zero-shot scores out with --items 0.") from error


def zero_shot(model: Any, tokenizer: Any, data_folder: Path, items: int, batch_size: int = 8) -> dict[str, Any]:
    """Score a loaded model on the first `items` of each task.

    Returns:
        {"mean", "chance", "stderr", "tasks": {name: {"score", "chance", "items"}}}, shares of 1; chance is what
        guessing scores.

    Raises:
        TernarizeError: lm-eval or a file is missing.
    """
    version()
    found = score_tasks(model, tokenizer, sorted(PROMPTS), data_folder, items, batch_size)
    scores = {s.task: {"score": s.score, "chance": s.chance, "items": s.items} for s in found}
    mean = sum(s.score for s in found) / len(found)
    chance = sum(s.chance or 0.0 for s in found) / len(found)
    stderr = math.sqrt(sum((s.stderr or 0.0) ** 2 for s in found)) / len(found)
    return {"mean": mean, "chance": chance, "stderr": stderr, "tasks": scores}
