"""evaluate, bench, inspect, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ternarize.cli.app import app
from ternarize.cli.options import (
    AnyFolder,
    DeviceOption,
    DtypeOption,
    Folder,
    JsonOption,
    QuietOption,
    RevisionOption,
    TextOption,
    check_device,
    dtype_of,
)
from ternarize.errors import TernarizeError
from ternarize.printing import comparison, machine_rows, print_json, size_rows, summarize_kept, table
from ternarize.progress import Progress, size

if TYPE_CHECKING:
    from ternarize.evaluate import Evaluation
    from ternarize.tasks import Score


@app.command()
def evaluate(
    folder: AnyFolder,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The checkpoint that it was made from, for KL and agreement."),
    ] = None,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Branch, tag or commit of the teacher, or of the folder where that alone is a Hub id."),
    ] = None,
    text: TextOption = None,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Score these tasks by lm-eval, comma between: arc_easy,hellaswag. Needs ternarize[eval]."),
    ] = None,
    task_data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder with the tasks' files, NAME*.jsonl[.gz] or NAME.yaml; nothing is fetched then."),
    ] = None,
    items: Annotated[int, typer.Option(min=0, help="At most so many items of each task; 0 is all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of a task at a time.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    windows: Annotated[int, typer.Option(min=0, help="At most so many windows of each text; 0 is all.")] = 20,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    save: Annotated[bool, typer.Option(help="Write the result into report.json and the card.")] = True,
    activations: Annotated[
        str, typer.Option(help="float, the same on every machine; or int8, as a loaded model runs on a CPU.")
    ] = "float",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity and distance to the teacher, or score tasks.

    With --tasks alone no text is measured. Windows of text do not overlap and the tail is dropped; WikiText's raw file
    (its name contains "wiki") is joined as in the papers. Default text: pydoc, Python's own manual.
    """
    from ternarize.evaluate import evaluate as run
    from ternarize.sources import resolve

    check_device(device)
    progress, kind = Progress(quiet), dtype_of(dtype)
    if task_data is not None and not tasks:
        raise TernarizeError("--task-data holds the files of --tasks. Name the tasks, such as --tasks arc_easy.")
    student = resolve(folder, None if teacher else revision)
    reference_folder = resolve(teacher, revision) if teacher else None
    results, scores = [], []
    if text or not tasks:
        texts, most = text or ["pydoc"], windows or None
        results = run(student, reference_folder, texts, length, most, device, kind, progress, save, activations)
    if tasks:
        from ternarize.tasks import evaluate_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        scores = evaluate_tasks(
            student,
            reference_folder,
            names,
            task_data,
            items or None,
            device,
            kind,
            batch_size,
            progress,
            save,
            activations,
        )
    if as_json:
        print_json([result.to_dict() for result in results] + [score.to_dict() for score in scores])
        return
    comparison(_rows(student, results, scores))


def _rows(student: Path, results: list[Evaluation], scores: list[Score]) -> list[tuple[str, str, str]]:
    """What is shown of an evaluation: a figure's name, the teacher's, the student's."""
    rows = size_rows(student)
    for result in results:
        reference = "" if result.teacher_perplexity is None else f"{result.teacher_perplexity:.2f}"
        what = f"{result.text}, {result.windows} x {result.length} tokens"
        rows.append((f"perplexity ({what})", reference, f"{result.perplexity:.2f}"))
        if result.kl is not None and result.agreement is not None:
            rows.append(("KL to the teacher, nats a token", "", f"{result.kl:.3f}"))
            rows.append(("same likeliest token", "", f"{100 * result.agreement:.1f} %"))
    for score in scores:
        other = "" if score.teacher is None else f"{100 * score.teacher:.1f} %"
        guess = "" if score.chance is None else f", guessing {100 * score.chance:.0f} %"
        how = f", {score.how}" if score.how else ""
        what = f"{score.task} ({score.metric}, {score.items} items{guess}{how})"
        rows.append((what, other, f"{100 * score.score:.1f} %"))
    return rows


