"""The errors a user can meet: each says what was found, which rule it breaks, and what to do next."""

from __future__ import annotations


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
