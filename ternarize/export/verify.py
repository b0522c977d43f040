"""Reload what was written, each format with its own reader, and compare its predictions with the student's.

The student is the ternarize folder computed in float32 with float activations. Differences of logits are given as
shares of their spread (their standard deviation over all places and tokens); an export passes where its mean difference
lies below its format's `tolerance`. What was written with a loss is measured, and cannot fail.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import TernarizeError
from ternarize.evaluate import load_any
from ternarize.export import find_targets
from ternarize.export.export import EXPORT_FILE, Exported
from ternarize.export.stock import model_logits
from ternarize.export.target import TernaryFolder
from ternarize.progress import Progress
from ternarize.quantizer import quant_method
from ternarize.text import evaluation_windows, load_tokenizer, read_whole


@dataclass(frozen=True)
class Comparison:
    """One export against the student.

    Args:
        path, format, exact: of the export.
        largest, mean: of the logits' absolute differences, as shares of the student's spread.
        agreement: share of places where the likeliest next token is the same.
        error: why it could not be read, or "".
        ok: whether it could, and an exact one is.
    """

    path: str
    format: str
    exact: bool
    largest: float | None = None
    mean: float | None = None
    agreement: float | None = None
    error: str = ""
    ok: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def verify(
    path: Path,
    exports: list[Path] | None = None,
    student: Path | None = None,
    text: str = "pydoc",
    windows: int = 2,
    length: int = 64,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Compare exports with the folder that they were made from.

    Args:
        path: a ternarize folder, itself checked by loading it, with the exports found beside it; or one export.
        exports: more of them.
        student: the ternarize folder, where an export's own note of it no longer leads there.
        text, windows, length: what both read.

    Returns:
        One entry per export; those that could not be read say why.

    Raises:
        TernarizeError: `path` is neither, the student is not to be found, or is another than the one exported.
        FormatError: the folder is damaged.
    """
    progress = progress or Progress()
    given = [Exported.read(export) for export in exports or []]
    if (path / EXPORT_FILE).is_file():
        given.insert(0, Exported.read(path))
        source = student or path / given[0].source
        if not source.is_dir() or quant_method(source) is None:
            raise TernarizeError(f"{path} was made from {source}, which is not there. Name the folder with --student.")
        folder = TernaryFolder(source)
    else:
        folder = TernaryFolder(path)
        given = _beside(folder) + given
    for exported in given:
        if exported.source_sha256 != folder.identity:
            raise TernarizeError(
                f"{exported.path} was made from another folder than {folder.path}, or from an earlier state of it. "
                "Export again, or name its own folder with --student."
            )
    ids = evaluation_windows(read_whole(text), load_tokenizer(folder.path), length, windows)
    expected = model_logits(load_any(folder.path, "cpu", torch.float32), ids)
    if not bool(torch.isfinite(expected).all()):
        raise TernarizeError(f"{folder.path} predicts NaN or infinity on {text}. Convert the model again.")
    found = []
    with progress.bar("verifying", total=len(given), unit="export") as bar:
        for exported in given:
            found.append(compare(exported, expected, ids))
            bar.update(1)
    return found


def compare(exported: Exported, expected: Tensor, ids: Tensor) -> Comparison:
    """Read one export and compare its logits with the student's, float32 [B, T, V]."""
    about = {"path": str(exported.path), "format": exported.format, "exact": exported.exact}
    try:
        target = find_targets([exported.format])[0]
        logits = target.logits(exported.readable, ids)
        if logits.shape[-1] < expected.shape[-1] or logits.shape[:-1] != expected.shape[:-1]:
            raise TernarizeError(f"logits are {list(logits.shape)}, the student's {list(expected.shape)}.")
    except TernarizeError as error:
        return Comparison(**about, error=str(error))  # type: ignore[arg-type]
    logits = logits[..., : expected.shape[-1]]  # some formats pad the vocabulary
    difference = (logits - expected).abs() / expected.std()
    mean = float(difference.mean())
    agreement = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    ok = not exported.exact or mean <= target.tolerance
    return Comparison(**about, largest=float(difference.max()), mean=mean, agreement=agreement, ok=ok)  # type: ignore[arg-type]


def _beside(folder: TernaryFolder) -> list[Exported]:
    """The exports of a folder that lie beside it, or one folder deeper."""
    parent = folder.path.resolve().parent
    notes = [*parent.glob(f"*/{EXPORT_FILE}"), *parent.glob(f"*/*/{EXPORT_FILE}")]
    found = [Exported.read(note.parent) for note in sorted(notes)]
    return [exported for exported in found if exported.source_sha256 == folder.identity]
