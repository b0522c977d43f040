"""Results of the speed benchmark as Markdown tables and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ternarize.plot import new_figure, save
from ternarize.speed import spread

from .contenders import TERNARIZE

Row = dict[str, Any]


def figures(contender: Row, figure: str, threads: int, prompt: int) -> dict[int, float]:
    """{round: "prefill" or "decode"} of one contender."""
    return {
        run["round"]: run[figure] for run in contender["runs"] if (run["threads"], run["prompt"]) == (threads, prompt)
    }


def ratios(contender: Row, reference: Row, threads: int, prompt: int) -> list[float]:
    """Its decode over the reference's in each round that both have run."""
    mine, other = (figures(row, "decode", threads, prompt) for row in (contender, reference))
    return [mine[number] / other[number] for number in mine if number in other]


def shares(contender: Row, bandwidth: list[Row], threads: int, prompt: int) -> list[float]:
    """What of the memory's bandwidth its decode takes, in each round."""
    runs = figures(contender, "decode", threads, prompt)
    measured = {
        entry["round"]: entry["bandwidth"]
        for entry in bandwidth
        if (entry["threads"], entry["prompt"]) == (threads, prompt)
    }
    return [contender["bytes_per_token"] * runs[number] / measured[number] for number in runs]


def markdown(results: Row) -> str:
    """For each model a table for each number of threads, one of the contexts if there are several, and what failed."""
    machine, settings = results["machine"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, path {machine['path']}; "
        f"{versions}. {settings['tokens']} tokens decoded, {settings['rounds']} rounds: medians, and their range.",
    ]
    for model in results["rows"]:
        lines += ["", f"### {model['model']}"]
        for threads in settings["threads"]:
            lines += ["", *_table(model, threads, settings["contexts"][0])]
        if len(settings["contexts"]) > 1:
            lines += ["", "Prefill, tokens/s, by tokens:", "", *_contexts(model, settings, "prefill")]
            lines += ["", "Decode, tokens/s, by tokens before:", "", *_contexts(model, settings, "decode")]
        lines += _below(model)
    return "\n".join(lines)


def _table(model: Row, threads: int, prompt: int) -> list[str]:
    done = _done(model)
    reference = next((row for row in done if row["contender"] == TERNARIZE), None)
    bandwidth = [
        entry["bandwidth"] / 1e9
        for entry in model["bandwidth"]
        if (entry["threads"], entry["prompt"]) == (threads, prompt)
    ]
    lines = [
        f"{_count(threads)}, behind {prompt} tokens; a sum reads {spread(bandwidth)} GB/s:",
        "",
        "| contender | read a token, MB | load, s | peak memory, MB | prefill, tokens/s | decode, tokens/s | decode, "
        "x ternarize's | of bandwidth |",
        f"| --- |{' ---: |' * 7}",
    ]
    for row in done:
        compared = ratios(row, reference, threads, prompt) if reference and row is not reference else []
        cells = [
            row["contender"],
            f"{row['bytes_per_token'] / 1e6:.1f}",
            f"{statistics.median(row['load']):.1f}",
            f"{row['peak_memory'] / 1e6:,.0f}",
            spread(list(figures(row, "prefill", threads, prompt).values())),
            spread(list(figures(row, "decode", threads, prompt).values())),
            ratio_range(compared),
            f"{100 * statistics.median(shares(row, model['bandwidth'], threads, prompt)):.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _contexts(model: Row, settings: Row, figure: str) -> list[str]:
    """Medians of "prefill" or "decode" for prompts of each length."""
    columns = [(threads, prompt) for threads in settings["threads"] for prompt in settings["contexts"]]
    names = [f"{_count(threads)}, {prompt}" for threads, prompt in columns]
    lines = [f"| contender | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for row in _done(model):
        medians = [statistics.median(figures(row, figure, *column).values()) for column in columns]
        lines.append(f"| {row['contender']} | {' | '.join(f'{median:.1f}' for median in medians)} |")
    return lines


def _count(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _below(model: Row) -> list[str]:
    """What linears and head are held in; who failed, and why."""
    held = [
        f"- {row['contender']}: {', '.join(f'{count} {name}' for name, count in row['types'].items())}"
        for row in _done(model)
    ]
    failed = [f"- {row['contender']}: {row['error']}" for row in model["contenders"] if "error" in row]
    lines: list[str] = []
    for title, listed in (("Linears and head are held in:", held), ("Failed:", failed)):
        lines += ["", title, "", *listed] if listed else []
    return lines


def _done(model: Row) -> list[Row]:
    return [row for row in model["contenders"] if "error" not in row]


def ratio_range(compared: list[float]) -> str:
    """The median of the rounds' ratios, and their range; empty where there are none."""
    if not compared:
        return ""
    return f"{statistics.median(compared):.2f} ({min(compared):.2f} to {max(compared):.2f})"


def draw(results: Row, path: Path) -> None:
    """Decode of everybody, a panel a model: a bar for each number of threads, the range of the rounds, and a mark where
    the bandwidth would end it; behind the first prompt.

    Raises:
        TernarizeError: matplotlib is not there.
    """
    models, settings = results["rows"], results["settings"]
    contexts = len(settings["contexts"]) > 1
    size = (7 * (1 + contexts), 3.6 * len(models))
    figure, grid = new_figure(len(models), 1 + contexts, size, squeeze=False)
    for axes, model in zip(grid, models, strict=True):
        _bars(axes[0], model, settings)
        if contexts:
            _lines(axes[1], model, settings)
    save(figure, path)


def _bars(axes: Any, model: Row, settings: Row) -> None:
    done, prompt = _done(model), settings["contexts"][0]
    width = 0.8 / len(settings["threads"])
    for place, threads in enumerate(settings["threads"]):
        for line, row in enumerate(done):
            speeds = list(figures(row, "decode", threads, prompt).values())
            middle, y = statistics.median(speeds), line + (place + 0.5) * width - 0.4
            reach = [[middle - min(speeds)], [max(speeds) - middle]]
            limit = middle / statistics.median(shares(row, model["bandwidth"], threads, prompt))
            color, first = f"C{place}", line == 0
            label = _count(threads) if first else None
            axes.barh(y, middle, width * 0.9, xerr=reach, color=color, label=label, error_kw={"linewidth": 1})
            axes.plot(limit, y, "|", color="0.2", markersize=9, label="bandwidth" if first and not place else None)
    axes.set_yticks(range(len(done)), [row["contender"] for row in done])
    axes.invert_yaxis()
    axes.set_xlabel(f"decode, tokens/s, behind {prompt} tokens")
    axes.set_title(model["model"])
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)


def _lines(axes: Any, model: Row, settings: Row) -> None:
    from matplotlib.ticker import LogFormatter

    threads = settings["threads"][-1]
    for row in _done(model):
        medians = [
            statistics.median(figures(row, "decode", threads, prompt).values()) for prompt in settings["contexts"]
        ]
        own = row["contender"] == TERNARIZE
        axes.plot(
            settings["contexts"], medians, marker="*" if own else "o", linewidth=2 if own else 1, label=row["contender"]
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings["contexts"], [str(prompt) for prompt in settings["contexts"]])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_xlabel("tokens before")
    axes.set_ylabel(f"decode, tokens/s, {_count(threads)}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
