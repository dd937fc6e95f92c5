"""What is true of a scheduler between two events: the promises of the design, and the `#:` comments of its records.

`check` looks at everything and costs as much; tests call it after each event, nothing calls it on the hot path. One
function per rule; its name is the rule's name in the error, its docstring what is promised. Reads, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from agentpool.core.crew import LIVE_STATES
from agentpool.core.records import SessionRecord, TaskRecord, WorkerRecord
from agentpool.core.scheduler import Scheduler
from agentpool.core.timers import Timer
from agentpool.core.transitions import BreakerState, TaskState, WorkerState
from agentpool.errors import InternalError

__all__ = ["RULES", "check"]

#: A rule yields what breaks it, in words.
Rule: TypeAlias = Callable[[Scheduler], Iterator[str]]

_BOUNDED: Final = frozenset({WorkerState.STARTING, WorkerState.CHECKING, WorkerState.RETIRING, WorkerState.KILLED})


def _is_live(timer: Timer | None) -> bool:
    return timer is not None and timer.handler is not None


def _held(scheduler: Scheduler) -> Iterator[tuple[WorkerRecord, TaskRecord]]:
    for worker in scheduler.workers.values():
        if worker.running is not None:
            yield worker, worker.running
        for task in worker.backlog:
            yield worker, task


def _queued(scheduler: Scheduler) -> list[TaskRecord]:
    return [*scheduler.queue, *scheduler.isolated]


# -- tasks -----------------------------------------------------------------------------------------------------------


def nothing_is_lost(scheduler: Scheduler) -> Iterator[str]:
    """Accepted = resolved + queued + running + waiting to retry."""
    places = len(_queued(scheduler)) + len(scheduler.waiting) + sum(1 for _ in _held(scheduler))
    if scheduler.unresolved != places:
        yield f"{scheduler.unresolved} tasks are unresolved, {places} are somewhere"
    counters = scheduler.counters
    resolved = counters.completed + counters.failed + counters.cancelled
    if counters.submitted != scheduler.unresolved + resolved:
        yield f"{counters.submitted} submitted, {resolved} resolved, {scheduler.unresolved} unresolved"


def a_task_is_in_one_place(scheduler: Scheduler) -> Iterator[str]:
    """A task is queued, or waits for a retry, or is in one worker: never in two at the same time."""
    seen: set[int] = set()
    held = [task for _, task in _held(scheduler)]
    for task in (*_queued(scheduler), *scheduler.waiting.values(), *held):
        if task.id in seen:
            yield f"{task!r} is in two places"
        seen.add(task.id)


def queued_tasks_are_in_state_queued(scheduler: Scheduler) -> Iterator[str]:
    """In `queue` and `isolated` are QUEUED tasks, in the latter all and only those that killed a worker."""
    for task in _queued(scheduler):
        if task.state is not TaskState.QUEUED:
            yield f"{task!r} is in the queue"
    for place, is_isolated in ((scheduler.queue, False), (scheduler.isolated, True)):
        for task in place:
            if task.is_isolated is not is_isolated:
                yield f"{task!r} is in the wrong queue"


def the_queue_counts_its_tasks(scheduler: Scheduler) -> Iterator[str]:
    """`len(queue)` is the number of tasks in it."""
    found = sum(1 for _ in scheduler.queue)
    if len(scheduler.queue) != found:
        yield f"the queue says {len(scheduler.queue)}, {found} are in it"


def waiting_tasks_are_in_state_waiting_retry(scheduler: Scheduler) -> Iterator[str]:
    """`waiting` has all and only the WAITING_RETRY tasks, each with a deadline."""
    for task in scheduler.waiting.values():
        if task.state is not TaskState.WAITING_RETRY or not _is_live(task.timer):
            yield f"{task!r} waits for a retry, with timer {task.timer}"


def workers_hold_tasks_in_their_states(scheduler: Scheduler) -> Iterator[str]:
    """At a worker's head is a task RUNNING or STOPPING, in its backlog are ASSIGNED ones; each knows its worker."""
    for worker, task in _held(scheduler):
        wanted = (TaskState.RUNNING, TaskState.STOPPING) if task is worker.running else (TaskState.ASSIGNED,)
        if task.state not in wanted or task.worker is not worker:
            yield f"{task!r} is in {worker!r}"


