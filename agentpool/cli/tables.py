"""Tables and figures for people. Main thread only.

What comes from a pool (names of tasks, command lines) is printed without its control characters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from agentpool_worker.agents.rendering import printable

__all__ = ["mb_words", "print_table", "seconds_words", "state_style"]

#: A pipe has no width; what reads it cuts for itself.
_WIDTH_OF_A_PIPE: Final = 250
_STYLES: Final = {
    "ok": "green", "busy": "cyan", "closed": "green", "running": "cyan", "degraded": "yellow", "half_open": "yellow",
    "paused": "yellow", "draining": "yellow", "recycling": "yellow", "starting": "yellow", "open": "red",
    "forced_open": "red", "broken": "red", "silent": "red", "fail": "red", "warn": "yellow", "skipped": "dim",
    "idle": "dim",
}


def state_style(state: str) -> str:
    """The colour of a state."""
    return _STYLES.get(state, "")


def mb_words(mb: float | None) -> str:
    """Memory, short."""
    if mb is None:
        return "-"
    return f"{mb / 1024:.1f} GB" if mb >= 10_000 else f"{mb:.0f} MB"


def seconds_words(seconds: float | None) -> str:
    """A length of time, short."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 2880 else f"{minutes // 1440} d"


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]], *, right: str = "", states: str = "") -> None:
    """A table without lines. right: titles, parted by blanks, of columns of figures; states: of columns of states."""
    print_renderable(make_table(titles, rows, right=right, states=states))


def make_table(titles: Sequence[str], rows: Iterable[Sequence[object]], *, right: str = "", states: str = "") -> Any:
    """The same, for rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    last = titles[-1] if titles else ""
    for title in titles:
        # Where the width does not do, the last column alone gives way, though its cells are of one line as well.
        table.add_column(title, justify="right" if title in right.split() else "left", no_wrap=title != last)
    for row in rows:
        table.add_row(*(
            Text(printable(str(cell)), style=state_style(str(cell)) if title in states.split() else "", no_wrap=True,
                 overflow="ellipsis")
            for title, cell in zip(titles, row, strict=True)
        ))
    return table


def print_renderable(renderable: Any) -> None:
    """Print something of rich's, without blanks at the ends of lines."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE, highlight=False)
    if console.is_terminal:
        console.print(renderable)
        return
    with console.capture() as captured:
        console.print(renderable)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
