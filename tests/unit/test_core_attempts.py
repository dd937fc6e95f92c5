"""How attempts end: results, errors, retries, crashes, timeouts, kills, time in the queue."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity

from agentpool.config import BreakerSettings
from agentpool.core import actions as act
from agentpool.core.attempts import ACKNOWLEDGE_WITHIN, DUMP_SECONDS
from agentpool.core.retry import RetryPolicy, compile_policy
from agentpool.core.transitions import TaskState, WorkerState
from agentpool.errors import (
    CircuitOpenError,
    InternalError,
    QuarantinedError,
    QueueTimeoutError,
    TaskKilledError,
    TaskTimeoutError,
    WorkerCrashedError,
)


def every_error(attempts: int, wait: float = 0.0) -> RetryPolicy:
    return RetryPolicy(stop=tenacity.stop_after_attempt(attempts), wait=tenacity.wait_fixed(wait),
                       retry=tenacity.retry_if_exception_type())


def respawn(bench) -> None:
    """Let a new worker come, whatever back-off there is."""
    for _ in range(20):
        for worker in bench.spawned():
            if worker.state is WorkerState.STARTING:
                bench.ready(worker)
                return
        bench.advance(1.0)
    pytest.fail("no worker came")


class TestResults:
    def test_a_value_is_passed_through(self, make_bench) -> None:
        bench = make_bench()
        task, _ = bench.started()
        bench.finish(task, value := object())
        assert bench.outcomes[task.id] == (True, value)
        assert task.state is TaskState.RESOLVED
        assert task.attempts == 1
        assert bench.core.counters.completed == 1

    def test_what_is_over_has_no_worker_and_no_cause_to_stop_so_that_late_words_find_nothing(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        bench.do(bench.core.kill_task, task, TaskKilledError("x"))
        bench.fail(task, TaskKilledError("x"))
        assert (task.worker, task.stop) == (None, None)
        bench.do(bench.core.task_skipped, worker, task)
        bench.do(bench.core.task_given_back, task)
        bench.do(bench.core.stop_acknowledged, worker, task, "late")
        assert not bench.do(bench.core.kill_task, task, TaskKilledError("y"))
        assert bench.core.counters.given_back == 0

    def test_an_error_is_final_without_a_policy(self, make_bench) -> None:
        bench = make_bench()
        task, _ = bench.started()
        bench.fail(task, error := ValueError("x"))
        assert bench.outcomes[task.id] == (False, error)
        assert bench.core.counters.failed == 1

    def test_an_error_that_is_no_exception_is_passed_through_all_the_same(self, make_bench) -> None:
        bench = make_bench()
        task, _ = bench.started()
        bench.fail(task, "what the shell thinks of")
        assert bench.outcomes[task.id] == (False, "what the shell thinks of")
        assert task.last_error is None

    def test_what_comes_twice_or_from_elsewhere_is_dropped(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        bench.finish(task, 1)
        task.worker = worker
        bench.finish(task, 2)
        assert bench.outcomes[task.id] == (True, 1)
        assert worker.tasks_done == 1


class TestRetries:
    def test_a_failed_attempt_is_made_again_after_the_wait_and_holds_no_slot_meanwhile(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(policy=every_error(3, wait=5.0))
        bench.fail(task, OSError(1))
        assert task.state is TaskState.WAITING_RETRY
        assert worker.state is WorkerState.IDLE
        assert bench.core.active == 0
        bench.advance(4.9)
        assert task.state is TaskState.WAITING_RETRY
        bench.advance(0.1)
        assert task.state is TaskState.RUNNING
        bench.finish(task, "at last")
        assert bench.outcomes[task.id] == (True, "at last")
        assert (task.attempts, bench.core.counters.retried, task.idle_seconds) == (2, 1, 5.0)

    def test_the_last_error_is_the_outcome(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, _ = bench.started(policy=every_error(2))
        bench.fail(task, OSError(1))
        bench.advance(0.0)
        bench.fail(task, last := OSError(2))
        assert bench.outcomes[task.id] == (False, last)
        assert task.last_error is last

    def test_a_value_may_be_retried_too(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        policy = RetryPolicy(retry=tenacity.retry_if_result(lambda value: value is None), wait=tenacity.wait_none())
        task, _ = bench.started(policy=policy)
        bench.finish(task, None)
        bench.advance(0.0)
        bench.finish(task, 5)
        assert bench.outcomes[task.id] == (True, 5)
        assert task.attempts == 2

    def test_stop_after_delay_counts_from_the_first_start_even_at_time_zero(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        policy = RetryPolicy(stop=tenacity.stop_after_delay(10), wait=tenacity.wait_fixed(6),
                             retry=tenacity.retry_if_exception_type())
        task, _ = bench.started(policy=policy)
        assert task.first_started_at == 0.0
        bench.fail(task, OSError())
        bench.advance(6.0)
        bench.fail(task, OSError())
        bench.advance(6.0)
        bench.fail(task, last := OSError())
        assert bench.outcomes[task.id] == (False, last)

    def test_the_strategies_see_how_long_was_waited(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        seen = []

        def stop(state: tenacity.RetryCallState) -> bool:
            seen.append((state.attempt_number, state.idle_for))
            return len(seen) == 3

        policy = RetryPolicy(stop=stop, wait=tenacity.wait_fixed(2), retry=tenacity.retry_always)
        task, _ = bench.started(policy=policy)
        for _ in range(3):
            bench.fail(task, OSError())
            bench.advance(2.0)
        assert seen == [(1, 0.0), (2, 2.0), (3, 4.0)]

    def test_a_retried_task_goes_before_others_of_its_priority(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(policy=every_error(2))
        others = [bench.submit() for _ in range(2)]
        bench.fail(task, OSError())
        bench.advance(0.0)
        bench.finish(others[0])
        assert worker.running is task

    @pytest.mark.parametrize("outcome", ["value", OSError("the task's own")])
    def test_what_a_strategy_raises_is_the_outcome_as_in_tenacity(self, make_bench, outcome) -> None:
        def broken(state: tenacity.RetryCallState) -> bool:
            raise LookupError("a fault in the strategy")

        bench = make_bench(max_workers=1)
        task, _ = bench.started(policy=RetryPolicy(retry=broken))
        if isinstance(outcome, BaseException):
            bench.fail(task, outcome)
        else:
            bench.finish(task, outcome)
        is_value, error = bench.outcomes[task.id]
        assert not is_value
        assert isinstance(error, LookupError)
        assert error.__notes__ == [f"raised by the retry policy of <task {task.id}  RUNNING attempts=1>; "
                                   "the task is not run again"]
        assert error.__context__ is (outcome if isinstance(outcome, BaseException) else None)

    def test_a_strategy_that_raises_the_tasks_own_error_makes_no_circle(self, make_bench) -> None:
        def reraise(state: tenacity.RetryCallState) -> bool:
            assert state.outcome is not None
            state.outcome.result()
            return False

        bench = make_bench(max_workers=1)
        task, _ = bench.started(policy=RetryPolicy(retry=reraise))
        bench.fail(task, error := OSError())
        assert bench.outcomes[task.id] == (False, error)
        assert error.__context__ is None


class TestCrashes:
    def test_without_a_policy_a_begun_task_is_not_run_again(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        bench.exit(worker, -11, stderr_tail="bad pointer")
        is_value, error = bench.outcomes[task.id]
        assert not is_value
        assert type(error) is WorkerCrashedError
        assert (error.exit_code, error.stderr_tail, error.worker_pid) == (-11, "bad pointer", worker.pid)
        assert bench.core.counters.crashed == 1

    def test_with_one_it_runs_again_alone_in_a_fresh_worker(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_concurrent=2)
        task, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_none()))
        used = bench.idle_worker()
        bench.exit(worker)
        bench.advance(0.0)
        assert task.state is TaskState.QUEUED
        assert used.state is WorkerState.IDLE, "it is not fresh, and there is room for one that is"
        respawn(bench)
        assert task.worker is not used
        assert task.worker.tasks_done == 0

    def test_three_workers_killed_are_quarantine_whatever_the_policy_says(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(policy=every_error(100))
        for _ in range(2):
            bench.exit(worker)
            bench.advance(0.0)
            respawn(bench)
            worker = task.worker
        bench.exit(worker)
        is_value, error = bench.outcomes[task.id]
        assert not is_value
        assert isinstance(error, QuarantinedError)
        assert task.attempts == 3

    def test_a_worker_lost_with_the_keeper_is_not_the_tasks_fault(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_none()))
        bench.exit(worker, None, keeper_lost=True)
        bench.advance(0.0)
        assert task.kills == 0
        assert not task.is_isolated
        respawn(bench)
        bench.finish(task, 1)
        assert bench.outcomes[task.id] == (True, 1)

    def test_an_attempt_that_never_began_is_not_charged_and_made_again_by_itself(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started()
        bench.exit(worker, -9, began=False)
        assert task.state is TaskState.WAITING_RETRY
        assert (task.attempts, task.first_started_at, task.dispatch_failures) == (0, None, 1)
        assert bench.core.breaker.failure_count(bench.now) == 1, "that is a death without a culprit"
        respawn(bench)
        assert task.attempts == 1
        bench.finish(task, 5)
        assert bench.outcomes[task.id] == (True, 5)

    def test_a_dispatch_that_the_keeper_took_along_does_not_count_against_the_breaker(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started()
        bench.exit(worker, None, began=False, keeper_lost=True)
        assert bench.core.breaker.failure_count(bench.now) == 0
        assert task.state is TaskState.WAITING_RETRY

    def test_an_earlier_attempt_stays_charged(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(policy=every_error(9))
        bench.fail(task, OSError())
        bench.advance(0.0)
        bench.exit(worker, -9, began=False)
        assert (task.attempts, task.first_started_at) == (1, 0.0)


class TestBacklogLost:
    """Found by the simulator: what had begun in a worker whose results were not believed any more ran once again."""

    def lost(self, make_bench, **spec: Any) -> Any:
        bench = make_bench(max_workers=1)
        _, worker = bench.started(call_key="f", **spec)
        for _ in range(20):
            bench.submit(call_key="f", **spec)
        while len(worker.backlog) < 3:
            bench.finish(worker.running, seconds=0.0001)
        head, begun, waiting = worker.running, worker.backlog[0], worker.backlog[1]
        bench.exit(worker, begun=frozenset({begun.id}))
        return bench, head, begun, waiting

    def test_what_began_is_not_run_again_and_the_rest_is(self, make_bench) -> None:
        bench, head, begun, waiting = self.lost(make_bench)
        for task in (head, begun):
            is_value, error = bench.outcomes[task.id]
            assert not is_value
            assert isinstance(error, WorkerCrashedError)
            assert task.attempts == 1
        assert (begun.kills, waiting.attempts) == (0, 0)
        respawn(bench)
        assert waiting.state in (TaskState.RUNNING, TaskState.ASSIGNED)

    def test_it_is_where_that_is_allowed(self, make_bench) -> None:
        bench, _, begun, _ = self.lost(make_bench, policy=compile_policy(2))
        assert begun.id not in bench.outcomes
        assert begun.state is TaskState.WAITING_RETRY

    def test_when_the_pool_is_stopped_it_ends_with_the_others(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        _, worker = bench.started(call_key="f", policy=compile_policy(3))
        for _ in range(20):
            bench.submit(call_key="f", policy=compile_policy(3))
        while len(worker.backlog) < 3:
            bench.finish(worker.running, seconds=0.0001)
        begun = worker.backlog[0]
        bench.core.stop_all(bench.now, TaskKilledError("stopped"))
        bench.exit(worker, begun=frozenset({begun.id}))
        assert isinstance(bench.outcomes[begun.id][1], TaskKilledError)


class TestTimeouts:
    def test_stack_then_cancel_then_kill(self, make_bench) -> None:
        bench = make_bench(kill_grace=2)
        task, worker = bench.started(timeout=10.0)
        bench.advance(10.0)
        assert task.state is TaskState.STOPPING
        assert bench.asked(act.AskToStop) == [act.AskToStop(worker, task, wants_stack=True)]
        bench.advance(0.1)
        bench.do(bench.core.stop_acknowledged, worker, task, "File x.py, line 3\n")
        bench.advance(1.8)
        assert bench.asked(act.Kill) == []
        bench.advance(0.1)
        (kill,) = bench.asked(act.Kill)
        assert kill.reason == f"task {task.id} ran longer than its timeout of 10 s and was stopped"
        bench.exit(worker)
        error = bench.outcomes[task.id][1]
        assert isinstance(error, TaskTimeoutError)
        assert error.stack == "File x.py, line 3"
        assert error.__notes__ == ["What the worker was doing:\nFile x.py, line 3"]
        assert "STOPPING attempts=1>: TaskTimeoutError" in bench.core.story()
        assert bench.core.counters.timed_out == 1
        assert bench.core.counters.crashed == 0

    def test_a_worker_that_does_not_react_has_its_stack_dumped_by_signal_and_is_killed(self, make_bench) -> None:
        bench = make_bench(kill_grace=2)
        task, worker = bench.started(timeout=1.0)
        bench.advance(1.0 + ACKNOWLEDGE_WITHIN)
        assert bench.asked(act.DumpStack) == [act.DumpStack(worker)]
        assert bench.asked(act.Kill) == []
        bench.advance(DUMP_SECONDS)
        assert len(bench.asked(act.Kill)) == 1
        bench.exit(worker, story="Thread 0x1 (most recent call first): in C code")
        assert bench.outcomes[task.id][1].stack == "Thread 0x1 (most recent call first): in C code"

    def test_the_first_stack_stays(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(timeout=1.0)
        bench.advance(1.0)
        bench.do(bench.core.stop_acknowledged, worker, task, " \n")
        bench.do(bench.core.stop_acknowledged, worker, task, "first")
        bench.exit(worker, story="second")
        assert bench.outcomes[task.id][1].stack == "first"

    def test_a_task_that_stops_when_asked_costs_no_kill_and_its_worker_is_recycled(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(timeout=1.0)
        bench.advance(1.0)
        bench.do(bench.core.stop_acknowledged, worker, task)
        bench.fail(task, RuntimeError("cancelled"))
        assert isinstance(bench.outcomes[task.id][1], TaskTimeoutError)
        assert bench.asked(act.Kill) == []
        assert bench.asked(act.Retire) == [act.Retire(worker, "task stopped")]

    def test_a_value_that_comes_after_the_timeout_comes_too_late(self, make_bench) -> None:
        bench = make_bench()
        task, _ = bench.started(timeout=1.0)
        bench.advance(1.0)
        bench.finish(task, "too late")
        assert isinstance(bench.outcomes[task.id][1], TaskTimeoutError)

    def test_a_result_that_comes_from_a_worker_that_is_being_killed_frees_its_slot_and_not_the_worker(
        self, make_bench
    ) -> None:
        bench = make_bench(max_workers=1, kill_grace=0)
        task, worker = bench.started(timeout=1.0)
        waiting = bench.submit()
        bench.advance(1.0 + DUMP_SECONDS)
        assert worker.state is WorkerState.KILLED
        bench.finish(task, "too late")
        assert isinstance(bench.outcomes[task.id][1], TaskTimeoutError)
        assert worker.state is WorkerState.KILLED
        (successor,) = bench.spawned()
        bench.ready(successor)
        assert successor.running is waiting

    def test_the_clock_starts_with_the_task_and_stops_with_it(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        first, _ = bench.started(timeout=10.0)
        second = bench.submit(timeout=10.0)
        bench.advance(9.0)
        bench.finish(first)
        bench.advance(9.0)
        assert second.state is TaskState.RUNNING
        bench.finish(second)
        bench.advance(100.0)
        assert bench.core.counters.timed_out == 0

    def test_a_policy_may_try_a_timeout_again(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        policy = RetryPolicy(retry=tenacity.retry_if_exception_type(TaskTimeoutError), wait=tenacity.wait_none())
        task, worker = bench.started(timeout=1.0, policy=policy)
        bench.advance(2.0)
        bench.exit(worker)
        bench.advance(0.0)
        respawn(bench)
        assert (task.state, task.attempts) == (TaskState.RUNNING, 2)

    def test_a_grace_shorter_than_the_time_to_acknowledge_is_kept(self, make_bench) -> None:
        bench = make_bench(kill_grace=0.1)
        _, worker = bench.started()
        bench.do(bench.core.kill_task, worker.running, TaskKilledError("x"))
        bench.advance(0.1)
        assert len(bench.asked(act.Kill)) == 1

    def test_an_acknowledgement_of_a_task_that_is_over_or_killed_changes_nothing(self, make_bench) -> None:
        bench = make_bench(kill_grace=0)
        task, worker = bench.started(timeout=1.0)
        bench.do(bench.core.stop_acknowledged, worker, task, "not asked")
        bench.advance(1.0 + DUMP_SECONDS)
        assert worker.state is WorkerState.KILLED
        bench.asked(act.Kill)
        bench.do(bench.core.stop_acknowledged, worker, task, "while it dies")
        assert bench.asked(act.Kill) == []
        bench.exit(worker)
        assert bench.outcomes[task.id][1].stack == "while it dies"
        bench.do(bench.core.stop_acknowledged, worker, task, "too late")

    def test_a_task_that_had_not_begun_when_it_was_stopped_is_not_charged(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(timeout=1.0, policy=every_error(5))
        bench.advance(2.0)
        bench.exit(worker, began=False)
        assert isinstance(bench.outcomes[task.id][1], TaskTimeoutError)
        assert task.attempts == 0


class TestKill:
    def test_asked_first_killed_after_the_grace_and_never_tried_again(self, make_bench) -> None:
        bench = make_bench(kill_grace=2)
        task, worker = bench.started(policy=every_error(5))
        error = TaskKilledError("by hand")
        assert bench.do(bench.core.kill_task, task, error)
        assert bench.asked(act.AskToStop) == [act.AskToStop(worker, task, wants_stack=False)]
        bench.do(bench.core.stop_acknowledged, worker, task)
        bench.advance(2.0)
        assert bench.asked(act.Kill) == [act.Kill(worker, "by hand")]
        assert bench.asked(act.DumpStack) == []
        bench.exit(worker)
        assert bench.outcomes[task.id] == (False, error)

    def test_one_that_does_not_react_is_killed_without_waiting_for_the_grace(self, make_bench) -> None:
        bench = make_bench(kill_grace=60)
        task, _ = bench.started()
        bench.do(bench.core.kill_task, task, TaskKilledError(""))
        bench.advance(ACKNOWLEDGE_WITHIN)
        assert [kill.reason for kill in bench.asked(act.Kill)] == [""]
        assert task.worker.reason == "stopped"

    def test_it_wins_over_a_timeout_that_is_under_way(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(timeout=1.0, policy=every_error(9))
        bench.advance(1.0)
        error = TaskKilledError("x")
        assert bench.do(bench.core.kill_task, task, error)
        bench.do(bench.core.stop_acknowledged, worker, task, "a stack that nobody asked for")
        bench.fail(task, RuntimeError("cancelled"))
        assert bench.outcomes[task.id] == (False, error)

    def test_what_does_not_run_cannot_be_killed(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        running, _ = bench.started()
        queued = bench.submit()
        assert not bench.do(bench.core.kill_task, queued, TaskKilledError("x"))
        bench.finish(running)
        assert not bench.do(bench.core.kill_task, running, TaskKilledError("x"))


class TestTimeInTheQueue:
    def test_waiting_longer_than_queue_timeout_fails(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        bench.started()
        task = bench.submit(queue_timeout=5.0)
        bench.advance(4.9)
        assert task.state is TaskState.QUEUED
        bench.advance(0.1)
        error = bench.outcomes[task.id][1]
        assert isinstance(error, QueueTimeoutError)
        assert bench.core.queue_length == 0

    def test_a_task_that_runs_does_not_wait(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, _ = bench.started(queue_timeout=5.0)
        bench.advance(100.0)
        assert task.state is TaskState.RUNNING

    def test_a_pool_without_a_worker_and_with_an_open_breaker_says_so(self, make_bench) -> None:
        bench = make_bench(breaker=BreakerSettings(failure_threshold=1))
        task = bench.submit(queue_timeout=5.0)
        for worker in bench.spawned():
            bench.exit(worker, 1, stderr_tail="no module named x")
        bench.advance(5.0)
        error = bench.outcomes[task.id][1]
        assert isinstance(error, CircuitOpenError)
        assert "waited 5 s, the pool has no worker" in str(error)
        assert "no module named x" in str(error)
        assert "It recovers by itself" in str(error)

    def test_with_one_worker_it_is_the_queue_that_was_too_long(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        bench.started()
        bench.started()
        bench.do(bench.core.force_open, "maintenance")
        task = bench.submit(queue_timeout=5.0)
        bench.advance(5.0)
        assert isinstance(bench.outcomes[task.id][1], QueueTimeoutError)

    def test_the_wait_for_a_retry_does_not_count(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(queue_timeout=5.0, policy=every_error(2, wait=60.0))
        other = bench.submit()
        bench.fail(task, OSError())
        bench.advance(60.0)
        assert worker.running is other
        assert task.state is TaskState.QUEUED
        bench.advance(4.9)
        assert task.state is TaskState.QUEUED
        bench.advance(0.1)
        assert isinstance(bench.outcomes[task.id][1], QueueTimeoutError)

    def test_a_task_that_never_began_has_been_waiting_since_its_submission(self, make_bench) -> None:
        bench = make_bench(max_workers=1, breaker=BreakerSettings(failure_threshold=100))
        task, worker = bench.started(queue_timeout=5.0)
        while task.id not in bench.outcomes:
            bench.exit(worker, -9, began=False)
            respawn_or_end(bench, task)
            worker = task.worker
        assert bench.now == pytest.approx(5.0, abs=0.06)
        assert isinstance(bench.outcomes[task.id][1], QueueTimeoutError)
        assert task.attempts == 0

    def test_a_task_that_killed_a_worker_is_bounded_as_well(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(queue_timeout=5.0, policy=RetryPolicy(wait=tenacity.wait_none()))
        bench.do(bench.core.force_open, "maintenance")
        bench.exit(worker)
        bench.advance(5.0)
        error = bench.outcomes[task.id][1]
        assert isinstance(error, CircuitOpenError)
        assert "It was opened by hand" in str(error)
        assert bench.core.queue_length == 0

    def test_shutdown_does_not_wait_for_a_fresh_worker_that_cannot_come(self, make_bench) -> None:
        """Found by the simulator: the used worker that is idle serves everybody but who killed one before."""
        bench = make_bench(max_workers=2, max_concurrent=2, idle_timeout=None)
        task, worker = bench.started(policy=compile_policy(2))
        other, _ = bench.started()
        bench.finish(other)
        bench.exit(worker, -11)
        bench.do(bench.core.force_open, "by hand")
        bench.do(bench.core.shutdown, cancel_futures=False)
        bench.advance(10.0)
        assert isinstance(bench.outcomes[task.id][1], CircuitOpenError)
        for left in list(bench.core.workers.values()):
            bench.exit(left, 0)
        assert bench.core.is_closed

    def test_shutdown_waits_for_a_fresh_worker_whose_memory_is_looked_at(self, make_bench) -> None:
        bench = make_bench(max_workers=2, min_workers=2)
        bench.do(bench.core.start)
        for worker in bench.spawned():
            bench.ready(worker)
        task, worker = bench.started(policy=compile_policy(2))
        (fresh,) = bench.core.idle.values()
        bench.sample(fresh, 500)
        assert fresh.state is WorkerState.CHECKING
        bench.do(bench.core.force_open, "by hand")
        bench.do(bench.core.shutdown, cancel_futures=False)
        bench.exit(worker, -11)
        bench.advance(2.0)
        assert task.state is TaskState.QUEUED
        bench.do(bench.core.worker_collected, fresh)
        bench.sample(fresh, 50)
        assert task.worker is fresh

    def test_shutdown_does_not_wait_for_a_breaker_that_only_a_hand_closes(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        crashed, worker = bench.started(policy=RetryPolicy(wait=tenacity.wait_none()))
        waiting = [bench.submit() for _ in range(2)]
        bench.do(bench.core.force_open, "maintenance")
        bench.do(bench.core.shutdown, cancel_futures=False)
        assert not bench.outcomes, "the worker that there is goes on"
        bench.exit(worker)
        bench.advance(0.0)
        for task in (crashed, *waiting):
            error = bench.outcomes[task.id][1]
            assert isinstance(error, CircuitOpenError)
            assert "was not run: its pool shuts down" in str(error)
        assert bench.core.is_closed

    def test_a_breaker_that_was_opened_for_a_time_says_for_how_long(self, make_bench) -> None:
        bench = make_bench()
        bench.do(bench.core.force_open, "maintenance", 60.0)
        task = bench.submit(queue_timeout=5.0)
        bench.advance(5.0)
        assert "opened by hand for another 55 s" in str(bench.outcomes[task.id][1])

    def test_nor_for_starts_that_fail_but_for_memory_it_does(self, make_bench) -> None:
        for is_memory in (False, True):
            bench = make_bench(max_workers=1, breaker=BreakerSettings(failure_threshold=1))
            task = bench.submit()
            bench.do(bench.core.shutdown, cancel_futures=False)
            if is_memory:
                bench.core.breaker.hold("available", "too little memory")
            bench.exit(bench.spawned()[0], 1)
            assert (task.id in bench.outcomes) is not is_memory


def respawn_or_end(bench, task) -> None:
    for _ in range(200):
        for worker in bench.spawned():
            bench.ready(worker)
        if task.worker is not None or task.id in bench.outcomes:
            return
        bench.advance(0.05)
    pytest.fail("neither a worker nor an end")


class TestStopAll:
    def test_everything_ends_at_once_for_good_and_each_gets_an_error_of_his_own(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        first, _ = bench.started(policy=every_error(9))
        retried, _ = bench.started(policy=every_error(9, wait=100.0))
        bench.fail(retried, OSError())
        second = bench.submit(policy=every_error(9))
        queued = bench.submit()
        cancelled = bench.do(bench.core.stop_all, TaskKilledError("emergency"))
        assert cancelled == [queued, retried]
        assert {task.state for task in cancelled} == {TaskState.RESOLVED}
        assert bench.asked(act.AskToStop) == []
        workers = list(bench.core.workers.values())
        assert [kill.worker for kill in bench.asked(act.Kill)] == workers
        for worker in workers:
            bench.exit(worker)
        errors = [bench.outcomes[task.id][1] for task in (first, second)]
        assert [str(error) for error in errors] == ["emergency", "emergency"]
        assert errors[0] is not errors[1]
        assert bench.core.is_closed
        assert bench.spawned() == []
        assert "stopped: emergency" in bench.core.story()

    def test_a_task_that_is_being_stopped_keeps_its_cause(self, make_bench) -> None:
        bench = make_bench()
        policy = RetryPolicy(retry=tenacity.retry_if_exception_type(TaskTimeoutError))
        task, worker = bench.started(timeout=1.0, policy=policy)
        bench.advance(1.0)
        bench.do(bench.core.stop_all, TaskKilledError("x"))
        bench.do(bench.core.stop_all, TaskKilledError("y"))
        assert len(bench.asked(act.Kill)) == 1
        bench.exit(worker)
        assert isinstance(bench.outcomes[task.id][1], TaskTimeoutError)
        assert bench.core.is_closed

    def test_a_move_that_is_not_in_the_table_is_a_defect(self, make_bench) -> None:
        bench = make_bench()
        task, _ = bench.started()
        with pytest.raises(InternalError, match="RUNNING attempts=1> cannot become ASSIGNED"):
            bench.core._move_task(task, TaskState.ASSIGNED)


def test_what_a_shutdown_leaves_undone_says_why_the_breaker_is_open(make_bench) -> None:
    bench = make_bench()
    isolated, worker = bench.started(policy=compile_policy(3))
    bench.exit(worker)
    bench.do(bench.core.force_open, "the moon is full")
    waiting = bench.submit()
    bench.advance(60.0)
    assert isolated.is_isolated
    bench.do(bench.core.shutdown, cancel_futures=False)
    for task in (isolated, waiting):
        assert "the moon is full" in str(bench.outcomes[task.id][1])
