"""All rules of `agentpool.core.invariants` in one pass, for simulations that look after every event.

`is_well` says whether they hold, four times as fast; which one does not, and why, `invariants.check` says, which is
asked whenever this says no. `tests/simulation` breaks each rule in turn and wants this to notice, and every so many
schedules are looked at by the rules themselves. A rule that is added there is to be added here: `COVERED` names them.
"""

from __future__ import annotations

from typing import Final

from agentpool.core.records import SessionRecord, TaskRecord, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.core.transitions import BreakerState, TaskState, WorkerState

__all__ = ["COVERED", "is_well"]

_QUEUED, _ASSIGNED, _RUNNING, _STOPPING, _WAITING_RETRY, _RESOLVED = TaskState
_STARTING, _IDLE, _BUSY, _CHECKING, _RETIRING, _KILLED, _GONE = WorkerState
_CLOSED, _OPEN, _HALF_OPEN, _FORCED = BreakerState
_NOT_LIVE: Final = (_RETIRING, _KILLED)
_STATE_COUNT: Final = len(WorkerState)

#: The rules that `is_well` looks at.
COVERED: Final = frozenset({
    "a_backlog_is_watched", "a_cause_is_set_exactly_while_stopping", "a_closed_pool_is_empty", "a_doomed_pool_ends",
    "a_pool_runs_no_more_than_it_has_slots", "a_session_has_one_worker", "a_task_is_in_one_place",
    "a_worker_runs_no_more_than_its_limit", "attempts_are_charged_when_begun", "groups_keep_their_limits",
    "idle_workers_are_in_order", "limits_have_timers", "no_worker_is_idle_while_a_task_could_run",
    "nothing_is_lost", "numbers_agree_with_workers", "one_probe_at_a_time", "places_agree_with_states",
    "queued_tasks_are_in_state_queued", "ready_workers_have_a_baseline", "running_is_set_exactly_while_busy",
    "sessions_count_their_tasks", "tasks_outside_workers_have_none", "the_bound_holds", "the_breaker_has_a_reason",
    "the_pool_keeps_its_size", "the_queue_counts_its_tasks", "the_throttle_holds",
    "waiting_tasks_are_in_state_waiting_retry", "what_a_worker_owes_is_bounded_in_time",
    "what_is_promised_is_accounted", "what_runs_alone_is_alone", "workers_hold_tasks_in_their_states",
})


def is_well(core: Scheduler) -> bool:
    """Do all rules hold?"""
    seen: set[int] = set()  # the ids of all tasks, each of which is in one place
    return _pool_is_well(core) and _crew_is_well(core, seen) and _waiting_are_well(core, seen)


def _pool_is_well(core: Scheduler) -> bool:
    settings, counters, breaker, alone = core.settings, core.counters, core.breaker, core.alone
    resolved = counters.completed + counters.failed + counters.cancelled
    if counters.submitted != core.unresolved + resolved:
        return False
    if len(core.workers) > 2 * settings.max_workers + core.left_over:
        return False
    if core.live - core.leaving > settings.max_workers and not all(
        worker.is_leaving or worker.retire_reason is not None or worker.state in _NOT_LIVE or worker.session is not None
        for worker in core.workers.values()
    ):
        return False
    concurrency, active = core.concurrency, core.active
    if concurrency > (0 if core.is_paused else settings.concurrency):
        return False
    if active > concurrency + core.overhang:
        return False
    share = core.share
    if share is not None and (
        active > len(share.held) or concurrency > len(share.held) or not share.unused <= share.held.keys()
        or any(not 0 <= slot < share.agents for slot in share.held)
    ):
        return False
    if alone is not None and (
        not alone.is_alone or active > 1 or (alone.state is not _RUNNING and alone.state is not _STOPPING)
    ):
        return False
    state = breaker.state
    if (state is _CLOSED) is not (breaker.reason == "") or breaker.changes:
        return False
    if breaker.holds and (state is _CLOSED or state is _HALF_OPEN):
        return False
    if core.broken is not None and core.doom is None:
        return False
    if core.doom is not None and (core.queue.length or core.isolated or core.waiting):
        return False
    if core.is_closed and (
        core.unresolved or core.workers or not core.is_closing or core.next_deadline() is not None
    ):
        return False
    return not (
        active < concurrency and not core._is_dirty and not core._hungry and core.queue.length
        and not core._is_reserved() and _could_run(core)
    )


