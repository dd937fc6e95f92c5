"""How workers ended and what they wrote last, for whoever asks afterwards. Bounded, whatever dies however often.

Added to by the manager thread under the pool's lock; read by any thread under it. What it hands out never changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from agentpool.io.channel import kept_since

__all__ = ["Ended", "LastWords"]

#: Workers whose standard error is kept: the last that wrote any. Of each 64 KiB, so at most 1 MiB.
_SPOKE: Final = 16
#: The other ones, of whom only the end is known.
_SILENT: Final = 256


@dataclass(frozen=True, slots=True)
class LastWords:
    """A worker that has ended: `how`, in words, and `at` which time of the monotonic clock."""

    how: str
    at: float
    #: the end of its standard error, as far as it is kept, and how many bytes it wrote in all
    kept: bytes
    count: int

    def stderr_since(self, position: int) -> tuple[bytes, int]:
        """What came after so many bytes, as far as it is kept, and how many came in all."""
        return kept_since(self.kept, self.count, position), self.count


class Ended:
    """The workers that ended last, by id."""

    def __init__(self) -> None:
        self._spoke: dict[int, LastWords] = {}
        self._silent: dict[int, LastWords] = {}

    def add(self, worker_id: int, how: str, kept: bytes, count: int) -> None:
        """One has ended. Those that said nothing push out none that did."""
        words = LastWords(how, time.monotonic(), kept, count)
        if not kept:
            self._add_silent(worker_id, words)
            return
        self._spoke[worker_id] = words
        if len(self._spoke) > _SPOKE:
            oldest = next(iter(self._spoke))
            self._add_silent(oldest, replace(self._spoke.pop(oldest), kept=b""))

    def _add_silent(self, worker_id: int, words: LastWords) -> None:
        self._silent[worker_id] = words
        if len(self._silent) > _SILENT:
            del self._silent[next(iter(self._silent))]

    def find(self, workers: Iterable[int]) -> dict[int, LastWords]:
        """All of whom something is kept, and of these workers those whose end is known; oldest first."""
        asked = {worker: self._silent[worker] for worker in workers if worker in self._silent}
        return dict(sorted((self._spoke | asked).items()))
