"""Sessions: tasks that run in one worker, in order, one at a time, so that they find what those before them left there.

The sixth of the seven rooms of one state machine, see `crew`. A session gets its worker with its first task; from then
on that worker runs nothing else and is retired with the session, so that nobody finds another's state. Where the worker
is lost or recycled before, the session is lost: what waits in it fails, and nothing more is accepted. Pure; one thread
at a time.
"""

from __future__ import annotations

from typing import Final

from agentpool.config import PoolSettings
from agentpool.core import failures
from agentpool.core.rationing import Rationing
from agentpool.core.records import SessionRecord, TaskRecord, WorkerExit, WorkerRecord
from agentpool.core.transitions import WorkerState
from agentpool.errors import PoolClosedError

__all__ = ["Sessions"]

_IDLE, _BUSY, _CHECKING = WorkerState.IDLE, WorkerState.BUSY, WorkerState.CHECKING

#: Why a worker goes whose session has ended.
SESSION_CLOSED: Final = "session closed"
#: Why a worker goes whose session was not used for too long.
SESSION_IDLE: Final = "session idle"


class Sessions(Rationing):
    """See the module."""

    def __init__(self, settings: PoolSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        #: all and only those that have a worker or tasks
        self.sessions: dict[int, SessionRecord] = {}
        #: closed, and their last task was just resolved
        self._ending: list[SessionRecord] = []

    # -- tasks of a session --------------------------------------------------------------------------------------

    def _join_session(self, now: float, session: SessionRecord) -> None:
        """A task is about to be accepted. Raises SessionLostError and PoolClosedError."""
        if session.error is not None:
            raise failures.fresh(session.error)
        if session.is_closed:
            raise PoolClosedError("cannot schedule new futures after the session was closed")
        session.unresolved += 1
        session.used_at = now
        self.sessions[session.id] = session

    def _left_session(self, task: TaskRecord, session: SessionRecord) -> None:
        """A task of it is resolved."""
        session.unresolved -= 1
        self._is_dirty = True
        if session.current is task:
            session.current = None
        if session.unresolved:
            return
        worker = session.worker
        if worker is None:
            del self.sessions[session.id]
        elif session.is_closed or self.is_closing:
            if worker.state is _BUSY:
                worker.retire_reason = worker.retire_reason or SESSION_CLOSED  # with the end of that very task
            else:
                self._ending.append(session)

    def _worker_for(self, now: float, task: TaskRecord) -> WorkerRecord | None:
        session = task.spec.session
        if session is None:
            return super()._worker_for(now, task)
        if session.current is not None and session.current is not task:
            return None  # it waits to be tried again, and has its turn before the others
        worker = session.worker
        if worker is None:
            worker = super()._worker_for(now, task)
            if worker is not None:
                self._pin(worker, session)
        elif worker.state is not _IDLE or not self._admits(now, task, worker):
            return None
        if worker is not None:
            session.current = task
        return worker

    def _pin(self, worker: WorkerRecord, session: SessionRecord) -> None:
        """An idle worker is this session's from now on."""
        del self.idle[worker.id]
        self.kept[worker.id] = worker
        worker.session, session.worker = session, worker
        worker.task_limit = None

    def _line_room(self, task: TaskRecord) -> int:
        session = task.spec.session
        if session is None:
            return super()._line_room(task)
        return min(1, self._group_room(task)) if session.worker is None and session.current in (None, task) else 0

    def _could_begin(self, task: TaskRecord) -> bool:
        """For the invariants: could this head of a line begin, needing no memory?"""
        session = task.spec.session
        if task.spec.expected_bytes is not None or self._group_room(task) <= 0:
            return False
        if session is None or session.worker is None:
            return bool(self.idle) and (session is None or session.current in (None, task))
        return session.worker.state is _IDLE and session.current in (None, task)

    def startable(self, most: int) -> int:
        """Queued tasks that neither their group nor their session holds up; `most` is enough.

        What they lack is a place in the budget, a worker, or memory.
        """
        queue = self.queue
        count = len(self.isolated) + queue.plain_length
        for line in queue.lines.values() if queue.line_length else ():
            if count >= most:
                break
            head = line.peek()
            if head is not None:
                count += max(0, min(self._startable_room(head), len(line)))
        return count

    def _startable_room(self, head: TaskRecord) -> int:
        session = head.spec.session
        if session is None or session.worker is None:
            return self._line_room(head)
        is_free = session.worker.state is _IDLE and session.current in (None, head)
        return min(1, self._group_room(head)) if is_free else 0

    # -- the end of a session ------------------------------------------------------------------------------------

    def close_session(self, now: float, session: SessionRecord) -> None:
        """Accept no more tasks in it; it ends with its last one."""
        session.is_closed = True
        self._end_session(now, session)

    def _end_session(self, now: float, session: SessionRecord) -> None:
        """It gets no more tasks; where it has none, its worker goes."""
        worker = session.worker
        if worker is not None and not session.unresolved and worker.state in (_IDLE, _CHECKING):
            self._retire(now, worker, SESSION_CLOSED)

    def _end_sessions(self, now: float) -> None:
        """The pool shuts down: those without tasks are over, and others may want their workers."""
        for session in list(self.sessions.values()):
            self._end_session(now, session)

    def _session_idle(self, now: float, session: SessionRecord) -> None:
        """Its worker became idle."""
        if session.idle_timeout is not None and session.timer is None:
            self._watch_session(session, now + session.idle_timeout)

    def _watch_session(self, session: SessionRecord, when: float) -> None:
        session.timer = self.timers.add(when, lambda at: self._session_due(at, session))

    def _session_due(self, now: float, session: SessionRecord) -> None:
        session.timer = None
        worker, timeout = session.worker, session.idle_timeout
        assert worker is not None  # else the timer was cancelled
        assert timeout is not None  # or never set
        if worker.state is not _IDLE:
            return  # armed again when it is idle again
        due = max(session.used_at, worker.idle_since) + timeout
        if session.unresolved or now < due:
            self._watch_session(session, max(due, now + timeout / 2) if session.unresolved else due)
        else:
            self._retire(now, worker, SESSION_IDLE)

    def _session_retired(self, worker: WorkerRecord, session: SessionRecord, reason: str) -> None:
        """Its worker is told to end. Whether that is its proper end depends on who wanted it."""
        if reason != SESSION_CLOSED:
            session.error = failures.session_retired(session, worker, reason)
        self._let_go(session)

    def _session_killed(self, worker: WorkerRecord, session: SessionRecord, exit_: WorkerExit) -> None:
        """Its worker is gone, and was not told to end."""
        if session.worker is worker:
            session.error = failures.session_crashed(session, worker, exit_)
            self._let_go(session)

    def _let_go(self, session: SessionRecord) -> None:
        """It has no worker any more, and will have none: what waits in it gets the reason."""
        self.timers.cancel(session.timer)
        session.worker = session.timer = None
        if session.error is not None and self.doom is None:
            line = self.queue.lines.get(session)
            for task in [] if line is None else list(line):
                self._resolve(task, False, failures.fresh(session.error))
                self.queue.discard(task)
            for task in [task for task in self.waiting.values() if task.spec.session is session]:
                del self.waiting[task.id]
                self._resolve(task, False, failures.fresh(session.error))
        if not session.unresolved:
            self.sessions.pop(session.id, None)
        self._is_dirty = True
