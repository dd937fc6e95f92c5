"""Each rule notices what breaks it. That a scheduler that is well breaks none, every other test of the core shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tenacity

from agentpool.config import MB, HostBudget
from agentpool.core import invariants
from agentpool.core.budget import Share
from agentpool.core.invariants import RULES, check
from agentpool.core.records import SessionRecord, StopCause, TaskRecord, TaskSpec
from agentpool.core.retry import RetryPolicy
from agentpool.core.transitions import BreakerState, TaskState, WorkerState
from agentpool.errors import InternalError, SessionLostError

#: what the bench's workers use when they are fresh
FRESH_BYTES = 20 * MB


def scene(make_bench) -> Any:
    """Something of everything: a running task, an idle worker, one that is looked at, queued and waiting tasks."""
    bench = make_bench(max_workers=3, max_concurrent=3, max_pending=9, max_tasks_per_child=5)
    retried, _ = bench.started(policy=RetryPolicy(wait=tenacity.wait_fixed(9), retry=tenacity.retry_always))
    checked, bench.checking = bench.started()
    bench.running, bench.busy = bench.started(timeout=5.0)
    bench.fail(retried, OSError())
    bench.finish(checked, seconds=1.0)
    bench.waiting = retried
    (bench.idle,) = bench.core.idle.values()
    bench.core.concurrency = 1
    bench.queued = bench.submit(queue_timeout=50.0)
    return bench


def _set(**attributes: Any) -> Callable[[Any], None]:
    def change(bench: Any) -> None:
        for path, value in attributes.items():
            owner, name = path.split("__")
            setattr(getattr(bench, owner), name, value)

    return change


def _requeue(bench: Any) -> None:
    bench.core.waiting[bench.running.id] = bench.running


def _isolate(bench: Any) -> None:
    bench.core.isolated.append(bench.core.queue.pop())


def _hide_task(bench: Any) -> None:
    bench.core.queue.pop()


def _many_pending(bench: Any) -> None:
    for _ in range(10):
        bench.core.queue.push(bench.queued)


def _backlog_alone(bench: Any) -> None:
    bench.queued.state, bench.queued.worker = TaskState.ASSIGNED, bench.idle
    bench.idle.backlog.append(bench.queued)


def _probes(bench: Any) -> None:
    bench.busy.is_probe = bench.idle.is_probe = True


def _dead_timer(record: str, name: str) -> Callable[[Any], None]:
    def change(bench: Any) -> None:
        bench.core.timers.cancel(getattr(getattr(bench, record), name))

    return change


def _dead_backlog_timer(bench: Any) -> None:
    bench.busy.backlog_timer = bench.core.timers.add(1.0, print)
    bench.core.timers.cancel(bench.busy.backlog_timer)


def _disorder(bench: Any) -> None:
    bench.checking.state = WorkerState.IDLE
    bench.core.idle[bench.checking.id] = bench.core.checking.pop(bench.checking.id)
    bench.idle.idle_since = 1e9


def _placed_badly(bench: Any) -> None:
    bench.core.concurrency = 3


def _no_way_to_end(bench: Any) -> None:
    bench.running.state = TaskState.STOPPING
    bench.running.stop = StopCause(OSError(), 0.0)
    bench.core.timers.cancel(bench.running.timer)


def _too_many_workers(bench: Any) -> None:
    bench.core.live = 4


def _uncharged(bench: Any) -> None:
    bench.running.attempts, bench.running.first_started_at = 0, None


def _closed(bench: Any) -> None:
    bench.core.is_closed = True


def _alone_beside_another(bench: Any) -> None:
    bench.core.alone = bench.running
    bench.running.is_alone = True
    bench.core.active = 2


def _share(**changes: Any) -> Callable[[Any], None]:
    """It has a share of the host's budget, in which something is wrong."""
    def change(bench: Any) -> None:
        bench.core.share = Share(HostBudget(agents=2))
        bench.core.share.held = {0: 1.0, 1: 1.0}
        for name, value in changes.items():
            setattr(bench.core.share, name, value)

    return change


