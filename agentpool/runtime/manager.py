"""The manager: one thread per pool that waits, feeds the core, and performs its actions.

The uppermost of six rooms, see `changes`: here is what the thread itself does, turn by turn. `submit`, `cancel` and
the like, in the rooms below, run in their caller's thread; they write calls to a free worker themselves and leave
everything else to this thread. Decides nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from agentpool.core.failures import fresh
from agentpool.core.records import TaskRecord
from agentpool.errors import AgentPoolError, InternalError, PoolClosedError, TaskKilledError
from agentpool.runtime.changes import TORN, Call
from agentpool.runtime.performing import Performing
from agentpool_worker.arena import WARM_SECONDS

__all__ = ["Call", "Manager"]

log = logging.getLogger("agentpool")

#: How long the manager waits for room in its own standard error before it tries again, in seconds.
_STDERR_RETRY: Final = 0.05


class Manager(Performing):
    """A pool's manager. One per pool; starts its thread with the first task."""

    def _run(self) -> None:
        self._thread_id = threading.get_ident()
        self.door.open_soon()
        try:
            while not self._is_finished:
                self._turn()
        except BaseException as error:  # a defect of ours: fail what waits, end, and never hang
            self._fail(error)

    def _turn(self) -> None:
        with self.lock:
            if self._is_inside:
                raise PoolClosedError(TORN)
            deadline = self.core.next_deadline()
            self._sleeps_until = float("inf") if deadline is None else deadline
        if self._cold or self._reception.has_events:
            seconds: float | None = 0.0
        elif deadline is not None:
            seconds = deadline - time.monotonic()
        else:
            seconds = None
        stderr = self._reception.stderr
        if stderr.is_waiting:
            seconds = _STDERR_RETRY if seconds is None else min(seconds, _STDERR_RETRY)
            self._reception.push_stderr()
        if self.door.is_due:
            seconds = self.door.wait_or_open(seconds)
        arena = self._staff.arena
        if arena.is_warm:
            seconds = WARM_SECONDS if seconds is None else min(seconds, WARM_SECONDS)
        for callback in self._reactor.wait(seconds):
            callback()
        if arena.is_warm and time.monotonic() > self._trims_at:
            self._trims_at = time.monotonic() + WARM_SECONDS
            self._staff.trim()
        late_kills = self._prepare_late_kills() if self._late_kills else ()
        with self.lock:  # written out: `_section` costs 3 us, and is for threads that Ctrl-C may interrupt
            self._enter()
            now = time.monotonic()
            self._sleeps_until = 0.0
            self._reception.tell_core(now)
            for task, error in late_kills:
                self.core.kill_task(now, task, error)
            if self._is_dropped and not self.core.is_closing:
                self._takes_unlocked = False
                self._collect(now)  # what was left was accepted, and is finished
                self.core.shutdown(now, cancel_futures=False)
            self.core.tick(now)
            self._take(now)
            self._is_inside = False
        if self._reception.said:
            self._deliver_events()
        while self._cold:
            self._perform(self._cold.popleft())

    def _prepare_late_kills(self) -> list[tuple[TaskRecord, TaskKilledError]]:
        late_kills, self._late_kills = self._late_kills, []
        for task, _ in late_kills:
            link = None if task.worker is None else self._staff.links.get(task.worker.id)
            if link is not None:
                self._reception.take_everything(link)
        return late_kills

    def _fail(self, error: BaseException) -> None:
        """The handler of last resort: settle everything, end everything, never hang."""
        is_torn = isinstance(error, PoolClosedError)
        if not is_torn:
            log.critical("the manager thread of pool %s failed. What the core knew:\n%s", self.name, self.core.story(),
                         exc_info=error)
        self._takes_unlocked = False
        with self.lock:
            self._open.update((task.id, task) for task in self._inbox)
            self._inbox.clear()
            resolved = [action for action in self._cold if type(action) is tuple]
            self._cold.clear()
            failure: AgentPoolError
            if is_torn:
                failure = TaskKilledError(f"the task's pool was ended: {TORN}")
                self._stop_reason = f": {TORN}"
            else:
                failure = self.core.broken = InternalError(
                    f"agentpool failed: {type(error).__name__}: {error}. This is a defect: please report it",
                    story=self.core.story(),
                )
                failure.__cause__ = error
            self.core.is_closing = True
            self._room.notify_all()
        for _, task, is_value, payload in resolved:  # type: ignore[misc]  # calls are never cold
            self._resolve(task, bool(is_value), payload)
        for task in list(self._open.values()):
            self._resolve(task, False, fresh(failure))
        self._finish()
