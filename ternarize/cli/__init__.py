"""The command line: parse, call, print.

Exit codes: 0 done, 1 a bug in ternarize, 2 bad input or usage, 3 the model cannot be converted, 4 stopped but
resumable, 5 converted, but the model has collapsed. Results go to standard output, progress and errors to standard
error.
"""

from ternarize.cli import converting, exporting, measuring, running, sharing
from ternarize.cli.app import app, run

__all__ = ["app", "converting", "exporting", "measuring", "run", "running", "sharing"]