def tasks_outside_workers_have_none(scheduler: Scheduler) -> Iterator[str]:
    """A task that is QUEUED or WAITING_RETRY has neither a worker nor a cause to stop."""
    for task in (*_queued(scheduler), *scheduler.waiting.values()):
        if task.worker is not None or task.stop is not None:
            yield f"{task!r} still has {task.worker!r}, {task.stop!r}"


def a_cause_is_set_exactly_while_stopping(scheduler: Scheduler) -> Iterator[str]:
    """`task.stop` is set exactly while STOPPING, and then somebody will end it: a timer, or its worker's kill."""
    for worker, task in _held(scheduler):
        if (task.stop is not None) is not (task.state is TaskState.STOPPING):
            yield f"{task!r} has cause {task.stop!r}"
        elif task.stop is not None and not _is_live(task.timer) and worker.state is not WorkerState.KILLED:
            yield f"{task!r} is to stop, and nobody sees to it"


def attempts_are_charged_when_begun(scheduler: Scheduler) -> Iterator[str]:
    """A task that never started is never charged with an attempt; one that runs is charged with it."""
    for task in (*_queued(scheduler), *scheduler.waiting.values(), *(task for _, task in _held(scheduler))):
        if task.attempts < 0 or (task.attempts == 0) is not (task.first_started_at is None):
            yield f"{task!r}, first started at {task.first_started_at}"
        elif task.worker is not None and task is task.worker.running and not task.attempts:
            yield f"{task!r} runs uncharged"


def limits_have_timers(scheduler: Scheduler) -> Iterator[str]:
    """QUEUED with a queue_timeout, RUNNING with a timeout: there is a deadline. ASSIGNED, or without limit: none."""
    for task in (*_queued(scheduler), *(task for _, task in _held(scheduler))):
        if task.state is TaskState.STOPPING:
            continue
        limit = {TaskState.QUEUED: task.spec.queue_timeout, TaskState.RUNNING: task.spec.timeout}.get(task.state)
        if _is_live(task.timer) is not (limit is not None):
            yield f"{task!r} has limit {limit} and timer {task.timer}"


# -- workers ---------------------------------------------------------------------------------------------------------


def the_pool_keeps_its_size(scheduler: Scheduler) -> Iterator[str]:
    """Live workers <= max_workers; with those that are about to be gone, twice that at most.

    Where `resize` made them too many, all that are left are busy and marked to go, or of sessions.
    """
    most = scheduler.settings.max_workers
    is_too_many = scheduler.live - scheduler.leaving > most and any(
        worker.state in LIVE_STATES and not worker.is_leaving and worker.retire_reason is None
        and worker.session is None
        for worker in scheduler.workers.values()
    )
    if is_too_many or len(scheduler.workers) > 2 * most + scheduler.left_over:
        yield f"{scheduler.live} live of {len(scheduler.workers)} workers, max_workers is {most}"


def the_throttle_holds(scheduler: Scheduler) -> Iterator[str]:
    """Running tasks <= max_concurrent, or <= 0 while paused, but for those that ran when that was lowered."""
    most = 0 if scheduler.is_paused else scheduler.settings.concurrency
    if scheduler.concurrency > most or scheduler.active > scheduler.concurrency + scheduler.overhang:
        yield f"{scheduler.active} tasks run, {scheduler.overhang} of them from before; max_concurrent is {most}"


def a_pool_runs_no_more_than_it_has_slots(scheduler: Scheduler) -> Iterator[str]:
    """Where the host's budget is shared: running tasks <= slots held, and no slot has a number beyond the budget."""
    share = scheduler.share
    if share is None:
        return
    if scheduler.active > len(share.held):
        yield f"{scheduler.active} tasks run in {len(share.held)} slots"
    if scheduler.concurrency > len(share.held):
        yield f"concurrency is {scheduler.concurrency} with {len(share.held)} slots"
    if not share.unused <= share.held.keys() or any(not 0 <= slot < share.agents for slot in share.held):
        yield f"slots {sorted(share.held)}, unused {sorted(share.unused)}, of {share.agents}"


def what_runs_alone_is_alone(scheduler: Scheduler) -> Iterator[str]:
    """While a task runs that its retry policy wants alone, nothing else does."""
    alone = scheduler.alone
    if alone is None:
        return
    if not alone.is_alone or alone.state not in (TaskState.RUNNING, TaskState.STOPPING):
        yield f"{alone!r} is said to run alone"
    if scheduler.active > 1:
        yield f"{scheduler.active} tasks run beside or instead of {alone!r}, which runs alone"


