"""The workers' upkeep: measuring them and the machine, stopping what passes a hard limit, recycling what grew.

The second of the seven rooms of one state machine, see `crew`. Pure; one thread at a time.
"""

from __future__ import annotations

from typing import Final

from agentpool.config import MB, PoolSettings
from agentpool.core import failures, governance, recycling
from agentpool.core.actions import Collect, SampleHost, SampleWorker, StopTool
from agentpool.core.crew import Crew
from agentpool.core.records import HostState, StopCause, TaskRecord, TreeState, WorkerRecord
from agentpool.core.timers import Timer
from agentpool.core.transitions import WorkerState

__all__ = ["Upkeep"]

_STARTING, _IDLE, _BUSY, _CHECKING, _RETIRING, _KILLED, _GONE = WorkerState

#: Seconds that an idle worker has for its two readings and the collection between them.
CHECK_GRACE: Final = 10.0
#: Seconds between readings of the host while there are tasks, and while too little memory keeps the breaker open.
HOST_INTERVAL_BUSY: Final = 2.0
#: So many fresh workers in a row over the limit after their first task are worth a warning.
ALWAYS_OVER: Final = 3
#: So many of its processes are stopped in a task's place, in one attempt; then the task itself is.
MAX_TOOLS_STOPPED: Final = 20


