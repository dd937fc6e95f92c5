"""Deadlines of the core: a heap of timers that can be cancelled cheaply.

Knows no clock; `now` comes in with each call. Called only by the scheduler.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

__all__ = ["Timer", "TimerQueue"]

#: Cancelled timers stay in the heap until they outnumber the live ones and are at least this many.
_COMPACT_ABOVE: Final = 64


class Timer:
    """One deadline. `cancel()` it through its queue; a fired or cancelled timer has no handler."""

    __slots__ = ("handler", "when")

    def __init__(self, when: float, handler: Callable[[float], None]) -> None:
        self.when = when
        self.handler: Callable[[float], None] | None = handler


class TimerQueue:
    """All pending deadlines, soonest first."""

    __slots__ = ("_cancelled", "_heap", "_number")

    def __init__(self) -> None:
        #: (when, number, timer): equal times fire in the order in which they were set, so that a seed replays exactly
        self._heap: list[tuple[float, int, Timer]] = []
        self._number = 0
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def add(self, when: float, handler: Callable[[float], None]) -> Timer:
        """Call `handler(now)` from `fire_due` at the first `now` that is not before `when`."""
        self._number += 1
        timer = Timer(when, handler)
        heapq.heappush(self._heap, (when, self._number, timer))
        return timer

    def cancel(self, timer: Timer | None) -> None:
        """Forget a timer. Harmless for None and for one that fired."""
        if timer is None or timer.handler is None:
            return
        timer.handler = None
        self._cancelled += 1
        if self._cancelled > _COMPACT_ABOVE and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].handler is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def next_deadline(self) -> float | None:
        """When the soonest live timer is due; None: there is none."""
        heap = self._heap
        while heap and heap[0][2].handler is None:
            heapq.heappop(heap)
            self._cancelled -= 1
        return heap[0][0] if heap else None

    def fire_due(self, now: float) -> None:
        """Call the handlers of all timers due by `now`, the ones that those handlers set for `now` included."""
        while (due := self.next_deadline()) is not None and due <= now:
            timer = heapq.heappop(self._heap)[2]
            handler, timer.handler = timer.handler, None
            assert handler is not None  # next_deadline() dropped the cancelled ones
            handler(now)
