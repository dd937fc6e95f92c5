"""Schedulers that are broken on purpose, one promise each: what the simulator must find.

Each is the real one with one method that does what a plausible slip would do. The comment says which slip.
"""

from __future__ import annotations

from typing import Any

from agentpool.core.actions import DISPATCH, RESOLVE, Spawn
from agentpool.core.records import TaskRecord, WorkerExit, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.core.transitions import BreakerState, TaskState, WorkerState


class ResolvesTwice(Scheduler):
    """A result and the death of its worker are both taken for the end of a task."""

    def worker_exited(self, now: float, worker: WorkerRecord, exit_: WorkerExit) -> None:
        task = worker.running
        super().worker_exited(now, worker, exit_)
        if task is not None and task.state is TaskState.RESOLVED:
            self._actions.append((RESOLVE, task, False, OSError("again")))


class LosesQueued(Scheduler):
    """A task that comes back from a lost worker is forgotten."""

    def _requeue_unbegun(self, tasks: list[TaskRecord]) -> None:
        super()._requeue_unbegun(tasks[1:])


class LosesSilently(Scheduler):
    """A task is forgotten, and the books are cooked."""

    def _retry_due(self, now: float, task: TaskRecord) -> None:
        del self.waiting[task.id]
        self.unresolved -= 1
        self.counters.submitted -= 1


class StartsWhileOpen(Scheduler):
    """The breaker is asked whether it is closed, and the answer is not used."""

    def _consider_spawning(self, now: float) -> None:
        super()._consider_spawning(now)
        if self.breaker.state in (BreakerState.OPEN, BreakerState.FORCED_OPEN) and self.queue and not self.live:
            self._spawn(now)


class StartsTooMany(Scheduler):
    """One worker more than `max_workers`."""

    def _consider_spawning(self, now: float) -> None:
        super()._consider_spawning(now)
        if self.starting and self.live == self.settings.max_workers:
            self._spawn(now)


class RunsTooMany(Scheduler):
    """`max_concurrent` is compared by <=."""

    def _place(self, now: float) -> None:
        super()._place(now)
        if self.queue and self.idle and self.active == self.concurrency and self.alone is None:
            task = self.queue.pop()
            self._run(now, self._choose(task), task)


class ChargesWhatNeverBegan(Scheduler):
    """An attempt that was sent and never began is counted."""

    def _uncharge(self, task: TaskRecord) -> None:
        return


class RunsAgainUnasked(Scheduler):
    """A task that began in a lost worker is run again, whether or not its policy allows that."""

    def _attempt_ended(self, now: float, task: TaskRecord, is_value: bool, payload: object) -> None:
        if task.spec.policy is None and task.attempts == 1 and task.kills:
            self._wait_for_retry(now, task, 0.0)
        else:
            super()._attempt_ended(now, task, is_value, payload)


class SendsTwice(Scheduler):
    """A dispatch is made twice."""

    def _run(self, now: float, worker: WorkerRecord, task: TaskRecord) -> None:
        super()._run(now, worker, task)
        self._actions.append((DISPATCH, worker, task))


class CancelsWhatRuns(Scheduler):
    """A task that runs is cancelled as if it were queued."""

    def cancel(self, now: float, task: TaskRecord) -> bool:
        if task.state is TaskState.RUNNING and task.worker is not None and not task.worker.backlog:
            worker = task.worker
            self.counters.cancelled += 1
            self._settle(task)
            self._worker_free(now, worker)
            return True
        return super().cancel(now, task)


class ForgetsTimeouts(Scheduler):
    """A retried attempt has no timeout."""

    def _begin(self, now: float, worker: WorkerRecord, task: TaskRecord) -> None:
        super()._begin(now, worker, task)
        if task.attempts > 1:
            self._drop_timer(task)


class NeverKills(Scheduler):
    """A retired worker that does not end is left alone."""

    def _retire(self, now: float, worker: WorkerRecord, reason: str) -> None:
        super()._retire(now, worker, reason)
        self.timers.cancel(worker.state_timer)


class KillsWithoutASignal(Scheduler):
    """A worker is marked as killed, and nobody kills it; nor is that tried again."""

    def _kill(self, now: float, worker: WorkerRecord, reason: str) -> None:
        super()._kill(now, worker, reason)
        self._actions.pop()


class NeverCloses(Scheduler):
    """The last worker's death does not close the pool."""

    def _consider_closing(self, now: float) -> None:
        if self.counters.spawned < 3:
            super()._consider_closing(now)


class IsAlwaysInTime(Scheduler):
    """`queue_timeout` is counted from the last retry's end, minus what it waited: too soon."""

    def _limit_waiting(self, task: TaskRecord) -> None:
        super()._limit_waiting(task)
        if task.timer is not None and task.attempts:
            self.timers.cancel(task.timer)
            task.timer = self.timers.add(task.queued_at, lambda at: self._queue_timeout(at, task))