@app.command()
def bench(
    folder: AnyFolder,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens that go in.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens that come out.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often all is timed; the median counts.")] = 3,
    threads: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(min=1, help="Threads; repeat to compare, in turns. Default: torch's own number."),
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    activations: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="int8 or float, for native products on a CPU.", show_default="as the environment says"),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time a model: load, prefill and decode.

    By greedy generation from random tokens.
    """
    from ternarize.sources import resolve
    from ternarize.speed import measure, spread

    check_device(device)
    kind, progress = dtype_of(dtype), Progress(quiet)
    path = resolve(folder, revision)
    found = measure(path, prompt, tokens, rounds, threads or [], device, kind, activations, progress)
    if as_json:
        print_json([speed.to_dict() for speed in found])
        return
    rows = [("ready in", f"{found[0].ready:.1f} s")]
    for speed in found:
        label = f"{speed.threads} thread{'s' if speed.threads > 1 else ''}"
        rows.append((f"prefill of {prompt} tokens, {label}", f"{spread(speed.prefill)} tokens/s"))
        rows.append((f"decode of {tokens} tokens, {label}", f"{spread(speed.decode)} tokens/s"))
    table([*rows, ("peak memory", size(found[-1].peak_memory) if found[-1].peak_memory else "not known")])


@app.command()
def inspect(
    folder: Folder,
    worst: Annotated[int, typer.Option(min=0, help="Only the linears with the largest error; 0 is all.")] = 0,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the table into this .png, .svg or .pdf."),
    ] = None,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Source of the conversion: rank the linears by the KL that each alone does to it."),
    ] = None,
    text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a conversion did, per linear.

    With --teacher it ranks the linears by how much each hurts on its own.
    """
    from ternarize.report import Report

    report = Report.read(folder)
    if teacher is None and text:
        raise TernarizeError("--text is what linears are ranked on, beside the --teacher. Give both, or leave it out.")
    if teacher is not None and plot is not None:
        raise TernarizeError("--plot draws the table of errors, which --teacher does not show. Leave one of them out.")
    if teacher is not None:
        _rank(folder, teacher, text or ["pydoc"], worst, as_json)
        return
    if plot is not None:  # before the table, which a reader such as head may stop
        from ternarize.plot import save

        save(report.plot(), plot)
    if as_json:
        print_json(json.loads(report.to_json()))
    else:
        entries = report.linears
        if worst:
            entries = report.worst(worst)
        width = max([len(entry.name) for entry in entries] + [6])
        typer.echo(f"{'linear':{width}}  {'shape':>13}  {'error':>7}  {'zeros':>6}  {'bits':>5}")
        for entry in entries:
            shape = f"{entry.shape[0]} x {entry.shape[1]}"
            note = "  without data" if entry.data_free else ""
            typer.echo(
                f"{entry.name:{width}}  {shape:>13}  {entry.error:7.4f}  {100 * entry.zero_share:5.1f}%  "
                f"{entry.bits:5.3f}{note}"
            )
        typer.echo("")
        table(
            [
                ("bits per ternary weight", f"{report.bits_per_ternary_weight:.3f}"),
                ("bits per weight, whole file", f"{report.bits_per_weight:.3f}"),
                ("mean relative error", f"{report.mean_error:.4f}"),
            ]
        )
        typer.echo("\nStayed float:")
        for line in summarize_kept([(kept["name"], kept["reason"]) for kept in report.kept]):
            typer.echo(f"  {line}")
    if plot is not None and not as_json:
        typer.echo(f"\nDrawn into {plot}")


@app.command()
def doctor() -> None:
    """Say what of this machine runs the models, and how."""
    from ternarize.kernels.cpu import missing

    table(machine_rows())
    if missing():
        typer.echo(
            "\nProducts run on torch's own operators, ten times slower or more. "
            "With a C compiler (gcc or clang) in place, install ternarize again."
        )


def _rank(folder: Path, teacher: str, text: list[str], worst: int, as_json: bool) -> None:
    from ternarize.budget import rank_folder
    from ternarize.sources import resolve

    damages = rank_folder(folder, resolve(teacher), text, Progress(quiet=as_json))
    ranked = sorted(damages.items(), key=lambda item: -item[1])[: worst or None]
    if as_json:
        print_json([{"linear": name, "kl": damage} for name, damage in ranked])
        return
    width = max(len(name) for name, _ in ranked)
    typer.echo(f"{'linear':{width}}  KL to the teacher with this linear alone ternary, nats a token")
    for name, damage in ranked:
        typer.echo(f"{name:{width}}  {damage:.5f}")
