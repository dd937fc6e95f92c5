"""Waits for descriptors and wake-ups: a kept epoll (0.3 us a wait, however many descriptors), or poll elsewhere.

Knows nothing of workers. Only one thread may `wait`; any thread may `wake`, `watch_writing` and `unwatch_writing`.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

__all__ = ["Reactor"]

_READ = select.POLLIN | select.POLLHUP | select.POLLERR
_WRITE = select.POLLOUT
#: poll takes 24 days at most; to wait an hour and look again does no harm.
_LONGEST = 3600.0


class Reactor:
    """Descriptors with a callback each for reading and, while wanted, for writing."""

    def __init__(self) -> None:
        # The event bits of poll and epoll are the same on Linux.
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._poll = None if self._epoll is not None else select.poll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._wake_read, self._wake_write = os.pipe()  # close-on-exec, as all descriptors that Python makes
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._is_woken = False
        self._register(self._wake_read, select.POLLIN)

    def _register(self, descriptor: int, events: int) -> None:
        (self._epoll or self._poll).register(descriptor, events)  # type: ignore[union-attr]

    def watch(self, descriptor: int, on_readable: Callable[[], None]) -> None:
        """Call `on_readable` whenever there is something to read, or the other end is closed."""
        self._readers[descriptor] = on_readable
        self._register(descriptor, select.POLLIN)

    def watch_writing(self, descriptor: int, on_writable: Callable[[], None]) -> None:
        """Call `on_writable` whenever there is room to write. The descriptor is watched for nothing else."""
        if descriptor not in self._writers:
            self._writers[descriptor] = on_writable
            if descriptor in self._readers:
                (self._epoll or self._poll).modify(descriptor, select.POLLIN | _WRITE)  # type: ignore[union-attr]
            else:
                self._register(descriptor, _WRITE)

    def unwatch_writing(self, descriptor: int) -> None:
        """No longer wait for room."""
        if self._writers.pop(descriptor, None) is not None:
            if descriptor in self._readers:
                (self._epoll or self._poll).modify(descriptor, select.POLLIN)  # type: ignore[union-attr]
            else:
                (self._epoll or self._poll).unregister(descriptor)  # type: ignore[union-attr]

    def unwatch(self, descriptor: int) -> None:
        """Forget the descriptor. Call it before closing; harmless for one that is not watched."""
        is_known = self._readers.pop(descriptor, None) is not None
        if (self._writers.pop(descriptor, None) is not None) or is_known:
            (self._epoll or self._poll).unregister(descriptor)  # type: ignore[union-attr]

    def wake(self) -> None:
        """Make `wait` return. Takes no lock, so that even a finalizer may call it."""
        if not self._is_woken:
            self._is_woken = True
            try:
                os.write(self._wake_write, b"w")
            except (BlockingIOError, OSError):  # full: it will wake; closed: nobody waits any more
                return

    def wait(self, seconds: float | None) -> list[Callable[[], None]]:
        """Block until something is due; returns the callbacks to call. None: without limit."""
        if seconds is not None:
            seconds = min(max(0.0, seconds), _LONGEST)
        if self._epoll is not None:
            events = self._epoll.poll(-1 if seconds is None else seconds)
        else:
            assert self._poll is not None
            events = self._poll.poll(None if seconds is None else seconds * 1000)
        due = []
        for descriptor, mask in events:
            if descriptor == self._wake_read:
                os.read(self._wake_read, 4096)
                self._is_woken = False
                continue
            if mask & _READ and (reader := self._readers.get(descriptor)) is not None:
                due.append(reader)
            if mask & ~select.POLLIN and (writer := self._writers.get(descriptor)) is not None:
                due.append(writer)
        return due

    def close(self) -> None:
        """Give back the descriptors. May be called twice."""
        if self._epoll is not None:
            self._epoll.close()
        self._is_woken = True  # wake() writes no more
        if self._wake_read >= 0:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1