class DropsTheBacklog(Scheduler):
    """The backlog of a lost worker is resolved as if it had run there."""

    def worker_exited(self, now: float, worker: WorkerRecord, exit_: WorkerExit) -> None:
        for task in list(worker.backlog):
            worker.backlog.remove(task)
            self._resolve(task, False, OSError("lost"))
        super().worker_exited(now, worker, exit_)


class TwoProbes(Scheduler):
    """A half-open breaker admits another start while its probe is on the way."""

    def _consider_spawning(self, now: float) -> None:
        super()._consider_spawning(now)
        if self.breaker.is_probing and self.breaker.state is BreakerState.HALF_OPEN and self.live < 2:
            self._spawn(now)
            next(reversed(self.workers.values())).is_probe = True


class KeepsAnIdleWorkerFromWork(Scheduler):
    """A worker that was checked goes idle, and nobody looks whether there is work for it."""

    def _judge_check(self, now: float, worker: WorkerRecord) -> None:
        super()._judge_check(now, worker)
        if worker.state is WorkerState.IDLE:
            self._is_dirty = False


class TellsNobodyOfRoom(Scheduler):
    """Room in a bounded queue is not announced."""

    def _consider_room(self) -> None:
        return


class DropsErrors(Scheduler):
    """An error of the last attempt is told as a value."""

    def _resolve(self, task: TaskRecord, is_value: bool, payload: object) -> None:
        super()._resolve(task, is_value or task.attempts > 1, payload)


class BlamesTheWrongOne(Scheduler):
    """A worker that the pool killed for a timeout is told as a crash."""

    def _end_stopped(self, now: float, task: TaskRecord, cause: Any) -> None:
        self._attempt_ended(now, task, False, OSError("what was that?"))


class RepeatsAStart(Scheduler):
    """A start is asked for twice."""

    def _spawn(self, now: float) -> None:
        super()._spawn(now)
        self._actions.append(Spawn(next(reversed(self.workers.values()))))


class RunsTooManyOfAGroup(Scheduler):
    """`group_limit` is compared by <=."""

    def _group_room(self, task: TaskRecord) -> int:
        return super()._group_room(task) + 1


class StrandsASession(Scheduler):
    """The death of a session's worker is not told to the session."""

    def _session_killed(self, now: float, worker: WorkerRecord, session: Any, exit_: WorkerExit) -> None:
        return


class LendsASessionsWorker(Scheduler):
    """A worker that a session has is among the idle ones again after its first task."""

    def _now_idle(self, now: float, worker: WorkerRecord) -> None:
        worker.session = None
        super()._now_idle(now, worker)


class GoesOnWhilePaused(Scheduler):
    """A pause is noted, and changes nothing."""

    def _set_concurrency(self) -> None:
        self.concurrency = self.settings.concurrency
        self.overhang = max(0, self.active - self.concurrency)


class NeverResumes(Scheduler):
    """After a pause as many may run as while it lasted."""

    def _end_pause(self, now: float) -> None:
        self.is_paused = False


class AcceptsWhileDraining(Scheduler):
    """A drain waits for those who are in, and lets others in."""

    def drain(self, now: float) -> None:
        super().drain(now)
        self.is_draining = False


class KeepsTheSurplus(Scheduler):
    """`resize` changes the number, and sends nobody home."""

    def _shed(self, now: float, surplus: int) -> None:
        return


class KillsNobodyByHand(Scheduler):
    """An order to kill a worker is noted, and not given."""

    def _order_kill(self, now: float, worker: WorkerRecord, reason: str) -> None:
        worker.is_ordered = True


class PromisesTwice(Scheduler):
    """Memory that a task was promised, and has not taken yet, is promised to the next."""

    def _unseen_bytes(self, worker: WorkerRecord) -> int:
        return 0


#: Each with the number of schedules within which it must be found.
BROKEN: dict[type[Scheduler], int] = {
    ResolvesTwice: 100,
    LosesQueued: 300,
    LosesSilently: 300,
    StartsWhileOpen: 300,
    StartsTooMany: 100,
    RunsTooMany: 100,
    ChargesWhatNeverBegan: 300,
    RunsAgainUnasked: 100,
    SendsTwice: 100,
    CancelsWhatRuns: 300,
    ForgetsTimeouts: 300,
    NeverKills: 100,
    KillsWithoutASignal: 300,
    NeverCloses: 300,
    IsAlwaysInTime: 1000,
    DropsTheBacklog: 1000,
    TwoProbes: 300,
    KeepsAnIdleWorkerFromWork: 1000,
    TellsNobodyOfRoom: 300,
    DropsErrors: 300,
    BlamesTheWrongOne: 300,
    RepeatsAStart: 100,
    RunsTooManyOfAGroup: 6000,
    StrandsASession: 1000,
    LendsASessionsWorker: 1000,
    GoesOnWhilePaused: 1000,
    NeverResumes: 300,
    AcceptsWhileDraining: 1000,
    KeepsTheSurplus: 3000,
    KillsNobodyByHand: 5000,
    PromisesTwice: 1500,
}
