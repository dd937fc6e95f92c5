"""Details of tasks, workers, queues and plans that mutation testing found nobody looking at. See docs/mutants.md."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity

from agentpool.config import MB, BreakerSettings
from agentpool.core.plan import NodeState, PlanNode, PlanState, StartAgent, StopAgent
from agentpool.core.queueing import TaskQueue
from agentpool.core.records import TaskRecord, TaskSpec
from agentpool.core.retry import RetryPolicy
from agentpool.core.transitions import BreakerState, TaskState, WorkerState
from agentpool.errors import CircuitOpenError, TaskKilledError

ONCE_MORE = RetryPolicy(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_fixed(0.0),
                        retry=tenacity.retry_if_exception_type())


def crew(make_bench, count: int, **settings):
    """So many workers, each busy."""
    bench = make_bench(max_workers=count, **settings)
    tasks = [bench.submit(call_key="f") for _ in range(count)]
    for worker in bench.spawned():
        bench.ready(worker)
    return bench, tasks, [task.worker for task in tasks]


def trusted(bench, worker, *, waiting: int, **spec: Any) -> None:
    """The pool knows by now that calls of `f` are short; so many of them wait, and one is in the worker."""
    for _ in range(4):
        bench.submit(call_key="f")
        bench.finish(worker.running, seconds=0.00001)
    for _ in range(waiting):
        bench.submit(call_key="f", **spec)


class TestTasks:
    def test_the_reason_of_an_open_breaker_tells_of_a_worker_lost_before_its_task_began(self, make_bench) -> None:
        bench = make_bench(breaker=BreakerSettings(failure_threshold=1))
        _, worker = bench.started()
        bench.exit(worker, began=False)
        assert bench.core.breaker.reason.endswith("a worker was killed by SIGKILL before its task began")

    def test_what_a_worker_began_after_the_pool_was_stopped_fails(self, make_bench) -> None:
        bench, _, (worker,) = crew(make_bench, 1)
        trusted(bench, worker, waiting=5)
        bench.finish(worker.running, seconds=0.00001)
        head, second = worker.running, worker.backlog[0]
        bench.do(bench.core.stop_all, TaskKilledError("stop"))
        bench.finish(head)
        assert worker.running is second
        bench.exit(worker)
        is_value, error = bench.outcomes[second.id]
        assert (is_value, type(error)) == (False, TaskKilledError)

    def test_a_lost_dispatch_with_time_left_in_the_queue_is_not_made_again_at_once(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(queue_timeout=100.0)
        bench.exit(worker, began=False)
        assert task.state is TaskState.WAITING_RETRY
        assert task.timer.when >= 0.05

    def test_closing_waits_for_what_runs_before_it_gives_up_what_wants_a_fresh_worker(self, make_bench) -> None:
        bench, _, (worker, other) = crew(make_bench, 2)
        bench.finish(worker.running)
        task = bench.submit()
        assert task.worker is worker
        bench.finish(other.running)
        isolated = bench.submit(policy=ONCE_MORE)
        bench.do(bench.core.force_open, "by hand")
        bench.exit(other)
        bench.advance(0.0)
        assert isolated.state is TaskState.QUEUED
        assert isolated.is_isolated
        bench.do(bench.core.shutdown, cancel_futures=False)
        assert bench.outcomes.keys().isdisjoint({task.id, isolated.id})
        bench.finish(worker.running)
        is_value, error = bench.outcomes[isolated.id]
        assert (is_value, type(error)) == (False, CircuitOpenError)

    def test_closing_gives_up_what_is_queued_where_nobody_can_run_it(self, make_bench) -> None:
        bench = make_bench()
        bench.do(bench.core.force_open, "by hand")
        task = bench.submit()
        bench.do(bench.core.shutdown, cancel_futures=False)
        is_value, error = bench.outcomes[task.id]
        assert (is_value, type(error)) == (False, CircuitOpenError)

    def test_one_given_back_by_its_worker_leaves_it_idle_since_then(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        bench.now = 4.0
        bench.do(bench.core.pause)
        bench.do(bench.core.task_given_back, task)
        assert (worker.state, worker.idle_since) == (WorkerState.IDLE, 4.0)


class TestSentAhead:
    def test_a_call_of_another_function_ends_it_and_what_was_sent_is_watched(self, make_bench) -> None:
        bench, _, (worker,) = crew(make_bench, 1)
        trusted(bench, worker, waiting=2)
        others = [bench.submit(call_key="g") for _ in range(3)]
        bench.finish(worker.running, seconds=0.00001)
        assert len(worker.backlog) == 1
        assert {task.state for task in others} == {TaskState.QUEUED}
        assert worker.backlog_timer is not None

    def test_whoever_was_sent_waits_no_longer_in_the_queue(self, make_bench) -> None:
        bench, _, (worker,) = crew(make_bench, 1)
        trusted(bench, worker, waiting=6, queue_timeout=50.0)
        bench.finish(worker.running, seconds=0.00001)
        assert [task.timer for task in worker.backlog] == [None] * len(worker.backlog)
        assert worker.backlog
        bench.now = 60.0
        bench.take()
        assert bench.core.counters.failed == 0

    def test_each_of_those_that_ended_a_call_in_one_moment_is_sent_more(self, make_bench) -> None:
        bench, _, workers = crew(make_bench, 2)
        for _ in range(3):
            for worker in workers:
                bench.submit(call_key="f")
                bench.finish(worker.running, seconds=0.00001)
        for _ in range(12):
            bench.submit(call_key="f")
        for worker in workers:
            bench.finish(worker.running, seconds=0.00001)
        before = [len(worker.backlog) for worker in workers]
        assert all(before)
        for _ in range(20):
            bench.submit(call_key="f")
        for worker in workers:
            bench.core.task_finished(bench.now, worker, worker.running, True, None, 0.00001, 0)
        bench.take()
        assert all(len(worker.backlog) > count for worker, count in zip(workers, before, strict=True))

    def test_a_worker_that_is_given_its_last_call_while_it_is_idle_is_leaving(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_tasks_per_child=2)
        worker = bench.idle_worker()
        worker.tasks_done = 0
        first = bench.submit(call_key="f")
        bench.finish(first, seconds=0.001)
        assert worker.task_limit == 2
        assert not worker.is_leaving
        bench.submit(call_key="f")
        assert worker.is_leaving


class TestWorkers:
    def test_one_that_was_told_to_end_says_why(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker()
        bench.do(bench.core.recycle, worker.id)
        assert (worker.state, worker.reason) == (WorkerState.RETIRING, "by hand")

    def test_a_start_that_succeeds_ends_the_series_of_those_that_failed(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        bench.submit()
        for _ in range(3):
            (worker,) = bench.spawned()
            bench.exit(worker, 1)
            bench.advance(5.0)
        (worker,) = bench.spawned()
        bench.ready(worker)
        bench.exit(worker, began=False)
        assert bench.spawned() == []
        bench.advance(0.1)
        assert len(bench.spawned()) == 1  # after one failure the wait is 0.1 s at most

    def test_an_idle_one_that_dies_says_nothing_of_the_probe(self, make_bench) -> None:
        bench = make_bench(max_workers=2, breaker=BreakerSettings(failure_threshold=1, open_seconds=10.0))
        first, worker = bench.started()
        bench.submit()
        (failing,) = bench.spawned()
        bench.exit(failing, 1)
        bench.advance(10.0)
        (probe,) = bench.spawned()
        assert probe.is_probe
        bench.finish(first)
        bench.finish(worker.running)
        assert worker.state is WorkerState.IDLE
        bench.exit(worker)
        assert (bench.core.breaker.state, bench.core.breaker.is_probing) == (BreakerState.HALF_OPEN, True)

    def test_those_that_run_beyond_a_smaller_throttle_are_fewer_with_each_that_dies(self, make_bench) -> None:
        bench, _, workers = crew(make_bench, 4)
        bench.do(bench.core.resize, None, 1)
        counts = [bench.core.overhang]
        for worker in workers:
            bench.exit(worker)
            counts.append(bench.core.overhang)
        assert counts == [3, 2, 1, 0, 0]

    def test_those_beyond_twice_a_smaller_size_are_fewer_with_each_that_dies(self, make_bench) -> None:
        bench, _, workers = crew(make_bench, 7)
        bench.do(bench.core.resize, 2, None)
        counts = [bench.core.left_over]
        for worker in workers[:4]:
            bench.exit(worker)
            counts.append(bench.core.left_over)
        assert counts == [3, 2, 1, 0, 0]

    def test_one_that_leaves_anyway_makes_room_for_one_that_was_to_go(self, make_bench) -> None:
        bench, _, (leaving, marked, other) = crew(make_bench, 3, max_tasks_per_child=3)
        bench.finish(leaving.running, seconds=0.001)
        bench.submit(call_key="f")
        bench.do(bench.core.resize, 2, None)
        assert marked.retire_reason == "resize"
        bench.exit(other)
        leaving.task_limit = 2
        bench.core._consider_leaving(leaving, leaving.running)
        assert (bench.core.live, bench.core.leaving) == (2, 1)
        bench.core.task_finished(bench.now, marked, marked.running, True, None, 0.001, 0)
        assert marked.state is WorkerState.IDLE


class TestStory:
    @pytest.mark.parametrize("ended_by", ["drain", "shutdown", "stop_all"])
    def test_it_tells_when_a_pause_ended(self, make_bench, ended_by) -> None:
        bench = make_bench()
        bench.started()
        bench.do(bench.core.pause)
        bench.now = 3.0
        how: dict[str, Any] = {"shutdown": {"cancel_futures": False}, "stop_all": {"error": TaskKilledError("stop")}}
        bench.do(getattr(bench.core, ended_by), **how.get(ended_by, {}))
        assert "3.000000 resumed" in bench.core.story()


def test_what_was_dropped_and_passed_over_is_counted_no_longer() -> None:
    queue = TaskQueue()
    tasks = [TaskRecord(number, TaskSpec(), None) for number in range(8)]
    for task in tasks:
        queue.push(task)
    for task in tasks[:5]:
        task.state = TaskState.RESOLVED
        queue.discard()
    assert queue._dropped == 5
    assert queue.pop() is tasks[5]
    assert queue._dropped == 0


class TestPlan:
    @staticmethod
    def plan(*nodes: PlanNode, budget_mb: int | None = None) -> PlanState:
        state = PlanState(0.0, nodes, budget_bytes=None if budget_mb is None else budget_mb * MB)
        state.take_actions(0.0)
        return state

    @staticmethod
    def read(state: PlanState, now: float, **held_mb: int) -> list[StartAgent | StopAgent]:
        state.memory_sampled(now, {name: (now, mb * MB) for name, mb in held_mb.items()})
        return state.take_actions(now)

    def test_before_anything_happened_there_is_nothing_to_tell(self) -> None:
        state = PlanState(0.0, [PlanNode(name="a")])
        assert (state.reason_of("a"), state.ending_reason, state.peak_bytes) == (None, None, 0)

    def test_at_the_budget_nobody_is_stopped(self) -> None:
        state = self.plan(PlanNode(name="a"), PlanNode(name="b"), budget_mb=100)
        assert [self.read(state, now, a=60, b=40) for now in (1.0, 2.0, 3.0)] == [[], [], []]

    def test_what_was_over_the_budget_and_is_not_begins_anew(self) -> None:
        state = self.plan(PlanNode(name="a"), PlanNode(name="b"), budget_mb=100)
        held = [(70, 40), (60, 40), (70, 40), (70, 40)]
        actions = [self.read(state, now, a=a, b=b) for now, (a, b) in enumerate(held, 1)]
        assert [[action.name for action in each] for each in actions] == [[], [], [], ["a"]]

    def test_after_one_was_stopped_the_next_needs_two_readings_as_well(self) -> None:
        state = self.plan(PlanNode(name="a"), PlanNode(name="b"), PlanNode(name="c"), budget_mb=100)
        assert not self.read(state, 1.0, a=90, b=70, c=40)
        assert [action.name for action in self.read(state, 2.0, a=90, b=70, c=40)] == ["a"]
        state.failed(3.0, "a")
        assert not self.read(state, 4.0, b=70, c=40)
        assert [action.name for action in self.read(state, 5.0, b=70, c=40)] == ["b"]

    def test_a_fallback_begins_with_nothing_held(self) -> None:
        state = self.plan(PlanNode(name="a", expected_bytes=(30 * MB, 20 * MB)), budget_mb=100)
        self.read(state, 1.0, a=90)
        state.failed(2.0, "a")
        assert state.take_actions(2.0) == [StartAgent("a", 1)]
        self.read(state, 3.0)
        assert state.peak_bytes == 90 * MB

    def test_one_that_was_skipped_does_not_keep_the_next_from_starting(self) -> None:
        state = self.plan(PlanNode(name="a"), PlanNode(name="x"), PlanNode(name="b", after=("a", "x")),
                          PlanNode(name="c", after=("a",)))
        state.failed(1.0, "x")
        assert state.state_of("b") is NodeState.SKIPPED
        state.succeeded(2.0, "a")
        assert state.take_actions(2.0) == [StartAgent("c", 0)]
