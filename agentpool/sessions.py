"""Session: an Executor whose tasks run in one worker, in order, one at a time, with what they leave there kept.

A facade, like a pool's view: what a session means is decided in `agentpool.core.sessions`. Any thread may use it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from agentpool.config import check_session
from agentpool.core.failures import fresh
from agentpool.core.records import SessionRecord, TaskSpec
from agentpool.errors import PoolClosedError, SessionLostError
from agentpool.submitting import Submitting

if TYPE_CHECKING:
    from agentpool.futures import AgentFuture
    from agentpool_worker.protocol import Payload

__all__ = ["Session", "Sessions"]

_numbers: Final = itertools.count(1)


class Session(Submitting):
    """What `pool.session(...)` returns.

    Its tasks have the options of the pool or view that it was opened on. Leaving a `with` block closes it, and waits
    for its tasks. `submit` raises SessionLostError once the session is lost, PoolClosedError once it is closed.
    """

    def __init__(self, source: Submitting, record: SessionRecord, futures: deque[AgentFuture[Any]]) -> None:
        #: the pool or view, kept since a pool ends when nobody holds it
        self._source = source
        self._manager = source._manager
        self._options = source._options
        self._given = source._given
        self._captured = source._captured
        self._record = record
        self._spec = replace(source._spec, session=record, key=None)
        #: not settled when last looked at; for those who wait for the end
        self._futures = futures

    @property
    def key(self) -> str | None:
        """The name that it was opened with."""
        return self._record.key

    @property
    def closed(self) -> bool:
        """No more tasks are accepted: it was closed, or lost, or its pool is shut down."""
        return self._record.is_over or self._manager.core.is_closing

    @property
    def lost(self) -> SessionLostError | None:
        """Why it was lost, or None."""
        return self._record.error

    @property
    def worker_pid(self) -> int | None:
        """The process that its tasks run in; None before the first one begins, and after the end."""
        worker = self._record.worker
        return None if worker is None else worker.pid

    def _accept(
        self, payload: Payload, buffers: Sequence[memoryview], spec: TaskSpec, call_key: object
    ) -> AgentFuture[Any]:
        self._manager.check_open()
        if self._record.error is not None:
            raise fresh(self._record.error)
        if self._record.is_closed:
            raise PoolClosedError("cannot schedule new futures after the session was closed")
        future = super()._accept(payload, buffers, spec, call_key)
        while self._futures and self._futures[0].done():
            with suppress(IndexError):  # another thread was quicker
                self._futures.popleft()
        self._futures.append(future)
        return future

    def close(self, wait: bool = True) -> None:
        """Accept no more tasks, finish those accepted, then retire the worker. May be called again.

        wait: return when the tasks are settled; not in a callback of a future, where it returns at once.
        """
        with suppress(PoolClosedError):  # the pool's end ended it
            self._manager.order(lambda now: self._manager.core.close_session(now, self._record))
        if wait and not self._manager.is_own_thread:
            wait_for(list(self._futures))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close it, as an Executor is closed; `cancel_futures`: cancel what has not begun. The pool stays open."""
        self.close(wait=False)
        if cancel_futures:
            for future in list(self._futures):
                future.cancel()
        self.close(wait=wait)

    def __repr__(self) -> str:
        record = self._record
        state = "lost" if record.error is not None else "closed" if record.is_closed else "open"
        return f"<Session {record.id}{' ' + record.key if record.key else ''} {state} in worker {self.worker_pid}>"


class Sessions:
    """The open sessions of one pool, by key.

    Holds no `Session`, as each holds its pool: a pool that nobody else holds ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both dicts
        self._by_key: dict[str, tuple[SessionRecord, deque[AgentFuture[Any]]]] = {}
        self._held: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()

    def open(self, source: Submitting, key: str | None, idle_timeout: float | None) -> Session:
        """A new session of that pool or view, or the open one of that key. Raises as `AgentPool.session` does."""
        check_session(key, idle_timeout)
        source._manager.check_open()
        if key is None:
            return Session(source, SessionRecord(next(_numbers), key, idle_timeout), deque())
        with self._lock:
            self._by_key = {name: known for name, known in self._by_key.items() if not known[0].is_over}
            known = self._by_key.get(key)
            session = self._held.get(key)
            if known is None:
                known = self._by_key[key] = SessionRecord(next(_numbers), key, idle_timeout), deque()
                session = None
            if session is None:
                session = self._held[key] = Session(source, *known)
            return session