def _too_many_of_a_group(bench: Any) -> None:
    bench.running.spec = bench.busy.ration = TaskSpec(group="g", group_limit=0)
    bench.core.groups["g"] = 1


def _in_a_strange_worker(bench: Any) -> None:
    bench.running.spec = bench.busy.ration = TaskSpec(session=SessionRecord(1, None, None), timeout=5.0)


def _out_of_turn(bench: Any) -> None:
    session = bench.busy.session = SessionRecord(1, None, None)
    session.worker, session.unresolved, bench.core.sessions[1] = bench.busy, 1, session
    bench.running.spec = bench.busy.ration = TaskSpec(session=session, timeout=5.0)


def _uncounted_in_its_session(bench: Any) -> None:
    session = SessionRecord(1, None, None)
    session.unresolved, session.current, bench.core.sessions[1] = 2, None, session
    bench.waiting.spec = TaskSpec(session=session)


def _goes_on_with_what_is_resolved(bench: Any) -> None:
    _uncounted_in_its_session(bench)
    session = bench.waiting.spec.session
    session.unresolved, session.current = 1, TaskRecord(77, TaskSpec(), None)
    session.current.state = TaskState.RESOLVED


def _kept_by_nobody(bench: Any) -> None:
    bench.core.kept[bench.idle.id] = bench.core.idle.pop(bench.idle.id)


def _waits_in_a_lost_session(bench: Any) -> None:
    _uncounted_in_its_session(bench)
    session = bench.waiting.spec.session
    session.unresolved, session.error = 1, SessionLostError("lost")


BREAKS: list[tuple[str, Callable[[Any], None]]] = [
    ("nothing_is_lost", _hide_task),
    ("nothing_is_lost", lambda bench: setattr(bench.core.counters, "submitted", 9)),
    ("a_task_is_in_one_place", _requeue),
    ("queued_tasks_are_in_state_queued", lambda bench: bench.core.isolated.append(bench.running)),
    ("queued_tasks_are_in_state_queued", _isolate),
    ("the_queue_counts_its_tasks", lambda bench: bench.core.queue.discard()),
    ("waiting_tasks_are_in_state_waiting_retry", _set(waiting__state=TaskState.QUEUED)),
    ("waiting_tasks_are_in_state_waiting_retry", _dead_timer("waiting", "timer")),
    ("workers_hold_tasks_in_their_states", _set(running__state=TaskState.ASSIGNED)),
    ("workers_hold_tasks_in_their_states", _set(running__worker=None)),
    ("tasks_outside_workers_have_none", lambda bench: setattr(bench.queued, "worker", bench.idle)),
    ("a_cause_is_set_exactly_while_stopping", _set(running__state=TaskState.STOPPING)),
    ("a_cause_is_set_exactly_while_stopping", _no_way_to_end),
    ("attempts_are_charged_when_begun", _uncharged),
    ("attempts_are_charged_when_begun", _set(queued__attempts=1)),
    ("limits_have_timers", _dead_timer("running", "timer")),
    ("limits_have_timers", _dead_timer("queued", "timer")),
    ("the_pool_keeps_its_size", _too_many_workers),
    ("the_throttle_holds", _set(core__active=4)),
    ("a_pool_runs_no_more_than_it_has_slots", _share(held={})),
    ("a_pool_runs_no_more_than_it_has_slots", _share(held={0: 1.0, 7: 1.0})),
    ("a_pool_runs_no_more_than_it_has_slots", _share(unused={5})),
    ("what_runs_alone_is_alone", lambda bench: setattr(bench.core, "alone", bench.queued)),
    ("what_runs_alone_is_alone", _alone_beside_another),
    ("groups_keep_their_limits", lambda bench: bench.core.groups.update(g=1)),
    ("groups_keep_their_limits", _too_many_of_a_group),
    ("what_is_promised_is_accounted", _set(idle__reserved_bytes=1)),
    ("what_is_promised_is_accounted", _set(core__reserved_bytes=1)),
    ("what_is_promised_is_accounted", lambda bench: setattr(bench.busy, "ration", bench.running.spec)),
    ("a_session_has_one_worker", _in_a_strange_worker),
    ("a_session_has_one_worker", lambda bench: setattr(bench.idle, "session", SessionRecord(1, None, None))),
    ("a_session_has_one_worker", _out_of_turn),
    ("sessions_count_their_tasks", lambda bench: bench.core.sessions.update({1: SessionRecord(1, None, None)})),
    ("sessions_count_their_tasks", _uncounted_in_its_session),
    ("sessions_count_their_tasks", _waits_in_a_lost_session),
    ("sessions_count_their_tasks", _goes_on_with_what_is_resolved),
    ("the_bound_holds", _many_pending),
    ("numbers_agree_with_workers", _set(core__pool_bytes=1)),
    ("places_agree_with_states", lambda bench: bench.core.idle.clear()),
    ("places_agree_with_states", _set(idle__state=WorkerState.GONE)),
    ("places_agree_with_states", _kept_by_nobody),
    ("idle_workers_are_in_order", _disorder),
    ("running_is_set_exactly_while_busy", _set(busy__running=None)),
    ("running_is_set_exactly_while_busy", _backlog_alone),
    ("a_backlog_is_watched", _dead_backlog_timer),
    ("what_a_worker_owes_is_bounded_in_time", _dead_timer("checking", "state_timer")),
    ("what_a_worker_owes_is_bounded_in_time", _dead_timer("idle", "state_timer")),
    ("a_worker_runs_no_more_than_its_limit", _set(busy__tasks_done=5)),
    ("ready_workers_have_a_baseline", _set(busy__baseline_bytes=None)),
    ("one_probe_at_a_time", _probes),
    ("one_probe_at_a_time", lambda bench: setattr(bench.core.breaker, "is_probing", True)),
    ("the_breaker_has_a_reason", lambda bench: setattr(bench.core.breaker, "reason", "x")),
    ("the_breaker_has_a_reason", lambda bench: bench.core.breaker.holds.update(available="x")),
    ("the_breaker_has_a_reason", lambda bench: bench.core.breaker.changes.append((BreakerState.CLOSED,) * 2)),
    ("no_worker_is_idle_while_a_task_could_run", _placed_badly),
    ("a_doomed_pool_ends", _set(core__broken=OSError())),
    ("a_doomed_pool_ends", _set(core__doom=OSError())),
    ("a_closed_pool_is_empty", _closed),
]


