"""The driver's end of a worker (`serve.py` is the other): start it, ask it, end it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

from ternarize.errors import TernarizeError

from ..quality.contenders import failure

ROOT = Path(__file__).resolve().parents[3]


class Worker:
    """A process that holds one model.

    Args:
        command: what to run; it calls `serve` or `converse`.
        log: the file that its standard error is added to.
        patience: seconds that it may take to get ready, or to answer once.

    Raises:
        TernarizeError: it ended before it was ready; the message ends with its last line.
    """

    def __init__(self, command: list[str], log: Path, patience: float) -> None:
        self.log, self.patience = log, patience
        with log.open("a", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,  # `-m tests.benchmarks...` is found there
                env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            )
        self.facts = self._receive()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer, such as the speed of one prompt and what follows it.

        Raises:
            TernarizeError: the worker ended, or took longer than its patience.
        """
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended: it will say nothing
            print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._receive()

    def close(self) -> None:
        """End the process; what it holds is free afterwards."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(OSError):  # a line that it never read
                stream.close()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        started, timer = time.monotonic(), Timer(self.patience, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()  # it ends, by itself or by the timer
        timer.cancel()
        if not line:
            late = time.monotonic() - started >= self.patience
            self.close()
            raise TernarizeError(
                f"no answer within {self.patience:.0f} s"
                if late
                else f"exit code {self.process.returncode}: {failure(self.log)}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