def _could_run(core: Scheduler) -> bool:
    """Is there a queued task that needs no more than a free worker, or no more than a place in its group?"""
    return bool(core.queue.plain_length and core.idle) or any(core._could_begin(head) for head in core.queue.heads())


def _crew_is_well(core: Scheduler, seen: set[int]) -> bool:
    """The workers, each and together; adds the ids of their tasks."""
    tally = [0] * _STATE_COUNT
    active = probes = rss = leaving = reserved = places = 0
    has_rations, has_sessions = bool(core.groups), bool(core.sessions)
    for worker in core.workers.values():
        state, running, backlog = worker.state, worker.running, worker.backlog
        tally[state] += 1
        rss += worker.rss_bytes
        reserved += worker.reserved_bytes
        probes += worker.is_probe
        leaving += worker.is_leaving
        has_sessions |= worker.session is not None
        if running is None:
            if backlog or state is _BUSY or worker.ration is not None or worker.reserved_bytes:
                return False
        else:
            active += 1
            places += 1 + len(backlog)
            seen.add(running.id)
            if running.spec.line is not None:
                has_rations = True
                has_sessions |= running.spec.session is not None
                if worker.ration is not running.spec or worker.reserved_bytes < 0:
                    return False
            elif worker.ration is not None or worker.reserved_bytes:
                return False
            if not _running_is_well(worker, state, running):
                return False
            for task in backlog:
                seen.add(task.id)
                if task.state is not _ASSIGNED or task.worker is not worker or not _waits_well(task, None):
                    return False
        if not _worker_is_well(core, worker, state):
            return False
    idle = core.idle
    if len(idle) > 1:
        since = [worker.idle_since for worker in idle.values()]
        if since != sorted(since):
            return False
    return (
        tally[_STARTING] == core.starting and tally[_CHECKING] == len(core.checking)
        and tally[_IDLE] == len(idle) + len(core.kept) and not tally[_GONE]
        and tally[_STARTING] + tally[_CHECKING] + tally[_IDLE] + tally[_BUSY] == core.live
        and (core.doom is None or tally[_KILLED] + tally[_RETIRING] == len(core.workers))
        and active == core.active and rss == core.pool_bytes and reserved == core.reserved_bytes
        and leaving == core.leaving and probes <= 1 and bool(probes) is core.breaker.is_probing
        and places == len(seen)
        and (not has_rations or _rations_are_well(core)) and (not has_sessions or _sessions_are_well(core))
    )


def _worker_is_well(core: Scheduler, worker: WorkerRecord, state: WorkerState) -> bool:
    """It is where its state says, with the timers of that state."""
    timer, backlog_timer, limit = worker.state_timer, worker.backlog_timer, worker.task_limit
    if state is _CHECKING and worker.id not in core.checking:
        return False
    if state is _IDLE:
        place = core.idle if worker.session is None else core.kept
        if worker.id not in place or (core.settings.idle_timeout and (timer is None or timer.handler is None)):
            return False
    elif state is not _BUSY and (timer is None or timer.handler is None):
        return False
    if backlog_timer is not None and backlog_timer.handler is None:
        return False
    if limit is not None and worker.tasks_done + len(worker.backlog) + (worker.running is not None) > limit:
        return False
    if state is not _STARTING and state is not _KILLED:
        return worker.baseline_bytes is not None and not worker.is_probe
    return True