@pytest.mark.parametrize(("rule", "change"), BREAKS)
def test_a_rule_notices_what_breaks_it(make_bench, rule: str, change: Callable[[Any], None]) -> None:
    bench = scene(make_bench)
    the_rule = getattr(invariants, rule)
    assert list(the_rule(bench.core)) == []
    change(bench)
    assert list(the_rule(bench.core))


def test_every_rule_is_tried_here() -> None:
    assert {rule for rule, _ in BREAKS} == {rule.__name__ for rule in RULES}


def test_every_rule_says_what_it_promises() -> None:
    assert all(rule.__doc__ for rule in RULES)


def test_check_raises_for_the_first_broken_rule_with_its_name_and_the_story(make_bench) -> None:
    bench = scene(make_bench)
    check(bench.core)
    bench.core.unresolved += 1
    with pytest.raises(InternalError, match="nothing_is_lost: 4 tasks are unresolved, 3 are somewhere") as caught:
        check(bench.core)
    assert repr(bench.running) in caught.value.story


def test_placing_is_judged_only_once_actions_were_taken(make_bench) -> None:
    bench = scene(make_bench)
    bench.core.concurrency = 3
    bench.core._is_dirty = True
    assert list(invariants.no_worker_is_idle_while_a_task_could_run(bench.core)) == []


# -- to the letter, and where a limit begins -----------------------------------------------------------------------


@pytest.mark.parametrize(("change", "said"), [
    (_set(core__live=2), "live is 2, 3 was counted"),
    (_set(core__leaving=1), "leaving is 1, 0 was counted"),
    (_set(core__starting=1), "starting is 1, 0 was counted"),
    (_set(core__active=0), "active is 0, 1 was counted"),
    (_set(core__pool_bytes=1), f"pool_bytes is 1, {3 * FRESH_BYTES} was counted"),
])
def test_a_wrong_number_is_named(make_bench, change: Callable[[Any], None], said: str) -> None:
    bench = scene(make_bench)
    change(bench)
    assert list(invariants.numbers_agree_with_workers(bench.core)) == [said]


