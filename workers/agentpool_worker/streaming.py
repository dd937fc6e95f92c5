"""Events of a running task on their way to the parent: bounded, droppable, and never waited for.

An event is sent at once while there are few, so that a worker that dies takes none with it. A flood of them is sent in
batches. Where the pipe has no room, as nobody reads it, a bounded number waits and the oldest go; how many is told with
the next that is sent. Imported with the first event of a worker. Any thread of a task may `put`.
"""

from __future__ import annotations

import _pickle as pickle
import _thread
import fcntl
import select
import sys
import termios
import time
from collections import deque

from agentpool_worker import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, Protocol
else:
    Protocol = object

#: An event is no larger than this, in bytes, so that an empty pipe of 1 MiB takes it whole.
LARGEST: Final = 960 * 1024
#: What waits for room in the pipe: so many events, and bytes.
MOST_WAITING: Final = 1000
MOST_BYTES: Final = 2 * 1024 * 1024
#: Events that are sent one by one: so many in a row, and then so many a second.
BURST: Final = 1000
PER_SECOND: Final = 1000.0
#: Seconds after which events that were not sent with the next one are sent nevertheless, and after
#: which room for them is looked for again.
LINGER: Final = 0.002
LOOK_AGAIN: Final = 0.02

_NO_NUMBER: Final = b"\0" * 4


class Outlet(Protocol):
    """What a sender needs of its worker."""

    def hold_stop(self) -> int:
        """In the task's own thread: have no exception raised in it until `release_stop`."""

    def release_stop(self, held: int) -> None:
        """The end of `hold_stop`, whose result is passed. Raises TaskCancelled where that was asked for meanwhile."""

    def write_events(self, least: int, build: Callable[[int], bytes]) -> bool:
        """Write what `build(room)` makes, of no more bytes than that, and do not wait. False: nothing was written.

        `least`: that it makes nothing of less.
        """

    def send_output(self, task_id: int, descriptors: list[int]) -> None:
        """Have the parent read what the task writes to these pipes: standard output, standard error."""

    def write_last(self, frame: bytes) -> None:
        """Write, at the end of the task and in its own thread, and wait for room."""


def room_in(descriptor: int, wanted: int) -> int:
    """How many bytes a write to this pipe takes for certain without waiting, where nobody else writes to it.

    The kernel counts in pages: a pipe that polls as writable takes PIPE_BUF, one that is empty all that it holds.
    """
    if int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, _NO_NUMBER), sys.byteorder):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return select.PIPE_BUF if any(mask & select.POLLOUT for _, mask in poll.poll(0)) else 0
    size = _capacity(descriptor)
    if wanted > size:
        protocol.enlarge_pipe(descriptor)
        size = _capacity(descriptor)
    return size


def _capacity(descriptor: int) -> int:
    if not hasattr(fcntl, "F_GETPIPE_SZ"):
        return select.PIPE_BUF
    return fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)


def _pickled(value: object) -> bytes:
    """In one piece. Raises what pickling raises."""
    if protocol.is_simple(value, 4):
        return pickle.dumps(value, 5)
    from io import BytesIO

    from agentpool_worker import byvalue

    with BytesIO() as file:
        byvalue.Pickler(file).dump(value)
        return file.getvalue()


class Sender:
    """The events of one task."""

    __slots__ = ("_bytes", "_dropped", "_is_closed", "_lock", "_outlet", "_reported", "_sent_at", "_task_id", "_tokens",
                 "_waiting")

    def __init__(self, outlet: Outlet, task_id: int) -> None:
        self._outlet = outlet
        self._task_id = task_id
        #: guards what is below. One that its holder may take again: a finalizer or a signal handler may tell something
        self._lock = _thread.RLock()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        #: how many were dropped as the parent knows it
        self._reported = 0
        self._tokens = float(BURST)
        self._sent_at = time.monotonic()
        self._is_closed = False

    def put(self, kind: str, data: tuple[Any, ...]) -> None:
        """Send an event, now or soon. Raises what pickling raises, and ValueError for a user's that is too large."""
        event = _pickled((time.time(), kind, data))  # runs code of the user's classes: not under the lock
        if len(event) > LARGEST:
            if kind == "custom":
                raise ValueError(
                    f"an event of {len(event):,} bytes is larger than {LARGEST:,}; return large data as the result, or "
                    "write it to a file and emit its name"
                )
            event = b""
        held = self._outlet.hold_stop()
        try:
            with self._lock:
                if not self._is_closed:
                    self._add(event)
        finally:
            self._outlet.release_stop(held)

    def _add(self, event: bytes) -> None:
        if event:
            self._waiting.append(event)
            self._bytes += len(event)
        else:
            self._dropped += 1
        while len(self._waiting) > MOST_WAITING or self._bytes > MOST_BYTES:
            self._bytes -= len(self._waiting.popleft())
            self._dropped += 1
        now = time.monotonic()
        self._tokens = min(float(BURST), self._tokens + (now - self._sent_at) * PER_SECOND)
        self._sent_at = now
        if self._tokens >= 1:
            self._tokens -= 1
            self.flush()
        if self._waiting:
            _linger(self)

    def flush(self) -> bool:
        """Send what waits as far as there is room. True: nothing waits any more."""
        with self._lock:
            while self._waiting and not self._is_closed and self._outlet.write_events(self._least, self._build):
                continue
            return self._is_closed or not self._waiting

    def _build(self, room: int) -> bytes:
        """A frame of what waits, no longer than that; b"": there is no room for one event."""
        events: list[bytes] = []
        left = room - protocol.HEADER.size
        while self._waiting and (size := protocol.event_size(self._waiting[0])) <= left:
            event = self._waiting.popleft()
            self._bytes -= len(event)
            events.append(event)
            left -= size
        return self._frame(events) if events else b""

    def _frame(self, events: list[bytes]) -> bytes:
        self._reported = self._dropped
        return protocol.encode_events(self._task_id, events, self._dropped)

    @property
    def _least(self) -> int:
        """The size of a frame with the event that goes next."""
        return protocol.HEADER.size + protocol.event_size(self._waiting[0])

    def close(self) -> None:
        """The task has ended: send what is left, before its result."""
        with self._lock:
            self._is_closed = True
            while self._waiting:
                self._outlet.write_last(self._build(max(protocol.OUT_OF_BAND, self._least)))
            if self._dropped != self._reported:
                self._outlet.write_last(self._frame([]))


# -- what waits, and is not sent with the next event -----------------------------------------------------------------

_lingering: deque[Sender] = deque()
_is_wanted = _thread.allocate_lock()
_has_thread = False


def _linger(sender: Sender) -> None:
    """Have these events sent soon, by a thread that sleeps while there are none."""
    global _has_thread
    if _lingering:
        return
    _lingering.append(sender)
    if not _has_thread:
        _is_wanted.acquire(blocking=False)
        try:
            _thread.start_new_thread(_send_lingering, ())
        except RuntimeError:  # no more threads can be had: they go with the next event, or at the end of the task
            _lingering.clear()
            return
        _has_thread = True
    if _is_wanted.locked():
        _is_wanted.release()


def _send_lingering() -> None:
    while True:
        _is_wanted.acquire()
        seconds = LINGER
        while _lingering:
            time.sleep(seconds)
            sender = _lingering.popleft()  # first: what is put from now on lingers anew
            if not sender.flush():
                _lingering.append(sender)
                seconds = LOOK_AGAIN