def groups_keep_their_limits(scheduler: Scheduler) -> Iterator[str]:
    """Of a group no more tasks run than the greatest `group_limit` of those that do; `groups` counts them."""
    counts: dict[str, int] = {}
    limits: dict[str, int] = {}
    for worker in scheduler.workers.values():
        spec = worker.ration
        if spec is not None and spec.group is not None:
            counts[spec.group] = counts.get(spec.group, 0) + 1
            own = scheduler.settings.max_workers if spec.group_limit is None else spec.group_limit
            limits[spec.group] = max(limits.get(spec.group, 0), own)
    if counts != scheduler.groups:
        yield f"groups are {scheduler.groups}, {counts} were counted"
    for group, count in counts.items():
        is_alone = scheduler.alone is not None and scheduler.alone.spec.group == group
        if count > limits[group] and not is_alone:
            yield f"{count} tasks of {group!r} run, {limits[group]} may"


def what_is_promised_is_accounted(scheduler: Scheduler) -> Iterator[str]:
    """A worker has a ration exactly while it runs a task that stood in a line; `reserved_bytes` is their sum."""
    for worker in scheduler.workers.values():
        task = worker.running
        wanted = None if task is None or task.spec.line is None else task.spec
        most = 0 if wanted is None else wanted.expected_bytes or 0
        if worker.ration is not wanted or not 0 <= worker.reserved_bytes <= most:
            yield f"{worker!r} has {worker.ration} and {worker.reserved_bytes} bytes, its task is {task!r}"
    found = sum(worker.reserved_bytes for worker in scheduler.workers.values())
    if found != scheduler.reserved_bytes:
        yield f"{scheduler.reserved_bytes} bytes are reserved, {found} were counted"


def a_session_has_one_worker(scheduler: Scheduler) -> Iterator[str]:
    """A session and its worker know each other; it runs only its tasks, and they run only there, one at a time."""
    for worker in scheduler.workers.values():
        session, task = worker.session, worker.running
        theirs = None if task is None else task.spec.session
        if task is not None and theirs is not session:
            yield f"{worker!r} of {session!r} runs {task!r} of {theirs!r}"
        is_there = worker.state in (WorkerState.IDLE, WorkerState.BUSY, WorkerState.CHECKING)
        if session is not None and is_there and session.worker is not worker:
            yield f"{worker!r} is of {session!r}, which has {session.worker!r}"
        if session is not None and task is not None and session.current is not task:
            yield f"{worker!r} runs {task!r}, and {session!r} has {session.current!r}"


def sessions_count_their_tasks(scheduler: Scheduler) -> Iterator[str]:
    """`sessions` are those with a worker or tasks; each knows how many. In one that is lost nothing waits."""
    counts: dict[SessionRecord, int] = {}
    for task in (*_queued(scheduler), *scheduler.waiting.values(), *(task for _, task in _held(scheduler))):
        if task.spec.session is not None:
            counts[task.spec.session] = counts.get(task.spec.session, 0) + 1
    for session in {*scheduler.sessions.values(), *counts}:
        if session.unresolved != counts.get(session, 0) or scheduler.sessions.get(session.id) is not session:
            yield f"{session!r}: {counts.get(session, 0)} were counted"
        if not session.unresolved and session.worker is None:
            yield f"{session!r} is over"
        if session.current is not None and session.current.state is TaskState.RESOLVED:
            yield f"{session!r} goes on with {session.current!r}"
    for task in (*_queued(scheduler), *scheduler.waiting.values()):
        if task.spec.session is not None and task.spec.session.error is not None:
            yield f"{task!r} waits in {task.spec.session!r}, which is lost"


def the_bound_holds(scheduler: Scheduler) -> Iterator[str]:
    """Queued <= max_pending where set; what was in a worker and came back is queued again all the same."""
    most = scheduler.settings.max_pending
    pending = sum(1 for task in scheduler.queue if not task.is_returned)
    if most is not None and pending > most:
        yield f"{pending} tasks are queued, max_pending is {most}"


