"""Results of the quality benchmark as a Markdown table and a picture."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from ternarize.plot import new_figure, save

Row = dict[str, Any]
COLUMNS = {
    "contender": lambda row, teacher: row["contender"],
    "settings": lambda row, teacher: _settings(row),
    "bits a linear weight": lambda row, teacher: _number(bits(row), "{:.2f}"),
    "bits, whole file": lambda row, teacher: _whole_file(row),
    "WikiText-2": lambda row, teacher: _perplexity(row["wiki"]["perplexity"]),
    "C4": lambda row, teacher: _perplexity(row["c4"]["perplexity"]),
    "KL": lambda row, teacher: _number(row["wiki"]["kl"], "{:.3f}"),
    "same token": lambda row, teacher: _number(row["wiki"]["agreement"], "{:.1f} %", 0.01),
    "zero-shot": lambda row, teacher: _number(_zero_shot(row, "mean"), "{:.1f} %", 0.01),
    "kept above chance": lambda row, teacher: _number(above_chance(row, teacher), "{:.0f} %", 0.01),
    "minutes": lambda row, teacher: _number(row.get("seconds"), "{:.1f}", 60),
    "peak GB": lambda row, teacher: _number(row.get("peak_memory"), "{:.2f}", 1e9),
}


def bits(row: Row) -> float | None:
    """Stored bits of the quantized linears over their weights; None for the teacher."""
    return 8 * row["linear_bytes"] / row["linear_weights"] if "linear_bytes" in row else None


def above_chance(row: Row, teacher: Row | None) -> float | None:
    """Share that is left of what the teacher's mean zero-shot score has above guessing."""
    mine, reference = _zero_shot(row, "mean"), _zero_shot(teacher or {}, "mean")
    if mine is None or reference is None or reference <= row["zero_shot"]["chance"]:
        return None
    return (mine - row["zero_shot"]["chance"]) / (reference - row["zero_shot"]["chance"])


