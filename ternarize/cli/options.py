"""Arguments and options that several commands share, and what they mean."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ternarize.errors import TernarizeError, first_line, nearest

Source = Annotated[
    str,
    typer.Argument(help="A checkpoint's folder, a Hub id, a .gguf file, or sample:smollm2-135m.", show_default=False),
]
AnyFolder = Annotated[
    str, typer.Argument(help="A folder that ternarize convert wrote, or any checkpoint.", show_default=False)
]
Folder = Annotated[Path, typer.Argument(help="A folder that ternarize convert wrote.", show_default=False)]
Pushable = Annotated[
    Path, typer.Argument(help="A folder that ternarize convert, import or export wrote.", show_default=False)
]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")]
SetOption = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it
    typer.Option("--set", help="Change one setting of the recipe: key=value, such as group_size=128. Repeatable."),
]
TextOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--text",
        help="Text: self (the model writes its own), pydoc, a .jsonl or .txt file, or a Hub dataset "
        "owner/name[:config[:split]]. Repeat for a mixture, NAME@WEIGHT for shares.",
    ),
]
RevisionOption = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a Hub id.")]  # noqa: UP045
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SizeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--target-size",
        help="Size of the weight files, such as 60MB: linears that hurt get more of it.",
        show_default=False,
    ),
]
TimeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Time for all of it: 90s, 30m, 1h; a distillation, which comes last, takes what is left.",
        show_default=False,
    ),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Nobody else may see the repository.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str, typer.Option(help="Type of activations: float32, bfloat16 or float16.")]


FormatOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--format", help="Write these formats too, beside the output: metal,mlx,... as in export.", show_default=False
    ),
]
LossyOption = Annotated[
    bool, typer.Option("--allow-lossy", help="Write a format that cannot hold the model exactly, too.")
]


def split_formats(values: list[str] | None) -> list[str]:
    """`["metal,mlx", "dense"]` -> three names."""
    return [name.strip() for value in values or [] for name in value.split(",") if name.strip()]


def command_line() -> str:
    """What the user typed, for reports and cards."""
    return shlex.join(["ternarize", *sys.argv[1:]])


def check_device(device: str) -> None:
    """Raise a TernarizeError where nothing can be computed on it."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TernarizeError(f"device {device!r} cannot be used: {first_line(error)} Try --device cpu.") from error


def dtype_of(name: str) -> Any:
    """A torch.dtype by name; a TernarizeError names those that there are."""
    import torch

    known: dict[str, Callable[[], Any]] = {
        "float32": lambda: torch.float32,
        "bfloat16": lambda: torch.bfloat16,
        "float16": lambda: torch.float16,
    }
    if name not in known:
        raise TernarizeError(f"dtype {name!r} is not one of {', '.join(known)}{nearest(name, known)}.")
    return known[name]()