def numbers_agree_with_workers(scheduler: Scheduler) -> Iterator[str]:
    """`live`, `starting`, `active` and `pool_bytes` are what a count says."""
    workers = list(scheduler.workers.values())
    counts = (
        ("live", scheduler.live, sum(1 for worker in workers if worker.state in LIVE_STATES)),
        ("leaving", scheduler.leaving, sum(worker.is_leaving for worker in workers)),
        ("starting", scheduler.starting, sum(1 for worker in workers if worker.state is WorkerState.STARTING)),
        ("active", scheduler.active, sum(1 for worker in workers if worker.running is not None)),
        ("pool_bytes", scheduler.pool_bytes, sum(worker.rss_bytes for worker in workers)),
    )
    for name, said, found in counts:
        if said != found:
            yield f"{name} is {said}, {found} was counted"


def places_agree_with_states(scheduler: Scheduler) -> Iterator[str]:
    """`workers` has none that is GONE; `idle` and `checking` have all and only the workers of that state."""
    for worker in scheduler.workers.values():
        if worker.state is WorkerState.GONE:
            yield f"{worker!r} is among the workers"
    idle = {**scheduler.idle, **scheduler.kept}
    if any(worker.session is not None for worker in scheduler.idle.values()) or any(
        worker.session is None for worker in scheduler.kept.values()
    ):
        yield f"idle are {scheduler.idle}, of sessions {scheduler.kept}"
    for state, place in ((WorkerState.IDLE, idle), (WorkerState.CHECKING, scheduler.checking)):
        found = {id_ for id_, worker in scheduler.workers.items() if worker.state is state}
        if found != set(place):
            yield f"{state.name} are {sorted(found)}, the scheduler says {sorted(place)}"


def idle_workers_are_in_order(scheduler: Scheduler) -> Iterator[str]:
    """`idle` is in the order of becoming idle."""
    since = [worker.idle_since for worker in scheduler.idle.values()]
    if since != sorted(since):
        yield f"idle since {since}"


def running_is_set_exactly_while_busy(scheduler: Scheduler) -> Iterator[str]:
    """`running` is set exactly while BUSY (or KILLED while a task ran); there is no backlog without it."""
    for worker in scheduler.workers.values():
        is_busy = worker.state is WorkerState.BUSY
        has_task = worker.running is not None
        if (is_busy and not has_task) or (has_task and not is_busy and worker.state is not WorkerState.KILLED):
            yield f"{worker!r} runs {worker.running!r}"
        if worker.backlog and not has_task:
            yield f"{worker!r} has a backlog and runs nothing"


def a_backlog_is_watched(scheduler: Scheduler) -> Iterator[str]:
    """What waits behind a task is given back if that is slow: a timer says when, unless that time is over."""
    for worker in scheduler.workers.values():
        if worker.backlog_timer is not None and not _is_live(worker.backlog_timer):
            yield f"{worker!r} has a dead backlog timer"


def what_a_worker_owes_is_bounded_in_time(scheduler: Scheduler) -> Iterator[str]:
    """STARTING, CHECKING, RETIRING, KILLED: a timer is set. So a retired or killed worker is gone in bounded time."""
    for worker in scheduler.workers.values():
        if worker.state in _BOUNDED and not _is_live(worker.state_timer):
            yield f"{worker!r} may take for ever"
        if worker.state is WorkerState.IDLE and scheduler.settings.idle_timeout and not _is_live(worker.state_timer):
            yield f"{worker!r} is never idle for too long"


def a_worker_runs_no_more_than_its_limit(scheduler: Scheduler) -> Iterator[str]:
    """Tasks done, running and in the backlog <= the worker's task limit."""
    for worker in scheduler.workers.values():
        total = worker.tasks_done + len(worker.backlog) + (worker.running is not None)
        if worker.task_limit is not None and total > worker.task_limit:
            yield f"{worker!r} has {total} tasks, its limit is {worker.task_limit}"


def ready_workers_have_a_baseline(scheduler: Scheduler) -> Iterator[str]:
    """Only a worker that was never ready has no baseline."""
    for worker in scheduler.workers.values():
        if worker.baseline_bytes is None and worker.state not in (WorkerState.STARTING, WorkerState.KILLED):
            yield f"{worker!r} has no baseline"


# -- the breaker, the pool -------------------------------------------------------------------------------------------