def _running_is_well(worker: WorkerRecord, state: WorkerState, task: TaskRecord) -> bool:
    """The task that a worker runs."""
    if state is not _BUSY and state is not _KILLED:
        return False
    if task.worker is not worker or task.attempts <= 0 or task.first_started_at is None:
        return False
    timer = task.timer
    is_timed = timer is not None and timer.handler is not None
    if task.state is _RUNNING:
        return task.stop is None and is_timed is (task.spec.timeout is not None)
    return task.state is _STOPPING and task.stop is not None and (is_timed or state is _KILLED)


def _sessions_are_well(core: Scheduler) -> bool:
    counts: dict[SessionRecord, int] = {}
    for task in (*core.queue, *core.isolated, *core.waiting.values()):
        session = task.spec.session
        if session is not None:
            if session.error is not None:
                return False
            counts[session] = counts.get(session, 0) + 1
    for worker in core.workers.values():
        session, running = worker.session, worker.running
        if running is not None and running.spec.session is not session:
            return False
        if session is None:
            continue
        if running is not None:
            counts[session] = counts.get(session, 0) + 1
            if session.current is not running:
                return False
        if worker.state in (_IDLE, _BUSY, _CHECKING) and session.worker is not worker:
            return False
    return all(
        session.unresolved == counts.get(session, 0) and core.sessions.get(session.id) is session
        and (session.unresolved or session.worker is not None)
        and (session.current is None or session.current.state is not _RESOLVED)
        for session in {*core.sessions.values(), *counts}
    )


def _rations_are_well(core: Scheduler) -> bool:
    counts: dict[str, int] = {}
    limits: dict[str, int] = {}
    for worker in core.workers.values():
        spec = worker.ration
        if spec is None:
            continue
        if worker.reserved_bytes > (spec.expected_bytes or 0):
            return False
        if spec.group is not None:
            counts[spec.group] = counts.get(spec.group, 0) + 1
            own = core.settings.max_workers if spec.group_limit is None else spec.group_limit
            limits[spec.group] = max(limits.get(spec.group, 0), own)
    alone = None if core.alone is None else core.alone.spec.group
    return counts == core.groups and all(
        count <= limits[group] or group == alone for group, count in counts.items()
    )


def _waiting_are_well(core: Scheduler, seen: set[int]) -> bool:
    """The queues and those who wait for a retry; `seen` has the ids of all others."""
    queue, most = core.queue, core.settings.max_pending
    lanes = [*queue._lanes.values()]
    for line in queue.lines.values():
        lanes += line._lanes.values()
    held, pending, found = len(seen), 0, 0
    for lane in lanes:
        for task in lane:
            if task.state is not _QUEUED:
                continue  # it was dropped
            found += 1
            seen.add(task.id)
            timer = task.timer
            # `_waits_well` written out: of all places this is where most tasks are.
            if (
                task.worker is not None or task.is_isolated or task.stop is not None
                or (timer is not None and timer.handler is not None) is (task.spec.queue_timeout is None)
            ):
                return False
            if task.is_returned:
                if task.attempts < 0 or (task.attempts == 0) is not (task.first_started_at is None):
                    return False
            else:
                pending += 1
                if task.attempts or task.first_started_at is not None:
                    return False
    if found != queue.length or (most is not None and pending > most):
        return False
    for task in core.isolated:
        seen.add(task.id)
        if not task.is_isolated or task.state is not _QUEUED or task.worker is not None:
            return False
        if not _waits_well(task, task.spec.queue_timeout):
            return False
    for task in core.waiting.values():
        seen.add(task.id)
        if task.state is not _WAITING_RETRY or task.worker is not None or not _waits_well(task, 0.0):
            return False
    return len(seen) == core.unresolved == held + found + len(core.isolated) + len(core.waiting)


def _waits_well(task: TaskRecord, limit: float | None) -> bool:
    """It does not run: no cause to stop, attempts only where one began, a timer exactly where there is a limit."""
    timer = task.timer
    return (
        task.stop is None
        and task.attempts >= 0
        and (task.attempts == 0) is (task.first_started_at is None)
        and (timer is not None and timer.handler is not None) is (limit is not None)
    )
