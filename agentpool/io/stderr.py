"""Passes on what workers write to their standard error, to this process's own, without ever blocking.

A terminal or log that does not take more must not stop the manager thread: what does not fit waits, within bounds.
Called by the manager thread alone.
"""

from __future__ import annotations

import os
import select
from typing import Final

__all__ = ["Forwarder"]

#: A pipe that polls as writable takes this much without blocking (POSIX: PIPE_BUF).
_CHUNK: Final = 4096
_MAX_WAITING: Final = 256 * 1024
_NOTE: Final = b"\n[agentpool: standard error of workers was dropped, as nobody read it]\n"


class Forwarder:
    """Writes to descriptor 2 what fits, and keeps a bounded rest."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._waiting = bytearray()

    @property
    def is_waiting(self) -> bool:
        """There is a rest: call `push` again soon."""
        return bool(self._waiting)

    def push(self, data: bytes = b"") -> None:
        """Pass on more, and what waits."""
        self._waiting += data
        try:
            while self._waiting and self._is_writable():
                written = os.write(self._descriptor, self._waiting[:_CHUNK])
                del self._waiting[:written]
        except OSError:  # it is closed: nobody wants to read it
            self._waiting.clear()
        if len(self._waiting) > _MAX_WAITING:
            self._waiting[: len(self._waiting) - _MAX_WAITING // 2] = _NOTE

    def _is_writable(self) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return any(mask & (select.POLLOUT | select.POLLERR | select.POLLNVAL) for _, mask in poll.poll(0))