def test_each_rule_about_slots_is_one_of_its_own(make_bench) -> None:
    bench = scene(make_bench)
    rule = invariants.a_pool_runs_no_more_than_it_has_slots
    for held, unused, said in [
        ({0: 1.0}, set(), []),  # as many as run
        ({0: 1.0, 1: 1.0}, {0, 1}, []),
        ({0: 1.0, 2: 1.0}, set(), ["slots [0, 2], unused [], of 2"]),
        ({-1: 1.0, 0: 1.0}, set(), ["slots [-1, 0], unused [], of 2"]),
        ({0: 1.0}, {1}, ["slots [0], unused [1], of 2"]),
        ({}, set(), ["1 tasks run in 0 slots", "concurrency is 1 with 0 slots"]),
    ]:
        _share(held=held, unused=unused)(bench)
        assert list(rule(bench.core)) == said, (held, unused)


def test_a_task_that_was_killed_still_runs_alone(make_bench) -> None:
    bench = scene(make_bench)
    bench.core.alone = bench.running
    rule = invariants.what_runs_alone_is_alone
    for is_alone, state, is_well in [
        (True, TaskState.RUNNING, True), (True, TaskState.STOPPING, True), (False, TaskState.RUNNING, False),
        (False, TaskState.STOPPING, False), (True, TaskState.QUEUED, False),
    ]:
        bench.running.is_alone, bench.running.state = is_alone, state
        assert (list(rule(bench.core)) == []) is is_well, (is_alone, state)


def test_a_group_may_be_passed_by_one_that_runs_alone_and_has_no_limit_by_itself(make_bench) -> None:
    bench = scene(make_bench)
    rule = invariants.groups_keep_their_limits
    bench.running.spec = bench.busy.ration = TaskSpec(group="g", group_limit=0)
    bench.core.groups["g"] = 1
    assert list(rule(bench.core)) == ["1 tasks of 'g' run, 0 may"]
    bench.core.alone = bench.running
    assert list(rule(bench.core)) == []
    bench.core.alone = bench.queued
    assert list(rule(bench.core)) == ["1 tasks of 'g' run, 0 may"], "another one runs alone"
    bench.core.alone = None
    bench.busy.ration = TaskSpec(group="g", expected_bytes=1)
    assert list(rule(bench.core)) == []


def test_no_byte_is_promised_where_none_is_wanted(make_bench) -> None:
    bench = scene(make_bench)
    rule = invariants.what_is_promised_is_accounted
    for worker, spec in ((bench.idle, None), (bench.busy, TaskSpec(group="g", group_limit=1, timeout=5.0))):
        if spec is not None:
            bench.running.spec = worker.ration = spec
        assert list(rule(bench.core)) == []
        worker.reserved_bytes = bench.core.reserved_bytes = 1
        assert len(list(rule(bench.core))) == 1
        worker.reserved_bytes = bench.core.reserved_bytes = 0


def test_what_a_session_counts_wrongly_is_told(make_bench) -> None:
    bench = scene(make_bench)
    session = SessionRecord(1, None, None)
    session.unresolved, session.worker, bench.core.sessions[1] = 2, bench.idle, session
    assert list(invariants.sessions_count_their_tasks(bench.core)) == [f"{session!r}: 0 were counted"]
    bench.waiting.spec = TaskSpec(session=session)
    assert list(invariants.sessions_count_their_tasks(bench.core)) == [f"{session!r}: 1 were counted"]


def test_a_worker_of_no_session_is_not_kept_and_one_of_a_session_not_idle(make_bench) -> None:
    bench = scene(make_bench)
    rule = invariants.places_agree_with_states
    bench.idle.session = SessionRecord(1, None, None)
    assert len(list(rule(bench.core))) == 1
    bench.core.kept[bench.idle.id] = bench.core.idle.pop(bench.idle.id)
    assert list(rule(bench.core)) == []
    bench.idle.session = None
    assert len(list(rule(bench.core))) == 1


