from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import tenacity

from agentpool.config import MB, HostBudget, PoolSettings
from agentpool.core.actions import GiveSlots, LookAtBudget, PublishShare, TakeSlots
from agentpool.core.governance import Governor
from agentpool.core.host_scheduler import HostScheduler
from agentpool.core.records import AttemptRecord, SessionRecord, TaskRecord, TaskSpec, WorkerRecord
from agentpool.core.retry import RetryPolicy
from agentpool.core.scheduler import Scheduler
from agentpool.core.transitions import TaskState, WorkerState
from agentpool.errors import SessionLostError


def test_records_say_what_a_defects_report_needs() -> None:
    task = TaskRecord(7, TaskSpec(name="parse"), None)
    task.attempts = 2
    assert repr(task) == "<task 7 parse QUEUED attempts=2>"
    worker = WorkerRecord(3, 0.0)
    worker.pid = 4711
    assert repr(worker) == "<worker 3 pid=4711 STARTING done=0>"


def test_records_have_slots_only_as_there_may_be_millions() -> None:
    for record in (TaskRecord(1, TaskSpec(), None), WorkerRecord(1, 0.0), TaskSpec()):
        assert not hasattr(record, "__dict__")


def shown(record: object, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What there is to read of it that is not empty, nor false, nor 0; None is not empty here."""
    names = [name for one in type(record).__mro__ for name in getattr(one, "__slots__", ())] or list(vars(record))
    found = {name: getattr(record, name) for name in names if not name.startswith("_") and name not in without}
    return {name: value for name, value in found.items() if value is None or value}


def test_a_fresh_task_says_that_nothing_happened_to_it() -> None:
    spec, handle = TaskSpec(hard_limit_bytes=5), object()
    assert shown(TaskRecord(7, spec, handle, "f"), without=("state",)) == {
        "id": 7, "spec": spec, "handle": handle, "call_key": "f", "hard_limit_bytes": 5, "first_started_at": None,
        "worker": None, "stop": None, "timer": None, "past": None, "last_error": None,
    }
    assert TaskRecord(7, spec, handle).state is TaskState.QUEUED


def test_a_fresh_worker_says_that_it_is_starting_and_was_never_read() -> None:
    worker = WorkerRecord(3, 4.5)
    assert worker.state is WorkerState.STARTING
    assert shown(worker, without=("state",)) == {
        "id": 3, "pid": None, "spawned_at": 4.5, "idle_since": 4.5, "running": None, "task_limit": None,
        "retire_reason": None, "state_timer": None, "backlog_timer": None, "sample_timer": None, "baseline_bytes": None,
        "soft_limit_bytes": None, "growth_limit_bytes": None, "warm_bytes": None, "ration": None, "session": None,
        "limit_bytes": None, "processes": 1, "sampled_at": None,
    }


def test_a_fresh_session_has_no_worker_and_no_tasks() -> None:
    session = SessionRecord(2, "k", 30.0)
    assert shown(session) == {"id": 2, "key": "k", "idle_timeout": 30.0, "worker": None, "current": None, "error": None,
                              "timer": None}
    assert (session.unresolved, session.used_at, session.is_closed) == (0, 0.0, False)
    assert repr(session) == "<session 2 k in None, 0 tasks>"
    assert repr(SessionRecord(2, None, None)) == "<session 2  in None, 0 tasks>"


def test_a_past_attempt_is_what_the_task_was_then() -> None:
    task, error = TaskRecord(1, TaskSpec(), None), OSError()
    task.worker, task.queued_at, task.started_at, task.peak_rss_bytes = WorkerRecord(3, 0.0), 1.0, 2.0, 50
    assert shown(AttemptRecord(task, 7.0, error)) == {
        "worker": task.worker, "queued_at": 1.0, "started_at": 2.0, "ended_at": 7.0, "error": error,
        "peak_rss_bytes": 50}


@pytest.mark.parametrize("kind", [Scheduler, HostScheduler])
def test_a_fresh_scheduler_has_done_nothing(kind: type[Scheduler]) -> None:
    settings = PoolSettings.make(max_workers=3, min_workers=1, budget=HostBudget() if kind is HostScheduler else None)
    core = kind(settings)
    left = shown(core, without=("settings", "rng", "breaker", "governor", "counters", "share", "timers", "queue"))
    assert left == {"hard_limit_bytes": None, "broken": None, "doom": None, "alone": None} | (
        {"concurrency": 3} if kind is Scheduler else {})
    assert core.take_actions(0.0) == [], "the floor is for `start`"
    assert core._failed_at == -math.inf


@pytest.mark.parametrize("kind", [Scheduler, HostScheduler])
def test_a_seed_decides_what_is_drawn(kind: type[Scheduler]) -> None:
    settings = PoolSettings.make(budget=HostBudget() if kind is HostScheduler else None)
    assert kind(settings, seed=5).rng.random() == Random(5).random()
    assert kind(settings).rng.random() == Random(0).random()


def test_a_fresh_governor_knows_nothing() -> None:
    core = Scheduler(PoolSettings())
    assert shown(Governor(core.settings, core.breaker), without=("settings",)) == {
        "host": None, "sampled_at": None, "critical_since": None}


def test_an_action_has_what_it_was_made_with() -> None:
    assert (LookAtBudget(True).is_loud, PublishShare(True).is_loud) == (True, True)
    assert (TakeSlots((1,)).slots, GiveSlots((2,)).slots) == ((1,), (2,))


def test_the_peak_of_a_task_is_that_of_all_its_attempts(make_bench) -> None:
    bench = make_bench(max_workers=1, memory_limit_mb=None)
    again = RetryPolicy(stop=tenacity.stop_after_attempt(3), retry=tenacity.retry_if_exception_type(OSError))
    task, worker = bench.started(policy=again)
    bench.sample(worker, 300)
    bench.fail(task, OSError())
    bench.advance(60.0)
    assert (task.attempts, task.peak_rss_bytes) == (2, 0)
    assert task.highest_rss_bytes == 300 * MB
    bench.sample(worker, 400)
    assert task.highest_rss_bytes == 400 * MB


def test_a_session_is_over_when_it_was_closed_or_lost() -> None:
    opened, closed, lost = (SessionRecord(number, None, None) for number in (1, 2, 3))
    closed.is_closed, lost.error = True, SessionLostError("lost")
    assert [session.is_over for session in (opened, closed, lost)] == [False, True, True]
