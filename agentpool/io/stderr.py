"""Passes on what workers write to their standard error, to this process's own, without ever blocking.

A terminal or log that does not take more must not stop the manager thread. What does not fit waits; whoever feeds
this stops reading while it `is_full`, so that a slow reader loses nothing. Where nobody reads at all, the oldest is
dropped, with a note: a task must not hang because of it. Called by the manager thread alone.
"""

from __future__ import annotations

import os
import select
import time
from typing import Final

__all__ = ["Forwarder"]

#: A pipe that polls as writable takes this much without blocking (POSIX: PIPE_BUF).
_CHUNK: Final = 4096
_FULL: Final = 256 * 1024
#: A reader that took nothing for so many seconds is none.
_PATIENCE: Final = 1.0
_NOTE: Final = b"\n[agentpool: standard error of workers was dropped, as nobody read it]\n"


class Forwarder:
    """Writes to descriptor 2 what fits, and keeps a bounded rest."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._waiting = bytearray()
        self._moved_at = 0.0

    @property
    def is_waiting(self) -> bool:
        """There is a rest: call `push` again soon."""
        return bool(self._waiting)

    @property
    def is_full(self) -> bool:
        """So much waits, and is being taken, that no more should be read."""
        return len(self._waiting) >= _FULL and time.monotonic() - self._moved_at < _PATIENCE

    def push(self, data: bytes = b"") -> None:
        """Pass on more, and what waits."""
        if not self._waiting:
            self._moved_at = time.monotonic()  # patience begins with the first that waits
        self._waiting += data
        try:
            while self._waiting and self._is_writable():
                del self._waiting[: os.write(self._descriptor, self._waiting[:_CHUNK])]
                self._moved_at = time.monotonic()
        except OSError:  # it is closed: nobody wants to read it
            self._waiting.clear()
        if len(self._waiting) > 2 * _FULL or (len(self._waiting) >= _FULL and not self.is_full):
            self._waiting[: len(self._waiting) - _FULL // 2] = _NOTE

    def drain(self) -> None:
        """At the end: pass on what waits, as long as somebody takes it."""
        while self._waiting and time.monotonic() - self._moved_at < _PATIENCE:
            self._is_writable(50)
            self.push()

    def _is_writable(self, milliseconds: int = 0) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return any(mask & (select.POLLOUT | select.POLLERR | select.POLLNVAL) for _, mask in poll.poll(milliseconds))
