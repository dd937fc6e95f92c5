"""How a pool ends: by shutdown, by force, because nobody holds it any more, or as the copy in a forked process.

See `changes` for the rooms of the manager. Any thread may call it, any number of times.
"""

from __future__ import annotations

import threading
from contextlib import suppress

from agentpool.core.records import TaskRecord
from agentpool.errors import PoolClosedError
from agentpool.runtime import interrupts
from agentpool.runtime.intake import Intake

__all__ = ["Ending"]


class Ending(Intake):
    """See the module."""

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        """Accept nothing more; end when all is done. Safe from any thread, and any number of times."""
        if self._is_forked:
            return
        self._takes_unlocked = False
        cancelled: list[TaskRecord] = []
        with interrupts.held():
            # Where a change was torn the manager thread ends the pool by itself.
            with suppress(PoolClosedError), self._section() as now:
                if cancel_futures:
                    self._take_all_back(now)
                cancelled = self.core.shutdown(now, cancel_futures=cancel_futures)
                self._room.notify_all()
                self._take(now)
                self._reactor.wake()
            self._settle_cancelled(cancelled)
        self._join(wait)

    def stop_all(self, error: BaseException, reason: str, *, wait: bool) -> tuple[int, int, int]:
        """Kill everything now. Returns the numbers of workers stopped, tasks cancelled and tasks stopped."""
        if self._is_forked:
            return (0, 0, 0)
        self._takes_unlocked = False
        workers, active = 0, 0
        cancelled: list[TaskRecord] = []
        with interrupts.held():
            with suppress(PoolClosedError), self._section() as now:
                self._stop_reason = f": {reason}" if reason else ""
                workers, active = len(self.core.workers), self.core.active
                self._take_all_back(now)
                cancelled = self.core.stop_all(now, error)
                self._room.notify_all()
                self._take(now)
                self._reactor.wake()
            self._settle_cancelled(cancelled)
        self._join(wait)
        return (workers, len(cancelled), active)

    def drop(self) -> None:
        """Nobody holds the pool any more: finish what was accepted, then end. Takes no lock: a finalizer calls it."""
        self._is_dropped = True
        if self._thread is None and not self._is_finished:
            self._finish()
        elif not self._is_finished:
            self._reactor.wake()

    def _join(self, wait: bool) -> None:
        thread = self._thread
        if thread is None:
            with self.lock:
                if not self._is_finished:
                    self._finish()
        elif wait and not self.is_own_thread:
            thread.join()

    def _finish(self) -> None:
        if self._announcer is not None:
            self._announcer.close()  # first: it settles futures
        self._is_finished = True
        self.door.close()
        self._reception.stderr.drain()
        self._staff.close()
        if self._clerk is not None:
            self._clerk.close()
        self._reactor.close()

    # -- when the parent forks -----------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """The parent is about to fork: see `Staff.keep_results`."""
        self._staff.keep_results()

    def abandon(self) -> None:
        """In a forked copy of the parent: become inert. The lock may have been held by a thread that is not here."""
        self._is_forked = True
        self._takes_unlocked = False
        self.lock = threading.Lock()
        self._room = threading.Condition(self.lock)
        self._staff.abandon()
        self.door.abandon()
        if self._clerk is not None:
            self._clerk.abandon()
        self._reactor.close()
