"""Write a ternarize folder in other formats: check all, say what each makes of it, refuse, then write.

Each format gets a folder of its own, which holds what its readers want and, beside it, a card and export.json:

    format, file                what it is; the name of the file, where the format is one, or null
    source, source_sha256       the ternarize folder, relative to this one, and `TernaryFolder.identity`
    exact, reason, error        as in `Exactness`
    bits_per_ternary_weight     all side data counted
    bytes                       of the weight files
    ternarize, torch, ...       versions of what wrote it
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ternarize.errors import TernarizeError
from ternarize.export import find_targets
from ternarize.export.card import export_card
from ternarize.export.target import Exactness, Target, TernaryFolder
from ternarize.files import copy_rights, sync_folder, write_text
from ternarize.hub import CARD_FILE
from ternarize.progress import Progress, size
from ternarize.report import dump_json, versions

EXPORT_FILE = "export.json"


@dataclass(frozen=True)
class Exported:
    """One export, as export.json describes it (see the module's docstring).

    Args:
        path: the export's folder.
    """

    path: Path
    format: str
    file: str | None
    source: str
    source_sha256: str
    exact: bool
    reason: str
    error: float
    bits_per_ternary_weight: float
    bytes: int

    @property
    def readable(self) -> Path:
        """What the format's reader is given."""
        return self.path if self.file is None else self.path / self.file

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"path": str(self.path)}

    @classmethod
    def read(cls, path: Path) -> Exported:
        """Read an export's export.json.

        Raises:
            TernarizeError: there is none, or it is damaged.
        """
        file = path / EXPORT_FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            values.pop("versions")
            found = cls(path=path, **values)
        except OSError as error:
            raise TernarizeError(f"{file} cannot be read: {error.strerror}. Is {path} an export?") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TernarizeError(f"{file} is damaged: {error!r}. Export the folder again.") from error
        if found.file is not None and Path(found.file).name != found.file:
            raise TernarizeError(f"{file} names the file {found.file!r}, which is not in its own folder.")
        return found


def export(
    folder: Path,
    formats: list[str],
    output: Path | None = None,
    *,
    allow_lossy: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Exported]:
    """Write a ternarize folder in other formats. Nothing is written where one of them is refused.

    Args:
        folder: what `ternarize convert` wrote; it is not changed.
        formats: names, see `ternarize.export.targets`.
        output: the folder to write; of several formats, one that will hold a folder for each. Default: beside `folder`.
        allow_lossy: write formats that cannot hold the model exactly, too.
        force: replace what is there, once the new export is complete.

    Raises:
        TernarizeError: an unknown format, one that is not exact, or something at an output.
    """
    progress = progress or Progress()
    targets = find_targets(formats)
    places = export_places(folder, targets, output)
    check_places(folder, places, force)
    source = TernaryFolder(folder)
    found = [check(source, target, progress) for target in targets]
    refuse_lossy(targets, found, allow_lossy)
    return [
        _write(source, target, exactness, place, force, progress)
        for target, exactness, place in zip(targets, found, places, strict=True)
    ]


def export_places(folder: Path, targets: list[Target], output: Path | None) -> list[Path]:
    """The folder that each format gets."""
    if output is None:
        return [folder.resolve().with_name(f"{folder.resolve().name}-{target.name}") for target in targets]
    return [output] if len(targets) == 1 else [output / target.name for target in targets]


def check_places(folder: Path, places: list[Path], force: bool) -> None:
    """Refuse to replace anything unasked, and to replace the source at all.

    Raises:
        TernarizeError: naming the place.
    """
    source = folder.resolve()
    for place in places:
        if place.resolve() in (source, *source.parents) or source in place.resolve().parents:
            raise TernarizeError(f"{place} and the folder {folder} lie inside each other. Choose another --output.")
        if place.is_file() or any(parent.is_file() for parent in place.parents):
            raise TernarizeError(f"{place} cannot be a folder: there is a file. Choose another --output.")
        if place.is_dir() and any(place.iterdir()) and not force:
            raise TernarizeError(f"{place} exists and is not empty. Choose another --output, or --force to replace it.")


