"""What happens after a memory limit: again with more, again alone, or a tool stopped in the task's place."""

from __future__ import annotations

import pytest

from agentpool.config import MB
from agentpool.core import actions as act
from agentpool.core.records import HostState, TreeState
from agentpool.core.retry import Escalate, RetryPolicy
from agentpool.core.transitions import TaskState, WorkerState
from agentpool.core.upkeep import MAX_TOOLS_STOPPED
from agentpool.errors import MemoryLimitError, SettingsError

PLENTY = HostState(10_000 * MB, 8_000 * MB)


def pass_limit(bench, task, rss_mb: float, *, processes: int = 1) -> None:
    """A reading that is plainly over the task's limit; a worker that is killed for it dies."""
    worker = task.worker
    bench.core.worker_sampled(bench.now, worker, TreeState(int(rss_mb * MB), processes))
    bench.take()
    if worker.state is WorkerState.KILLED:
        bench.exit(worker)


def restart(bench, task) -> None:
    """The back-off passes and a worker comes."""
    for _ in range(40):
        for worker in bench.spawned():
            if worker.state is WorkerState.STARTING:
                bench.ready(worker)
        if task.state is TaskState.RUNNING:
            return
        bench.advance(0.5)
    pytest.fail(f"{task!r} does not start again")