class Upkeep(Crew):
    """See the module."""

    def __init__(self, settings: PoolSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        self._is_host_asked = False
        self._host_timer: Timer | None = None
        #: the host's next reading was set for a time without tasks
        self._is_host_quiet = False
        self._pool_cpu: tuple[float, float] | None = None
        self._over_in_a_row = 0

    # -- workers -------------------------------------------------------------------------------------------------

    def _arm_sampling(self, worker: WorkerRecord, when: float) -> None:
        timer = worker.sample_timer
        if timer is not None and timer.handler is not None:
            if timer.when <= when:
                return
            self.timers.cancel(timer)
        worker.sample_timer = self.timers.add(when, lambda at: self._sample_due(at, worker))

    def _sample_due(self, now: float, worker: WorkerRecord) -> None:
        if worker.state is _CHECKING:
            self._arm_sampling(worker, now + self.settings.cleanup_interval)  # its check reads it anyway
        else:
            self._actions.append(SampleWorker(worker))

    def worker_sampled(self, now: float, worker: WorkerRecord, reading: TreeState | None) -> None:
        """A reading of the worker's tree; None: it could not be read (it is about to be gone)."""
        if worker.state is _GONE:
            return
        if reading is not None:
            self.pool_bytes += reading.rss_bytes - worker.rss_bytes
            recycling.record_reading(worker, now, reading)
            self.governor.pool_sampled(now, self.pool_bytes)
            self._note_breaker(now)
            task = worker.running
            if task is not None:
                self._judge_running(now, worker, task)
            elif worker.state is _STARTING:
                self._judge_start(now, worker)
            elif worker.state is _CHECKING:
                self._judge_check(now, worker)
            elif worker.state is _IDLE and recycling.is_over_soft_limit(worker, worker.rss_bytes):
                self._begin_check(now, worker, is_read=True)
            self._govern_pool(now)
        worker.sample_interval = self._next_interval(worker)
        self._arm_sampling(worker, now + worker.sample_interval)

    def _next_interval(self, worker: WorkerRecord) -> float:
        task, slowest = worker.running, self.settings.cleanup_interval
        if worker.state is _STARTING and self.hard_limit_bytes is not None:
            if worker.is_over_hard_limit:
                return recycling.SAMPLE_FASTEST
            return recycling.next_sample_interval(worker, self.hard_limit_bytes, slowest)
        if task is None or worker.state is not _BUSY:
            return slowest
        if worker.is_over_hard_limit:
            return recycling.SAMPLE_FASTEST
        limit, critical = self._hard_limit(task), self.settings.critical_bytes
        if critical is not None and self.governor.may_stop_one:
            share = critical - (self.pool_bytes - worker.rss_bytes)
            limit = share if limit is None else min(limit, share)
        return recycling.next_sample_interval(worker, limit, slowest)

    def _judge_start(self, now: float, worker: WorkerRecord) -> None:
        """What preload or an initializer takes has the limit of a task; the breaker counts it as a failed start."""
        if self._is_over(worker, self.hard_limit_bytes):
            used, limit = worker.rss_bytes / MB, self.settings.hard_memory_limit_mb
            self._kill(now, worker, f"used {used:.0f} MB before it was ready, above hard_memory_limit_mb ({limit:g})")

    def _is_over(self, worker: WorkerRecord, limit: int | None) -> bool:
        """Twice in a row, since a fork just before exec shows a process twice for one reading; or plainly over."""
        if limit is None or worker.rss_bytes <= limit:
            worker.is_over_hard_limit = False
        elif worker.is_over_hard_limit or worker.rss_bytes > limit * 5 // 4:
            return True
        else:
            worker.is_over_hard_limit = True
        return False

    def _judge_running(self, now: float, worker: WorkerRecord, task: TaskRecord) -> None:
        task.peak_rss_bytes = max(task.peak_rss_bytes, worker.rss_bytes)
        if recycling.is_over_soft_limit(worker, worker.rss_bytes):
            worker.wants_check = True
        limit = self._hard_limit(task)
        if limit is None or worker.state is not _BUSY or not self._is_over(worker, limit):
            return
        if task.spec.spares_task and worker.processes > 1 and task.tools_stopped < MAX_TOOLS_STOPPED:
            worker.is_over_hard_limit = False
            task.tools_stopped += 1
            self.counters.tools_stopped += 1
            self._actions.append(StopTool(worker))
        else:
            self._stop_for_memory(now, worker, task, limit)

    def _stop_for_memory(
        self, now: float, worker: WorkerRecord, task: TaskRecord, limit_bytes: int, why: str = ""
    ) -> None:
        if task.stop is not None:  # asked to stop for another reason; memory cannot wait for it
            self._kill(now, worker, str(task.stop.error))
            return
        self.counters.memory_killed += 1
        error = failures.memory_limit(task, worker, limit_bytes, why)
        self._stop_task(now, task, StopCause(error, now), ask=False)

    def _govern_pool(self, now: float) -> None:
        """All workers together are above the critical limit: idle ones go, and if need be the biggest offender."""
        critical, since = self.settings.critical_bytes, self.governor.critical_since
        if critical is None or since is None:
            return
        for worker in list(self.idle.values()):
            self._retire(now, worker, "pool over critical_memory_mb")
        if not self.governor.may_stop_one:
            return
        if self.pool_bytes - governance.leaving_bytes(self.workers.values()) <= critical:
            return
        victim = governance.biggest_offender(self.workers.values())
        if victim is None or victim.running is None:
            return
        if victim.sampled_at is None or victim.sampled_at <= since:
            # Readings flap: it is read once more before it is stopped for this.
            self._arm_sampling(victim, now + recycling.SAMPLE_FASTEST)
            return
        self._stop_for_memory(now, victim, victim.running, critical, self.governor.critical_reason)

    # -- recycling -----------------------------------------------------------------------------------------------

    def _begin_check(self, now: float, worker: WorkerRecord, *, is_read: bool) -> None:
        """Look whether the worker is over its soft limit: a reading, a garbage collection, another reading."""
        worker.wants_check = False
        self._move_worker(worker, _CHECKING)
        self._set_state_timer(worker, now + CHECK_GRACE, "did not answer while idle")
        worker.check_stage = 1 if is_read else 0
        self._actions.append(Collect(worker) if is_read else SampleWorker(worker))

    def _judge_check(self, now: float, worker: WorkerRecord) -> None:
        if worker.check_stage == 1:
            return  # asked for earlier: the garbage is still there
        recycling.note_warm(self.settings, worker)
        if not recycling.is_over_soft_limit(worker, worker.rss_bytes):
            self.timers.cancel(worker.state_timer)
            worker.state_timer = None
            self._over_in_a_row = 0
            self._now_idle(now, worker)
        elif worker.check_stage == 0:
            worker.check_stage = 1
            self._actions.append(Collect(worker))
        else:
            self._note_over(worker)
            self._retire(now, worker, "memory")
        self._is_dirty = True

    def worker_collected(self, now: float, worker: WorkerRecord) -> None:
        """The worker collected its garbage; it is measured once more."""
        if worker.state is _CHECKING and worker.check_stage == 1:
            worker.check_stage = 2
            self._actions.append(SampleWorker(worker))

    def _note_over(self, worker: WorkerRecord) -> None:
        self._over_in_a_row = self._over_in_a_row + 1 if worker.tasks_done <= 1 else 0
        if self._over_in_a_row >= ALWAYS_OVER:
            self._warn_once("always over", recycling.always_over_warning(worker))

    # -- the machine ---------------------------------------------------------------------------------------------

    def host_sampled(self, now: float, host: HostState, cpu_count: int = 1) -> None:
        """A reading of the machine."""
        self._is_host_asked = False
        cpu_seconds = sum(worker.cpu_seconds for worker in self.workers.values())
        own = 0.0
        if self._pool_cpu is not None and now > self._pool_cpu[0]:
            then, before = self._pool_cpu
            own = max(0.0, cpu_seconds - before) / (now - then) / cpu_count * 100
        self._pool_cpu = (now, cpu_seconds)
        self.governor.host_sampled(now, host, own)
        self._note_breaker(now)
        self._govern_pool(now)
        self._watch_host(now)
        self._is_dirty = True

    def _ask_host(self) -> None:
        if not self._is_host_asked:
            self._is_host_asked = True
            self._actions.append(SampleHost())

    def _watch_host(self, now: float) -> None:
        is_of_use = self.workers or self.breaker.holds or self.governor.reasons or self.is_memory_awaited
        if self.is_closed or not is_of_use:
            return
        self._is_host_quiet = not (self.unresolved or self.breaker.holds)
        interval = self.settings.cleanup_interval
        when = now + (interval if self._is_host_quiet else min(interval, HOST_INTERVAL_BUSY))
        timer = self._host_timer
        if timer is not None and timer.handler is not None:
            if timer.when <= when:
                return
            self.timers.cancel(timer)
        self._host_timer = self.timers.add(when, self._host_due)

    def _host_due(self, now: float) -> None:
        self._ask_host()
