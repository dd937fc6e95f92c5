"""Measuring workers and the machine; what readings lead to."""

from __future__ import annotations

from itertools import pairwise

import pytest

from agentpool.config import MB
from agentpool.core import actions as act
from agentpool.core.records import HostState, TreeState
from agentpool.core.retry import RetryPolicy
from agentpool.core.transitions import BreakerState, TaskState, WorkerState
from agentpool.core.upkeep import CHECK_GRACE
from agentpool.errors import MemoryLimitError, TaskKilledError, TaskTimeoutError

PLENTY = HostState(total_bytes=10_000 * MB, available_bytes=8_000 * MB)
SHORT = HostState(total_bytes=10_000 * MB, available_bytes=100 * MB)


def two_running(bench, **spec):
    tasks = [bench.submit(**spec), bench.submit(**spec)]
    for worker in bench.spawned():
        bench.ready(worker)
    return [(task, task.worker) for task in tasks]


class TestSampling:
    def test_a_busy_worker_is_read_after_a_quarter_second_then_ever_less_often(self, make_bench) -> None:
        bench = make_bench()
        _, worker = bench.started()
        moments = []
        for _ in range(12):
            while not (asked := bench.asked(act.SampleWorker)):
                bench.advance(bench.core.next_deadline() - bench.now)
            assert [action.worker for action in asked] == [worker]
            moments.append(bench.now)
            bench.sample(worker, 20)
        gaps = [later - sooner for sooner, later in pairwise(moments)]
        assert moments[0] == 0.25
        assert gaps == sorted(gaps)
        assert gaps[-1] == 2.0

    def test_an_idle_one_with_each_full_sweep(self, make_bench) -> None:
        bench = make_bench(cleanup_interval=60)
        worker = bench.idle_worker()
        bench.advance(0.25)
        bench.sample(worker, 20)
        bench.asked(act.SampleWorker)
        bench.advance(59.9)
        assert bench.asked(act.SampleWorker) == []
        bench.advance(0.1)
        assert bench.asked(act.SampleWorker) == [act.SampleWorker(worker)]

    def test_one_whose_memory_is_looked_at_anyway_is_not_read_in_addition(self, make_bench) -> None:
        bench = make_bench(cleanup_interval=1)
        worker = bench.idle_worker(seconds=1.0)
        bench.asked(act.SampleWorker)
        bench.advance(5.0)
        assert bench.asked(act.SampleWorker) == []
        assert worker.state is WorkerState.CHECKING

    def test_readings_add_up_to_the_pools_memory(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        (_, first), (_, second) = two_running(bench)
        assert bench.core.pool_bytes == 40 * MB
        bench.sample(first, 100)
        bench.sample(second, 50)
        assert bench.core.pool_bytes == 150 * MB
        bench.exit(first)
        assert bench.core.pool_bytes == 50 * MB

    def test_the_greatest_reading_is_the_tasks_peak(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        for rss_mb in (50, 90, 30):
            bench.sample(worker, rss_mb)
        bench.finish(task, rss_bytes=20 * MB, peak_bytes=80 * MB)
        assert task.peak_rss_bytes == 90 * MB
        task = bench.submit()
        bench.finish(task, rss_bytes=20 * MB, peak_bytes=80 * MB)
        assert task.peak_rss_bytes == 80 * MB

    def test_a_reading_that_failed_or_came_too_late_changes_nothing(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker()
        bench.sample(worker, None)
        assert worker.rss_bytes == 20 * MB
        bench.exit(worker)
        bench.sample(worker, 500)
        assert bench.core.pool_bytes == 0


class TestHardLimit:
    def test_a_little_over_it_must_be_seen_twice_as_a_fork_counts_double_for_a_moment(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=200)
        task, worker = bench.started()
        bench.sample(worker, 210)
        assert task.state is TaskState.RUNNING
        assert worker.sample_interval == 0.01, "it is read again at once"
        bench.sample(worker, 150)
        bench.sample(worker, 210)
        assert task.state is TaskState.RUNNING
        bench.sample(worker, 210)
        assert task.state is TaskState.STOPPING
        (kill,) = bench.asked(act.Kill)
        assert kill.worker is worker
        bench.exit(worker)
        is_value, error = bench.outcomes[task.id]
        assert not is_value
        assert isinstance(error, MemoryLimitError)
        assert error.limit_bytes == 200 * MB
        assert "it passed its hard memory limit of 200 MB; its process tree had 210 MB" in str(error)
        assert bench.core.counters.memory_killed == 1

    def test_far_over_it_is_stopped_at_once_without_being_asked(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=200)
        task, worker = bench.started()
        bench.sample(worker, 251)
        assert task.state is TaskState.STOPPING
        assert bench.asked(act.AskToStop) == []
        assert len(bench.asked(act.Kill)) == 1

    def test_a_tasks_own_limit_comes_before_the_pools(self, make_bench) -> None:
        bench = make_bench(max_workers=2, hard_memory_limit_mb=200)
        (small, first), (large, second) = (
            bench.started(hard_limit_bytes=150 * MB), bench.started(hard_limit_bytes=900 * MB))
        bench.sample(first, 199)
        bench.sample(second, 800)
        assert (small.state, large.state) == (TaskState.STOPPING, TaskState.RUNNING)

    def test_a_suspicion_does_not_pass_to_the_next_task(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=200, memory_limit_mb=None)
        task, worker = bench.started()
        bench.sample(worker, 210)
        bench.finish(task)
        task = bench.submit()
        bench.sample(worker, 210)
        assert task.state is TaskState.RUNNING

    def test_a_task_that_was_asked_to_stop_for_another_reason_is_killed_now_and_keeps_that_reason(
        self, make_bench
    ) -> None:
        bench = make_bench(hard_memory_limit_mb=200)
        task, worker = bench.started(timeout=1.0)
        bench.advance(1.0)
        assert bench.asked(act.Kill) == []
        bench.sample(worker, 400)
        assert len(bench.asked(act.Kill)) == 1
        bench.sample(worker, 400)
        assert bench.asked(act.Kill) == [], "one is enough"
        bench.exit(worker)
        assert isinstance(bench.outcomes[task.id][1], TaskTimeoutError)

    @pytest.mark.parametrize("limit", [{"hard_limit_bytes": 60 * MB}, {}])
    def test_with_a_limit_the_first_reading_comes_soon_enough_for_a_fast_allocation(self, make_bench, limit) -> None:
        bench = make_bench(hard_memory_limit_mb=None if limit else 60, memory_limit_mb=50)
        bench.started(**limit)
        bench.advance(0.04)
        assert len(bench.asked(act.SampleWorker)) == 1

    def test_near_the_limit_the_worker_is_read_more_often(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=1000)
        _, worker = bench.started()
        bench.sample(worker, 980)
        assert worker.sample_interval <= 0.02


class TestPoolMemory:
    def test_above_critical_idle_workers_are_recycled_and_no_task_is_stopped_for_a_derived_value(
        self, make_bench
    ) -> None:
        bench = make_bench(max_workers=2, memory_limit_mb=200)
        (done, idle), (task, busy) = two_running(bench)
        bench.finish(done)
        bench.sample(busy, 900)
        bench.sample(busy, 900)
        assert bench.core.breaker.state is BreakerState.OPEN
        assert bench.asked(act.Retire) == [act.Retire(idle, "pool over critical_memory_mb")]
        assert task.state is TaskState.RUNNING

    def test_a_value_that_the_user_set_costs_the_biggest_its_task_after_a_second_reading(self, make_bench) -> None:
        bench = make_bench(max_workers=2, critical_memory_mb=500)
        (small, first), (big, second) = two_running(bench, policy=RetryPolicy())
        bench.sample(first, 100)
        bench.sample(second, 450)
        assert big.state is TaskState.RUNNING
        assert second.sample_timer.when == bench.now + 0.01
        bench.advance(0.005)
        bench.sample(first, 100)
        assert big.state is TaskState.RUNNING, "it was not read again itself"
        bench.advance(0.005)
        bench.sample(second, 460)
        assert (small.state, big.state) == (TaskState.RUNNING, TaskState.STOPPING)
        bench.sample(first, 100)
        assert small.state is TaskState.RUNNING, "what is about to be free counts as free"
        bench.exit(second)
        error = bench.outcomes[big.id][1]
        assert isinstance(error, MemoryLimitError)
        assert "all workers use 560 MB together, above critical_memory_mb (500), and it was the biggest" in str(error)

    def test_with_the_host_short_of_memory_a_derived_value_does_too(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        bench.host = SHORT
        task, worker = make_running_in_spite_of(bench)
        for _ in range(2):
            bench.do(bench.core.host_sampled, SHORT)
        for _ in range(2):
            bench.advance(0.01)
            bench.sample(worker, 300)
        assert task.state is TaskState.STOPPING

    def test_where_nothing_runs_there_is_nobody_to_stop(self, make_bench) -> None:
        bench = make_bench(max_workers=1, critical_memory_mb=300)
        worker = bench.idle_worker(rss_bytes=400 * MB)
        bench.sample(worker, 400)
        assert worker.state is WorkerState.CHECKING
        assert bench.asked(act.Collect) == [act.Collect(worker)]
        assert bench.core.counters.memory_killed == 0

    def test_a_worker_within_its_own_limit_is_recycled_for_the_pools(self, make_bench) -> None:
        bench = make_bench(max_workers=1, critical_memory_mb=100, alert_memory_mb=50, memory_limit_mb=None)
        worker = bench.idle_worker(seconds=1.0)
        bench.sample(worker, 400)
        assert worker.state is WorkerState.RETIRING

    def test_a_worker_that_becomes_idle_later_is_recycled_with_the_next_reading_of_the_machine(
        self, make_bench
    ) -> None:
        bench = make_bench(max_workers=1, critical_memory_mb=300, memory_limit_mb=None)
        task, worker = bench.started()
        bench.sample(worker, 400)
        bench.finish(task)
        assert worker.state is WorkerState.IDLE
        bench.advance(2.0)
        assert bench.asked(act.Retire) == [act.Retire(worker, "pool over critical_memory_mb")]

    def test_a_breaker_reset_by_hand_does_not_hide_who_is_to_blame(self, make_bench) -> None:
        bench = make_bench(max_workers=1, critical_memory_mb=300)
        task, worker = bench.started()
        bench.sample(worker, 400)
        bench.do(bench.core.reset_breaker)
        assert bench.core.breaker.state is BreakerState.CLOSED
        bench.advance(0.01)
        bench.sample(worker, 400)
        bench.exit(worker)
        assert "all workers use 400 MB together" in str(bench.outcomes[task.id][1])

    def test_one_that_was_never_read_is_read_first(self, make_bench) -> None:
        bench = make_bench(max_workers=2, critical_memory_mb=100, alert_memory_mb=50, memory_limit_mb=None)
        bench.submit()
        bench.submit()
        first, second = bench.spawned()
        bench.ready(first, 30 * MB)
        bench.ready(second, 60 * MB)
        bench.sample(first, 50)
        assert second.sample_timer.when == bench.now + 0.01
        assert bench.core.counters.memory_killed == 0

    def test_a_fresh_worker_counts_at_once(self, make_bench) -> None:
        bench = make_bench(max_workers=2, critical_memory_mb=100, alert_memory_mb=50, memory_limit_mb=None)
        bench.submit()
        (worker,) = bench.spawned()
        bench.ready(worker, 120 * MB)
        bench.submit()
        assert bench.core.breaker.reason == "all workers use 120 MB together, above critical_memory_mb (100)"
        assert bench.spawned() == []

    def test_near_the_pools_limit_workers_are_read_more_often(self, make_bench) -> None:
        bench = make_bench(max_workers=2, critical_memory_mb=500)
        (_, first), (_, second) = two_running(bench)
        bench.sample(first, 250)
        bench.sample(second, 240)
        assert second.sample_interval <= 0.02
        limited = make_bench(max_workers=1, critical_memory_mb=5000, hard_memory_limit_mb=300)
        _, worker = limited.started()
        limited.sample(worker, 290)
        assert worker.sample_interval <= 0.02, "the nearer of both limits counts"


def make_running_in_spite_of(bench):
    """A running task of a pool whose host is short by now."""
    host, bench.host = bench.host, HostState(10_000 * MB, 9_000 * MB)
    running = bench.started()
    bench.host = host
    return running


class TestSoftLimit:
    def over(self, bench, worker, first_mb=150, second_mb=150):
        """A worker's check: a reading, a collection, another reading."""
        assert worker.state is WorkerState.CHECKING
        assert bench.asked(act.SampleWorker)[-1] == act.SampleWorker(worker)
        bench.sample(worker, first_mb)
        if worker.state is WorkerState.CHECKING:
            assert bench.asked(act.Collect) == [act.Collect(worker)]
            bench.do(bench.core.worker_collected, worker)
            assert bench.asked(act.SampleWorker) == [act.SampleWorker(worker)]
            bench.sample(worker, second_mb)

    def test_after_a_short_task_within_its_limit_the_worker_is_free_at_once(self, make_bench) -> None:
        bench = make_bench()
        assert bench.idle_worker(seconds=0.01, rss_bytes=99 * MB).state is WorkerState.IDLE

    @pytest.mark.parametrize("ended", [{"rss_bytes": 101 * MB}, {"seconds": 0.06}])
    def test_after_one_that_was_long_or_says_too_much_of_itself_its_tree_is_measured(self, make_bench, ended) -> None:
        bench = make_bench()
        worker = bench.idle_worker(**ended)
        self.over(bench, worker, 90)
        assert worker.state is WorkerState.IDLE

    def test_over_it_before_and_after_its_garbage_is_collected_it_is_recycled(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker(rss_bytes=150 * MB)
        self.over(bench, worker)
        assert bench.asked(act.Retire) == [act.Retire(worker, "memory")]
        assert bench.core.counters.recycled == {"memory": 1}

    def test_what_collecting_garbage_mends_stays(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker(rss_bytes=150 * MB)
        self.over(bench, worker, 150, 80)
        assert worker.state is WorkerState.IDLE
        bench.advance(CHECK_GRACE)
        assert worker.state is WorkerState.IDLE

    def test_a_reading_that_was_asked_for_earlier_does_not_stand_for_the_second_one(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker(rss_bytes=150 * MB)
        bench.sample(worker, 150)
        bench.sample(worker, 150)
        assert worker.state is WorkerState.CHECKING
        bench.do(bench.core.worker_collected, worker)
        bench.do(bench.core.worker_collected, worker)
        bench.sample(worker, 80)
        assert worker.state is WorkerState.IDLE
        bench.do(bench.core.worker_collected, worker)
        assert worker.state is WorkerState.IDLE

    def test_a_reading_of_a_busy_worker_over_it_has_it_looked_at_when_its_task_ended(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        bench.sample(worker, 150)
        assert task.state is TaskState.RUNNING
        bench.finish(task)
        assert worker.state is WorkerState.CHECKING

    def test_a_reading_of_an_idle_worker_over_it_counts_as_the_first(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker()
        bench.sample(worker, 150)
        assert bench.asked(act.Collect) == [act.Collect(worker)]
        bench.do(bench.core.worker_collected, worker)
        bench.sample(worker, 150)
        assert worker.state is WorkerState.RETIRING

    def test_a_tasks_own_soft_limit_is_for_the_worker_that_ran_it(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started(soft_limit_bytes=300 * MB)
        bench.finish(task, rss_bytes=250 * MB)
        assert worker.state is WorkerState.IDLE
        task = bench.submit(soft_limit_bytes=50 * MB)
        bench.finish(task, rss_bytes=60 * MB)
        assert worker.state is WorkerState.CHECKING
        self.over(bench, worker, 40)
        bench.finish(bench.submit(), rss_bytes=60 * MB)
        assert worker.state is WorkerState.IDLE, "back to the pool's limit"

    def test_the_successor_is_started_while_garbage_is_collected_not_after(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_concurrent=1)
        task, worker = bench.started()
        bench.submit()
        bench.finish(task, rss_bytes=150 * MB)
        assert bench.spawned() == [], "it may be free again in a moment"
        bench.sample(worker, 150)
        assert len(bench.spawned()) == 1

    def test_one_that_does_not_answer_is_killed(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker(rss_bytes=150 * MB)
        bench.sample(worker, None)
        bench.advance(CHECK_GRACE)
        assert bench.asked(act.Kill) == [act.Kill(worker, "did not answer while idle")]

    def test_one_that_dies_while_it_is_looked_at_died_without_a_culprit(self, make_bench) -> None:
        bench = make_bench()
        bench.exit(bench.idle_worker(rss_bytes=150 * MB))
        assert bench.core.counters.start_failures == 1

    def recycle_after_first_task(self, bench) -> None:
        task, worker = bench.started()
        bench.finish(task, rss_bytes=150 * MB)
        self.over(bench, worker)
        bench.exit(worker, 0)

    def test_worker_after_worker_over_it_after_the_first_task_is_worth_one_warning(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        for _ in range(2):
            self.recycle_after_first_task(bench)
        assert bench.asked(act.Warn) == []
        for _ in range(4):
            self.recycle_after_first_task(bench)
        (warning,) = bench.asked(act.Warn)
        assert "worker after worker is above its memory limit (100 MB)" in warning.message
        assert bench.core.counters.recycled == {"memory": 6}

    @pytest.mark.parametrize("seconds", [0.0, 1.0])
    def test_one_good_worker_in_between_breaks_the_row(self, make_bench, seconds) -> None:
        bench = make_bench(max_workers=1)
        for _ in range(4):
            for _ in range(2):
                self.recycle_after_first_task(bench)
            worker = bench.idle_worker(seconds=seconds)
            if seconds:
                self.over(bench, worker, 50)
            bench.exit(worker)
            bench.do(bench.core.reset_breaker)
        assert bench.asked(act.Warn) == []

    def test_a_worker_that_grew_over_many_tasks_breaks_it_too(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        for _ in range(3):
            for _ in range(2):
                self.recycle_after_first_task(bench)
            worker = bench.idle_worker()
            bench.finish(bench.submit(), rss_bytes=150 * MB)
            self.over(bench, worker)
            bench.exit(worker, 0)
        assert bench.asked(act.Warn) == []


class TestMachine:
    def asked_in(self, bench, seconds: float) -> int:
        before = bench.host_asked
        bench.advance(seconds)
        return bench.host_asked - before

    def test_it_is_read_every_2_seconds_with_tasks_and_with_each_sweep_without(self, make_bench) -> None:
        bench = make_bench(cleanup_interval=60, idle_timeout=None)
        task, _ = bench.started()
        assert self.asked_in(bench, 20.0) == 10
        bench.finish(task)
        self.asked_in(bench, 4.0)
        assert self.asked_in(bench, 240.0) == 4

    def test_it_is_read_soon_again_when_work_comes_back(self, make_bench) -> None:
        bench = make_bench(cleanup_interval=60, idle_timeout=None)
        bench.idle_worker()
        bench.advance(100.0)
        bench.submit()
        assert self.asked_in(bench, 2.0) == 1

    def test_not_less_often_than_the_cleanup_interval(self, make_bench) -> None:
        bench = make_bench(cleanup_interval=0.5)
        bench.started()
        assert self.asked_in(bench, 10.0) == 20

    def test_without_workers_it_is_left_alone(self, make_bench) -> None:
        bench = make_bench()
        bench.exit(bench.idle_worker(), 0)
        self.asked_in(bench, 5.0)
        assert self.asked_in(bench, 1000.0) == 0

    def test_a_quick_reading_does_not_put_off_the_next_one(self, make_bench) -> None:
        bench = make_bench()
        bench.started()
        bench.advance(1.5)
        bench.do(bench.core.host_sampled, bench.host)
        assert self.asked_in(bench, 0.5) == 1

    def test_one_question_at_a_time(self, make_bench) -> None:
        bench = make_bench()
        bench.host = None
        bench.submit()
        bench.advance(100.0)
        bench.submit()
        assert bench.host_asked == 1

    def test_the_pools_own_cpu_is_not_taken_for_that_of_others(self, make_bench) -> None:
        bench = make_bench(idle_timeout=None)
        _, worker = bench.started()
        for now in (0.0, 10.0):
            bench.now = now
            bench.core.worker_sampled(now, worker, TreeState(20 * MB, 1, cpu_seconds=now * 3))
            bench.do(bench.core.host_sampled, HostState(10_000 * MB, 9_000 * MB, cpu_percent=90), cpu_count=4)
        assert bench.core.governor.others_cpu_percent == pytest.approx(90 - 75)

    def test_a_task_stopped_by_the_user_and_over_its_memory_is_not_counted_twice(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=200)
        task, worker = bench.started()
        bench.do(bench.core.kill_task, task, TaskKilledError("x"))
        bench.sample(worker, 900)
        bench.exit(worker)
        assert isinstance(bench.outcomes[task.id][1], TaskKilledError)
        assert bench.core.counters.memory_killed == 0


def test_a_reading_in_between_does_not_make_the_next_ones_more_frequent(make_bench) -> None:
    counts = []
    for extra in (0, 3):
        bench = make_bench()
        bench.started()
        bench.advance(10.0)
        for _ in range(extra):
            bench.now += 0.1
            bench.do(bench.core.host_sampled, PLENTY)
        before = bench.host_asked
        bench.advance(60.0)
        counts.append(bench.host_asked - before)
    assert counts[0] == counts[1] == 30


def test_the_first_task_after_a_quiet_time_has_the_host_watched_again(make_bench) -> None:
    bench = make_bench(idle_timeout=None)
    bench.idle_worker()
    bench.advance(330.5)
    before = bench.host_asked
    bench.submit()
    bench.advance(10.0)
    assert bench.host_asked - before == 5
    bench.advance(100.0)
    assert bench.host_asked - before == 55, "the reading that was set for a quiet time is not had as well"
