"""The command line: parse, call, print.

Exit codes: 0 done, 1 a bug in ternarize, 2 bad input or usage, 3 the model cannot be converted, 4 stopped but
resumable, 5 converted, but the model has collapsed. Results go to standard output, progress and errors to standard
error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import ternarize
from ternarize.errors import TernarizeError
from ternarize.printing import comparison, machine_rows, print_json, say_verdict, size_rows, summarize_kept, table
from ternarize.progress import Progress, duration, parse_duration, parse_size, quiet_transformers, size
from ternarize.recipe import DEFAULT, Recipe

app = typer.Typer(
    name="ternarize",
    help="A Hugging Face checkpoint goes in, a ternary one comes out: weights scale * {-1, 0, 1} + shift.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 a bug, 2 bad input, 3 unsupported model, 4 stopped (run again with --resume), "
    "5 the converted model has collapsed.",
)

Source = Annotated[
    str,
    typer.Argument(help="A checkpoint's folder, a Hub id, a .gguf file, or sample:smollm2-135m.", show_default=False),
]
Folder = Annotated[Path, typer.Argument(help="A folder that ternarize convert wrote.", show_default=False)]
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
        help="Time for all of it: 90s, 30m, 1h. What fit and tune leave is the distillation's.", show_default=False
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str, typer.Option(help="Type of activations: float32, bfloat16 or float16.")]


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
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a checkpoint ternary."""
    from ternarize.conversion import convert as run

    if plan_only:
        plan(source, recipe, setting, text, target_size, revision, as_json)
        return
    _check_device(device)
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
        progress=progress,
    )
    verdict = report.run["verdict"]
    if as_json:
        print_json(json.loads(report.to_json()))
        say_verdict(verdict, quietly=True)
        return
    data_free = [entry.name for entry in report.linears if entry.data_free]
    if data_free and chosen.needs_statistics:
        progress.say(
            f"{len(data_free)} experts saw too few calibration tokens and were fitted without data, "
            f"such as {data_free[0]}; more calibration.samples would reach them."
        )
    table(
        [
            ("source", source),
            ("output", str(target)),
            ("weight files", f"{size(report.source_bytes)} -> {size(report.output_bytes)}"),
            ("bits per ternary weight", f"{report.bits_per_ternary_weight:.3f}"),
            ("bits per weight, whole file", f"{report.bits_per_weight:.3f}"),
            ("mean relative error", f"{report.mean_error:.4f}"),
            ("time", duration(report.run["seconds"])),
            ("peak memory", size(report.run["peak_memory"]) if report.run["peak_memory"] else "not known here"),
        ]
    )
    say_verdict(verdict)
    typer.echo(f"\nNext: ternarize evaluate {target} --teacher {source}")
    typer.echo(f'      ternarize generate {target} "Once upon a time"')


