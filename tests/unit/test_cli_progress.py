"""Progress as lines and as a table, on what is and what is not a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
from dataclasses import replace

import pytest
from rich.console import Console

from agentpool.cli.progress import progress_on, table_of
from agentpool.cli.terminal import StatusLine
from agentpool.config import MB
from agentpool.futures import TaskSnapshot

QUEUED = TaskSnapshot(
    task_id=1, name=None, kind="security-analyst", state="queued", attempts=0, elapsed_seconds=0.0, rss_bytes=0,
    peak_rss_bytes=0, worker_pid=None, last_error=None,
)  # fmt: skip
RUNNING = replace(QUEUED, state="running", attempts=1, elapsed_seconds=1.25, rss_bytes=40 * MB, peak_rss_bytes=41 * MB)
RETRYING = replace(RUNNING, state="waiting_to_retry", rss_bytes=0, last_error="WorkerCrashedError: killed\nby signal 9")
AGAIN = replace(RETRYING, state="running", attempts=2, rss_bytes=40 * MB)
DONE = replace(AGAIN, state="done", elapsed_seconds=2.04)
FAILED = replace(DONE, task_id=2, name="mine", state="failed", attempts=1, last_error="ValueError: [bold]no[/bold]")


def test_a_line_for_each_change_and_for_nothing_else() -> None:
    stream = io.StringIO()
    with progress_on(stream) as progress:
        for snapshot in (QUEUED, QUEUED, RUNNING, replace(RUNNING, elapsed_seconds=2.0), RETRYING, AGAIN, DONE, DONE):
            progress.update([snapshot])
        progress.update([DONE, FAILED])
    assert stream.getvalue().splitlines() == [
        "security-analyst: running",
        "security-analyst: retrying - WorkerCrashedError: killed",
        "security-analyst: running (attempt 2) - WorkerCrashedError: killed",
        "security-analyst: done in 2.0 s, peak 41 MB after 2 attempts",
        "mine: failed in 2.0 s, peak 41 MB - ValueError: [bold]no[/bold]",
    ]


def test_a_task_cancelled_before_it_began_has_no_times() -> None:
    stream = io.StringIO()
    with progress_on(stream) as progress:
        progress.update([replace(QUEUED, name=None, kind=None, state="cancelled")])
    assert stream.getvalue() == "task 1: cancelled\n"


def test_no_lines_where_none_are_wanted() -> None:
    stream = io.StringIO()
    with progress_on(stream, lines=False) as progress:
        progress.update([RUNNING])
    assert stream.getvalue() == ""


@pytest.mark.parametrize("width", [50, 72, 132])
def test_the_table_shows_all_there_is_to_know(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(table_of([QUEUED, AGAIN, replace(FAILED, elapsed_seconds=75.0)]))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    print(*lines, sep="\n")
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "security-analyst" in text
    assert "mine: ValueError: [bold]no[/bold]" in text  # no markup
    if width >= 72:
        assert "1.2 s" in text
        assert "1:15 min" in text
        assert "40 MB" in text
    assert "1 of 3 ended, 40 MB in use" in text


def written_to_terminal(columns: int, write: object) -> str:
    """What `write(stream)` sends to a terminal."""
    leader, follower = pty.openpty()
    os.environ["COLUMNS"] = str(columns)
    try:
        with os.fdopen(follower, "w") as stream:
            write(stream)  # type: ignore[operator]
        chunks = []
        # Linux reports the other end's close as an error, once all was read.
        with contextlib.suppress(OSError):
            while chunk := os.read(leader, 65536):
                chunks.append(chunk)
        return b"".join(chunks).decode()
    finally:
        del os.environ["COLUMNS"]
        os.close(leader)


def test_a_terminal_gets_a_table_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def write(stream: io.TextIOWrapper) -> None:
        with progress_on(stream) as progress:
            progress.update([RUNNING])
            progress.update([DONE])

    output = written_to_terminal(100, write)
    assert "\x1b[" in output
    assert "running" in output
    assert "done" in output


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")

    def write(stream: io.TextIOWrapper) -> None:
        with progress_on(stream) as progress:
            progress.update([RUNNING])

    assert written_to_terminal(100, write) == "security-analyst: running\r\n"


def test_a_status_line_is_cut_to_the_terminal_and_cleared() -> None:
    def write(stream: io.TextIOWrapper) -> None:
        status = StatusLine(stream)
        assert status.is_shown
        assert status.is_due()
        status.draw("0123456789" * 10)
        assert not status.is_due()  # not more often than one can read
        status.clear()
        status.clear()
        assert status.is_due()

    assert written_to_terminal(20, write) == "\r\x1b[K0123456789012345678\r\x1b[K"


def test_no_status_line_without_a_terminal() -> None:
    stream = io.StringIO()
    status = StatusLine(stream)
    assert not status.is_due()
    status.clear()
    assert stream.getvalue() == ""
