"""What a future keeps of its task's events, and those who read them: loops, asynchronous ones, and callbacks.

One thread puts events in, the pool's manager thread; any thread reads. There is no lock: Ctrl-C in a reader could leave
one taken that the manager thread waits for. Between two lines of a reader others may come in, so it looks again after
it said that it waits. Bounded: the oldest events go, and are counted. Knows nothing of workers and pipes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final

from agentpool import events
from agentpool.events import Event

__all__ = ["KEPT_BYTES", "KEPT_EVENTS", "EventBuffer", "EventCallback", "EventStream"]

log = logging.getLogger("agentpool")

#: What a future keeps for those who have not read it yet: so many events and, pickled, bytes.
KEPT_EVENTS: Final = 1000
KEPT_BYTES: Final = 4 * 1024 * 1024


class EventBuffer:
    """The last events of one task, numbered from 0, and who is to be told of more."""

    __slots__ = ("_bytes", "_dropped_by_worker", "_items", "_most", "_most_bytes", "_next", "_wakers", "callbacks",
                 "dropped", "is_announced", "is_ending")

    def __init__(self, most: int = KEPT_EVENTS, most_bytes: int = KEPT_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        #: (number, attempt, pickled event), oldest first
        self._items: deque[tuple[int, int, bytes]] = deque()
        self._bytes = 0
        self._next = 0
        #: attempt -> how many its worker dropped
        self._dropped_by_worker: dict[int, int] = {}
        self._wakers: list[Callable[[], None]] = []
        #: that were here, and went for others
        self.dropped = 0
        self.callbacks: list[EventCallback] = []
        #: the callbacks will be called for what came
        self.is_announced = False
        #: the task is over: its future is settled as soon as they were called for the last time
        self.is_ending = False

    @property
    def dropped_altogether(self) -> int:
        """How many events went, here and in workers."""
        return self.dropped + sum(list(self._dropped_by_worker.values()))

    def put(self, attempt: int, payloads: Iterable[bytes], dropped: int) -> None:
        """The manager thread: these came; so many were dropped by this attempt's worker so far. Call `wake` then."""
        items = self._items
        for payload in payloads:
            items.append((self._next, attempt, payload))
            self._next += 1
            self._bytes += len(payload)
            while len(items) > self._most or (self._bytes > self._most_bytes and len(items) > 1):
                self._bytes -= len(items.popleft()[2])
                self.dropped += 1
        if dropped:
            self._dropped_by_worker[attempt] = dropped

    def wake(self) -> None:
        """Tell those who wait that there is more, or that nothing more will come."""
        wakers, self._wakers = self._wakers, []
        for waker in wakers:
            waker()

    def wake_by(self, waker: Callable[[], None]) -> None:
        """Call this, once, when there is more. It must not block or raise. Look for more after this."""
        self._wakers.append(waker)

    def forget(self, waker: Callable[[], None]) -> None:
        """The opposite of `wake_by`."""
        with suppress(ValueError):  # it was called meanwhile
            self._wakers.remove(waker)

    def read(self, position: int) -> tuple[int, int, bytes] | None:
        """The event with this number, or the oldest after it that is kept; None: there is none yet."""
        while position < self._next:
            try:
                oldest = self._items[0][0]
                item = self._items[max(0, position - oldest)]
            except IndexError:  # the manager thread put one in, and took away what it displaced, between these lines
                continue
            if item[0] <= max(position, oldest):  # else the same, and there is an older one
                return item
        return None


class EventStream:
    """The events of a task, from the oldest that is kept to its end: `for`, or `async for`.

    Each one made by `future.events()` reads for itself. It ends when the task is over and all was read.
    """

    def __init__(self, future: Future[Any], buffer: EventBuffer) -> None:
        self._future = future
        self._buffer = buffer
        self._position = 0

    def __iter__(self) -> EventStream:
        return self

    def __aiter__(self) -> EventStream:
        return self

    def _take(self) -> Event | None:
        item = self._buffer.read(self._position)
        if item is None:
            return None
        self._position = item[0] + 1
        return events.decode(item[2], item[1])

    def _take_or_end(self, end: type[Exception]) -> Event | None:
        """The next event; None: there will be more. Raises `end` after the last."""
        is_over = self._future.done()  # first: what came before that is there by then
        event = self._take()
        if event is None and is_over:
            raise end
        return event

    def __next__(self) -> Event:
        while True:
            event = self._take_or_end(StopIteration)
            if event is not None:
                return event
            lock = threading.Lock()
            lock.acquire()
            self._buffer.wake_by(lock.release)
            try:
                if self._buffer.read(self._position) is None and not self._future.done():
                    lock.acquire()
            finally:
                self._buffer.forget(lock.release)

    async def __anext__(self) -> Event:
        import asyncio

        while True:
            event = self._take_or_end(StopAsyncIteration)
            if event is not None:
                return event
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()

            def wake(waiter: asyncio.Future[None] = waiter, loop: asyncio.AbstractEventLoop = loop) -> None:
                with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                    loop.call_soon_threadsafe(_end_wait, waiter)

            self._buffer.wake_by(wake)
            try:
                if self._buffer.read(self._position) is None and not self._future.done():
                    await waiter
            finally:
                self._buffer.forget(wake)


class EventCallback:
    """A function to be called for each event, and how far that is. One thread at a time calls it."""

    def __init__(self, function: Callable[[Event], object], future: Future[Any], buffer: EventBuffer) -> None:
        self._function = function
        self._future = future
        self._buffer = buffer
        self._position = 0
        self._lock = threading.Lock()

    def call(self, most: int | None = None) -> bool:
        """Call it for what came, `most` events at most. True: there may be more. What it raises is logged."""
        with self._lock:
            called = 0
            while (item := self._buffer.read(self._position)) is not None:
                if called == most:
                    return True
                called += 1
                self._position = item[0] + 1
                try:
                    self._function(events.decode(item[2], item[1]))
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                        raise  # somebody pressed Ctrl-C while this thread added the callback
                    log.exception("exception calling event callback for %r", self._future)
        return False


def _end_wait(waiter: Any) -> None:
    if not waiter.done():
        waiter.set_result(None)
