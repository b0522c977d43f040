"""What a conversion did: one entry per linear, what stayed float and why, and the totals."""

from __future__ import annotations

import json
import math
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ternarize.errors import TernarizeError

REPORT_FILE = "report.json"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class LinearReport:
    """One ternary linear.

    Args:
        name: full name in the model.
        shape: (O, I).
        zero_share: share of trits that are 0.
        error: ||X^ What' - X W'||^2 / ||X W'||^2 on the calibration tokens; of the weights alone where data_free. A
            distillation, which comes later, changes it; it is not measured again.
        bits: stored bits per weight, scale and shift counted.
        tokens: calibration tokens that it saw.
        data_free: fitted without statistics, because it saw too few tokens (an expert) or the recipe uses none.
    """

    name: str
    shape: tuple[int, int]
    zero_share: float
    error: float
    bits: float
    tokens: int
    data_free: bool


@dataclass(frozen=True)
class Report:
    """The result of a conversion, written as report.json.

    Args:
        source, revision: what was converted, as the user named it.
        model: class name in transformers.
        linears: one entry per ternary linear.
        int8: names of the modules stored in int8.
        kept: [{name, shape, reason}] of what stayed float.
        bits_per_ternary_weight: stored bits of the ternary linears over their weights, all side data counted.
        bits_per_weight: bits of all weight files, headers included, over all weights of the model.
        weights, ternary_weights: counts; shared weights once.
        source_bytes, output_bytes: of the weight files.
        data: calibration sources, windows, tokens and the fingerprint of the token ids.
        versions: of the packages that computed.
        base: of the source, for the card: what `sources.describe` found.
        run: what differs from run to run, or came later: seconds, peak_memory in bytes, commands as typed, evaluation,
            tasks.
    """

    source: str
    revision: str | None
    model: str
    linears: list[LinearReport]
    int8: list[str]
    kept: list[dict[str, Any]]
    bits_per_ternary_weight: float
    bits_per_weight: float
    weights: int
    ternary_weights: int
    source_bytes: int
    output_bytes: int
    data: dict[str, Any]
    versions: dict[str, str]
    base: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_error(self) -> float:
        """Mean of the linears' errors, weighted by their number of weights."""
        total = sum(entry.shape[0] * entry.shape[1] for entry in self.linears)
        return sum(entry.error * entry.shape[0] * entry.shape[1] for entry in self.linears) / total

    def to_json(self) -> str:
        """JSON text."""
        return dump_json(asdict(self)) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Read the report of a ternarize folder.

        Raises:
            TernarizeError: there is none, or it is damaged.
        """
        path = folder / REPORT_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["linears"] = [
                LinearReport(**(entry | {"shape": tuple(entry["shape"])})) for entry in values["linears"]
            ]
            return cls(**values)
        except OSError as error:
            raise TernarizeError(f"{path} cannot be read: {error.strerror}. Is {folder} a ternarize folder?") from error
        except (ValueError, TypeError, KeyError) as error:
            raise TernarizeError(f"{path} is damaged: {error!r}. Convert the model again.") from error


def dump_json(value: Any) -> str:
    """JSON text; infinity and NaN, which JSON does not have, become null."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=1, allow_nan=False)


def versions() -> dict[str, str]:
    """Of everything that can change the numbers."""
    from ternarize import __version__

    return {
        "ternarize": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where the system does not tell (Windows).

    Linux's ru_maxrss is at least what the process that started this one held at that moment, so it is not asked there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
