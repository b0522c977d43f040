"""Progress that a person or a log can read: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Protocol

from ternarize.errors import TernarizeError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tqdm's about ipywidgets: without them a notebook has a text bar
    from tqdm.auto import tqdm

LINE_EVERY = 10.0  # seconds between plain lines


class Bar(Protocol):
    """What a long loop needs of its bar."""

    def update(self, n: int = 1) -> object:
        """Advance by `n`; back, where it is negative."""


class _Lines:
    """Plain lines: at most one every `LINE_EVERY` seconds, with the time left."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.started, self.printed = 0, time.monotonic(), time.monotonic()

    def update(self, n: int = 1) -> None:
        """Advance by `n`."""
        self.done += n
        now = time.monotonic()
        if now - self.printed >= LINE_EVERY and 0 < self.done < self.total:
            left = (now - self.started) / self.done * (self.total - self.done)
            self.printed = now
            print(
                f"{self.label}: {self.done}/{self.total} {self.unit}s, about {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )


class _Silence:
    def update(self, n: int = 1) -> None:
        """Do nothing."""


class Progress:
    """Where messages and bars go: standard error, so that standard output stays clean for results.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, message: str) -> None:
        """One line to the person."""
        if not self.quiet:
            tqdm.write(message, file=sys.stderr)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        """A bar over `total` units; plain lines where standard error is no terminal."""
        if self.quiet:
            yield _Silence()
        elif not (sys.stderr.isatty() or _in_notebook()):
            started = time.monotonic()
            yield _Lines(label, total, unit)
            if (spent := time.monotonic() - started) > 2:
                print(f"{label}: done in {duration(spent)}", file=sys.stderr, flush=True)
        else:
            with tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True, smoothing=0.1) as bar:
                yield bar


def _in_notebook() -> bool:
    """Whether this runs in a cell: the shell of IPython has a kernel."""
    interactive = sys.modules.get("IPython")
    return interactive is not None and getattr(interactive.get_ipython(), "kernel", None) is not None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """None of transformers' own progress bars and warnings while a part is loaded: this package shows its own."""
    from transformers import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def bars_on_terminals(module: ModuleType) -> Iterator[None]:
    """A module's own bars, which no setting turns off, only where standard error is a terminal."""
    own = getattr(module, "tqdm", tqdm)
    module.tqdm = partial(own, disable=None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.tqdm = own  # type: ignore[attr-defined]


def duration(seconds: float) -> str:
    """`72.4` -> `1 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def parse_duration(text: str) -> float:
    """`30m` -> 1800.0 seconds.

    Raises:
        TernarizeError: it is no duration above 0.
    """
    refusal = f"time budget {text!r} is no duration above 0. Write it as 90s, 30m or 1h."
    number, unit = _quantity(text, "(s|m|h|)", refusal)
    return number * {"s": 1, "": 1, "m": 60, "h": 3600}[unit]


def parse_size(text: str) -> int:
    """`60MB` -> 60000000 bytes.

    Raises:
        TernarizeError: it is no size above 0.
    """
    refusal = f"target size {text!r} is no size above 0. Write it as 60MB or 1.2GB."
    number, unit = _quantity(text, "([kKMGT]?)i?B?", refusal)
    return int(number * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit])


def _quantity(text: str, unit: str, refusal: str) -> tuple[float, str]:
    """A number above 0 and its unit, which is the one group of the pattern `unit`; `refusal` says what is wrong."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*{unit}", text.strip())
    if found is None or float(found[1]) <= 0:
        raise TernarizeError(refusal)
    return float(found[1]), found[2]


def size(count: float) -> str:
    """Bytes for people: `97300000` -> `97.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
