"""The errors a user can meet: each says what was found, which rule it breaks, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TernarizeError(Exception):
    """Something the user can mend: bad input, a bad file, no room. The message is complete as it stands."""

    exit_code = 2


class UnsupportedModelError(TernarizeError):
    """The model's structure is one that this version cannot convert faithfully; the message says which part."""

    exit_code = 3


class FormatError(TernarizeError):
    """A packed folder is corrupted, incomplete, or of a version or packing that this reader does not know."""


class StoppedError(TernarizeError):
    """The work stopped early (Ctrl-C, disk full, no memory); what is done is on disk and can be resumed."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """What an error of a library says first; the name of its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, known: Iterable[object]) -> str:
    """` (did you mean 'x'?)` for what a mistyped name may have meant, or "" where nothing is near."""
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
