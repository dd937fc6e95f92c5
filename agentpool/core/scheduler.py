"""The scheduler: a deterministic state machine that decides everything about tasks and workers of one pool.

One method per event; each takes `now`, in seconds of any monotonic clock. `take_actions(now)` returns what to do,
in order; `next_deadline()` says when to call `tick`. It performs nothing, knows no thread and takes no lock: the
caller lets one thread in at a time. Handlers of one event may append actions, never call back into the scheduler.

This is the uppermost of its seven rooms (see `crew`): the events of tasks and of the pool, and placing. The events of
workers and of the machine are in `crew` and `upkeep`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from agentpool.config import PoolSettings
from agentpool.core import failures, recycling
from agentpool.core.actions import DISPATCH, Action, Revoke, RoomFreed
from agentpool.core.placement import (
    GIVE_BACK_AFTER,
    Durations,
    KeyAffinity,
    choose_worker,
    fresh_worker,
    may_wait_behind,
)
from agentpool.core.records import StopCause, TaskRecord, WorkerRecord
from agentpool.core.sessions import Sessions
from agentpool.core.transitions import BreakerState, TaskState, WorkerState
from agentpool.errors import PoolClosedError, QueueFullError

if TYPE_CHECKING:
    from agentpool.core.budget import Share

__all__ = ["Scheduler"]

_QUEUED, _ASSIGNED, _RUNNING, _STOPPING, _WAITING_RETRY, _RESOLVED = TaskState
_BUSY = WorkerState.BUSY

#: After a task that took longer than this the worker's tree is measured, whatever the worker says of itself.
MEASURE_AFTER: Final = 0.05
#: A worker whose last tasks will take no longer than this, in seconds, has its successor started meanwhile. To wait the
#: 5 ms of a start after longer ones is nothing, and to have one more process all that time would be something.
SUCCESSOR_LEAD: Final = 1.0


class Scheduler(Sessions):
    """See the module. Public attributes are for reading only."""

    def __init__(self, settings: PoolSettings, *, seed: int = 0) -> None:
        super().__init__(settings, seed=seed)
        #: of the host's budget: see `host_scheduler`
        self.share: Share | None = None
        #: workers that have just ended a call; looked at, and forgotten, with the next `take_actions`
        self._hungry: list[WorkerRecord] = []
        self._durations = Durations()
        self._affinity = KeyAffinity()
        self._has_preferences = False
        #: a `submit` was refused for want of room
        self._is_room_wanted = False

    @property
    def queue_length(self) -> int:
        """Tasks that wait for a worker."""
        return len(self.queue) + len(self.isolated)

    # -- events: tasks -------------------------------------------------------------------------------------------

    def submit(self, now: float, task: TaskRecord, *, is_one_of_many: bool = False) -> None:
        """Accept a task. Raises PoolClosedError, QueueFullError, or what broke the pool; then it was not accepted.

        `is_one_of_many`: others come with it, which may have to go first; it is placed with `take_actions`.
        """
        if self.broken is not None:
            raise failures.fresh(self.broken)
        if self.is_closing:
            raise PoolClosedError("cannot schedule new futures after shutdown")
        if self.is_draining:
            raise PoolClosedError("the pool is draining: it finishes what it accepted, and takes nothing new until "
                                  "pool.resume()")
        limit = self.settings.max_pending
        if limit is not None and self.queue.length >= limit:
            self._is_room_wanted = True
            raise QueueFullError(
                f"{limit} tasks are queued already (max_pending); wait for results, raise max_pending, or submit with "
                "options(block=True) from a thread that may wait"
            )
        if task.spec.session is not None:
            self._join_session(now, task.spec.session)
        self.counters.submitted += 1
        self.unresolved += 1
        task.queued_at = now
        if self.active < self.concurrency:
            if (self.idle and not self.queue.length and not self.isolated and self.alone is None and not is_one_of_many
                    and task.spec.line is None):
                self._run(now, self._choose(task), task)
                return
            self._is_dirty = True
        self._limit_waiting(task)
        self.queue.push(task)

    def cancel(self, now: float, task: TaskRecord) -> bool:
        """Withdraw a task that has not begun. True: it is resolved, and its future is the caller's to settle.

        A task that was sent ahead to a worker must be taken back first (`task_given_back`).
        """
        state = task.state
        if state is not _QUEUED and state is not _WAITING_RETRY:
            return False
        self.counters.cancelled += 1
        self._settle(task)
        if state is _QUEUED:
            self._left_queue(task)
        else:
            del self.waiting[task.id]
        return True

    def kill_task(self, now: float, task: TaskRecord, error: BaseException) -> bool:
        """Stop a running task for good: asked first, killed after a grace. True: it will be resolved with `error`."""
        if task.stop is not None:
            # It is being stopped already, for a cause after which it might have been tried again.
            task.stop.error = error
            task.stop.is_final = True
        elif task.state is _RUNNING:
            self._stop_task(now, task, StopCause(error, now, is_final=True), ask=True)
        else:
            return False
        return True

    def task_given_back(self, now: float, task: TaskRecord) -> None:
        """A task that was sent to a worker has been taken back: it had not begun, and will not in that worker.

        What the worker says of that dispatch later on is the caller's to drop, as the task may be sent there again.
        """
        if task.worker is not None:
            self._not_begun(now, task.worker, task)

    def task_skipped(self, now: float, worker: WorkerRecord, task: TaskRecord) -> None:
        """The worker passed over a task because it saw it revoked; it has not begun."""
        if task.worker is worker:
            self._not_begun(now, worker, task)

    def _not_begun(self, now: float, worker: WorkerRecord, task: TaskRecord) -> None:
        if worker.running is task:
            self._head_unbegun(task)
            self._worker_free(now, worker)
        else:
            worker.backlog.remove(task)
            self._requeue_unbegun([task])

    def task_finished(
        self,
        now: float,
        worker: WorkerRecord,
        task: TaskRecord,
        is_value: bool,
        payload: object,
        seconds: float,
        rss_bytes: int,
        peak_bytes: int = 0,
    ) -> None:
        """The worker sent a value or an error. `payload` is the exception for an error, opaque for a value.

        `seconds` is how long it ran; `rss_bytes` and `peak_bytes` are what the worker measured of itself, 0 where it
        did not.
        """
        if worker.running is not task:
            return  # written off, or seen twice: once in the pipe, once in the dead worker's outbox
        worker.tasks_done += 1
        peak = max(rss_bytes, peak_bytes)
        if peak > task.peak_rss_bytes:
            task.peak_rss_bytes = peak
        spec = task.spec
        if task.call_key is not None:
            self._durations.measured(task.call_key, seconds)
        if task.stop is not None:
            self._end_stopped(now, task, task.stop)
        elif is_value and (spec.policy is None or not spec.policy.sees_results):
            self._resolve(task, True, payload)
        else:
            self._attempt_ended(now, task, is_value, payload)
        if spec.soft_limit_bytes != worker.soft_limit_bytes or spec.growth_limit_bytes != worker.growth_limit_bytes:
            worker.soft_limit_bytes = spec.soft_limit_bytes
            worker.growth_limit_bytes = spec.growth_limit_bytes
            recycling.set_soft_limit(self.settings, worker)
            worker.wants_check |= not rss_bytes  # the last reading was judged by another limit
            if spec.growth_limit_bytes is not None and worker.warm_bytes is None:
                worker.wants_check = True  # for its first reading
        if seconds > MEASURE_AFTER or (rss_bytes and recycling.is_over_soft_limit(worker, rss_bytes)):
            worker.wants_check = True
        self._worker_free(now, worker)

    # -- events: the pool ----------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Time has passed."""
        self.breaker.tick(now)
        self._note_breaker(now)
        self.timers.fire_due(now)

    def next_deadline(self) -> float | None:
        """When `tick` has something to do; None: not by time."""
        if self.is_closed:
            return None
        timer, breaker = self.timers.next_deadline(), self.breaker.deadline()
        if timer is None or breaker is None:
            return breaker if timer is None else timer
        return min(timer, breaker)

    def take_actions(self, now: float) -> list[Action]:
        """What to do now, in order."""
        if self._is_dirty or self._hungry:
            self._place(now)
        actions = self._actions
        if actions:
            self._actions = []
        return actions

    def start(self, now: float) -> None:
        """Start the floor (`min_workers`) without waiting for work."""
        self._is_dirty = True

    def force_open(self, now: float, reason: str, seconds: float | None = None) -> None:
        """Forbid all starts until `reset_breaker`, or for so many seconds."""
        self.breaker.force_open(reason, None if seconds is None else now + seconds)
        self._note_breaker(now)

    def hold_closed(self, now: float, seconds: float) -> None:
        """Allow starts for so many seconds, whatever the breaker would say."""
        self.breaker.hold_closed(now + seconds)
        self._breaker_was_closed(now)

    def reset_breaker(self, now: float) -> None:
        """Close the breaker by hand."""
        self.breaker.reset()
        self._breaker_was_closed(now)

    def _breaker_was_closed(self, now: float) -> None:
        self._spawn_not_before = now
        self._note_breaker(now)
        self._is_dirty = True

    def shutdown(self, now: float, *, cancel_futures: bool) -> list[TaskRecord]:
        """Accept nothing more; close when all is done. Returns the tasks that were cancelled, to be settled.

        With `cancel_futures`, what was sent ahead to workers must be taken back first (`task_given_back`). Tasks
        for which there is a free slot, and only the worker is not ready yet, count as running, as in the standard
        library, and are kept.
        """
        self.is_closing = True
        self._end_pause(now)  # what was accepted is finished
        self._end_sessions(now)
        self._is_dirty = True
        self._note(now, "shutdown")
        if not cancel_futures:
            return []
        free = self.concurrency - self.active if self.breaker.state is BreakerState.CLOSED else 0
        kept = [self.queue.pop() for _ in range(min(free, self.queue.plain_length))]
        cancelled = self._cancel_waiting()
        for task in kept:
            self.queue.push(task)
        return cancelled

    def stop_all(self, now: float, error: BaseException) -> list[TaskRecord]:
        """Accept nothing more, kill every worker; what runs or was sent ahead gets `error`.

        Returns the tasks that were cancelled, to be settled. Nothing is tried again.
        """
        self.is_closing = True
        self._end_pause(now)
        self._note(now, f"stopped: {error}")
        cancelled = self._cancel_waiting()
        self._stop_workers(now, error)
        return cancelled

    def _cancel_waiting(self) -> list[TaskRecord]:
        tasks = self._take_waiting()
        for task in tasks:
            self.counters.cancelled += 1
            self._settle(task)
        return tasks

    # -- placing -------------------------------------------------------------------------------------------------

    def _place(self, now: float) -> None:
        self._is_dirty = False
        while self._ending:
            self._end_session(now, self._ending.pop())
            self._is_dirty = False
        queue = self.queue
        if self.isolated:
            self._place_isolated(now)
        while (queue.length and (self.idle or queue.line_length) and self.active < self.concurrency
               and not self._is_reserved()):
            if queue.line_length:
                found = self._next_in_line(now)
                if found is None:
                    break
                self._run(now, *found)
            else:
                task = queue.pop()
                self._run(now, self._choose(task), task)
        if self.is_memory_awaited and not queue.line_length:
            self.is_memory_awaited = False
        if self._hungry:
            self._feed()
        self._consider_spawning(now)
        if self.is_closing:
            self._consider_failing(now)
            self._consider_closing(now)
        if self._is_room_wanted:
            self._consider_room()

    def want_room(self) -> None:
        """Somebody goes on waiting for room in the bounded queue: `RoomFreed` is to come once more."""
        self._is_room_wanted = True

    def _consider_room(self) -> None:
        limit = self.settings.max_pending
        if limit is None or len(self.queue) < limit or self.is_closing or self.is_draining:
            self._is_room_wanted = False
            self._actions.append(RoomFreed())

    def _choose(self, task: TaskRecord) -> WorkerRecord:
        if not self._has_preferences and task.spec.key is None and task.spec.kind is None:
            return next(reversed(self.idle.values()))
        self._has_preferences = True
        return choose_worker(task, self.idle.values(), self._affinity)

    def _place_isolated(self, now: float) -> None:
        while self.isolated and self.active < self.concurrency and self.alone is None:
            task = self.isolated[0]
            if task.is_alone and self.active:
                return  # nothing new is started until those have ended
            worker = fresh_worker(self.idle.values())
            if worker is None:
                self._make_room_for_fresh(now)
                return
            if task.spec.line is not None and not task.is_alone and not self._admits(now, task, worker):
                return  # one that runs alone shares with nobody
            self.isolated.popleft()
            if task.is_alone:
                self.alone = task
            self._run(now, worker, task)

    def _is_reserved(self) -> bool:
        """A task that runs alone is running, or is the next to run.

        While no worker may start that is fresh enough for it, the others are not kept waiting for nothing.
        """
        if self.alone is not None:
            return True
        if not self.isolated or not self.isolated[0].is_alone:
            return False
        return self._admits_start() or self.starting > 0 or fresh_worker(self.idle.values()) is not None

    def _make_room_for_fresh(self, now: float) -> None:
        """All places are taken by used workers: one of them goes, if a fresh one can come."""
        if self.idle and self.live >= self.settings.max_workers and not self.starting and self._may_start(now):
            self._retire(now, next(iter(self.idle.values())), "room for a fresh worker")

    def _run(self, now: float, worker: WorkerRecord, task: TaskRecord) -> None:
        self._move_worker(worker, _BUSY)
        self.active += 1
        self._begin(now, worker, task)
        self._actions.append((DISPATCH, worker, task))
        if self._is_host_quiet:
            self._watch_host(now)

    def _begin(self, now: float, worker: WorkerRecord, task: TaskRecord) -> None:
        """The task is the one that its worker runs, from now on."""
        task.state = _RUNNING  # from QUEUED or ASSIGNED, both in the table
        task.worker = worker
        worker.running = task
        worker.is_over_hard_limit = False
        task.tools_stopped = 0
        task.attempts += 1
        task.started_at = now
        if task.first_started_at is None:
            task.first_started_at = now
        if task.timer is not None:
            self._drop_timer(task)
        if worker.task_limit is not None:
            self._consider_leaving(worker, task)
        spec = task.spec
        timeout = spec.timeout
        if timeout is not None:
            task.timer = self.timers.add(now + timeout, lambda at: self._task_timeout(at, task, timeout))
        if spec.kind is not None:
            worker.warm_kinds.add(spec.kind)
        if spec.line is not None:
            self._take_ration(worker, task)
        if spec.key is not None:
            self._affinity.used(spec.key, worker)
        soon = recycling.SAMPLE_BUSY
        if task.hard_limit_bytes is not None or self.hard_limit_bytes is not None:
            soon = recycling.next_sample_interval(worker, self._hard_limit(task), self.settings.cleanup_interval)
        timer = worker.sample_timer
        if timer is None or timer.when > now + soon:
            self._arm_sampling(worker, now + soon)

    def _consider_leaving(self, worker: WorkerRecord, task: TaskRecord) -> None:
        """Whoever has its last tasks already has its successor started now, so that nobody waits for it."""
        if worker.is_leaving or worker.task_limit is None or worker.state is not _BUSY:
            return  # one that is being killed takes up no place, and ends results that were on their way
        left = worker.task_limit - worker.tasks_done
        seconds = self._durations.expected(task.call_key, left)
        if left <= 1 + len(worker.backlog) and seconds is not None and seconds <= SUCCESSOR_LEAD:
            worker.is_leaving = True
            self.leaving += 1

    def _feed(self) -> None:
        """Send short calls ahead to workers that just ended one, while the queue is deep."""
        hungry, self._hungry = self._hungry, []
        if self.isolated or self.alone is not None or not self.concurrency:
            return  # they wait for a worker to run dry, or for an end of everything else
        for worker in hungry:
            head = worker.running
            if head is not None and worker.state is _BUSY and worker.retire_reason is None and not worker.wants_check:
                self._send_ahead(worker, head)

    def _send_ahead(self, worker: WorkerRecord, head: TaskRecord) -> None:
        room = self._durations.backlog_for(head.call_key)
        if worker.task_limit is not None:
            room = min(room, worker.task_limit - worker.tasks_done - 1)
        share = min(self.queue.plain_length // self.concurrency, room - len(worker.backlog))
        while share > 0:
            task = self.queue.peek()
            if task is None or not may_wait_behind(task, head):
                break
            self.queue.pop()
            task.state = _ASSIGNED  # from QUEUED, in the table
            task.worker = worker
            if task.timer is not None:
                self._drop_timer(task)
            worker.backlog.append(task)
            self._actions.append((DISPATCH, worker, task))
            share -= 1
        if worker.backlog and worker.backlog_timer is None:
            self._watch_backlog(worker, head)
        if worker.task_limit is not None:
            self._consider_leaving(worker, head)

    def _watch_backlog(self, worker: WorkerRecord, head: TaskRecord) -> None:
        due = head.started_at + GIVE_BACK_AFTER
        worker.backlog_timer = self.timers.add(due, lambda at: self._backlog_due(at, worker))

    def _backlog_due(self, now: float, worker: WorkerRecord) -> None:
        worker.backlog_timer = None
        head = worker.running
        if head is None or not worker.backlog:
            return
        if now >= head.started_at + GIVE_BACK_AFTER:
            self._actions.append(Revoke(worker))
        else:
            self._watch_backlog(worker, head)

    def _demand(self) -> int:
        # Asked after placing: whoever could use an idle worker has it.
        if self.active >= self.concurrency and not self.leaving:
            return 0
        if self._is_reserved():
            return 0 if self.active else 1
        slots = self.concurrency - self.active + self.leaving
        isolated = min(len(self.isolated), slots)
        queue = self.queue
        waiting = queue.plain_length
        if queue.line_length:
            waiting += self._line_demand(slots)
        return isolated + max(0, min(waiting, slots - isolated) - len(self.idle))

    def _is_succeeded(self, worker: WorkerRecord) -> bool:
        """It could run another task, as one was taken back, but its successor has its place already."""
        return worker.is_leaving and self.live > self.settings.max_workers + self.leaving - 1

    def _worker_free(self, now: float, worker: WorkerRecord) -> None:
        """The task at its head has ended."""
        worker.running = None
        if worker.ration is not None:
            self._return_ration(worker)
        if worker.backlog:
            self._begin(now, worker, worker.backlog.popleft())
            if not self._hungry or self._hungry[-1] is not worker:
                self._hungry.append(worker)
            return
        self.active -= 1
        if self.overhang:
            self.overhang = max(0, self.active - self.concurrency)
        if self.queue.length or self.isolated:
            self._is_dirty = True
        if worker.state is not _BUSY:
            return  # killed meanwhile: its death will be observed
        if worker.retire_reason is not None and self._is_to_go(worker):
            self._retire(now, worker, worker.retire_reason)
        elif worker.task_limit is not None and (worker.tasks_done >= worker.task_limit or self._is_succeeded(worker)):
            self._retire(now, worker, "max_tasks_per_child")
        elif worker.wants_check:
            self._begin_check(now, worker, is_read=False)
        else:
            self._over_in_a_row = 0
            self._now_idle(now, worker)
            if self.queue.length:
                self._hungry.append(worker)
