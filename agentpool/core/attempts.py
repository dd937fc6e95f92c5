"""How the attempts of a task end: resolved, stopped, lost, given back, tried again.

The third of the seven rooms of one state machine, see `crew`. Pure; one thread at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import Final

from agentpool.config import QUARANTINE_AFTER, PoolSettings
from agentpool.core import failures
from agentpool.core.actions import RESOLVE, AskToStop, DumpStack, Revoke
from agentpool.core.crew import LIVE_STATES, POOL_STOPPED
from agentpool.core.lines import LinedQueue
from agentpool.core.placement import fresh_worker
from agentpool.core.records import AttemptRecord, SessionRecord, StopCause, TaskRecord, WorkerExit, WorkerRecord
from agentpool.core.retry import RetryPolicy, backoff_seconds
from agentpool.core.transitions import TASK_TRANSITIONS, BreakerState, TaskState, WorkerState, allowed_masks
from agentpool.core.upkeep import Upkeep
from agentpool.errors import MemoryLimitError, TaskTimeoutError

__all__ = ["Attempts"]

_ALLOWED = allowed_masks(TASK_TRANSITIONS)
_QUEUED, _ASSIGNED, _RUNNING, _STOPPING, _WAITING_RETRY, _RESOLVED = TaskState
_KILLED = WorkerState.KILLED

#: A worker that does not acknowledge within this many seconds that it was asked to stop its task cannot do so.
ACKNOWLEDGE_WITHIN: Final = 0.25
#: Seconds between the order to write down the stack, and the kill.
DUMP_SECONDS: Final = 0.05


class Attempts(Upkeep):
    """See the module."""

    def __init__(self, settings: PoolSettings, *, seed: int) -> None:
        super().__init__(settings, seed=seed)
        #: QUEUED tasks that did not kill a worker
        self.queue = LinedQueue()
        #: QUEUED tasks that killed a worker before and want a fresh one for themselves
        self.isolated: deque[TaskRecord] = deque()
        #: all and only the WAITING_RETRY tasks
        self.waiting: dict[int, TaskRecord] = {}
        #: the task that runs while nothing else may
        self.alone: TaskRecord | None = None

    @abstractmethod
    def _left_session(self, task: TaskRecord, session: SessionRecord) -> None:
        """A task of this session is resolved."""

    @abstractmethod
    def _why_it_waits(self, task: TaskRecord) -> str:
        """What a queued task waits for besides a free worker, in words; "": nothing."""

    def _hard_limit(self, task: TaskRecord) -> int | None:
        own = task.hard_limit_bytes
        return self.hard_limit_bytes if own is None else own

    def _move_task(self, task: TaskRecord, state: TaskState) -> None:
        if not _ALLOWED[task.state] >> state & 1:
            raise self._defect(f"{task!r} cannot become {state.name}")
        task.state = state

    def _drop_timer(self, task: TaskRecord) -> None:
        if task.timer is not None:
            self.timers.cancel(task.timer)
            task.timer = None

    # -- final ---------------------------------------------------------------------------------------------------

    def _resolve(self, task: TaskRecord, is_value: bool, payload: object) -> None:
        self._settle(task)
        if is_value:
            self.counters.completed += 1
        else:
            self.counters.failed += 1
        self._actions.append((RESOLVE, task, is_value, payload))

    def _settle(self, task: TaskRecord) -> None:
        self._move_task(task, _RESOLVED)
        if task.timer is not None or self.alone is task:
            self._attempt_over(task)
        task.worker = None
        task.stop = None
        self.unresolved -= 1
        if task.spec.session is not None:
            self._left_session(task, task.spec.session)
        if not self.unresolved and self.is_closing:
            self._is_dirty = True

    def _attempt_over(self, task: TaskRecord) -> None:
        """It has left its worker, or was never in one."""
        self._drop_timer(task)
        if self.alone is task:
            self.alone = None
            self._is_dirty = True

    def _take_waiting(self) -> list[TaskRecord]:
        """All tasks that no worker has, out of their places; they are about to be settled."""
        tasks = [*self.queue.clear(), *self.isolated, *self.waiting.values()]
        self.isolated.clear()
        self.waiting.clear()
        return tasks

    def _fail_everything(self, now: float, error: BaseException) -> None:
        for task in self._take_waiting():
            self._resolve(task, False, failures.fresh(error))
        self._stop_workers(now, error)

    def _stop_workers(self, now: float, error: BaseException) -> None:
        """Kill all workers. Running tasks get `error`, and whatever comes back from a worker after this as well."""
        self.doom = error
        self._is_dirty = True
        for worker in list(self.workers.values()):
            task = worker.running
            if task is not None and task.state is _RUNNING:
                cause = StopCause(failures.fresh(error), now, is_final=True)
                self._stop_task(now, task, cause, ask=False)
            elif worker.state is not _KILLED:
                self._kill(now, worker, POOL_STOPPED)

    # -- final, or again? ----------------------------------------------------------------------------------------

    def _attempt_ended(self, now: float, task: TaskRecord, is_value: bool, payload: object) -> None:
        """An attempt that began has ended: final, or again?"""
        error = payload if not is_value and isinstance(payload, BaseException) else None
        if error is not None:
            task.last_error = error
        policy = task.spec.policy
        wait = None
        session = task.spec.session
        is_over = session is not None and session.error is not None  # what it would find is gone
        if policy is not None and task.kills < QUARANTINE_AFTER and self.doom is None and not is_over:
            assert task.first_started_at is not None
            try:
                wait = policy.decide(
                    attempt=task.attempts,
                    error=error,
                    value=payload,
                    started_at=task.first_started_at,
                    now=now,
                    idle_seconds=task.idle_seconds,
                )
            except BaseException as failure:  # a user's strategy; what it raises is the outcome, as in tenacity
                failure.add_note(f"raised by the retry policy of {task!r}; the task is not run again")
                if error is not None and failure is not error and failure.__context__ is None:
                    failure.__context__ = error
                is_value, payload = False, failure
        if wait is None:
            self._resolve(task, is_value, payload)
            return
        if isinstance(error, MemoryLimitError) and policy is not None:
            self._escalate(task, policy, error)
        self.counters.retried += 1
        if task.past is None:
            task.past = []
        task.past.append(AttemptRecord(task, now, error))
        task.peak_rss_bytes = 0
        task.idle_seconds += wait
        self._wait_for_retry(now, task, wait)

    def _escalate(self, task: TaskRecord, policy: RetryPolicy, error: MemoryLimitError) -> None:
        """What its policy says of the next attempt of a task that passed a memory limit."""
        own = self._hard_limit(task)
        if own is None or error.is_pool_wide:
            _, task.is_alone = policy.after_memory_limit(None)
        else:
            task.hard_limit_bytes, task.is_alone = policy.after_memory_limit(own)
        task.is_isolated = task.is_isolated or task.is_alone

    def _wait_for_retry(self, now: float, task: TaskRecord, seconds: float) -> None:
        self._move_task(task, _WAITING_RETRY)
        self._attempt_over(task)
        task.worker = None
        task.stop = None
        self.waiting[task.id] = task
        task.timer = self.timers.add(now + seconds, lambda at: self._retry_due(at, task))

    def _retry_due(self, now: float, task: TaskRecord) -> None:
        del self.waiting[task.id]
        if task.attempts:
            task.queued_at = now  # where it never began, it has been waiting since its submission
        self._queue_again(task)

    def _queue_again(self, task: TaskRecord) -> None:
        """It had its turn before: it goes to the front of its priority."""
        self._move_task(task, _QUEUED)
        self._attempt_over(task)
        task.worker = None
        task.is_returned = True
        self._limit_waiting(task)
        if task.is_isolated:
            self.isolated.append(task)
        else:
            self.queue.push_front(task)
        self._is_dirty = True

    def _requeue_unbegun(self, tasks: list[TaskRecord]) -> None:
        """Tasks that were sent to a worker and never began go back to where they were, first of them first."""
        for task in reversed(tasks):
            self.counters.given_back += 1
            if self.doom is None:
                self._queue_again(task)
            else:
                self._move_task(task, _QUEUED)
                self._resolve(task, False, failures.fresh(self.doom))

    def _uncharge(self, task: TaskRecord) -> None:
        task.attempts -= 1
        if not task.attempts:
            task.first_started_at = None

    def _head_unbegun(self, task: TaskRecord) -> None:
        """The task at a worker's head turned out never to have begun."""
        self._uncharge(task)
        if task.stop is not None:
            self._resolve(task, False, task.stop.error)
        else:
            self._requeue_unbegun([task])

    def _backlog_lost(self, now: float, tasks: list[TaskRecord], worker: WorkerRecord, exit_: WorkerExit) -> None:
        """Those that never began run again. What did, while its worker was not believed any more, is lost."""
        self._requeue_unbegun([task for task in tasks if task.id not in exit_.begun])
        for task in tasks:
            if task.id not in exit_.begun:
                continue
            self._move_task(task, _RUNNING)
            task.attempts += 1
            task.started_at = now
            task.first_started_at = now if task.first_started_at is None else task.first_started_at
            if self.doom is not None:
                self._resolve(task, False, failures.fresh(self.doom))
            else:
                self.counters.crashed += 1
                self._attempt_ended(now, task, False, failures.crashed(task, worker, exit_))

    def _task_lost(self, now: float, task: TaskRecord, worker: WorkerRecord, exit_: WorkerExit) -> None:
        """The worker died with this task at its head. Whoever ordered that, or the keeper, is to blame before it."""
        is_blameless = exit_.keeper_lost or bool(worker.reason)
        if task.spec.session is not None and task.stop is None and self.doom is None:
            self._session_task_lost(task, task.spec.session, worker, exit_)
        elif not exit_.began:
            if task.stop is not None or worker.reason:
                self._head_unbegun(task)
                return
            # Never charged; again after a back-off, as whatever killed the worker may go on doing so.
            self._uncharge(task)
            task.dispatch_failures += 1
            self._wait_for_retry(now, task, self._dispatch_backoff(now, task))
            if not is_blameless:
                self._start_failed(now, worker, f"a worker {failures.exit_words(exit_)} before its task began")
        elif task.stop is not None:
            _attach_stack(task.stop, exit_.story)
            self._end_stopped(now, task, task.stop)
        elif self.doom is not None:
            self._resolve(task, False, failures.fresh(self.doom))
        else:
            tell = failures.crashed
            self.counters.crashed += not worker.is_ordered
            if not is_blameless:
                task.kills += 1
                task.is_isolated = True
                if task.kills >= QUARANTINE_AFTER:
                    tell = failures.quarantined
            self._attempt_ended(now, task, False, tell(task, worker, exit_))

    def _session_task_lost(
        self, task: TaskRecord, session: SessionRecord, worker: WorkerRecord, exit_: WorkerExit
    ) -> None:
        """Whether or not it began: the state that it counts on is gone."""
        assert session.error is not None
        error = failures.fresh(session.error)
        if exit_.began:
            self.counters.crashed += not worker.is_ordered
            error.__cause__ = failures.crashed(task, worker, exit_)
        else:
            self._uncharge(task)
        self._resolve(task, False, error)

    def _dispatch_backoff(self, now: float, task: TaskRecord) -> float:
        seconds = backoff_seconds(task.dispatch_failures, self.rng)
        limit = task.spec.queue_timeout
        if limit is None or task.attempts:
            return seconds
        return min(seconds, max(0.0, task.queued_at + limit - now))

    # -- stopping ------------------------------------------------------------------------------------------------

    def _task_timeout(self, now: float, task: TaskRecord, seconds: float) -> None:
        self.counters.timed_out += 1
        cause = StopCause(failures.task_timeout(task, seconds), now, is_timeout=True)
        self._stop_task(now, task, cause, ask=True)

    def _stop_task(self, now: float, task: TaskRecord, cause: StopCause, *, ask: bool) -> None:
        worker = task.worker
        assert worker is not None
        self._move_task(task, _STOPPING)
        self._drop_timer(task)
        task.stop = cause
        worker.retire_reason = "task stopped"
        self._note(now, f"{task!r}: {type(cause.error).__name__}")
        if worker.backlog:
            self._actions.append(Revoke(worker))
        if ask:
            self._actions.append(AskToStop(worker, task, cause.is_timeout))
            patience = min(ACKNOWLEDGE_WITHIN, self.settings.kill_grace)
            self._set_stop_timer(task, now + patience, is_dumped=False)
        else:
            self._kill(now, worker, str(cause.error))

    def _set_stop_timer(self, task: TaskRecord, when: float, *, is_dumped: bool) -> None:
        self._drop_timer(task)
        task.timer = self.timers.add(when, lambda at: self._stop_overdue(at, task, is_dumped))

    def stop_acknowledged(self, now: float, worker: WorkerRecord, task: TaskRecord, stack: str = "") -> None:
        """The worker told its task to stop; `stack` is what its threads were doing."""
        if task.worker is not worker or task.stop is None:
            return
        _attach_stack(task.stop, stack)
        if worker.state is not _KILLED:
            self._set_stop_timer(task, task.stop.asked_at + self.settings.kill_grace, is_dumped=True)

    def _stop_overdue(self, now: float, task: TaskRecord, is_dumped: bool) -> None:
        worker, cause = task.worker, task.stop
        assert worker is not None
        assert cause is not None
        if cause.is_timeout and not is_dumped:
            # It does not react: the interpreter is held by C code, or stopped. A signal handler can still tell where.
            self._actions.append(DumpStack(worker))
            self._set_stop_timer(task, now + DUMP_SECONDS, is_dumped=True)
        else:
            task.timer = None
            self._kill(now, worker, str(cause.error))

    def _end_stopped(self, now: float, task: TaskRecord, cause: StopCause) -> None:
        if cause.is_final:
            self._resolve(task, False, cause.error)
        else:
            self._attempt_ended(now, task, False, cause.error)

    # -- waiting -------------------------------------------------------------------------------------------------

    def _limit_waiting(self, task: TaskRecord) -> None:
        limit = task.spec.queue_timeout
        if limit is not None:
            task.timer = self.timers.add(task.queued_at + limit, lambda at: self._queue_timeout(at, task))

    def _queue_timeout(self, now: float, task: TaskRecord) -> None:
        breaker = self.breaker.state
        error = (
            failures.queue_timeout(task, self._why_it_waits(task))
            if self.live or breaker is BreakerState.CLOSED
            else self._circuit_open(now, task)
        )
        self._resolve(task, False, error)
        self._left_queue(task)

    def _circuit_open(self, now: float, task: TaskRecord) -> BaseException:
        breaker = self.breaker
        return failures.circuit_open(
            task, now - task.queued_at, breaker.reason, is_forced=breaker.state is BreakerState.FORCED_OPEN,
            seconds_left=None if breaker.by_hand_until is None else breaker.by_hand_until - now,
        )

    def _left_queue(self, task: TaskRecord) -> None:
        """The task has just left state QUEUED other than by being sent to a worker."""
        if task.is_isolated:
            self.isolated.remove(task)
        else:
            self.queue.discard(task)
        self._is_dirty = True

    def _consider_failing(self, now: float) -> None:
        """While shutting down nobody waits for a breaker that was opened by hand, or for starts that fail.

        For memory it does wait: that comes back when others end.
        """
        breaker = self.breaker
        is_hopeless = breaker.state is BreakerState.FORCED_OPEN or (
            breaker.state is BreakerState.OPEN and not breaker.holds
        )
        if not is_hopeless or self.active or self.starting:
            return
        if not self.live:
            for task in self.queue.clear():
                self._resolve(task, False, failures.shut_down_while_open(task, breaker.reason))
        if fresh_worker(worker for worker in self.workers.values() if worker.state in LIVE_STATES) is None:
            # Used workers serve the queue, but not those who want a fresh one for themselves.
            for task in self.isolated:
                self._resolve(task, False, failures.shut_down_while_open(task, breaker.reason))
            self.isolated.clear()


def _attach_stack(cause: StopCause, stack: str) -> None:
    error = cause.error
    if stack.strip() and isinstance(error, TaskTimeoutError) and not error.stack:
        error.stack = stack.strip()
        error.add_note(f"What the worker was doing:\n{error.stack}")