@app.command()
def distill(
    folder: Folder,
    teacher: Annotated[str, typer.Option(help="What the folder was converted from.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    setting: SetOption = None,
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
    import torch.distributed as dist

    from ternarize.refine import distill_again

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        quiet = quiet or dist.get_rank() > 0
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    _check_device(device)
    try:
        report = distill_again(
            folder,
            teacher,
            output,
            setting,
            revision=revision,
            text=text,
            device=device,
            resume=resume,
            force=force,
            budget=None if time_budget is None else parse_duration(time_budget),
            progress=Progress(quiet),
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
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
            ("int8", ", ".join(f"{n} {list(shape)}" for n, shape in made.int8.items()) or "nothing"),
            ("weight files", f"{size(made.source_bytes)} -> {size(made.output_bytes)}"),
            ("peak memory", f"about {size(made.peak_memory)}"),
            ("time", f"about {duration(made.seconds)}" + (", and the model's own text first" * made.writes_text)),
        ]
    )
    typer.echo("\nStays float:")
    for line in summarize_kept([(kept.name, kept.reason) for kept in made.kept]):
        typer.echo(f"  {line}")


@app.command()
def evaluate(
    folder: Annotated[
        str, typer.Argument(help="A folder that ternarize convert wrote, or any checkpoint.", show_default=False)
    ],
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The checkpoint that it was made from, for KL and agreement."),
    ] = None,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Branch, tag or commit of the teacher, or of the folder where that alone is a Hub id."),
    ] = None,
    text: TextOption = None,
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
    """Measure perplexity, and distance to the teacher.

    Windows do not overlap and the tail is dropped; WikiText's raw file (its name contains "wiki") is joined as in the
    papers. Default text: pydoc, Python's own manual.
    """
    from ternarize.evaluate import evaluate as run
    from ternarize.sources import resolve

    _check_device(device)
    results = run(
        resolve(folder, None if teacher else revision),
        resolve(teacher, revision) if teacher else None,
        text or ["pydoc"],
        length,
        windows or None,
        device,
        _dtype(dtype),
        Progress(quiet),
        save,
        activations,
    )
    if as_json:
        print_json([result.to_dict() for result in results])
        return
    rows = size_rows(resolve(folder, None if teacher else revision))
    for result in results:
        reference = "" if result.teacher_perplexity is None else f"{result.teacher_perplexity:.2f}"
        what = f"{result.text}, {result.windows} x {result.length} tokens"
        rows.append((f"perplexity ({what})", reference, f"{result.perplexity:.2f}"))
        if result.kl is not None and result.agreement is not None:
            rows.append(("KL to the teacher, nats a token", "", f"{result.kl:.3f}"))
            rows.append(("same likeliest token", "", f"{100 * result.agreement:.1f} %"))
    comparison(rows)


@app.command()
def generate(
    folder: Annotated[
        str, typer.Argument(help="A folder that ternarize convert wrote, or any checkpoint.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many new tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    revision: RevisionOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Generate text, printed as it comes."""
    import torch
    from transformers import TextStreamer

    from ternarize.evaluate import load_any
    from ternarize.sources import resolve
    from ternarize.text import load_tokenizer

    class Printer(TextStreamer):  # type: ignore[misc]
        def __init__(self, tokenizer: Any) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(text, nl=stream_end)

    _check_device(device)
    path = resolve(folder, revision)
    model: Any = load_any(path, device, _dtype(dtype), activations=None)
    tokenizer = load_tokenizer(path)
    inputs: Any
    if chat:
        if not tokenizer.chat_template:
            raise TernarizeError(f"{folder} has no chat template. Leave --chat out.")
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
        typer.echo(prompt, nl=False)
    if inputs["input_ids"].shape[1] == 0:
        raise TernarizeError("the prompt is empty. Give some text to go on from.")
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature else {})
    try:
        with quiet_transformers():
            model.generate(**inputs.to(model.device), max_new_tokens=tokens, streamer=Printer(tokenizer), **settings)
    except IndexError as error:
        raise TernarizeError(f"{folder} cannot take so long a text: {error}. Choose fewer --tokens.") from error


@app.command()
def bench(
    folder: Annotated[
        str, typer.Argument(help="A folder that ternarize convert wrote, or any checkpoint.", show_default=False)
    ],
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
    """Time a model: ready, prefill and decode, by greedy generation from random tokens."""
    from ternarize.sources import resolve
    from ternarize.speed import measure, spread

    _check_device(device)
    path = resolve(folder, revision)
    found = measure(path, prompt, tokens, rounds, threads or [], device, _dtype(dtype), activations, Progress(quiet))
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
    if teacher is not None:
        _rank(folder, teacher, text or ["pydoc"], worst, as_json)
        return
    if as_json:
        print_json(json.loads(report.to_json()))
    else:
        entries = report.linears
        if worst:
            entries = sorted(entries, key=lambda entry: -entry.error)[:worst]
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
    if plot is not None:
        from ternarize.plot import plot_report

        plot_report(report, plot)
        if not as_json:
            typer.echo(f"\nDrawn into {plot}")


@app.command()
def doctor() -> None:
    """Say what was found on this machine, and what of it runs the models."""
    from ternarize.kernels.cpu import missing

    table(machine_rows())
    if missing():
        typer.echo(
            "\nProducts run on torch's own operators, ten times slower or more. "
            "With a C compiler (gcc or clang) in place, install ternarize again."
        )


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


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TernarizeError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]} Try --device cpu."
        ) from error


def _dtype(name: str) -> Any:
    import torch

    known: dict[str, Callable[[], Any]] = {
        "float32": lambda: torch.float32,
        "bfloat16": lambda: torch.bfloat16,
        "float16": lambda: torch.float16,
    }
    if name not in known:
        raise TernarizeError(f"dtype {name!r} is not one of {', '.join(known)}.")
    return known[name]()


if __name__ == "__main__":
    run()
