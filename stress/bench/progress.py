"""What is shown while it runs, on standard error: a line for each cell and, with rich on a terminal, a bar."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Of a known number of cells."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return self
            columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            # A bar that moves often would be part of what is measured.
            self._bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=1, transient=True)
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begins(self, what: str) -> None:
        """A cell is about to run."""
        if self._bar is not None:
            self._bar.update(self._task, description=what, refresh=True)

    def ended(self, what: str, seconds: float, found: str, *, bad: bool) -> None:
        """A cell has ended."""
        self._done += 1
        line = f"[{self._done:3}/{self._total}] {what} {seconds:6.1f} s  {found}"
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
            return
        self._bar.console.print(line, style="red" if bad else None, markup=False, highlight=False)
        self._bar.advance(self._task)