def markdown(results: dict[str, Any]) -> str:
    """The table, by bits and then by KL, the teacher first; what the numbers are, notes and failures below."""
    done = sorted((row for row in results["rows"] if "error" not in row), key=_order)
    teacher = next((row for row in done if row["contender"] == "teacher"), None)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * 2}{' ---: |' * (len(COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(cell(row, teacher) for cell in COLUMNS.values())} |" for row in done]
    shapes = {name: " x ".join(map(str, text["windows"])) for name, text in results["texts"].items()}
    lines += [
        "",
        f"{results['source']}. Perplexity on WikiText-2 ({shapes['wiki']} tokens) and C4 ({shapes['c4']}); KL in "
        "nats a token and share of tokens with the teacher's likeliest next token on WikiText-2. "
        f"Calibration: {' x '.join(map(str, results['calibration']['windows']))} tokens, seed "
        f"{results['calibration']['seed']}.",
    ]
    if results["zero_shot"]["items"]:
        stderr = _number(_zero_shot(teacher or {}, "stderr"), " (standard error {:.1f} points)", 0.01)
        lines[-1] += (
            f" Zero-shot: mean of arc_easy, hellaswag, piqa (acc_norm) and winogrande (acc), first "
            f"{results['zero_shot']['items']} items each{stderr}, lm-eval {results['zero_shot']['lm_eval']}, "
            f"{results['zero_shot']['dtype']}."
        )
    notes = [f"- {row['contender']}: {row['note']}" for row in done if row.get("note")]
    failed = [f"- {row['contender']}: {row['error']}" for row in results["rows"] if "error" in row]
    for title, listed in (("Notes:", notes), ("Failed:", failed)):
        lines += ["", title, "", *listed] if listed else []
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Bits against what perplexity on WikiText-2 has grown by, one labelled point a contender, the teacher's line at 0.

    Raises:
        TernarizeError: matplotlib is not there.
    """
    points = []
    for row in sorted((row for row in results["rows"] if "linear_bytes" in row and "error" not in row), key=_order):
        perplexity, reference = row["wiki"]["perplexity"], row["wiki"]["teacher_perplexity"]
        if perplexity and reference:  # null where it was not finite
            points.append((row["contender"], bits(row), math.log(perplexity / reference)))
    figure, axes = new_figure()
    colors: dict[str, Any] = {}
    for name, x, y in points:
        tool = name.partition(":")[0]
        color = colors.setdefault(tool, f"C{len(colors) % 10}")
        marker = "*" if tool == "ternarize" else "o"
        axes.plot(x, y, marker=marker, markersize=11 if marker == "*" else 6, color=color, linestyle="none")
    axes.axhline(0, color="0.4", linewidth=1.2, linestyle="--")
    axes.text(
        0.99, 0, "teacher", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color="0.4", fontsize=8
    )
    axes.margins(x=0.2)
    axes.set_yscale("symlog", linthresh=1, linscale=0.6)  # straight below 1, so that 0 is there; logarithmic above
    axes.set_yticks([0, 0.5, 1, 2, 5, 10, 20], ["0", "0.5", "1", "2", "5", "10", "20"])
    axes.set_ylim(-0.2, 1.6 * max([1.0, *(y for _, _, y in points)]))
    axes.set_xlabel("stored bits per quantized weight")
    axes.set_ylabel("ln(perplexity / teacher's perplexity), WikiText-2")
    axes.set_title(f"{results['source']}: quality against size")
    axes.grid(alpha=0.3)
    figure.draw_without_rendering()
    _label(axes, points, colors)
    save(figure, path)


def _label(axes: Any, points: list[tuple[str, Any, float]], colors: dict[str, Any]) -> None:
    """Names beside their points, a thin line to each: at the nearest place that nothing takes, and that no other point
    is nearer to, where there is one.
    """
    from matplotlib.text import Text

    places = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    frame, renderer = axes.get_window_extent(), axes.figure.canvas.get_renderer()
    for (name, x, y), own in zip(points, places, strict=True):
        for apart, distance, turn in itertools.product((True, False), range(10, 150, 8), (0, 4, 2, 6, 1, 7, 3, 5)):
            right, up = math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)
            text = axes.annotate(
                name,
                (x, y),
                (distance * right, distance * up),
                textcoords="offset points",
                ha="left" if right > 0.1 else "right" if right < -0.1 else "center",
                va="center",
                fontsize=8,
                color=colors[name.partition(":")[0]],
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if distance > 10 else None,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).extents  # the name's alone, without the line
            inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
            its_own = not apart or all(_distance(box, own) <= _distance(box, other) + 1 for other in places)
            if inside and its_own and not any(_overlap(box, other) for other in taken):
                break
            text.remove()
        else:
            continue
        taken.append(tuple(box))


def _overlap(one: Any, other: Any) -> bool:
    return bool(one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


def _distance(box: Any, place: Any) -> float:
    return math.hypot(max(box[0] - place[0], 0, place[0] - box[2]), max(box[1] - place[1], 0, place[1] - box[3]))


def _order(row: Row) -> tuple[float, float]:
    kl = row["wiki"]["kl"]
    return bits(row) or 0.0, math.inf if kl is None else kl


def _zero_shot(row: Row, key: str) -> float | None:
    return row["zero_shot"][key] if "zero_shot" in row else None


def _whole_file(row: Row) -> str:
    """Bits of all files over all weights, unless they hold the quantized linears alone, as some tools write them."""
    if row["file_bytes"] <= 1.02 * row.get("linear_bytes", 0):
        return "not whole"
    return f"{8 * row['file_bytes'] / row['weights']:.2f}"


def _settings(row: Row) -> str:
    settings = row["identity"]["settings"]
    return ", ".join(f"{key}={value}" for key, value in settings.items() if key != "recipe")


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def _perplexity(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
