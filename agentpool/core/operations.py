"""What operators order while the pool runs: resize, pause, drain, recycle, kill a worker.

The fourth of the seven rooms of one state machine, see `crew`. Each order is an event like any other; all may come at
any time, from anybody, and twice. Pure; one thread at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from agentpool.config import PoolSettings
from agentpool.core.actions import Revoke
from agentpool.core.attempts import Attempts
from agentpool.core.records import WorkerRecord
from agentpool.core.transitions import WorkerState
from agentpool.errors import SettingsError, UnknownWorkerError

__all__ = ["Operations"]

_STARTING, _IDLE, _BUSY, _CHECKING, _RETIRING, _KILLED, _GONE = WorkerState

#: Why a worker goes that a smaller `max_workers` has no place for.
SURPLUS: Final = "resize"
#: Why a worker goes that an operator wants to be replaced.
BY_HAND: Final = "by hand"


class Operations(Attempts):
    """See the module."""

    def __init__(self, settings: PoolSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        #: what was asked for, whatever a smaller `max_workers` makes of it for a while
        self._asked_concurrent = settings.max_concurrent
        self._asked_floor = settings.min_workers
        #: nothing begins until `resume`
        self.is_paused = False
        #: nothing is accepted until `resume`
        self.is_draining = False

    # -- size ----------------------------------------------------------------------------------------------------

    def resize(self, now: float, max_workers: int | None, max_concurrent: int | None) -> None:
        """Change `max_workers`, `max_concurrent` or both; None: leave it. Raises SettingsError, and changes nothing.

        Of workers that are too many the idle ones go now, the others as their tasks end: whichever end first. A
        throttle or floor above a smaller `max_workers` rests at that, and comes back as it grows again.
        """
        if max_workers is None and max_concurrent is None:
            raise SettingsError("resize needs max_workers, max_concurrent or both")
        most = self.settings.max_workers if max_workers is None else max_workers
        at_once = self._asked_concurrent if max_concurrent is None else max_concurrent
        settings = replace(self.settings, max_workers=most, min_workers=0, max_concurrent=None)  # looks at `most`
        if max_concurrent is None and at_once is not None:
            settings = replace(settings, max_concurrent=min(at_once, most))
        else:
            settings = replace(settings, max_concurrent=at_once)
        self.settings = self.governor.settings = replace(settings, min_workers=min(self._asked_floor, most))
        self._asked_concurrent = at_once
        self._note(now, f"resized to {most} workers, {self.settings.concurrency} at once")
        self._set_concurrency()
        self._shed(now, self.live - self.leaving - most)
        self.left_over = max(0, len(self.workers) - 2 * most)
        self.governor.pool_sampled(now, self.pool_bytes)  # its thresholds may follow the size
        self._note_breaker(now)
        self._is_dirty = True

    def _set_concurrency(self) -> None:
        self.concurrency = 0 if self.is_paused else self.settings.concurrency
        self.overhang = max(0, self.active - self.concurrency)

    def _shed(self, now: float, surplus: int) -> None:
        """So many workers are too many: the longest idle go first, then those that are not ready yet."""
        free = [*self.idle.values(), *(worker for worker in self.checking.values() if worker.session is None)]
        for worker in free[:max(0, surplus)]:
            self._retire(now, worker, SURPLUS)
            surplus -= 1
        for worker in reversed(list(self.workers.values())):
            if worker.state is _STARTING and surplus > 0:
                self._order_kill(now, worker, SURPLUS)
                surplus -= 1
            elif worker.state is _BUSY and worker.session is None and worker.retire_reason in (None, SURPLUS):
                # Nobody knows whose task ends first: all are marked, and looked at again then (`_is_to_go`).
                worker.retire_reason = SURPLUS if surplus > 0 else None

    def _is_to_go(self, worker: WorkerRecord) -> bool:
        """Its tasks have ended, and it was marked to be retired then. Is it to be still?"""
        if worker.retire_reason != SURPLUS or self.live - self.leaving > self.settings.max_workers:
            return True
        worker.retire_reason = None  # others have gone in its place
        return False

    # -- pause, drain --------------------------------------------------------------------------------------------

    def pause(self, now: float) -> None:
        """Begin no task until `resume`; what runs goes on, and what was sent ahead of it is taken back."""
        if self.is_paused or self.is_closing:
            return
        self.is_paused = True
        self._note(now, "paused")
        self._set_concurrency()
        for worker in self.workers.values():
            if worker.backlog:
                self._actions.append(Revoke(worker))

    def resume(self, now: float) -> None:
        """End a pause, and a drain."""
        self.is_draining = False
        self._end_pause(now)

    def drain(self, now: float) -> None:
        """Accept nothing until `resume`; what is accepted runs, so a pause ends."""
        self.is_draining = True
        self._end_pause(now)
        self._note(now, "draining")
        self._is_dirty = True  # who waits for room, waits in vain

    def _end_pause(self, now: float) -> None:
        if self.is_paused:
            self.is_paused = False
            self._note(now, "resumed")
            self._set_concurrency()
            self._is_dirty = True

    # -- workers -------------------------------------------------------------------------------------------------

    def recycle(self, now: float, worker_id: int | None) -> int:
        """Retire one worker, or all (None), as soon as their tasks ended. Returns how many go that would have stayed.

        Raises UnknownWorkerError for an id that no worker ever had. One that is starting is fresh anyway; one of a
        session goes with it, and not before.
        """
        if worker_id is None:
            workers = list(self.workers.values())
        else:
            workers = [worker for worker in (self._worker(worker_id),) if worker is not None]
        return sum([self._recycle(now, worker) for worker in workers])

    def _recycle(self, now: float, worker: WorkerRecord) -> bool:
        if worker.session is not None:
            return False
        if worker.state in (_IDLE, _CHECKING):
            self._retire(now, worker, BY_HAND)
            return True
        if worker.state is not _BUSY or worker.retire_reason not in (None, SURPLUS):
            return False
        worker.retire_reason = BY_HAND
        return True

    def kill_worker(self, now: float, worker_id: int, reason: str) -> bool:
        """Kill a worker and its tree. Its task fails with WorkerKilledError, or runs again where its policy allows.

        False: it is gone, or being killed, already. Raises UnknownWorkerError for an id that no worker ever had.
        """
        worker = self._worker(worker_id)
        if worker is None or worker.state is _KILLED:
            return False
        self.counters.workers_killed += 1
        self._order_kill(now, worker, reason)
        return True

    def _order_kill(self, now: float, worker: WorkerRecord, reason: str) -> None:
        worker.is_ordered = True
        self._kill(now, worker, reason)

    def _worker(self, worker_id: int) -> WorkerRecord | None:
        """The worker; None: it is gone."""
        is_number = isinstance(worker_id, int) and not isinstance(worker_id, bool)
        if not is_number or not 0 < worker_id < self._next_worker_id:
            present = ", ".join(map(str, self.workers)) or "none at present"
            raise UnknownWorkerError(f"this pool never had a worker {worker_id!r}; its workers are: {present}. "
                                     "get_pool_stats()['workers'] lists them by id and pid")
        return self.workers.get(worker_id)
