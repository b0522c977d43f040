"""push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ternarize.cli.app import app
from ternarize.cli.options import JsonOption, PrivateOption, Pushable, QuietOption
from ternarize.errors import TernarizeError
from ternarize.printing import print_json, table
from ternarize.progress import Progress, size


@app.command()
def push(
    folder: Pushable,
    repo: Annotated[str, typer.Argument(help="Where to: user/name on the Hub.", show_default=False)],
    private: PrivateOption = False,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Branch to push to, made if need be. Default: the main one.", show_default=False),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The base model's name on the Hub, for the card of a model that came out of a folder."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also where the repository holds something else.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Put a folder on the Hugging Face Hub.

    One commit shows all of it, or nothing is visible. Needs a token that may write: hf auth login, or HF_TOKEN. Run
    again after an interruption, it goes on.
    """
    from ternarize.publish import EXPORT_FILE, prepare, publish

    parcel = prepare(folder, repo, private, revision, base)
    facts = {"repository": repo, "private": private, "revision": revision or "main"}
    if not dry_run:
        address = publish(parcel, Progress(quiet), force)
        if as_json:
            print_json(facts | {"commit": address})
        else:
            typer.echo(f"Pushed: {address}")
            export = (folder / EXPORT_FILE).is_file()
            typer.echo("Load:   as its card says" if export else f"Load:   ternarize.load({repo!r})")
        return
    if as_json:
        print_json(facts | {"files": parcel.sizes, "card": parcel.card})
        return
    table(
        [
            ("repository", f"{repo}, {'private' if private else 'public'}"),
            ("revision", revision or "main"),
            *((name, size(count)) for name, count in parcel.sizes.items()),
            ("together", size(sum(parcel.sizes.values()))),
        ]
    )
    typer.echo(f"\n{parcel.card}")
    typer.echo("Nothing was sent.")


def send(folder: Path, repo: str, private: bool, progress: Progress) -> str:
    """Push what a conversion wrote; the commit's address."""
    from ternarize.publish import prepare, publish

    try:
        return publish(prepare(folder, repo, private), progress)
    except TernarizeError as error:
        raise TernarizeError(
            f"{error} The converted folder is complete; to push it: ternarize push {folder} {repo}"
            f"{' --private' if private else ''}"
        ) from error