def test_what_waits_in_a_worker_counts_towards_its_limit(make_bench) -> None:
    bench = scene(make_bench)
    bench.busy.task_limit, bench.busy.tasks_done = 2, 0
    bench.busy.backlog.append(bench.queued)
    rule = invariants.a_worker_runs_no_more_than_its_limit
    assert list(rule(bench.core)) == []
    bench.busy.backlog.append(bench.queued)
    assert list(rule(bench.core)) == [f"{bench.busy!r} has 3 tasks, its limit is 2"]


def test_of_two_probes_one_is_too_many(make_bench) -> None:
    bench = scene(make_bench)
    bench.core.breaker.is_probing = True
    for worker in (bench.busy, bench.idle):
        worker.is_probe, worker.state = True, WorkerState.STARTING
    assert len(list(invariants.one_probe_at_a_time(bench.core))) == 1
    bench.idle.is_probe = False
    assert list(invariants.one_probe_at_a_time(bench.core)) == []


def test_a_pool_that_ends_says_what_goes_on(make_bench) -> None:
    bench = scene(make_bench)
    rule = invariants.a_doomed_pool_ends
    bench.core.broken = OSError()
    assert list(rule(bench.core)) == ["broken, and not doomed"]
    bench.core.doom = OSError()
    for worker in (bench.busy, bench.idle, bench.checking):
        worker.state = WorkerState.KILLED
    waits = ["tasks wait for a pool that is broken or was stopped"]
    assert list(rule(bench.core)) == waits
    waiting = dict(bench.core.waiting)
    bench.core.waiting.clear()
    assert list(rule(bench.core)) == waits
    bench.core.queue.clear()
    assert list(rule(bench.core)) == []
    bench.core.waiting.update(waiting)
    assert list(rule(bench.core)) == waits


@pytest.mark.parametrize("left", ["task", "worker", "deadline", "not closing"])
def test_a_closed_pool_has_nothing_at_all(make_bench, left: str) -> None:
    bench = make_bench()
    worker = bench.idle_worker()
    bench.do(bench.core.shutdown, cancel_futures=False)
    bench.exit(worker, 0)
    core, rule = bench.core, invariants.a_closed_pool_is_empty
    assert core.is_closed
    assert list(rule(core)) == []
    if left == "task":
        core.unresolved = 1
    elif left == "worker":
        core.workers[worker.id] = worker
    elif left == "deadline":
        core.next_deadline = lambda: 1.0
    else:
        core.is_closing = False
    assert list(rule(core)) == [f"closed with {core.unresolved} tasks, {len(core.workers)} workers"]


def test_while_paused_nothing_may_run(make_bench) -> None:
    bench = scene(make_bench)
    rule = invariants.the_throttle_holds
    bench.core.is_paused = True
    assert list(rule(bench.core)) == ["1 tasks run, 0 of them from before; max_concurrent is 0"]
    bench.core.concurrency, bench.core.overhang = 0, 1
    assert list(rule(bench.core)) == []


def test_twice_as_many_workers_as_allowed_are_the_most(make_bench) -> None:
    bench = scene(make_bench)
    rule = invariants.the_pool_keeps_its_size
    for number in range(10, 13):
        bench.core.workers[number] = bench.idle
    assert list(rule(bench.core)) == []
    bench.core.workers[13] = bench.idle
    assert list(rule(bench.core)) == ["3 live of 7 workers, max_workers is 3"]
    bench.core.left_over = 1
    assert list(rule(bench.core)) == []


def test_a_task_that_is_being_stopped_hides_no_other(make_bench) -> None:
    bench = scene(make_bench)
    other, _ = bench.busy, bench.core.timers.cancel(bench.running.timer)
    assert len(list(invariants.limits_have_timers(bench.core))) == 1
    stopping = bench.idle
    stopping.running = TaskRecord(77, TaskSpec(), None)
    stopping.running.state = TaskState.STOPPING
    bench.core.workers = {stopping.id: stopping, other.id: other}
    assert len(list(invariants.limits_have_timers(bench.core))) == 1
