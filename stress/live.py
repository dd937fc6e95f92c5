"""What is shown while a scenario runs, on standard error: a table with rich on a terminal, plain lines elsewhere.

Meanwhile what tasks print goes nowhere, and what they write to standard error into a file: neither is of use here.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from stress.harness import Run

_TABLE_SECONDS: Final = 0.5
_LINE_SECONDS: Final = 5.0


@contextmanager
def quiet(errors: Path) -> Iterator[TextIO]:
    """Take descriptors 1 and 2 from this process' children to come; gives what was standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    null, file = os.open(os.devnull, os.O_WRONLY), os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.dup2(null, 1)
        os.dup2(file, 2)
        with open(os.dup(kept[1]), "w") as screen:
            yield screen
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in enumerate(kept, 1):
            os.dup2(old, fd)
        for fd in (*kept, null, file):
            os.close(fd)


class Live:
    """Use as a context. screen: where to."""

    def __init__(self, run: Run, screen: TextIO) -> None:
        self._run = run
        self._file = screen
        self._stop = threading.Event()
        self._screen: Any = None
        self._thread = threading.Thread(target=self._show, name="stress-live", daemon=True)

    def __enter__(self) -> Live:
        if self._file.isatty():
            try:
                from rich.console import Console
                from rich.live import Live as Screen
            except ImportError:
                pass
            else:
                self._screen = Screen(console=Console(file=self._file), auto_refresh=False, transient=True)
                self._screen.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)
        if self._screen is not None:
            self._screen.stop()

    def _show(self) -> None:
        while not self._stop.wait(_TABLE_SECONDS if self._screen is not None else _LINE_SECONDS):
            figures = self._figures()
            if self._screen is None:
                print("  ".join(f"{name} {value}" for name, value in figures.items()), file=self._file, flush=True)
            else:
                self._screen.update(_table(self._run, figures), refresh=True)

    def _figures(self) -> dict[str, str]:
        run, row = self._run, self._run.recorder.latest
        p99 = row.get("p99")
        return {
            f"{run.scenario.name:11}": f"{row.get('t', 0):.0f} s",
            "settled": f"{run.ledger.settled:,}",
            "open": f"{len(run.ledger.open):,}",
            "per second": f"{row.get('rate', 0):,.0f}",
            "p99": "-" if p99 is None else f"{p99 * 1000:.0f} ms",
            "workers": f"{len(row.get('workers_mb', ()))} with {row.get('pool_mb', 0):,.0f} MB",
            "parent": f"{row.get('parent_mb', 0):.0f} MB",
            "breaker": str(row.get("breaker") or "-"),
            "faults": str(len(run.chaos.marks)),
        } | ({"BROKEN": ", ".join(run.ledger.broken)} if run.ledger.broken else {})


def _table(run: Run, figures: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(title=f"{run.scenario.title} ({run.target.label})", title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name.strip(), value, style="bold red" if name == "BROKEN" else None)
    for mark in run.chaos.marks[-3:]:
        table.add_row(f"{mark.at - run.recorder.began_at:.0f} s", mark.detail, style="dim")
    return table