def check(folder: TernaryFolder, target: Target, progress: Progress) -> Exactness:
    """What a format makes of a folder, said in one line.

    Raises:
        UnsupportedModelError: it cannot hold it at all.
    """
    exactness = target.check(folder)
    ternary, total = target.sizes(folder)
    progress.say(
        f"{target.name}: {in_words(exactness)}; {_bits(folder, ternary):.3f} bits a ternary weight, {size(total)}"
    )
    return exactness


def in_words(exactness: Exactness | Exported) -> str:
    """`exact (...)`, or `NOT EXACT, by how much: why`."""
    by = f" (relative error of a weight up to {exactness.error:.2g})" if exactness.error else ""
    why = f": {exactness.reason}" if exactness.reason else ""
    return ("exact" if exactness.exact else "NOT EXACT") + by + why


def refuse_lossy(targets: list[Target], found: list[Exactness], allow_lossy: bool) -> None:
    """Stop where a format is not exact and nobody said that it need not be.

    Raises:
        TernarizeError: naming each.
    """
    lossy = [
        f"{target.name} cannot hold this model exactly{in_words(exactness).removeprefix('NOT EXACT')}"
        for target, exactness in zip(targets, found, strict=True)
        if not exactness.exact
    ]
    if lossy and not allow_lossy:
        raise TernarizeError(
            f"{'; '.join(lossy)}. Nothing was written. Choose another format, convert with a recipe that it holds "
            "(portable: fp16 scales in groups of 64, no shift), or say --allow-lossy."
        )


def _bits(folder: TernaryFolder, ternary_bytes: int) -> float:
    return 8 * ternary_bytes / sum(rows * columns for rows, columns in folder.linears.values())


def _write(
    folder: TernaryFolder, target: Target, exactness: Exactness, place: Path, force: bool, progress: Progress
) -> Exported:
    with replacing(place, force) as fresh:
        target.write(folder, fresh, progress)
        file = None
        if fresh.is_file():  # a format that is one file: it gets a folder around it
            ending, _, variant = target.name.partition("-")
            file = f"{folder.path.resolve().name}-{variant}.{ending}"
            written = fresh.rename(fresh.with_name(file))
            fresh.mkdir()
            written.rename(fresh / file)
            copy_rights(folder.path, fresh)
        kinds = ("*.safetensors",) if file is None else (file,)
        exported = Exported(
            path=place,
            format=target.name,
            file=file,
            source=os.path.relpath(folder.path.resolve(), place.resolve()),
            source_sha256=folder.identity,
            exact=exactness.exact,
            reason=exactness.reason,
            error=exactness.error,
            bits_per_ternary_weight=_bits(folder, target.sizes(folder)[0]),
            bytes=sum(path.stat().st_size for kind in kinds for path in fresh.glob(kind)),
        )
        fields = exported.to_dict() | {"versions": versions()}
        del fields["path"]
        write_text(fresh / EXPORT_FILE, dump_json(fields) + "\n")
        write_text(fresh / CARD_FILE, export_card(folder.path, target.name, fields, in_words(exactness)))
    return exported


@contextmanager
def replacing(place: Path, force: bool) -> Iterator[Path]:
    """A path beside `place` to write to, which takes its place at the end; after an error, all is as it was.

    Raises:
        TernarizeError: it cannot be written there.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".partial", dir=place.parent))
    except OSError as error:
        raise TernarizeError(f"{place.parent} cannot be written: {error.strerror}. Choose another --output.") from error
    try:
        yield scratch / "new"
        if place.exists():
            if any(place.iterdir()) and not force:
                raise TernarizeError(f"{place} was filled while the export was written. Choose another --output.")
            os.rename(place, scratch / "old")
        os.rename(scratch / "new", place)
        sync_folder(place.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
