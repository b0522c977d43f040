"""convert, distill, plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ternarize.cli.app import app
from ternarize.cli.options import (
    DeviceOption,
    Folder,
    FormatOption,
    JsonOption,
    LossyOption,
    PrivateOption,
    QuietOption,
    RecipeOption,
    RevisionOption,
    SetOption,
    SizeOption,
    Source,
    TextOption,
    TimeOption,
    check_device,
    command_line,
    split_formats,
)
from ternarize.errors import TernarizeError
from ternarize.printing import print_json, say_verdict, summarize_kept, table
from ternarize.progress import Progress, duration, parse_duration, parse_size, size
from ternarize.recipe import DEFAULT, Recipe

if TYPE_CHECKING:
    from ternarize.report import Report


@app.command()
def convert(
    source: Source,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder to write. Default: ./NAME-ternary.", show_default=False),
    ] = None,
    recipe: RecipeOption = DEFAULT,
    setting: SetOption = None,
    text: TextOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    plan_only: Annotated[bool, typer.Option("--plan", help="Say what would be done, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder, start over.")] = False,
    time_budget: TimeOption = None,
    target_size: SizeOption = None,
    push: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Put the result on the Hub as user/name, unless it has collapsed.", show_default=False),
    ] = None,
    private: PrivateOption = False,
    formats: FormatOption = None,
    allow_lossy: LossyOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a checkpoint ternary."""
    from ternarize.cli.sharing import send
    from ternarize.conversion import convert as run
    from ternarize.publish import check_access

    if plan_only:
        plan(source, recipe, setting, text, target_size, revision, as_json)
        return
    check_device(device)
    if push is not None:
        check_access(push)
    elif private:
        raise TernarizeError("--private says how to --push, which is not there.")
    progress = Progress(quiet)
    chosen = _recipe(source, recipe, setting, text, target_size, revision)
    target = output or Path(f"{_short_name(source)}-ternary")
    report = run(
        source,
        target,
        chosen,
        revision=revision,
        device=device,
        resume=resume,
        force=force,
        budget=None if time_budget is None else parse_duration(time_budget),
        formats=split_formats(formats),
        allow_lossy=allow_lossy,
        progress=progress,
        command=command_line(),
    )
    verdict = report.run["verdict"]
    if push is not None and verdict["word"] == "collapsed":
        progress.say(f"not pushed to {push}, because the model has collapsed.")
    if as_json:
        print_json(json.loads(report.to_json()))
    else:
        _show(report, source, target, chosen, progress)
    say_verdict(verdict, quietly=as_json)
    pushed = None if push is None else send(target, push, private, progress)
    if not as_json:
        _say_next(source, target, pushed)


def _say_next(source: str, target: Path, pushed: str | None) -> None:
    """Where the result went on the Hub, if it did, and what to do with it."""
    if pushed is not None:
        typer.echo(f"\nPushed: {pushed}")
    folder = quote(str(target))
    typer.echo(f"\nNext: ternarize evaluate {folder} --teacher {quote(source)}")
    typer.echo(f'      ternarize generate {folder} "Once upon a time"')


def _show(report: Report, source: str, target: Path, recipe: Recipe, progress: Progress) -> None:
    """What a conversion came to, as a table."""
    data_free = [entry.name for entry in report.linears if entry.data_free]
    if data_free and recipe.needs_statistics:
        progress.say(
            f"{len(data_free)} experts saw too few calibration tokens and were fitted without data, "
            f"such as {data_free[0]}; more calibration.samples would reach them."
        )
    rows = [("GPU", f"{run['device']}, {size(run['device_memory'])}")] if "device" in (run := report.run) else []
    table(
        [
            ("source", source),
            ("output", str(target)),
            ("weight files", f"{size(report.source_bytes)} -> {size(report.output_bytes)}"),
            ("bits per ternary weight", f"{report.bits_per_ternary_weight:.3f}"),
            ("bits per weight, whole file", f"{report.bits_per_weight:.3f}"),
            ("mean relative error", f"{report.mean_error:.4f}"),
            ("time", duration(run["seconds"])),
            ("peak memory", size(run["peak_memory"]) if run["peak_memory"] else "not known here"),
            *rows,
        ]
    )


