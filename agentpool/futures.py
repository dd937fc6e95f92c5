"""AgentFuture: a `concurrent.futures.Future` that knows its attempts, its worker and its memory, and can be killed.

Works wherever a Future does: `wait`, `as_completed`, `asyncio.wrap_future`. Any thread may use it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING  # no public names
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from agentpool.core.transitions import TaskState
from agentpool.runtime import interrupts
from agentpool.runtime.outcomes import Encoded, unpickling_error

if TYPE_CHECKING:
    from agentpool.core.records import TaskRecord, WorkerRecord
    from agentpool.events import Event
    from agentpool.history import Attempt
    from agentpool.io.arena import Held
    from agentpool.runtime.manager import Manager
    from agentpool.streams import EventBuffer, EventStream
    from agentpool_worker.protocol import Payload

__all__ = ["AgentFuture", "TaskSnapshot"]

T = TypeVar("T")

log = logging.getLogger("agentpool")

#: Events that a callback is called for before others have their turn.
_CALLS_IN_A_ROW: Final = 100

_CANCELLED = frozenset({CANCELLED, CANCELLED_AND_NOTIFIED})
_OVER = _CANCELLED | {FINISHED}

_STATES = {
    TaskState.QUEUED: "queued",
    TaskState.ASSIGNED: "queued",
    TaskState.RUNNING: "running",
    TaskState.STOPPING: "running",
    TaskState.WAITING_RETRY: "waiting_to_retry",
}


@dataclass(frozen=True, slots=True)
class TaskSnapshot:
    """How a task stands at one moment.

    state: "queued", "running", "waiting_to_retry", "done", "failed" or "cancelled". elapsed_seconds: of the present
    attempt, or of the last one. rss_bytes: last reading of its worker's process tree, 0 where there is none.
    sampled_at: when that was taken. first_started_at: when it began first. Both as `time.monotonic()` has it.
    """

    task_id: int
    name: str | None
    kind: str | None
    state: str
    attempts: int
    elapsed_seconds: float
    rss_bytes: int
    peak_rss_bytes: int
    worker_pid: int | None
    last_error: str | None
    sampled_at: float | None = None
    first_started_at: float | None = None


class AgentFuture(Future[T]):
    """The result of a task, to come.

    Its attempts, its memory and what it says while it runs can be asked for at any time.
    """

    # Defaults stand here and in no instance, and what others wait with is made when somebody waits: a future that is
    # pending costs the garbage collector one object instead of twelve.
    _state = PENDING
    _result = None
    _exception = None
    _task: TaskRecord | None = None
    _manager: Manager | None = None
    _ended_at: float | None = None
    #: locks of the threads that wait in `result`
    _waiting: list[threading.Lock] | None = None
    #: `_condition`, `_waiters` or `_done_callbacks` exist; never reset
    _is_watched = False
    #: what the task said, or who wants to know of it
    _stream: EventBuffer | None = None
    #: that ran it last, or has it
    worker: WorkerRecord | None = None

    def __init__(
        self, manager: Manager | None = None, payload: Payload | Held = b"", buffers: Sequence[memoryview] = ()
    ) -> None:
        self._manager = manager
        #: the serialized call, kept until the task is over, as it may be sent again
        self.payload = payload
        self.buffers = buffers

    def __getattr__(self, name: str) -> Any:
        """The base class's means of waiting, on first use. One `setdefault` decides between two threads."""
        if name == "_condition":
            made: object = self.__dict__.setdefault(name, threading.Condition())
        elif name in ("_waiters", "_done_callbacks"):
            made = self.__dict__.setdefault(name, [])
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._is_watched = True
        return made

    # -- what it knows -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The task's name, as given in `options(name=...)`."""
        return self._task.spec.name if self._task is not None else None

    @property
    def worker_pid(self) -> int | None:
        """The process that ran it last; None while it never left the queue."""
        return None if self.worker is None else self.worker.pid

    @property
    def attempts(self) -> int:
        """How often the task began; an attempt that never began is not counted."""
        return self._task.attempts if self._task is not None else 0

    @property
    def peak_rss_bytes(self) -> int:
        """The most memory seen in its worker's process tree while it ran, in bytes; 0: it was too short to be seen.

        The whole process counts: what a worker held before the task is part of it.
        """
        return self._task.highest_rss_bytes if self._task is not None else 0

    @property
    def history(self) -> list[Attempt]:
        """What became of each attempt that began, oldest first; the last one may still run."""
        if self._task is None:
            return []
        from agentpool.history import attempts_of

        return attempts_of(self._task, self.worker, self._ended_at, self._exception)

    def snapshot(self) -> TaskSnapshot:
        """How the task stands now."""
        task = self._task
        if task is None:  # its call could not be pickled: it never became a task
            return TaskSnapshot(0, None, None, "failed", 0, 0.0, 0, 0, None, str(self._exception))
        worker = task.worker
        end = self._ended_at if self._ended_at is not None else time.monotonic()
        return TaskSnapshot(
            task_id=task.id,
            name=task.spec.name,
            kind=task.spec.kind,
            state=self._state_word(task),
            attempts=task.attempts,
            elapsed_seconds=max(0.0, end - task.started_at) if task.attempts else 0.0,
            rss_bytes=worker.rss_bytes if worker is not None else 0,
            peak_rss_bytes=task.highest_rss_bytes,
            worker_pid=self.worker_pid,
            last_error=None if task.last_error is None else f"{type(task.last_error).__name__}: {task.last_error}",
            sampled_at=worker.sampled_at if worker is not None else None,
            first_started_at=task.first_started_at,
        )

    def _state_word(self, task: TaskRecord) -> str:
        if self.cancelled():
            return "cancelled"
        if self.done():
            return "done" if self._exception is None else "failed"
        return _STATES.get(task.state, "running")

    def __repr__(self) -> str:
        task = self._task
        words = "failed" if task is None else f"task {task.id} {self._state_word(task)}"
        return f"<{type(self).__name__} at {id(self):#x} {words}>"

    # Without the condition of the base class: one look needs no lock, and Ctrl-C in the middle of taking it would leave
    # it taken for good.

    def done(self) -> bool:
        """Is the task over: returned, failed or cancelled?"""
        return self._state in _OVER

    def cancelled(self) -> bool:
        """Was the task cancelled before it began?"""
        return self._state in _CANCELLED

    # -- what the task says --------------------------------------------------------------------------------------

    def events(self) -> EventStream:
        """What the task says while it runs: `for event in future.events()`, or `async for`; see `agentpool.events`.

        From the oldest event that is kept (the last 1,000, and 4 MiB) to the end of the task. May be called again, by
        any thread, also when the task is over: each call begins with the oldest. Results never wait for a reader.
        """
        from agentpool.streams import EventStream

        return EventStream(self, self._events())

    def add_event_callback(self, function: Callable[[Event], object]) -> None:
        """Have `function(event)` called for each event, those that are kept from before included, in order.

        It is called in a thread of the pool that does nothing else, before the future is done, and never after that;
        where the future is done already, at once and in this thread. A slow one delays its own future and other
        callbacks, and misses what is not kept meanwhile. What it raises is logged and goes no further. Raises
        RuntimeError where the pool cannot start that thread.
        """
        from agentpool.streams import EventCallback

        stream = self._events()
        callback = EventCallback(function, self, stream)
        announcer = None if self._manager is None or self.done() else self._manager.announcer()
        if announcer is not None:
            stream.callbacks.append(callback)
            if not self.done() and announcer.post(self._call_back):
                return
        callback.call()

    def _call_back(self) -> None:
        """The announcer's: a part of what came, so that others have their turn."""
        stream = self._events()
        stream.is_announced = False
        is_more = False
        for callback in stream.callbacks:
            is_more |= callback.call(_CALLS_IN_A_ROW)
        if is_more:
            self._announce(stream)

    def _announce(self, stream: EventBuffer) -> None:
        announcer = None if self._manager is None else self._manager.announcer()
        if announcer is not None and not stream.is_announced:
            stream.is_announced = True
            announcer.post(self._call_back)

    def _settles_later(self, is_value: bool, payload: object) -> bool:
        """False: there is no event callback to be called before this is settled."""
        stream = self._events()
        announcer = None if self._manager is None or not stream.callbacks else self._manager.announcer()
        if announcer is None or stream.is_ending:
            return False
        stream.is_ending = True
        ended_at = time.monotonic()

        def end() -> None:
            for callback in stream.callbacks:
                callback.call()
            self.settle(is_value, payload)
            self._ended_at = ended_at

        return announcer.post(end)

    @property
    def events_dropped(self) -> int:
        """How many events are lost, as they came faster than they were sent, or were not read in time."""
        return 0 if self._stream is None else self._stream.dropped_altogether

    def _events(self) -> EventBuffer:
        stream = self._stream
        if stream is None:
            from agentpool.streams import EventBuffer

            stream = self.__dict__.setdefault("_stream", EventBuffer())  # decides between two threads
        return stream

    def receive_events(self, attempt: int, payloads: Iterable[bytes], dropped: int) -> None:
        """The manager's: the task said this. dropped: how many events of this attempt went lost in the worker."""
        stream = self._events()
        stream.put(attempt, payloads, dropped)
        stream.wake()
        if stream.callbacks:
            self._announce(stream)

    # -- what can be done to it ----------------------------------------------------------------------------------

    def running(self) -> bool:
        """Is the task being run now?"""
        task = self._task
        return task is not None and not self.done() and task.state in (TaskState.RUNNING, TaskState.STOPPING)

    def cancel(self) -> bool:
        """Withdraw the task if it has not begun. True: it is cancelled. A running task is not stopped: see `kill`."""
        with interrupts.held():
            if self.cancelled():
                return True
            if self._task is None or self._manager is None or self.done():
                return False
            return self._manager.cancel(self._task) or self.cancelled()

    def kill(self) -> bool:
        """Stop the task, running or not: it is asked first (a `TaskCancelled` is raised in it), and its worker is
        killed after the pool's `kill_grace`. True: it will not return; `result()` raises TaskKilledError or, if it had
        not begun, CancelledError. False: it is over.
        """
        if self.cancel():
            return True
        if self._task is None or self._manager is None or self.done():
            return False
        return self._manager.kill(self._task, "future.kill() was called")

    # -- results -------------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> T:
        """The task's value; waits for it at most `timeout` seconds. It is rebuilt in the first caller's thread.

        Raises TimeoutError, CancelledError, what the task raised, or an `agentpool.errors` exception.
        """
        if self._state != FINISHED:
            self._wait(timeout)
        if type(self._result) is Encoded:
            self._rebuild()
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                self = None  # type: ignore[assignment]  # as the base class: no cycle through the traceback
        return cast(T, self._result)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result()` would raise, or None; waits at most `timeout` seconds."""
        if self._state != FINISHED:
            self._wait(timeout)
        if type(self._result) is Encoded:
            self._rebuild()
        return self._exception

    def _wait(self, timeout: float | None) -> None:
        """Wait until the task is over, by a lock of this call's own.

        Ctrl-C in the middle of taking the condition of the base class would leave it taken, and the manager thread
        would wait for it for ever. Raises TimeoutError and CancelledError.
        """
        if not self.done():
            lock = threading.Lock()
            lock.acquire()
            self.__dict__.setdefault("_waiting", []).append(lock)
            if not self.done():  # else nobody may look at the list any more
                lock.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))
            if not self.done():
                raise TimeoutError
        if self.cancelled():
            raise CancelledError

    def _rebuild(self) -> None:
        encoded = cast(object, self._result)
        if type(encoded) is not Encoded:
            return
        try:
            value, failure = encoded.rebuild(), None
        except KeyboardInterrupt:
            raise  # it is the reader's; the next call tries again
        except BaseException as error:  # user code; SystemExit in it must not end the reader
            value, failure = None, unpickling_error(error)
        # The first of several readers; all get one object. No lock: between these lines no other thread has the GIL,
        # and without a GIL two readers may get equal objects.
        if self._result is encoded:
            self._exception = failure
            self._result = cast(T, value)

    # -- for the manager -----------------------------------------------------------------------------------------

    def settle(self, is_value: bool, payload: object) -> None:
        """The manager's: the task is over."""
        if self._stream is not None and self._settles_later(is_value, payload):
            return
        self._ended_at = time.monotonic()
        self.payload, self.buffers = b"", ()
        if self._is_watched:
            self._settle_watched(is_value, payload)
        elif self._state != PENDING:
            self._report_settled()
        else:
            if is_value:
                self._result = cast(Any, payload)
            else:
                self._exception = cast(Any, payload)
            self._state = FINISHED
            # Whoever begins to wait or to watch does so before it looks at the state, so one of us sees the other.
            if self._waiting is not None:
                self._release_waiting()
            if self._is_watched:
                self._tell_watchers()
        if self._stream is not None:
            self._stream.wake()

    def _settle_watched(self, is_value: bool, payload: object) -> None:
        try:
            if is_value:
                self.set_result(cast(T, payload))
            else:
                assert isinstance(payload, BaseException)
                self.set_exception(payload)
        except InvalidStateError:
            self._report_settled()

    def _report_settled(self) -> None:
        # It is not the user's to settle; that costs nobody else.
        log.error("somebody else settled %r; what the task came to is lost", self)

    def _tell_watchers(self) -> None:
        with self._condition:
            for waiter in self._waiters:
                if self._exception is None:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
            self._condition.notify_all()
        self._invoke_callbacks()

    def settle_cancelled(self) -> None:
        """The manager's: the task will not run. Those who wait are told (cpython gh-109934)."""
        self.payload, self.buffers = b"", ()
        super().cancel()
        self.set_running_or_notify_cancel()
        if self._stream is not None:
            self._stream.wake()

    def _release_waiting(self) -> None:
        for lock in self.__dict__.pop("_waiting", ()):
            lock.release()

    def _invoke_callbacks(self) -> None:
        self._release_waiting()
        # As the base class, but SystemExit from a callback must not end the manager thread.
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise  # somebody pressed Ctrl-C while this thread cancelled the task
                log.exception("exception calling callback for %r", self)
