"""What goes on telling: snapshots of the pool, and what workers write to their standard error.

Used by the control thread alone. All is bounded: a snapshot that nobody could read in time is left out, and of what a
worker wrote the channel keeps the end; what was lost in between is told as a number of bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol

__all__ = ["Logs", "Watch"]

#: What a person sees as at once.
_LOOK_SECONDS: Final = 0.2


class Watch:
    """A snapshot each interval."""

    def __init__(self, take_snapshot: Callable[[float], dict[str, Any] | None], interval: float) -> None:
        self._take_snapshot = take_snapshot
        self._interval = interval
        self.due = 0.0

    def take(self, now: float) -> tuple[list[dict[str, Any]], str | None]:
        """See `server.Following`."""
        self.due = max(self.due + self._interval, now + self._interval / 2)
        snapshot = self._take_snapshot(now)
        return ([], "the pool was closed") if snapshot is None else ([snapshot], None)

    def close(self) -> None:
        """Nothing is held."""


class Channel(Protocol):
    """What is needed of a worker's channel."""

    def stderr_since(self, position: int) -> tuple[bytes, int]:
        """What came after so many bytes, as far as it is kept, and how many came in all."""


class _Reader:
    """One worker's standard error, from where it was read last."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._position = 0

    def read(self, worker: int) -> list[dict[str, Any]]:
        data, position = self.channel.stderr_since(self._position)
        lost = position - self._position - len(data)
        self._position = position
        if not data:
            return []
        return [{"worker": worker, "text": data.decode(errors="replace")} | ({"lost": lost} if lost else {})]


class LastWords(Channel, Protocol):
    """The same of a worker that has ended: how, and at which time of the monotonic clock."""

    @property
    def how(self) -> str:
        """In words."""

    @property
    def at(self) -> float:
        """In seconds."""


class Workers(Protocol):
    """Whose standard error there is."""

    def channels(self) -> Mapping[int, Channel]:
        """Those that live."""

    def ended_workers(self, asked: Collection[int]) -> Mapping[int, LastWords]:
        """Those that ended and of whom something is kept, and of `asked` those whose end is known."""


class Logs:
    """Standard error of one worker, or of all, those that come later and those that have ended included."""

    def __init__(self, workers: Workers, worker: int | None, *, is_followed: bool) -> None:
        self._workers = workers
        self._worker = worker
        self._is_followed = is_followed
        self._readers: dict[int, _Reader] = {}
        #: workers that ended, and whose end was told
        self._told: set[int] = set()
        self.due = 0.0

    def take(self, now: float) -> tuple[list[dict[str, Any]], str | None]:
        """See `server.Following`."""
        self.due = time.monotonic() + _LOOK_SECONDS
        living = self._workers.channels()
        ended = self._workers.ended_workers(self._readers if self._worker is None else [self._worker])
        self._told &= ended.keys()
        for worker, channel in {**ended, **living}.items():
            if worker not in self._readers and worker not in self._told and self._worker in (None, worker):
                self._readers[worker] = _Reader(channel)
        events: list[dict[str, Any]] = []
        for worker, reader in list(self._readers.items()):
            events += reader.read(worker)
            if worker not in living:  # it is gone, and these were its last words
                del self._readers[worker]
                self._told.add(worker)
                events.append(_end(worker, ended.get(worker), now))
        if not self._is_followed:
            return events, "that is all that is kept"
        if self._worker is not None and not self._readers:
            return events, f"worker {self._worker} ended"
        return events, None

    def close(self) -> None:
        """Let go of the channels."""
        self._readers.clear()


def _end(worker: int, words: LastWords | None, now: float) -> dict[str, Any]:
    """None: so many have ended since that nobody knows how."""
    how = {} if words is None else {"how": words.how, "seconds_ago": round(max(0.0, now - words.at), 1)}
    return {"worker": worker, "ended": True, **how}