class TestEscalate:
    @pytest.mark.parametrize("given", [{"factor": 1}, {"factor": 0.5}, {"attempts": 1}])
    def test_what_would_change_nothing_is_refused(self, given) -> None:
        with pytest.raises(SettingsError, match=r"factor must be greater than 1|attempts must be at least 2"):
            Escalate(**given)

    def test_alone_may_leave_the_limit_as_it_is(self) -> None:
        assert Escalate(factor=1, alone=True).after_memory_limit(100) == (100, True)

    def test_the_limit_grows_up_to_the_cap_and_never_shrinks(self) -> None:
        policy = Escalate(factor=2, cap_mb=300)
        assert policy.after_memory_limit(100 * MB) == (200 * MB, False)
        assert policy.after_memory_limit(200 * MB) == (300 * MB, False)
        assert policy.after_memory_limit(400 * MB) == (400 * MB, False)

    def test_a_plain_policy_changes_nothing(self) -> None:
        assert RetryPolicy().after_memory_limit(100) == (100, False)

    def test_each_attempt_has_more_memory_until_it_suffices(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, _ = bench.started(policy=Escalate(factor=2), hard_limit_bytes=100 * MB)
        pass_limit(bench, task, 130)
        restart(bench, task)
        pass_limit(bench, task, 130)  # below the new limit of 200
        assert task.state is TaskState.RUNNING
        bench.finish(task, "done")
        assert bench.outcomes[task.id] == (True, "done")
        assert task.attempts == 2

    def test_the_last_attempt_fails_with_the_limit_it_had(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, _ = bench.started(policy=Escalate(factor=2, attempts=2), hard_limit_bytes=100 * MB)
        pass_limit(bench, task, 500)
        restart(bench, task)
        pass_limit(bench, task, 500)
        is_value, error = bench.outcomes[task.id]
        assert not is_value
        assert isinstance(error, MemoryLimitError)
        assert error.limit_bytes == 200 * MB

    def test_other_errors_are_final(self, make_bench) -> None:
        bench = make_bench()
        task, _ = bench.started(policy=Escalate())
        bench.fail(task, error := ValueError())
        assert bench.outcomes[task.id] == (False, error)

    def test_a_lost_worker_is_tried_again(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(policy=Escalate())
        bench.exit(worker)
        assert task.state is TaskState.WAITING_RETRY


class TestAlone:
    def test_it_waits_for_all_to_end_and_nothing_starts_beside_it(self, make_bench) -> None:
        bench = make_bench(max_workers=3)
        task, _ = bench.started(policy=Escalate(alone=True), hard_limit_bytes=100 * MB)
        other, _ = bench.started()
        pass_limit(bench, task, 500)
        bench.advance(60)
        for worker in bench.spawned():
            bench.ready(worker)
        late = bench.submit()
        assert task.state is TaskState.QUEUED, "it waits for the other to end"
        assert late.state is TaskState.QUEUED, "and what comes later waits behind it"
        bench.finish(other)
        restart(bench, task)
        assert bench.core.alone is task
        assert late.state is TaskState.QUEUED
        assert bench.submit().state is TaskState.QUEUED
        bench.advance(60)
        assert not bench.spawned(), "no worker is started that could not run anything"
        bench.finish(task)
        assert bench.core.alone is None
        for worker in bench.spawned():
            bench.ready(worker)
        assert late.state is TaskState.RUNNING

    @pytest.mark.parametrize("why", ["breaker", "cpu"])
    def test_while_no_fresh_worker_may_start_for_it_the_others_go_on(self, make_bench, why) -> None:
        bench = make_bench(max_workers=1, cpu_policy="throttle")
        task, _ = bench.started(policy=Escalate(alone=True), hard_limit_bytes=100 * MB)
        pass_limit(bench, task, 500)
        used = bench.idle_worker()
        if why == "breaker":
            bench.do(bench.core.force_open, "maintenance")
        else:
            bench.host = HostState(10_000 * MB, 8_000 * MB, cpu_percent=99)
            for _ in range(3):
                bench.do(bench.core.host_sampled, bench.host)
        bench.advance(60)
        assert task.state is TaskState.QUEUED
        other = bench.submit()
        assert other.worker is used
        bench.finish(other)
        bench.host = PLENTY
        bench.do(bench.core.reset_breaker)
        restart(bench, task)
        assert bench.core.alone is task

    def test_after_the_pools_critical_memory_it_keeps_its_limit(self, make_bench) -> None:
        bench = make_bench(max_workers=1, memory_limit_mb=None, critical_memory_mb=200)
        task, worker = bench.started(policy=Escalate(factor=2, alone=True), hard_limit_bytes=1000 * MB)
        for _ in range(3):
            bench.advance(0.1)
            if worker.state is WorkerState.BUSY:
                bench.sample(worker, 500)
        assert worker.state is WorkerState.KILLED
        bench.exit(worker)
        assert isinstance(task.last_error, MemoryLimitError)
        assert task.last_error.is_pool_wide
        assert task.hard_limit_bytes == 1000 * MB
        assert task.is_alone

    def test_shut_down_ends_it_as_any_other(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, _ = bench.started(policy=Escalate(alone=True), hard_limit_bytes=100 * MB)
        pass_limit(bench, task, 500)
        restart(bench, task)
        bench.do(bench.core.stop_all, MemoryError("stop"))
        bench.exit(task.worker)
        assert bench.core.alone is None
        assert task.state is TaskState.RESOLVED


class TestTool:
    def test_the_biggest_process_is_stopped_in_the_tasks_place(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(spares_task=True, hard_limit_bytes=100 * MB)
        pass_limit(bench, task, 500, processes=2)
        assert [action.worker for action in bench.asked(act.StopTool)] == [worker]
        assert task.state is TaskState.RUNNING
        assert bench.core.counters.tools_stopped == 1
        assert not bench.core.counters.memory_killed

    def test_the_task_is_stopped_where_there_is_no_other_process(self, make_bench) -> None:
        bench = make_bench()
        task, _ = bench.started(spares_task=True, hard_limit_bytes=100 * MB)
        pass_limit(bench, task, 500)
        assert isinstance(bench.outcomes[task.id][1], MemoryLimitError)

    def test_a_task_that_starts_them_again_and_again_is_stopped(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(spares_task=True, hard_limit_bytes=100 * MB)
        for _ in range(MAX_TOOLS_STOPPED):
            pass_limit(bench, task, 500, processes=2)
        assert worker.state is WorkerState.BUSY
        pass_limit(bench, task, 500, processes=2)
        assert isinstance(bench.outcomes[task.id][1], MemoryLimitError)


class TestWhileOneIsToRunAlone:
    def to_run_alone(self, make_bench):
        """A bench with a used worker that is idle, another task that runs, and one that waits for it to end."""
        bench = make_bench(max_workers=4)
        tasks = [bench.submit() for _ in range(2)]
        alone = bench.submit(policy=Escalate(alone=True), hard_limit_bytes=100 * MB)
        for worker in bench.spawned():
            bench.ready(worker)
        pass_limit(bench, alone, 500)
        bench.finish(tasks[0])
        bench.advance(60)
        assert alone.is_alone
        assert alone.state is TaskState.QUEUED
        assert len(bench.core.idle) == 1
        return bench, alone, tasks[1]

    def test_an_idle_worker_is_not_used_although_a_fresh_one_is_still_to_be_started(self, make_bench) -> None:
        bench, _, _ = self.to_run_alone(make_bench)
        assert bench.core.starting == 0
        assert bench.submit().state is TaskState.QUEUED

    def test_its_worker_is_started_when_all_have_ended_and_it_is_one(self, make_bench) -> None:
        bench, alone, other = self.to_run_alone(make_bench)
        bench.submit()
        bench.submit()
        assert not bench.spawned()
        bench.finish(other)
        (worker,) = bench.spawned()
        assert bench.core.starting == 1
        bench.do(bench.core.force_open, "maintenance")
        assert bench.submit().state is TaskState.QUEUED, "its worker is on the way"
        bench.ready(worker)
        assert alone.worker is worker

    def test_where_no_worker_may_start_the_others_are_not_kept_waiting(self, make_bench) -> None:
        bench, alone, other = self.to_run_alone(make_bench)
        bench.do(bench.core.force_open, "maintenance")
        assert bench.submit().state is TaskState.RUNNING
        bench.finish(other)
        assert alone.state is TaskState.QUEUED
