"""The command line's front: what stands before a command, and what becomes of an error."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import ternarize
from ternarize.errors import TernarizeError

app = typer.Typer(
    name="ternarize",
    help="A Hugging Face checkpoint goes in, a ternary one comes out: weights scale * {-1, 0, 1} + shift.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 a bug, 2 bad input, 3 unsupported model, 4 stopped (run again with --resume), "
    "5 the converted model has collapsed.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ternarize {ternarize.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A Hugging Face checkpoint goes in, a ternary one comes out: weights scale * {-1, 0, 1} + shift."""


def run() -> None:
    """Entry point: known errors are one message and an exit code, never a traceback."""
    try:
        app()
    except TernarizeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as exit_:
        if exit_.code != 130:  # what typer makes of Ctrl-C
            raise
        typer.echo("stopped", err=True)
        sys.exit(4)
