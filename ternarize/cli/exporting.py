"""export, verify, import."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated, Optional

import typer

from ternarize.cli.app import app
from ternarize.cli.options import Folder, JsonOption, LossyOption, QuietOption, RevisionOption, Source, split_formats
from ternarize.errors import TernarizeError
from ternarize.printing import columns, print_json, table
from ternarize.progress import Progress, size


@app.command()
def export(
    folder: Folder,
    to: Annotated[
        list[str],
        typer.Option(
            help="Formats, separated by commas: dense, metal, metal-bf16, mlx, mlx-bf16, compressed-tensors, "
            "gptq, bitnet, gguf-tq1_0, gguf-tq2_0, gguf-q2_0, gguf-q4_0, gguf-q4_1, gguf-q2_k.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            help="Folder to write; of several formats, one that will hold a folder for each. Default: FOLDER-FORMAT.",
            show_default=False,
        ),
    ] = None,
    allow_lossy: LossyOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a converted folder for other software.

    Without calibrating again. Says of each format first whether it holds the model exactly, and how large it will be.
    """
    from ternarize.export.export import export as run
    from ternarize.export.export import in_words

    done = run(
        folder, split_formats(to), output, allow_lossy=allow_lossy, force=force, progress=Progress(quiet or as_json)
    )
    if as_json:
        print_json([exported.to_dict() for exported in done])
        return
    columns(
        ("format", "folder", "weight files", "bits a ternary weight"),
        [(e.format, str(e.path), size(e.bytes), f"{e.bits_per_ternary_weight:.3f}") for e in done],
    )
    for exported in done:
        if not exported.exact:
            typer.echo(f"{exported.format}: {in_words(exported)}", err=True)
    typer.echo(f"\nNext: ternarize verify {quote(str(folder if output is None else done[0].path))}")


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="A folder that ternarize convert or ternarize export wrote.", show_default=False)
    ],
    exports: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--export", help="Another export of it, that does not lie beside it. Repeatable."),
    ] = None,
    student: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The folder that an export was made from, where that has moved."),
    ] = None,
    text: Annotated[str, typer.Option(help="Text to compare on, as in evaluate.")] = "pydoc",
    windows: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 64,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare what exports predict with the folder.

    Each export is loaded with the software that it is for; those beside the folder are found.
    """
    from ternarize.export.verify import verify as run

    found = run(path, exports, student, text, windows, length, Progress(quiet or as_json))
    if as_json:
        print_json([comparison.to_dict() for comparison in found])
    else:
        typer.echo(
            f"{path}: loads, and predicts finite numbers" + ("." if found else "; no exports of it lie beside it.")
        )
        rows = []
        for c in found:
            word = "not read" if c.error else ("lossy" if not c.exact else "exact" if c.ok else "DIFFERS")
            figures = [f"{value:.2g}" for value in (c.largest, c.mean) if value is not None] or ["", ""]
            rows.append((c.format, word, *figures, "" if c.agreement is None else f"{100 * c.agreement:.1f} %", c.path))
        if rows:
            columns(("format", "", "largest difference", "mean", "same token", "folder"), rows)
    wrong = [f"{c.format} ({c.path}): {c.error}" for c in found if c.error]
    wrong += [
        f"{c.format} ({c.path}) was written as exact, but its logits differ by {c.mean:.2g} of their spread. "
        "Export again, and report it"
        for c in found
        if not c.ok and not c.error
    ]
    if wrong:
        raise TernarizeError("; ".join(wrong))


@app.command("import")
def import_(
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    skip: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A linear to leave as it is: full name, wildcards, or re: and an expression. Repeatable."),
    ] = None,
    revision: RevisionOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Take over what is ternary already, without loss.

    BitNet checkpoints, float ones whose weights have three levels, and .gguf files.
    """
    from ternarize.importing.folders import import_checkpoint
    from ternarize.importing.gguf import import_gguf
    from ternarize.sources import resolve

    progress = Progress(quiet or as_json)
    if Path(source).suffix == ".gguf":
        found = import_gguf(Path(source).expanduser(), output, tuple(skip or ()), force, progress)
    else:
        found = import_checkpoint(resolve(source, revision), output, tuple(skip or ()), force, progress, source)
    if as_json:
        print_json(asdict(found))
        return
    sizes = ", ".join(f"{size} ({count})" for size, count in sorted(found.group_sizes.items()))
    table(
        [
            ("output", str(output)),
            ("ternary linears", str(found.linears)),
            ("group size (linears)", sizes),
            ("shift", "yes" if found.shift else "no"),
            ("bits per ternary weight", f"{found.bits_per_ternary_weight:.3f}"),
        ]
    )
