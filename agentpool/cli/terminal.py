"""What the commands share: signals as one exception, messages, an output whose reader may go away, a status line.

Main thread only.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, TextIO

__all__ = ["CommandFailed", "Interrupted", "Interrupts", "StatusLine", "UsageProblem", "give_up_output", "message"]

#: As a shell reports a program that was ended by SIGPIPE.
READER_GONE: Final = 128 + signal.SIGPIPE
_REDRAW_SECONDS: Final = 0.2


class UsageProblem(Exception):
    """The command line cannot be carried out: exit code 2, with this message."""


class CommandFailed(Exception):
    """The command could not be carried out: this message and this exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """A signal asked this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP as `Interrupted`, raised only where the program says that it may be.

    So no signal arrives in the middle of a call into the pool, or between a result and its line in the job log.
    A signal that was ignored when this program started (nohup, a background job) stays ignored.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._is_open = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if self._is_open:
            self._raise()

    def _raise(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            raise Interrupted(number)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within this block a signal raises `Interrupted`; so does one that arrived before."""
        self._is_open = True
        try:
            self._raise()
            yield
        finally:
            self._is_open = False


def message(text: str) -> None:
    """A line for the person at the terminal."""
    print(f"agentpool: {text}", file=sys.stderr, flush=True)


def give_up_output() -> int:
    """Called when the reader of the output has gone away (`| head`): nothing more is written. The exit code for it."""
    # Descriptor 1 must stay valid, or the interpreter complains when it flushes it at exit.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return READER_GONE


class StatusLine:
    """One line at the bottom of a terminal that is rewritten in place; nothing at all where there is no terminal."""

    def __init__(self, stream: TextIO, *, wanted: bool = True) -> None:
        self._stream = stream
        self.is_shown = wanted and stream.isatty()
        self._is_drawn = False
        self._next_draw = 0.0

    def is_due(self) -> bool:
        """Whether `draw` would do anything now: it is asked more often than a person can read."""
        return self.is_shown and time.monotonic() >= self._next_draw

    def draw(self, text: str) -> None:
        self._next_draw = time.monotonic() + _REDRAW_SECONDS
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\x1b[K{text[:width]}")
        self._stream.flush()
        self._is_drawn = True

    def clear(self) -> None:
        """Makes room for other output."""
        if self._is_drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._is_drawn = False
            self._next_draw = 0.0
