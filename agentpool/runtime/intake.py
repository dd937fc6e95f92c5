"""How tasks come into a pool: accepted under the lock and sent at once, or left for whoever changes the core next.

See `changes` for the rooms of the manager. The hot path: a task costs its submitter some microseconds here. Runs in the
submitter's thread, which may be one that Ctrl-C interrupts at any line. Decides nothing.
"""

from __future__ import annotations

import time
from contextlib import suppress

from agentpool.core.records import TaskRecord, TaskSpec
from agentpool.errors import PoolClosedError, QueueFullError, SessionLostError
from agentpool.runtime import interrupts
from agentpool.runtime.changes import Call
from agentpool.runtime.orders import Orders

__all__ = ["Intake"]


class Intake(Orders):
    """See the module."""

    def submit(self, call: Call, spec: TaskSpec, call_key: object, *, block: bool) -> TaskRecord:
        """Accept a task, and send it to a worker at once where one is free.

        Raises PoolClosedError, QueueFullError (at once where `block` is False or the caller must not wait), or what
        broke the pool.
        """
        task = TaskRecord(next(self._task_ids), spec, call, call_key)
        core = self.core
        if (
            core.active >= core.concurrency
            and self._takes_unlocked
            and spec.queue_timeout is None
            and core.broken is None
            and self._leave(task)
        ):
            return task
        self.check_open()
        while True:
            is_held = interrupts.hold()
            try:
                self._accept(task)
                return task
            except QueueFullError:
                if not block or self.is_own_thread:
                    raise
            finally:
                if is_held:
                    self._release(task)
            self._wait_for_room()

    def _leave(self, task: TaskRecord) -> bool:
        """Leave a task, for which nobody is free now, to whoever changes the core next. False: the pool was closed.

        Every end of a running task is such a change, and collects what was left after it counted that end: so a task
        that was left too late for that finds a free place here.
        """
        core = self.core
        try:
            self._inbox.append(task)
            if not self._takes_unlocked:
                try:
                    self._inbox.remove(task)
                    return False
                except ValueError:  # somebody collected it: it was accepted in time
                    return True
            if core.active < core.concurrency:
                with self._section() as now:
                    self._take(now)
                    self._wake_for_deadline()
        except KeyboardInterrupt:
            self._withdraw(task)
            raise
        return True

    def _accept(self, task: TaskRecord) -> None:
        with self.lock:
            self._start_if_open()  # before the task is accepted: where no thread can be had, nothing is lost
            self._enter()
            now = time.monotonic()
            if self._inbox:
                self._collect(now)
            try:
                self.core.submit(now, task)
            except (QueueFullError, SessionLostError):
                self._is_inside = False
                raise
            except PoolClosedError as error:
                self._is_inside = False
                raise PoolClosedError(f"{error}{self._stop_reason}") from None
            self._open[task.id] = task
            self._take(now)
            self._wake_for_deadline()
            self._is_inside = False

    def _release(self, task: TaskRecord) -> None:
        try:
            interrupts.release()
        except KeyboardInterrupt:
            self._withdraw(task)
            raise

    def _withdraw(self, task: TaskRecord) -> None:
        """Ctrl-C came while it was submitted: its submitter gets no future to withdraw it with."""
        with suppress(PoolClosedError):  # the pool is torn: everything is stopped anyway
            with self._section() as now:
                self._take(now)
            if task.id in self._open and not self.cancel(task):
                self.kill(task, "Ctrl-C came while it was submitted")

    def _wait_for_room(self) -> None:
        core, limit = self.core, self.core.settings.max_pending
        with self.lock:
            while (limit is not None and len(core.queue) >= limit and not core.is_closing and not core.is_draining
                   and core.broken is None):
                core.want_room()  # another one may have had the room that was announced
                self._room.wait()
