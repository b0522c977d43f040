"""What a report shows in a notebook: HTML without a script, a table, a figure; and the bar beside it."""

from __future__ import annotations

import html
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ternarize import plot
from ternarize.errors import TernarizeError
from ternarize.report import WORST, Report

NASTY = "<script>alert('x')</script> & \"so\""


@pytest.fixture(scope="module")
def report(ternary: Path) -> Report:
    return Report.read(ternary)


class _Tags(HTMLParser):
    """What a browser makes of it: the tags, and whether each that opens is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_shows_sizes_bits_verdict_error_time_and_the_worst_linears(report: Report) -> None:
    shown = _Tags(report._repr_html_())
    assert not shown.open
    assert shown.seen == {"div", "b", "table", "tr", "td", "th"}
    for figure in (report.bits_per_ternary_weight, report.bits_per_weight):
        assert f"{figure:.3f}" in shown.words
    assert f"{report.mean_error:.4f}" in shown.words
    assert {"weight files", "verdict", "time"} < set(shown.words)
    errors = [float(word) for word in shown.words if re.fullmatch(r"0\.\d{4}", word)]
    assert errors[1:] == [round(entry.error, 4) for entry in sorted(report.linears, key=lambda e: -e.error)[:WORST]]


def test_every_string_of_the_html_is_escaped(report: Report) -> None:
    run = report.run | {"verdict": {"word": NASTY, "why": NASTY, "text": NASTY}}
    nasty = replace(
        report,
        source=NASTY,
        model=NASTY,
        linears=[replace(entry, name=NASTY, error=9.0) for entry in report.linears],
        run=run,
    )
    text = nasty._repr_html_()
    assert "<script" not in text
    assert text.count(html.escape(NASTY)) == 2 + 3 + WORST
    assert not _Tags(text).open


def test_html_of_a_report_without_a_run_leaves_its_rows_out(report: Report) -> None:
    words = _Tags(replace(report, run={})._repr_html_()).words
    assert "mean relative error" in words
    assert not {"verdict", "it writes", "time"} & set(words)


def test_worst_are_the_largest_errors_and_none_is_all(report: Report) -> None:
    errors = [entry.error for entry in report.worst(0)]
    assert errors == sorted((entry.error for entry in report.linears), reverse=True)
    assert report.worst(2) == report.worst(0)[:2]


def test_repr_is_one_short_line(report: Report) -> None:
    assert len(repr(report)) < 300
    assert report.source in repr(report)


def test_to_pandas_has_a_row_for_each_linear(report: Report) -> None:
    pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert list(frame["name"]) == [entry.name for entry in report.linears]
    assert list(frame["error"]) == [entry.error for entry in report.linears]
    assert list(frame.columns) == ["name", "shape", "zero_share", "error", "bits", "tokens", "data_free"]
    assert list(replace(report, linears=[]).to_pandas().columns) == list(frame.columns)


@pytest.mark.parametrize(("module", "call"), [("pandas", Report.to_pandas), ("matplotlib", Report.plot)])
def test_what_is_missing_is_named_with_the_extra(
    module: str, call: object, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TernarizeError, match=rf"needs? {module}.*pip install 'ternarize\["):
        call(report)  # type: ignore[operator]


def test_plot_is_a_figure_that_touches_no_backend(report: Report, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.rcParams._get("backend")
    figure = report.plot()
    assert matplotlib.rcParams._get("backend") == before
    assert figure._repr_png_().startswith(b"\x89PNG")
    plot.save(figure, tmp_path / "figure.png")
    plot.save(figure, tmp_path / "figure.svg")
    top, bottom = figure.axes
    kinds = {entry.name.split(".", 3)[3] for entry in report.linears}
    assert {line.get_label() for line in top.lines} == kinds
    drawn = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in bottom.lines}
    for entry in report.linears:
        depth, kind = entry.name.split(".", 3)[2:]
        assert drawn[kind][int(depth)] == entry.zero_share
