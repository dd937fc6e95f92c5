"""The events of tasks and of the pool; placing."""

from __future__ import annotations

import pytest
import tenacity

from agentpool.config import MB, BreakerSettings
from agentpool.core import actions as act
from agentpool.core.placement import GIVE_BACK_AFTER, MAX_BACKLOG
from agentpool.core.records import HostState, SessionRecord, StopCause, TaskRecord, TaskSpec
from agentpool.core.retry import RetryPolicy, compile_policy
from agentpool.core.transitions import BreakerState, TaskState, WorkerState
from agentpool.errors import (
    InitializerError,
    PoolClosedError,
    QueueFullError,
    TaskKilledError,
    TaskTimeoutError,
    WorkerCrashedError,
)


def sent_to(bench, worker) -> list[int]:
    return [task.id for to, task in bench.sent if to is worker]


class TestSubmit:
    def test_a_free_worker_gets_it_at_once(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker()
        task = TaskRecord(99, TaskSpec(), None)
        bench.core.submit(bench.now, task)
        assert task.state is TaskState.RUNNING
        assert bench.core.take_actions(bench.now) == [(act.DISPATCH, worker, task)]

    def test_no_more_run_at_once_than_the_throttle_allows_however_many_workers_are_idle(self, make_bench) -> None:
        bench = make_bench(max_workers=4, max_concurrent=4)
        tasks = [bench.submit() for _ in range(4)]
        for worker in bench.spawned():
            bench.ready(worker)
        for task in tasks:
            bench.finish(task)
        bench.core.concurrency = 2
        tasks = [bench.submit() for _ in range(4)]
        assert [task.state.name for task in tasks] == ["RUNNING", "RUNNING", "QUEUED", "QUEUED"]
        bench.finish(tasks[0])
        assert tasks[2].state is TaskState.RUNNING

    def test_priorities_then_order_of_submission(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        first, worker = bench.started()
        low, high, middle, second = (bench.submit(priority=priority) for priority in (-1, 5, 0, 0))
        for expected in (first, high, middle, second, low):
            assert worker.running is expected
            bench.finish(expected)

    def test_nobody_overtakes_those_who_wait(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        running, _ = bench.started()
        waiting = bench.submit()
        bench.core.task_finished(bench.now, running.worker, running, is_value=True, payload=1, seconds=0.0, rss_bytes=0)
        late = bench.submit()
        assert (waiting.state, late.state) == (TaskState.RUNNING, TaskState.QUEUED)

    def test_a_full_queue_refuses_and_tells_when_there_is_room(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_pending=2)
        running, _ = bench.started()
        waiting = [bench.submit() for _ in range(2)]
        with pytest.raises(QueueFullError, match=r"2 tasks are queued already \(max_pending\); wait for results"):
            bench.submit()
        assert bench.core.counters.submitted == 3
        bench.do(bench.core.reset_breaker)
        assert bench.asked(act.RoomFreed) == [], "it is still full"
        bench.finish(running)
        assert bench.asked(act.RoomFreed) == [act.RoomFreed()]
        bench.finish(waiting[0])
        assert bench.asked(act.RoomFreed) == [], "nobody had asked again"

    def test_who_goes_on_waiting_for_room_is_told_once_more(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_pending=1)
        first, _ = bench.started()
        bench.submit()
        bench.core.want_room()
        bench.finish(first)
        assert bench.asked(act.RoomFreed) == [act.RoomFreed()]

    @pytest.mark.parametrize("how", ["cancel", "timeout"])
    def test_room_comes_from_those_who_leave_the_queue_too(self, make_bench, how) -> None:
        bench = make_bench(max_workers=1, max_pending=1)
        bench.started()
        waiting = bench.submit(queue_timeout=5.0)
        with pytest.raises(QueueFullError):
            bench.submit()
        if how == "cancel":
            bench.do(bench.core.cancel, waiting)
        else:
            bench.advance(5.0)
        assert bench.asked(act.RoomFreed) == [act.RoomFreed()]

    def test_who_waits_for_room_learns_that_the_pool_closes(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_pending=1)
        bench.started()
        bench.submit()
        with pytest.raises(QueueFullError):
            bench.submit()
        bench.do(bench.core.shutdown, cancel_futures=False)
        assert bench.asked(act.RoomFreed) == [act.RoomFreed()]

    def test_who_waits_for_room_learns_that_the_pool_is_broken(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_pending=1)
        bench.started()
        bench.submit()
        (starting,) = bench.spawned()
        with pytest.raises(QueueFullError):
            bench.submit()
        bench.do(bench.core.initializer_failed, starting, InitializerError("x"))
        assert bench.asked(act.RoomFreed) == [act.RoomFreed()]

    def test_what_comes_back_is_queued_again_whatever_the_bound(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_pending=1)
        policy = RetryPolicy(retry=tenacity.retry_if_exception_type(), wait=tenacity.wait_fixed(1))
        task, _ = bench.started(policy=policy)
        running = bench.submit()
        bench.fail(task, OSError())
        bench.submit()
        bench.advance(1.0)
        assert running.state is TaskState.RUNNING
        assert bench.core.queue_length == 2

    def test_after_shutdown_as_in_the_standard_library(self, make_bench) -> None:
        bench = make_bench()
        bench.do(bench.core.shutdown, cancel_futures=False)
        with pytest.raises(PoolClosedError, match=r"^cannot schedule new futures after shutdown$"):
            bench.submit()
        assert bench.core.counters.submitted == 0


class TestCancel:
    def test_what_waits_can_be_cancelled_and_is_not_run(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        running, worker = bench.started()
        task, other = bench.submit(), bench.submit()
        assert bench.do(bench.core.cancel, task)
        assert task.state is TaskState.RESOLVED
        bench.finish(running)
        assert worker.running is other
        assert bench.core.counters.cancelled == 1

    def test_so_can_what_waits_for_a_retry(self, make_bench) -> None:
        bench = make_bench()
        policy = RetryPolicy(retry=tenacity.retry_if_exception_type(), wait=tenacity.wait_fixed(1))
        task, _ = bench.started(policy=policy)
        bench.fail(task, OSError())
        assert bench.do(bench.core.cancel, task)
        bench.advance(10.0)
        assert task.attempts == 1

    def test_so_can_what_waits_for_a_fresh_worker(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_none()))
        bench.exit(worker)
        bench.advance(0.0)
        assert bench.core.queue_length == 1
        assert bench.do(bench.core.cancel, task)
        assert bench.core.queue_length == 0

    def test_what_runs_or_is_over_cannot(self, make_bench) -> None:
        bench = make_bench()
        task, _ = bench.started()
        assert not bench.do(bench.core.cancel, task)
        bench.finish(task)
        assert not bench.do(bench.core.cancel, task)


def warmed(bench, call_key="f", seconds=1e-5):
    """A worker, and a function that is known to take so long."""
    for _ in range(4):
        task = bench.submit(call_key)
        for worker in bench.spawned():
            bench.ready(worker)
        bench.finish(task, seconds=seconds)
    return task


class TestSendingAhead:
    def fed(self, make_bench, count=100, **settings):
        """One worker that runs a short call, with others behind it."""
        bench = make_bench(max_workers=1, **settings)
        warmed(bench)
        tasks = [bench.submit("f") for _ in range(count)]
        worker = tasks[0].worker
        bench.finish(tasks[0])
        return bench, worker, tasks

    def test_short_calls_of_one_function_travel_together(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench)
        assert len(worker.backlog) == MAX_BACKLOG
        assert [task.id for task in worker.backlog] == [task.id for task in tasks[2 : 2 + MAX_BACKLOG]]
        assert {task.state for task in worker.backlog} == {TaskState.ASSIGNED}
        assert bench.core.active == 1
        for task in tasks[1:]:
            assert worker.running is task
            assert task.attempts == 1
            bench.finish(task)
        assert sent_to(bench, worker)[4:] == [task.id for task in tasks], "each was sent once, in order"

    def test_a_worker_takes_no_more_than_its_share(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        warmed(bench)
        tasks = [bench.submit("f") for _ in range(12)]
        for worker in bench.spawned():
            bench.ready(worker)
        bench.finish(tasks[0])
        assert len(tasks[0 + 2].worker.backlog) == 4

    def test_unknown_and_long_calls_go_alone(self, make_bench) -> None:
        for seconds, known in ((1e-5, "g"), (0.005, "f")):
            bench = make_bench(max_workers=1)
            warmed(bench, known, seconds)
            tasks = [bench.submit("f") for _ in range(50)]
            worker = tasks[0].worker
            bench.finish(tasks[0], seconds=seconds)
            assert not worker.backlog

    def test_what_waits_behind_a_slow_one_is_given_back_and_placed_elsewhere(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench, count=5)
        slow, behind = tasks[1], tasks[2:5]
        bench.advance(GIVE_BACK_AFTER)
        assert bench.asked(act.Revoke) == [act.Revoke(worker)]
        for task in reversed(list(worker.backlog)):
            bench.do(bench.core.task_given_back, task)
        assert [task.id for task in bench.core.queue] == [task.id for task in behind], "in their order"
        assert all(task.attempts == 0 and task.worker is None for task in behind)
        assert slow.state is TaskState.RUNNING
        assert bench.core.counters.given_back == 3

    def test_the_time_counts_for_each_head_anew(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench, count=10)
        for task in tasks[1:4]:
            bench.advance(GIVE_BACK_AFTER * 0.7)
            bench.finish(task)
        assert bench.asked(act.Revoke) == []
        bench.advance(GIVE_BACK_AFTER)
        assert bench.asked(act.Revoke) == [act.Revoke(worker)]

    def test_where_nothing_waits_any_more_nothing_is_taken_back(self, make_bench) -> None:
        bench, _, tasks = self.fed(make_bench, count=4)
        for task in tasks[1:3]:
            bench.finish(task)
        bench.advance(1.0)
        assert tasks[3].state is TaskState.RUNNING
        bench.finish(tasks[3])
        bench.advance(1.0)
        assert bench.asked(act.Revoke) == []

    def test_a_worker_that_sits_idle_by_then_is_left_alone(self, make_bench) -> None:
        bench, _, tasks = self.fed(make_bench, count=4)
        for task in tasks[1:]:
            bench.finish(task)
        bench.advance(1.0)
        assert bench.asked(act.Revoke) == []

    def test_a_higher_priority_does_not_wait_behind_them(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench)
        urgent = bench.submit("f", priority=1)
        bench.finish(worker.running)
        assert urgent.state is TaskState.QUEUED
        for task in tasks[2 : 2 + MAX_BACKLOG]:
            bench.finish(task)
        assert worker.running is urgent, "the worker was fed no more, and ran dry"

    def test_no_worker_gets_more_tasks_than_it_may_run(self, make_bench) -> None:
        bench, worker, _ = self.fed(make_bench, max_tasks_per_child=9)
        assert worker.task_limit == 9
        assert worker.tasks_done + 1 + len(worker.backlog) == 9
        while worker.running is not None:
            bench.finish(worker.running)
        assert worker.tasks_done == 9
        assert bench.asked(act.Retire) == [act.Retire(worker, "max_tasks_per_child")]

    def test_a_worker_whose_memory_is_in_doubt_is_fed_no_more(self, make_bench) -> None:
        bench, worker, _ = self.fed(make_bench)
        bench.finish(worker.running, rss_bytes=150 << 20)
        while worker.running is not None:
            bench.finish(worker.running)
        assert worker.state is WorkerState.CHECKING
        assert bench.core.queue_length > 0

    def test_a_worker_that_is_to_be_recycled_is_fed_no_more(self, make_bench) -> None:
        bench, worker, _ = self.fed(make_bench, count=140)
        bench.do(bench.core.kill_task, worker.running, TaskKilledError("x"))
        assert bench.asked(act.Revoke) == [act.Revoke(worker)]
        done = 0
        while worker.running is not None:
            bench.finish(worker.running)
            done += 1
        assert done == 1 + MAX_BACKLOG
        assert worker.state is WorkerState.RETIRING

    def test_nothing_is_sent_ahead_while_a_task_waits_for_a_fresh_worker(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench, count=140)
        killer = bench.submit("g", policy=RetryPolicy(wait=tenacity.wait_none()), priority=1)
        while worker.running is not killer:
            bench.finish(worker.running)
        bench.exit(worker)
        bench.do(bench.core.reset_breaker)
        bench.advance(0.0)
        (fresh,) = bench.spawned()
        bench.ready(fresh)
        assert fresh.running is killer
        assert not fresh.backlog
        bench.finish(killer)
        assert fresh.backlog, "later it is a worker as any other"
        assert not tasks[-1].is_isolated

    def test_workers_run_dry_while_one_waits_for_a_fresh_one(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        warmed(bench)
        killer = bench.submit("g", policy=RetryPolicy(wait=tenacity.wait_none()))
        tasks = [bench.submit("f") for _ in range(140)]
        (second,) = bench.spawned()
        bench.ready(second)
        bench.finish(tasks[0])
        before = len(second.backlog)
        bench.finish(second.running)
        assert len(second.backlog) == before, "as long as there are short ones, it is fed again"
        bench.exit(killer.worker)
        bench.advance(0.0)
        assert killer.state is TaskState.QUEUED
        bench.finish(second.running)
        assert len(second.backlog) == before - 1
        (replacing,) = bench.spawned()
        bench.ready(replacing)
        assert killer.worker is replacing

    def test_a_crash_costs_only_the_task_that_ran(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench, count=6)
        bench.exit(worker)
        assert isinstance(bench.outcomes[tasks[1].id][1], WorkerCrashedError)
        assert [task.id for task in bench.core.queue] == [task.id for task in tasks[2:]]
        assert all(task.attempts == 0 and task.kills == 0 for task in tasks[2:])

    def test_a_stopped_neighbour_costs_nothing_but_time(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench, count=6)
        bench.core._stop_task(bench.now, tasks[1], StopCause(TaskKilledError("x"), bench.now, is_final=True), ask=False)
        bench.take()
        bench.fail(tasks[1], TaskKilledError("x"))
        assert worker.running is tasks[2], "it may have begun in the dying worker"
        bench.exit(worker, began=False)
        assert bench.core.breaker.failure_count(bench.now) == 0
        assert [task.id for task in bench.core.queue] == [task.id for task in tasks[2:]]
        assert tasks[2].attempts == 0

    def test_a_neighbour_that_had_begun_in_a_worker_that_was_killed_is_lost_but_not_to_blame(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench, count=6)
        bench.core._stop_task(bench.now, tasks[1], StopCause(TaskKilledError("gone"), bench.now), ask=False)
        bench.take()
        bench.fail(tasks[1], TaskKilledError("x"))
        bench.exit(worker, began=True)
        error = bench.outcomes[tasks[2].id][1]
        assert "was stopped (gone) while it ran" in str(error)
        assert tasks[2].kills == 0

    def test_what_was_sent_ahead_gets_the_error_when_everything_is_stopped(self, make_bench) -> None:
        bench, worker, tasks = self.fed(make_bench, count=6)
        bench.do(bench.core.stop_all, TaskKilledError("emergency"))
        bench.finish(tasks[1], "too late")
        bench.exit(worker, began=True)
        assert bench.core.is_closed
        assert [str(bench.outcomes[task.id][1]) for task in tasks[1:]] == ["emergency"] * 5
        assert len({id(bench.outcomes[task.id][1]) for task in tasks[1:]}) == 5


class TestTakingBack:
    def test_a_call_that_a_worker_passed_over_is_placed_again(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(timeout=5.0)
        bench.do(bench.core.task_skipped, worker, task)
        assert bench.sent == [(worker, task), (worker, task)]
        assert task.attempts == 1
        assert task.timer.when == bench.now + 5.0

    def test_a_head_that_had_not_begun_can_be_taken_back_and_cancelled(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started()
        bench.core.task_given_back(bench.now, task)
        assert bench.core.cancel(bench.now, task)
        bench.take()
        assert worker.state is WorkerState.IDLE
        assert task.attempts == 0

    def test_a_skip_from_a_worker_that_does_not_have_it_is_nobodys_business(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        task, worker = bench.started()
        other = bench.idle_worker()
        bench.do(bench.core.task_skipped, other, task)
        assert worker.running is task

    def test_a_task_that_is_not_in_a_worker_cannot_be_taken_back(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        bench.started()
        task = bench.submit()
        bench.do(bench.core.task_given_back, task)
        assert bench.core.counters.given_back == 0

    def test_one_that_was_to_stop_and_had_not_begun_gets_its_error_uncharged(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        error = TaskKilledError("x")
        bench.do(bench.core.kill_task, task, error)
        bench.do(bench.core.task_skipped, worker, task)
        assert bench.outcomes[task.id] == (False, error)
        assert task.attempts == 0

    def test_a_task_that_killed_a_worker_keeps_its_place_apart(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_none()))
        bench.exit(worker)
        bench.advance(0.0)
        (fresh,) = bench.spawned()
        bench.ready(fresh)
        bench.do(bench.core.task_skipped, fresh, task)
        assert fresh.running is task, "it is still fresh, as nothing ran in it"


class TestPlacing:
    def test_a_warm_instance_is_preferred(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        analyst, first = bench.started(kind="analyst")
        auditor, second = bench.started(kind="auditor")
        bench.finish(auditor)
        bench.finish(analyst)
        assert bench.submit(kind="auditor").worker is second
        assert bench.submit(kind="analyst").worker is first

    def test_a_plain_task_leaves_warm_instances_alone_from_then_on(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        plain, first = bench.started()
        analyst, _ = bench.started(kind="analyst")
        bench.finish(plain)
        bench.finish(analyst)
        assert bench.submit().worker is first

    def test_a_key_goes_where_it_was(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        one, first = bench.started(key="session-1")
        two, second = bench.started(key="session-2")
        bench.finish(one)
        bench.finish(two)
        assert bench.submit(key="session-1").worker is first
        assert bench.submit(key="session-2").worker is second

    def test_the_latest_idle_worker_is_used_so_that_the_others_can_go(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        (one, _), (two, second) = bench.started(), bench.started()
        bench.finish(one)
        bench.finish(two)
        assert bench.submit().worker is second

    def test_per_child_limits_are_kept_and_the_successor_comes_while_work_waits(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_tasks_per_child=2)
        tasks = [bench.submit() for _ in range(3)]
        (worker,) = bench.spawned()
        bench.ready(worker)
        bench.finish(tasks[0])
        bench.finish(tasks[1])
        assert bench.asked(act.Retire) == [act.Retire(worker, "max_tasks_per_child")]
        (successor,) = bench.spawned()
        bench.ready(successor)
        assert successor.running is tasks[2]
        assert bench.core.counters.recycled == {"max_tasks_per_child": 1}

    def test_one_used_worker_makes_room_for_a_fresh_one_if_that_can_come(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_concurrent=2, breaker=BreakerSettings(failure_threshold=1))
        killer, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_fixed(5)))
        used = bench.idle_worker()
        bench.exit(worker)
        other, replacement = bench.submit(), None
        extra = bench.submit()
        (replacement,) = bench.spawned()
        bench.ready(replacement)
        for task in (other, extra):
            bench.finish(task)
        assert bench.core.live == 2
        bench.do(bench.core.force_open, "maintenance")
        bench.advance(5.0)
        assert bench.asked(act.Retire) == [], "a worker in the hand is worth two that the breaker forbids"
        bench.do(bench.core.reset_breaker)
        (retire,) = bench.asked(act.Retire)
        assert retire.reason == "room for a fresh worker"
        assert retire.worker in (used, replacement)
        (fresh,) = bench.spawned()
        bench.ready(fresh)
        assert fresh.running is killer

    def test_nobody_takes_the_fresh_worker_from_under_its_nose(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        killer, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_none()))
        bench.exit(worker)
        bench.advance(0.0)
        (fresh,) = bench.spawned()
        bench.core.worker_ready(bench.now, fresh, 7, 20 << 20)
        late = bench.submit()
        assert (fresh.running, late.state) == (killer, TaskState.QUEUED)

    def test_while_the_only_worker_is_looked_at_none_is_sent_home_for_it(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        killer, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_fixed(5)))
        bench.exit(worker)
        used = bench.idle_worker(seconds=1.0)
        bench.advance(5.0)
        assert used.state is WorkerState.CHECKING
        assert bench.asked(act.Retire) == []
        bench.sample(used, 20)
        assert bench.asked(act.Retire) == [act.Retire(used, "room for a fresh worker")]
        bench.ready(bench.spawned()[0])
        assert killer.state is TaskState.RUNNING

    def test_a_spare_that_is_fresh_does_not_let_it_pass_the_throttle(self, make_bench) -> None:
        bench = make_bench(max_workers=3, max_concurrent=1, min_workers=2)
        killer = bench.submit(policy=RetryPolicy(wait=tenacity.wait_none()))
        for spare in bench.spawned():
            bench.ready(spare)
        busy = bench.submit()
        bench.exit(killer.worker)
        bench.advance(0.0)
        for spare in bench.spawned():
            bench.ready(spare)
        assert busy.state is TaskState.RUNNING
        assert killer.state is TaskState.QUEUED
        assert any(not worker.tasks_done for worker in bench.core.idle.values())
        bench.finish(busy)
        assert killer.state is TaskState.RUNNING

    def test_it_waits_for_a_slot_like_everybody(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_concurrent=1)
        killer, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_none()))
        busy = bench.submit()
        bench.exit(worker)
        (second,) = bench.spawned()
        bench.ready(second)
        assert busy.state is TaskState.RUNNING
        bench.advance(0.0)
        assert killer.state is TaskState.QUEUED
        bench.finish(busy)
        (fresh,) = bench.spawned()
        bench.ready(fresh)
        assert fresh.running is killer

    def test_work_for_both_kinds_of_worker_starts_both_at_once(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        killer, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_none()))
        bench.exit(worker)
        bench.do(bench.core.force_open, "maintenance")
        bench.advance(0.0)
        bench.submit()
        bench.do(bench.core.reset_breaker)
        assert len(bench.spawned()) == 2
        assert killer.state is TaskState.QUEUED


class TestBreakerByHand:
    def test_forced_open_starts_nothing_and_what_runs_goes_on(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        task, worker = bench.started()
        bench.do(bench.core.force_open, "maintenance")
        assert bench.asked(act.BreakerChanged) == [act.BreakerChanged("closed", "forced_open", "maintenance")]
        waiting = bench.submit()
        bench.advance(1000.0)
        assert bench.spawned() == []
        bench.finish(task)
        assert waiting.worker is worker
        bench.submit()
        bench.do(bench.core.reset_breaker)
        assert bench.asked(act.BreakerChanged) == [act.BreakerChanged("forced_open", "closed", "")]
        assert len(bench.spawned()) == 1


class TestShutdown:
    def test_what_was_accepted_is_done_first(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        first, worker = bench.started()
        second = bench.submit()
        assert bench.do(bench.core.shutdown, cancel_futures=False) == []
        bench.finish(first)
        bench.finish(second)
        bench.exit(worker, 0)
        assert bench.core.is_closed
        assert len(bench.outcomes) == 2
        assert " shutdown\n" in bench.core.story()

    def test_cancel_futures_returns_what_no_worker_has(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        running, _ = bench.started()
        waiting = [bench.submit() for _ in range(3)]
        assert bench.do(bench.core.shutdown, cancel_futures=True) == waiting
        assert bench.core.counters.cancelled == 3
        bench.finish(running, 1)
        assert bench.outcomes == {running.id: (True, 1)}

    def test_a_task_whose_worker_is_just_starting_counts_as_running(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_concurrent=2)
        tasks = [bench.submit() for _ in range(5)]
        assert bench.do(bench.core.shutdown, cancel_futures=True) == tasks[2:]
        for worker in bench.spawned():
            bench.ready(worker)
        assert [task.state for task in tasks[:2]] == [TaskState.RUNNING] * 2

    def test_but_not_where_the_breaker_lets_none_start(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        bench.do(bench.core.force_open, "maintenance")
        tasks = [bench.submit() for _ in range(3)]
        assert bench.do(bench.core.shutdown, cancel_futures=True) == tasks
        assert bench.core.is_closed


class TestDeadlines:
    def test_the_soonest_of_timers_and_breaker(self, make_bench) -> None:
        bench = make_bench(breaker=BreakerSettings(failure_threshold=1, open_seconds=30), idle_timeout=None)
        assert bench.core.next_deadline() is None
        task = bench.submit()
        bench.exit(bench.spawned()[0], 1)
        assert bench.core.next_deadline() < 1.0
        bench.do(bench.core.cancel, task)
        bench.advance(5.0)
        assert bench.core.next_deadline() == 30.0, "the breaker's"
        bench.submit(queue_timeout=2.0)
        assert bench.core.next_deadline() == 7.0
        bench.advance(40.0)
        assert bench.core.breaker.state is BreakerState.HALF_OPEN

    def test_nothing_to_do_is_an_empty_list_and_costs_nothing(self, make_bench) -> None:
        bench = make_bench()
        assert bench.core.take_actions(0.0) == []
        worker = bench.idle_worker()
        assert bench.core.take_actions(bench.now) == []
        assert worker.state is WorkerState.IDLE


class TestInDetail:
    def test_the_whole_refusal_of_a_full_queue(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_pending=2)
        bench.started()
        for _ in range(2):
            bench.submit()
        with pytest.raises(QueueFullError) as raised:
            bench.submit()
        assert str(raised.value) == (
            "2 tasks are queued already (max_pending); wait for results, raise max_pending, or submit with "
            "options(block=True) from a thread that may wait")

    def test_a_breaker_that_is_opened_for_a_time_closes_after_it(self, make_bench) -> None:
        bench = make_bench()
        bench.now = 100.0
        bench.do(bench.core.force_open, "maintenance", 5.0)
        bench.submit()
        bench.advance(4.9)
        assert not bench.spawned()
        bench.advance(0.1)
        assert len(bench.spawned()) == 1

    def test_a_breaker_that_is_held_closed_for_a_time_allows_starts_until_then(self, make_bench) -> None:
        bench = make_bench(breaker=BreakerSettings(failure_threshold=1))
        bench.now = 100.0
        bench.submit()
        bench.exit(*bench.spawned())
        assert bench.core.breaker.state is BreakerState.OPEN
        bench.do(bench.core.hold_closed, 5.0)
        (worker,) = bench.spawned()
        bench.exit(worker)
        assert bench.core.breaker.state is BreakerState.CLOSED
        bench.advance(4.0)
        bench.exit(*bench.spawned())
        assert bench.core.breaker.state is BreakerState.CLOSED, "for 5 seconds whatever fails"
        bench.advance(2.0)
        bench.exit(*bench.spawned())
        assert bench.core.breaker.state is BreakerState.OPEN

    def test_a_probe_that_fails_opens_it_for_longer(self, make_bench) -> None:
        bench = make_bench(breaker=BreakerSettings(failure_threshold=1, open_seconds=30.0))
        bench.submit()
        bench.exit(*bench.spawned())
        bench.advance(30.0)
        (probe,) = bench.spawned()
        assert probe.is_probe
        bench.exit(probe)
        assert bench.core.breaker.state is BreakerState.OPEN
        bench.advance(59.9)
        assert not bench.spawned()
        bench.advance(0.1)
        assert len(bench.spawned()) == 1

    def test_one_that_waits_for_memory_and_is_withdrawn_waits_no_longer(self, make_bench) -> None:
        bench = make_bench(memory_limit_mb=None)
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=600 * MB)
        task = bench.submit(expected_bytes=600 * MB)
        assert bench.core.is_memory_awaited is True
        assert bench.do(bench.core.cancel, task)
        assert bench.core.is_memory_awaited is False

    def test_a_growth_limit_wants_its_first_reading_although_the_last_one_is_there(self, make_bench) -> None:
        bench = make_bench(memory_limit_mb=None)
        task, worker = bench.started(growth_limit_bytes=50 * MB)
        bench.finish(task, rss_bytes=30 * MB)
        assert worker.state is WorkerState.CHECKING
        bench.sample(worker, 30)
        assert worker.state is WorkerState.IDLE
        assert worker.warm_bytes == 30 * MB
        bench.finish(bench.submit(growth_limit_bytes=60 * MB), rss_bytes=31 * MB)
        assert worker.state is WorkerState.IDLE, "it is known from where the growth counts"

    def test_as_many_workers_as_may_run_however_the_tasks_wait(self, make_bench) -> None:
        bench = make_bench(max_workers=8, max_concurrent=2)
        task, worker = bench.started(policy=compile_policy(3))
        bench.exit(worker)
        for _ in range(5):
            bench.submit()
        assert task.state is TaskState.WAITING_RETRY
        for other in bench.spawned():
            bench.exit(other)
        bench.advance(60)
        assert task.is_isolated
        assert task.state is TaskState.QUEUED
        assert bench.core.live == 2

    def test_a_past_attempt_is_kept_and_the_next_begins_anew(self, make_bench) -> None:
        bench = make_bench()
        policy = RetryPolicy(wait=tenacity.wait_fixed(2), retry=tenacity.retry_if_exception_type(OSError))
        task, _ = bench.started(policy=policy)
        bench.advance(3.0)
        error = OSError()
        task.peak_rss_bytes = 70 * MB
        bench.fail(task, error)
        (past,) = task.past
        assert (past.ended_at, past.error, past.peak_rss_bytes) == (3.0, error, 70 * MB)
        assert task.peak_rss_bytes == 0
        assert task.highest_rss_bytes == 70 * MB

    def test_a_stopped_task_that_is_tried_again_ended_then(self, make_bench) -> None:
        bench = make_bench()
        policy = RetryPolicy(wait=tenacity.wait_fixed(2), retry=tenacity.retry_if_exception_type(TaskTimeoutError))
        task, worker = bench.started(policy=policy, timeout=1.0)
        bench.advance(1.0)
        bench.do(bench.core.stop_acknowledged, worker, task)
        bench.now = 1.5
        bench.fail(task, KeyboardInterrupt())
        assert task.state is TaskState.WAITING_RETRY
        assert task.past[0].ended_at == 1.5

    def test_a_stopped_task_of_a_lost_session_is_not_tried_again(self, make_bench) -> None:
        bench = make_bench()
        policy = RetryPolicy(wait=tenacity.wait_fixed(2), retry=tenacity.retry_if_exception_type(TaskTimeoutError))
        task, worker = bench.started(policy=policy, timeout=1.0, session=SessionRecord(1, None, None))
        bench.advance(1.0)
        bench.exit(worker)
        assert task.state is TaskState.RESOLVED
        assert isinstance(bench.outcomes[task.id][1], TaskTimeoutError)

    def test_another_error_than_that_of_memory_changes_no_limit(self, make_bench) -> None:
        class Asks(RetryPolicy):
            def after_memory_limit(self, limit_bytes: int | None) -> tuple[int | None, bool]:
                raise AssertionError("no memory limit was passed")

        bench = make_bench()
        task, _ = bench.started(policy=Asks(retry=tenacity.retry_if_exception_type(OSError)), hard_limit_bytes=9 * MB)
        bench.fail(task, OSError())
        assert task.state is TaskState.WAITING_RETRY
        assert (task.hard_limit_bytes, task.is_alone) == (9 * MB, False)
