"""Workers of one pool: starting, losing, sending home. The lowest of seven rooms of one state machine.

`Crew` < `Upkeep` (measuring, recycling) < `Attempts` (how a task's attempts end) < `Operations` (what operators order)
< `Rationing` (groups, promised memory) < `Sessions` < `Scheduler` (the events of tasks and of the pool, placing). Each
room knows those below it, and of those above only the methods declared abstract here.
Pure, like everything in `core`; one thread at a time may be inside, and the caller sees to that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Final

from agentpool.config import MB, PoolSettings
from agentpool.core import failures, recycling
from agentpool.core.actions import Action, BreakerChanged, Close, Kill, Retire, Spawn, Warn
from agentpool.core.breaker import Breaker
from agentpool.core.governance import Governor
from agentpool.core.records import SessionRecord, StopCause, TaskRecord, WorkerExit, WorkerRecord
from agentpool.core.retry import backoff_seconds
from agentpool.core.timers import TimerQueue
from agentpool.core.transitions import WORKER_TRANSITIONS, BreakerState, WorkerState, allowed_masks
from agentpool.errors import InternalError

__all__ = ["LIVE_STATES", "Counters", "Crew"]

_ALLOWED = allowed_masks(WORKER_TRANSITIONS)
_STARTING, _IDLE, _BUSY, _CHECKING, _RETIRING, _KILLED, _GONE = WorkerState
#: States that count against `max_workers`. A worker that was told to end does not: its successor starts first.
LIVE_STATES: Final = (_STARTING, _IDLE, _BUSY, _CHECKING)
_LIVE_MASK: Final = sum(1 << state for state in LIVE_STATES)

#: Seconds that a retiring worker has to end by itself, and after which a kill is repeated.
RETIRE_GRACE: Final = 5.0
#: A start is admitted on a reading of the host no older than this, in seconds.
HOST_READING_AGE: Final = 1.0
#: Why a worker was killed that the pool needs no more: nobody is to blame.
POOL_STOPPED: Final = "pool stopped"
#: So many events that are not of every task are remembered, for the report of a defect.
_REMEMBERED: Final = 64


@dataclass(slots=True)
class Counters:
    """What happened since the pool began."""

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    timed_out: int = 0
    crashed: int = 0
    memory_killed: int = 0
    tools_stopped: int = 0
    given_back: int = 0
    spawned: int = 0
    start_failures: int = 0
    workers_killed: int = 0
    recycled: dict[str, int] = field(default_factory=dict)


class Crew(ABC):
    """Workers of one pool. See `Scheduler`, which is what others use."""

    def __init__(self, settings: PoolSettings, *, seed: int) -> None:
        self.settings = settings
        hard = settings.hard_memory_limit_mb
        #: of a worker's tree while it starts, and while it runs a task that has no limit of its own
        self.hard_limit_bytes = None if hard is None else int(hard * MB)
        self.rng = Random(seed)
        self.timers = TimerQueue()
        self.breaker = Breaker(settings.breaker)
        self.governor = Governor(settings, self.breaker)
        self.counters = Counters()
        #: every worker that is not GONE
        self.workers: dict[int, WorkerRecord] = {}
        #: all and only the IDLE ones that no session has, in the order of becoming idle
        self.idle: dict[int, WorkerRecord] = {}
        #: all and only the IDLE ones that a session has, which alone may use them
        self.kept: dict[int, WorkerRecord] = {}
        #: all and only the CHECKING ones
        self.checking: dict[int, WorkerRecord] = {}
        #: number of workers in LIVE_STATES
        self.live = 0
        #: number of workers STARTING
        self.starting = 0
        #: number of workers that are leaving
        self.leaving = 0
        #: number of workers with a running task
        self.active = 0
        #: tasks that may run at once; 0 while paused
        self.concurrency = settings.concurrency
        #: how many more run, since that was lowered; falls as they end
        self.overhang = 0
        #: how many more workers there are than twice `max_workers`, since that was lowered; falls as they are gone
        self.left_over = 0
        #: a task waits for memory: the host is measured from time to time even if there is no worker
        self.is_memory_awaited = False
        #: sum of `rss_bytes` of `workers`
        self.pool_bytes = 0
        #: accepted tasks that are not resolved
        self.unresolved = 0
        self.is_closing = False
        #: Close was asked for: there is no task and no worker, and there will be none
        self.is_closed = False
        #: what the initializer raised; the pool is broken
        self.broken: BaseException | None = None
        #: the pool is broken or was stopped: what each task gets that is not resolved otherwise
        self.doom: BaseException | None = None
        self._actions: list[Action] = []
        self._is_dirty = False
        self._next_worker_id = 1
        self._failures_in_a_row = 0
        self._failed_at = -math.inf
        self._spawn_not_before = 0.0
        self._warned: set[str] = set()
        self._history: deque[tuple[float, str]] = deque(maxlen=_REMEMBERED)

    # -- what the rooms above provide ----------------------------------------------------------------------------

    @abstractmethod
    def _task_lost(self, now: float, task: TaskRecord, worker: WorkerRecord, exit_: WorkerExit) -> None:
        """The worker is gone, and this task was at its head."""

    @abstractmethod
    def _backlog_lost(self, now: float, tasks: list[TaskRecord], worker: WorkerRecord, exit_: WorkerExit) -> None:
        """The worker is gone, and these tasks waited in it behind the one at its head."""

    @abstractmethod
    def _return_ration(self, worker: WorkerRecord) -> None:
        """The worker's task, which has one, is in it no longer."""

    @abstractmethod
    def _session_idle(self, now: float, session: SessionRecord) -> None:
        """The worker that this session has became idle."""

    @abstractmethod
    def _session_retired(self, worker: WorkerRecord, session: SessionRecord, reason: str) -> None:
        """The worker, which this session has, was told to end."""

    @abstractmethod
    def _session_killed(self, worker: WorkerRecord, session: SessionRecord, exit_: WorkerExit) -> None:
        """The worker, which this session had, is gone."""

    @abstractmethod
    def _stop_task(self, now: float, task: TaskRecord, cause: StopCause, *, ask: bool) -> None:
        """A RUNNING task is to end."""

    @abstractmethod
    def _hard_limit(self, task: TaskRecord) -> int | None:
        """Bytes of its worker's tree at which the task is stopped."""

    @abstractmethod
    def _fail_everything(self, now: float, error: BaseException) -> None:
        """The pool is broken."""

    @abstractmethod
    def _demand(self) -> int:
        """Tasks that could start now if there were more workers for them."""

    @abstractmethod
    def _arm_sampling(self, worker: WorkerRecord, when: float) -> None:
        """Measure the worker at `when`, or earlier."""

    @abstractmethod
    def _ask_host(self) -> None:
        """Have the machine measured now."""

    @abstractmethod
    def _watch_host(self, now: float) -> None:
        """Have the machine measured from time to time, as long as there is reason to."""

    # -- moves ---------------------------------------------------------------------------------------------------

    def _move_worker(self, worker: WorkerRecord, state: WorkerState) -> None:
        old = worker.state
        if not _ALLOWED[old] >> state & 1:
            raise self._defect(f"{worker!r} cannot become {state.name}")
        worker.state = state
        self.live += (_LIVE_MASK >> state & 1) - (_LIVE_MASK >> old & 1)
        self.starting -= old is _STARTING
        if worker.is_leaving:
            worker.is_leaving = False
            self.leaving -= 1
        if old is _IDLE:
            del (self.idle if worker.session is None else self.kept)[worker.id]
        elif old is _CHECKING:
            del self.checking[worker.id]
        if state is _CHECKING:
            self.checking[worker.id] = worker
        elif state is _IDLE:
            (self.idle if worker.session is None else self.kept)[worker.id] = worker

    def _now_idle(self, now: float, worker: WorkerRecord) -> None:
        self._move_worker(worker, _IDLE)
        worker.idle_since = now
        if worker.session is not None:
            self._session_idle(now, worker.session)
        timeout = self.settings.idle_timeout
        if worker.state_timer is None and timeout is not None:
            # Armed once and looked at when it fires: a timer per task would cost as much as the task.
            self._watch_idle(worker, now + timeout, timeout)

    def _watch_idle(self, worker: WorkerRecord, when: float, timeout: float) -> None:
        worker.state_timer = self.timers.add(when, lambda at: self._idle_timer_fired(at, worker, timeout))

    def _set_state_timer(self, worker: WorkerRecord, when: float, overdue: str) -> None:
        self.timers.cancel(worker.state_timer)
        worker.state_timer = self.timers.add(when, lambda at: self._kill(at, worker, overdue))

    def _retire(self, now: float, worker: WorkerRecord, reason: str) -> None:
        worker.reason = reason
        self.counters.recycled[reason] = self.counters.recycled.get(reason, 0) + 1
        self._move_worker(worker, _RETIRING)
        self._note(now, f"{worker!r}: {reason}")
        self._set_state_timer(worker, now + RETIRE_GRACE, "did not end when told to")
        self._actions.append(Retire(worker, reason))
        self._is_dirty = True
        if worker.session is not None:
            self._session_retired(worker, worker.session, reason)

    def _kill(self, now: float, worker: WorkerRecord, reason: str) -> None:
        if worker.state is not _KILLED:
            worker.reason = reason or "stopped"
            self._move_worker(worker, _KILLED)
            self._is_dirty = True
        self._note(now, f"{worker!r}: {reason}")
        self._set_state_timer(worker, now + RETIRE_GRACE, "still not gone")
        self._actions.append(Kill(worker, reason))

    def _idle_timer_fired(self, now: float, worker: WorkerRecord, timeout: float) -> None:
        worker.state_timer = None
        if worker.state is not _IDLE:
            return  # armed again when it is idle again
        due = worker.idle_since + timeout
        if now < due:
            self._watch_idle(worker, due, timeout)
        elif self.live > self.settings.min_workers and worker.session is None:
            self._retire(now, worker, "idle")
        else:
            self._watch_idle(worker, now + timeout, timeout)

    # -- starting ------------------------------------------------------------------------------------------------

    def _consider_spawning(self, now: float) -> None:
        """Start what work waits for, or what the floor asks for, as far as all governors allow."""
        if self.doom is not None:
            return
        floor = 0 if self.is_closing or self.governor.reasons else self.settings.min_workers
        demand, missing = self._demand(), floor - self.live
        if demand <= 0 and missing <= 0:
            return
        # A worker whose memory is being read is free again in a moment; one that had to collect may not be.
        coming = self.starting + sum(not worker.check_stage for worker in self.checking.values())
        wanted = max(demand - coming, missing)
        most = self.settings.max_workers
        wanted = min(wanted, most + self.leaving - self.live, 2 * most - len(self.workers))
        if wanted <= 0 or not self._may_start(now):
            return
        # A start that is overdue is tried again when it is gone, and was counted.
        wanted -= sum(worker.state is _KILLED and worker.baseline_bytes is None for worker in self.workers.values())
        if wanted <= 0:
            return
        if self.governor.sampled_at is None or now - self.governor.sampled_at > HOST_READING_AGE:
            self._ask_host()
            return
        while wanted > 0 and self.breaker.allows_start():
            wanted -= 1
            self._spawn(now)

    def _may_start(self, now: float) -> bool:
        """Otherwise a timer, the breaker or the next reading of the host comes back to it."""
        has_waited = now >= self._spawn_not_before or self.breaker.state is BreakerState.HALF_OPEN
        return has_waited and self._admits_start()

    def _admits_start(self) -> bool:
        return self.breaker.allows_start() and not (self.governor.forbids_growth and self.live)

    def _spawn(self, now: float) -> None:
        worker = WorkerRecord(self._next_worker_id, now)
        self._next_worker_id += 1
        worker.is_probe = self.breaker.start_began()
        worker.task_limit = recycling.tasks_before_recycling(self.settings, self.rng)
        self.workers[worker.id] = worker
        self.live += 1
        self.starting += 1
        self.counters.spawned += 1
        self._note(now, f"{worker!r}: asked for")
        overdue = f"did not become ready within its start_timeout of {self.settings.start_timeout:g} s"
        self._set_state_timer(worker, now + self.settings.start_timeout, overdue)
        self._actions.append(Spawn(worker))
        self._watch_host(now)

    def worker_spawned(self, now: float, worker: WorkerRecord, pid: int) -> None:
        """The worker's process exists."""
        worker.pid = pid
        if worker.state is _STARTING and self.hard_limit_bytes is not None:
            soon = recycling.next_sample_interval(worker, self.hard_limit_bytes, self.settings.cleanup_interval)
            self._arm_sampling(worker, now + soon)  # an initializer may take more than that

    def worker_ready(self, now: float, worker: WorkerRecord, pid: int, rss_bytes: int) -> None:
        """The worker answered: preload and initializer are done. `rss_bytes` is its baseline."""
        if worker.state is not _STARTING:
            return  # it is being killed, and was quicker
        worker.pid = pid
        self.timers.cancel(worker.state_timer)
        worker.state_timer = None
        self._failures_in_a_row = 0
        self.breaker.start_succeeded(is_probe=worker.is_probe)
        worker.is_probe = False
        self.pool_bytes += rss_bytes - worker.rss_bytes
        worker.rss_bytes = rss_bytes
        self.governor.pool_sampled(now, self.pool_bytes)
        self._note_breaker(now)
        self._rebase(worker, rss_bytes)
        self._arm_sampling(worker, now + self.settings.cleanup_interval)
        self._now_idle(now, worker)
        self._note(now, f"{worker!r}: ready")
        self._is_dirty = True

    def agent_set_up(self, now: float, worker: WorkerRecord, rss_bytes: int) -> None:
        """The worker set up an agent it will keep: its memory belongs to the baseline."""
        worker.warm_bytes = None
        self._rebase(worker, max(worker.baseline_bytes or 0, rss_bytes))

    def _rebase(self, worker: WorkerRecord, baseline_bytes: int) -> None:
        worker.baseline_bytes = baseline_bytes
        recycling.set_soft_limit(self.settings, worker)
        warning = recycling.baseline_warning(self.settings, worker)
        if warning is not None:
            self._warn_once("baseline", warning)

    def initializer_failed(self, now: float, worker: WorkerRecord, error: BaseException) -> None:
        """The initializer raised: as in the standard library, the pool is broken and everything fails with `error`."""
        if self.broken is None:
            self.broken = error
            self._note(now, f"{worker!r}: initializer failed")
            self._fail_everything(now, error)

    # -- losing --------------------------------------------------------------------------------------------------

    def worker_exited(self, now: float, worker: WorkerRecord, exit_: WorkerExit) -> None:
        """The worker's death was observed, and all results that it had sent were fed in before."""
        if worker.state is _GONE:
            return
        state, task, backlog = worker.state, worker.running, list(worker.backlog)
        self._move_worker(worker, _GONE)
        self._note(now, f"{worker!r}: {failures.exit_words(exit_)}")
        self._forget(now, worker)
        if worker.baseline_bytes is None and worker.reason != POOL_STOPPED and not worker.is_ordered:
            self._start_failed(now, worker, failures.start_words(worker, exit_))
        elif worker.is_probe:
            self.breaker.probe_abandoned()
        worker.is_probe = False
        if worker.session is not None:
            self._session_killed(worker, worker.session, exit_)
        if backlog:
            worker.backlog.clear()
            self._backlog_lost(now, backlog, worker, exit_)
        if task is not None:
            worker.running = None
            self.active -= 1
            if worker.ration is not None:
                self._return_ration(worker)
            if self.overhang:
                self.overhang = max(0, self.active - self.concurrency)
            self._task_lost(now, task, worker, exit_)
        elif state in (_IDLE, _CHECKING) and not exit_.keeper_lost:
            # Nobody asked it to die and no task is to blame: an out-of-memory kill, or somebody's signal.
            self._start_failed(now, worker, f"an idle worker {failures.exit_words(exit_)}")
        self._note_breaker(now)
        self._is_dirty = True

    def _forget(self, now: float, worker: WorkerRecord) -> None:
        for timer in (worker.state_timer, worker.sample_timer, worker.backlog_timer):
            self.timers.cancel(timer)
        worker.state_timer = worker.sample_timer = worker.backlog_timer = None
        del self.workers[worker.id]
        if self.left_over:
            self.left_over = max(0, len(self.workers) - 2 * self.settings.max_workers)
        self.pool_bytes -= worker.rss_bytes
        self.governor.pool_sampled(now, self.pool_bytes)

    def _start_failed(self, now: float, worker: WorkerRecord, why: str) -> None:
        self.counters.start_failures += 1
        if worker.spawned_at >= self._failed_at or not self._failures_in_a_row:
            self._failures_in_a_row += 1  # those that were under way together fail together: that is one failure
        self._failed_at = now
        self.breaker.start_failed(now, why, is_probe=worker.is_probe)
        self._note_breaker(now)
        self._spawn_not_before = now + backoff_seconds(self._failures_in_a_row, self.rng)
        self.timers.add(self._spawn_not_before, self._look_again)

    def _look_again(self, now: float) -> None:
        self._is_dirty = True

    def _consider_closing(self, now: float) -> None:
        """Shut down, and nothing left to do: send the workers home, and close when the last is gone."""
        if self.unresolved or self.is_closed:
            return
        for worker in list(self.workers.values()):
            if worker.state in (_IDLE, _CHECKING):
                self._retire(now, worker, "shutdown")
            elif worker.state is _STARTING:
                self._kill(now, worker, POOL_STOPPED)
        if not self.workers:
            self.is_closed = True
            self._actions.append(Close())

    # -- common --------------------------------------------------------------------------------------------------

    def _note_breaker(self, now: float) -> None:
        if not self.breaker.changes:
            return
        for old, new, reason in self.breaker.changes:
            self._note(now, f"breaker {new.label}: {reason}")
            self._actions.append(BreakerChanged(old.label, new.label, reason))
        self.breaker.changes.clear()
        self._is_dirty = True

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            self._actions.append(Warn(message))

    def _note(self, now: float, what: str) -> None:
        """Remember an event for the report of a defect; not for what happens with every task."""
        self._history.append((now, what))

    def story(self) -> str:
        """The present state, and what happened last, for the report of a defect."""
        lines = [
            f"{self.unresolved} unresolved, {self.active} active, {self.live} live; closing {self.is_closing}, "
            f"doom {self.doom!r}; breaker {self.breaker.state.label} {self.breaker.reason}"
        ]
        for worker in self.workers.values():
            tasks = [worker.running, *worker.backlog] if worker.running is not None else list(worker.backlog)
            lines.append(f"{worker!r} {worker.reason} {tasks}")
        lines += [f"{at:.6f} {what}" for at, what in self._history]
        return "\n".join(lines)

    def _defect(self, message: str) -> InternalError:
        return InternalError(f"{message}. This is a defect of agentpool: please report it", story=self.story())