def one_probe_at_a_time(scheduler: Scheduler) -> Iterator[str]:
    """At most one probe is in flight, and the breaker knows of it."""
    probes = [worker for worker in scheduler.workers.values() if worker.is_probe]
    if len(probes) > 1 or bool(probes) is not scheduler.breaker.is_probing:
        yield f"probes are {probes}, the breaker says {scheduler.breaker.is_probing}"
    for worker in probes:
        if worker.state not in (WorkerState.STARTING, WorkerState.KILLED):
            yield f"{worker!r} is a probe"


def the_breaker_has_a_reason(scheduler: Scheduler) -> Iterator[str]:
    """A breaker that is not closed says why; one that admits starts has no hold; its listeners were told."""
    breaker = scheduler.breaker
    if (breaker.state is BreakerState.CLOSED) is not (breaker.reason == ""):
        yield f"{breaker.state.name} because {breaker.reason!r}"
    if breaker.holds and breaker.state in (BreakerState.CLOSED, BreakerState.HALF_OPEN):
        yield f"{breaker.state.name} in spite of {breaker.holds}"
    if breaker.changes:
        yield f"nobody was told of {breaker.changes}"


def no_worker_is_idle_while_a_task_could_run(scheduler: Scheduler) -> Iterator[str]:
    """Once actions were taken, a queued task and an idle worker are there together only for the throttle's sake."""
    if scheduler._is_dirty or scheduler._hungry:
        return
    if scheduler._is_reserved():
        return
    could_run = (scheduler.queue.plain_length and scheduler.idle) or any(
        scheduler._could_begin(head) for head in scheduler.queue.heads()
    )
    if could_run and scheduler.active < scheduler.concurrency:
        yield f"{len(scheduler.queue)} tasks are queued, {list(scheduler.idle.values())} idle"


def a_doomed_pool_ends(scheduler: Scheduler) -> Iterator[str]:
    """Broken or stopped: no task waits, and every worker was told to end."""
    if scheduler.broken is not None and scheduler.doom is None:
        yield "broken, and not doomed"
    if scheduler.doom is None:
        return
    if _queued(scheduler) or scheduler.waiting:
        yield "tasks wait for a pool that is broken or was stopped"
    for worker in scheduler.workers.values():
        if worker.state not in (WorkerState.RETIRING, WorkerState.KILLED):
            yield f"{worker!r} goes on"


def a_closed_pool_is_empty(scheduler: Scheduler) -> Iterator[str]:
    """After Close there is no task, no worker, and no deadline."""
    if scheduler.is_closed and (
        scheduler.unresolved or scheduler.workers or scheduler.next_deadline() is not None or not scheduler.is_closing
    ):
        yield f"closed with {scheduler.unresolved} tasks, {len(scheduler.workers)} workers"


RULES: Final[tuple[Rule, ...]] = (
    nothing_is_lost,
    a_task_is_in_one_place,
    queued_tasks_are_in_state_queued,
    the_queue_counts_its_tasks,
    waiting_tasks_are_in_state_waiting_retry,
    workers_hold_tasks_in_their_states,
    tasks_outside_workers_have_none,
    a_cause_is_set_exactly_while_stopping,
    attempts_are_charged_when_begun,
    limits_have_timers,
    the_pool_keeps_its_size,
    the_throttle_holds,
    a_pool_runs_no_more_than_it_has_slots,
    what_runs_alone_is_alone,
    groups_keep_their_limits,
    what_is_promised_is_accounted,
    a_session_has_one_worker,
    sessions_count_their_tasks,
    the_bound_holds,
    numbers_agree_with_workers,
    places_agree_with_states,
    idle_workers_are_in_order,
    running_is_set_exactly_while_busy,
    a_backlog_is_watched,
    what_a_worker_owes_is_bounded_in_time,
    a_worker_runs_no_more_than_its_limit,
    ready_workers_have_a_baseline,
    one_probe_at_a_time,
    the_breaker_has_a_reason,
    no_worker_is_idle_while_a_task_could_run,
    a_doomed_pool_ends,
    a_closed_pool_is_empty,
)


def check(scheduler: Scheduler) -> None:
    """Raise InternalError for the first rule that does not hold, with its name, and the scheduler's story."""
    for rule in RULES:
        for found in rule(scheduler):
            raise InternalError(f"{rule.__name__}: {found} ({rule.__doc__})", story=scheduler.story())
