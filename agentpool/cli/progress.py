"""Progress of a set of tasks: a table that is redrawn in place on a terminal, a line per change elsewhere.

Whoever runs the tasks calls `update` with the latest snapshots, from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentpool.config import MB

if TYPE_CHECKING:
    from agentpool.futures import TaskSnapshot

__all__ = ["Progress", "progress_on", "table_of"]

#: How a state is called on the screen, and its colour.
_STATES: Final = {
    "waiting": ("waiting", "dim"),
    "queued": ("queued", "dim"),
    "running": ("running", "cyan"),
    "waiting_to_retry": ("retrying", "yellow"),
    "done": ("done", "green"),
    "failed": ("failed", "red"),
    "cancelled": ("cancelled", "red"),
    "skipped": ("skipped", "yellow"),
}
_ENDED: Final = ("done", "failed", "cancelled", "skipped")
_NOT_BEGUN: Final = "-"


class Progress(Protocol):
    """Shows snapshots, in the order in which they are given."""

    def update(self, snapshots: Sequence[TaskSnapshot]) -> None: ...


@contextmanager
def progress_on(stream: TextIO, *, lines: bool = True) -> Iterator[Progress]:
    """Progress on `stream`: a live table where it is a terminal that can redraw, else lines, or nothing at all."""
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal:
        # Redrawn when there is news, which comes several times a second; no thread of its own.
        with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
            yield _LiveTable(live)
    elif lines:
        yield _Lines(stream)
    else:
        yield _Silent()


class _LiveTable:
    def __init__(self, live: Live) -> None:
        self._live = live

    def update(self, snapshots: Sequence[TaskSnapshot]) -> None:
        self._live.update(table_of(snapshots), refresh=True)


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        #: by place: what waits for others has no task yet, and a fallback is a task of its own
        self._last: dict[int, tuple[str, int]] = {}
        self._kinds: dict[int, str | None] = {}

    def update(self, snapshots: Sequence[TaskSnapshot]) -> None:
        for place, snapshot in enumerate(snapshots):
            if self._kinds.setdefault(place, snapshot.kind) != snapshot.kind:
                print(f"{_label(snapshot)}: failed, falling back to {snapshot.kind}", file=self._stream, flush=True)
                self._kinds[place] = snapshot.kind
            now = (snapshot.state, snapshot.attempts)
            # Everything waits or is queued at first; that is no news.
            if now != self._last.get(place) and snapshot.state not in ("waiting", "queued"):
                print(_line(snapshot), file=self._stream, flush=True)
            self._last[place] = now


class _Silent:
    def update(self, snapshots: Sequence[TaskSnapshot]) -> None:
        pass


def _line(snapshot: TaskSnapshot) -> str:
    words = [f"{_label(snapshot)}: {_STATES[snapshot.state][0]}"]
    if snapshot.state in _ENDED:
        if snapshot.attempts:
            words.append(f"in {snapshot.elapsed_seconds:.1f} s, peak {_megabytes(snapshot.peak_rss_bytes)}")
        if snapshot.attempts > 1:
            words.append(f"after {snapshot.attempts} attempts")
    elif snapshot.attempts > 1:
        words.append(f"(attempt {snapshot.attempts})")
    if snapshot.last_error and snapshot.state != "done":
        words.append(f"- {_first_line(snapshot.last_error)}")
    return " ".join(words)


def table_of(snapshots: Sequence[TaskSnapshot]) -> RenderableType:
    """The table of agents, one row each, and below it the sum and the last errors, a line each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Agent", no_wrap=True)
    # Wide enough for what is to come: columns that jump about cannot be read.
    table.add_column("State", no_wrap=True, min_width=9)
    for name, width in (("Attempt", 7), ("Elapsed", 8), ("Memory", 7), ("Peak", 7)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for snapshot in snapshots:
        words, style = _STATES[snapshot.state]
        has_begun = snapshot.attempts > 0
        is_there = snapshot.state == "running"
        table.add_row(
            Text(_label(snapshot)),
            Text(words, style=style),
            str(snapshot.attempts) if has_begun else _NOT_BEGUN,
            _duration(snapshot.elapsed_seconds) if has_begun else _NOT_BEGUN,
            _megabytes(snapshot.rss_bytes) if is_there else _NOT_BEGUN,
            _megabytes(_peak(snapshot)) if has_begun else _NOT_BEGUN,
        )
    errors = [
        Text(f"{_label(snapshot)}: {_first_line(snapshot.last_error)}", style="red", no_wrap=True, overflow="ellipsis")
        for snapshot in snapshots
        if snapshot.last_error and snapshot.state != "done"
    ]
    return Group(table, _sum(snapshots), *errors)


def _label(snapshot: TaskSnapshot) -> str:
    return snapshot.name or snapshot.kind or f"task {snapshot.task_id}"


def _sum(snapshots: Sequence[TaskSnapshot]) -> Text:
    ended = sum(snapshot.state in _ENDED for snapshot in snapshots)
    memory = sum(snapshot.rss_bytes for snapshot in snapshots if snapshot.state == "running")
    return Text(f"{ended} of {len(snapshots)} ended, {memory / MB:.0f} MB in use", style="dim")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _megabytes(size: int) -> str:
    return f"{size / MB:.0f} MB" if size else _NOT_BEGUN


def _peak(snapshot: TaskSnapshot) -> int:
    """The pool notes a peak when a task ends or its tree is sampled; what is there now may be newer."""
    return max(snapshot.peak_rss_bytes, snapshot.rss_bytes if snapshot.state == "running" else 0)


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