@contextmanager
def _among_processes(device: str) -> Iterator[str]:
    """Under torchrun, one of its processes that learn together; gives the device that is this one's."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        check_device(device)
        yield device
        return
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    check_device(own)
    backend = "gloo"
    if own.startswith("cuda"):
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"  # some of what is agreed on lies on the CPU
    dist.init_process_group(backend, timeout=timedelta(days=1))  # all wait for the first one to write the text
    try:
        yield own
    finally:
        dist.destroy_process_group()


@app.command()
def distill(
    folder: Folder,
    teacher: Annotated[str, typer.Option(help="What the folder was converted from.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    setting: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="Change one setting of distill or calibration, as distill.epochs=2. Repeatable."),
    ] = None,
    text: TextOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted distillation.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder, start over.")] = False,
    time_budget: TimeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Let a converted folder learn from its teacher, end to end. Runs under torchrun too."""
    from ternarize.distill import is_first
    from ternarize.refine import distill_again

    with _among_processes(device) as own:
        report = distill_again(
            folder,
            teacher,
            output,
            setting,
            revision=revision,
            text=text,
            device=own,
            resume=resume,
            force=force,
            budget=None if time_budget is None else parse_duration(time_budget),
            progress=Progress(quiet or not is_first()),
            command=command_line(),
        )
    if report is None:
        return
    if as_json:
        print_json(json.loads(report.to_json()))
    else:
        done = report.run["distill"]
        table(
            [
                ("output", str(output)),
                ("held-out KL to the teacher", f"{done['before']:.3f} -> {done['after']:.3f} nats a token"),
                ("steps, tokens", f"{done['steps']}, {done['tokens']:,}"),
                ("time", duration(done["seconds"])),
            ]
        )
    say_verdict(report.run["verdict"], quietly=as_json)


@app.command()
def plan(
    source: Source,
    recipe: RecipeOption = DEFAULT,
    setting: SetOption = None,
    text: TextOption = None,
    target_size: SizeOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a conversion would do, from config and headers alone."""
    from ternarize.checkpoint import Checkpoint
    from ternarize.plan import make_plan
    from ternarize.sources import resolve

    chosen = _recipe(source, recipe, setting, text, target_size, revision)
    made = make_plan(Checkpoint(resolve(source, revision)), chosen)
    if as_json:
        print_json(made.to_dict())
        return
    share = made.ternary_weights / made.weights
    table(
        [
            ("model", f"{made.model}, {made.block_count} blocks at {made.blocks}"),
            ("ternary", f"{len(made.ternary)} linears, {made.ternary_weights:,} weights ({100 * share:.1f} %)"),
            ("tables", ", ".join(f"{n} [{v}, {h}] in int{b}" for n, (v, h, b) in made.tables.items()) or "none"),
            ("weight files", f"{size(made.source_bytes)} -> {size(made.output_bytes)}"),
            ("peak memory", f"about {size(made.peak_memory)}"),
            ("disk, until it is done", f"about {size(made.disk_bytes)}"),
            ("time", f"about {duration(made.seconds)}" + (", and the model's own text first" * made.writes_text)),
        ]
    )
    typer.echo("\nStays float:")
    for line in summarize_kept([(kept.name, kept.reason) for kept in made.kept]):
        typer.echo(f"  {line}")


def _recipe(
    source: str,
    recipe: str,
    settings: list[str] | None,
    text: list[str] | None,
    target_size: str | None,
    revision: str | None,
) -> Recipe:
    """The recipe that the options ask for."""
    from ternarize.plan import budget_for_size

    chosen = Recipe.load(recipe).with_settings(settings or []).with_text(text)
    return chosen if target_size is None else budget_for_size(source, revision, chosen, parse_size(target_size))


def _short_name(source: str) -> str:
    return (
        Path(source.removeprefix("sample:").rstrip("/")).stem
        if source.endswith(".gguf")
        else (source.removeprefix("sample:").rstrip("/").rpartition("/")[2])
    )
