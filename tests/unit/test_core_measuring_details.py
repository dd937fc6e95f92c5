"""Details of measuring and its consequences that mutation testing found nobody looking at. See docs/mutants.md."""

from __future__ import annotations

import math

import pytest

from agentpool.config import MB, BreakerSettings, PoolSettings
from agentpool.core import actions as act
from agentpool.core import recycling
from agentpool.core.breaker import Breaker
from agentpool.core.governance import HYSTERESIS, Governor
from agentpool.core.placement import Durations
from agentpool.core.records import HostState, TreeState, WorkerRecord
from agentpool.core.transitions import BreakerState, WorkerState
from agentpool.errors import TaskTimeoutError

GIB = 1024 * MB
#: Divided by HYSTERESIS it is a whole number of bytes.
LIMIT_MB = 330


def crew(make_bench, count: int, **settings):
    """So many workers, each busy."""
    bench = make_bench(max_workers=count, **{"memory_limit_mb": None, **settings})
    tasks = [bench.submit() for _ in range(count)]
    for worker in bench.spawned():
        bench.ready(worker)
    return bench, tasks, [task.worker for task in tasks]


class TestThresholdsOfThePool:
    def governor(self, **settings):
        breaker = Breaker(BreakerSettings())
        return Governor(PoolSettings.make(memory_limit_mb=None, **settings), breaker), breaker

    def test_at_the_critical_value_nothing_is_held_and_a_tenth_below_it_is_released(self) -> None:
        governor, breaker = self.governor(critical_memory_mb=LIMIT_MB)
        released_at = LIMIT_MB * MB / HYSTERESIS
        assert released_at == int(released_at)
        governor.pool_sampled(0.0, LIMIT_MB * MB)
        assert breaker.holds == {}
        governor.pool_sampled(1.0, LIMIT_MB * MB + 1)
        assert set(breaker.holds) == {"critical"}
        governor.pool_sampled(2.0, int(released_at) + 1)
        assert set(breaker.holds) == {"critical"}
        governor.pool_sampled(3.0, int(released_at))
        assert breaker.holds == {}

    def test_at_the_alert_value_nothing_is_wrong_and_a_tenth_below_it_is_well_again(self) -> None:
        governor, _ = self.governor(alert_memory_mb=LIMIT_MB)
        released_at = int(LIMIT_MB * MB / HYSTERESIS)
        governor.pool_sampled(0.0, LIMIT_MB * MB)
        assert governor.reasons == {}
        governor.pool_sampled(1.0, LIMIT_MB * MB + 1)
        assert set(governor.reasons) == {"memory"}
        governor.pool_sampled(2.0, released_at + 1)
        assert set(governor.reasons) == {"memory"}
        governor.pool_sampled(3.0, released_at)
        assert governor.reasons == {}

    def test_released_a_breaker_that_failed_starts_opened_as_well_waits_for_its_time(self, make_bench) -> None:
        """And what the pool's memory is after a death is judged at the time of that death."""
        bench, _, (worker, _) = crew(make_bench, 2, critical_memory_mb=300, breaker=BreakerSettings(
            failure_threshold=1, open_seconds=30.0))
        bench.sample(worker, 400)
        assert bench.core.breaker.state is BreakerState.OPEN
        bench.core.breaker.reset()
        bench.core.breaker.start_failed(bench.now, "fork failed", is_probe=False)
        bench.sample(worker, 400)
        assert set(bench.core.breaker.holds) == {"critical"}
        bench.now = 5.0
        bench.exit(worker)
        assert bench.core.breaker.holds == {}
        assert (bench.core.breaker.state, bench.core.breaker.reason[-11:]) == (BreakerState.OPEN, "fork failed")

    def test_a_hold_released_at_the_very_time_lets_the_probe_go(self) -> None:
        breaker = Breaker(BreakerSettings(failure_threshold=1, open_seconds=30.0))
        breaker.start_failed(0.0, "fork failed", is_probe=False)
        breaker.hold("critical", "too much")
        breaker.release("critical", 30.0)
        assert breaker.state is BreakerState.HALF_OPEN

    def test_memory_is_critical_since_the_worker_was_ready_that_made_it_so(self, make_bench) -> None:
        bench = make_bench(critical_memory_mb=100, memory_limit_mb=None)
        bench.submit()
        (worker,) = bench.spawned()
        bench.now = 3.0
        bench.ready(worker, 200 * MB)
        assert bench.core.governor.critical_since == 3.0

    def test_and_since_the_pool_was_made_smaller_where_that_made_it_so(self, make_bench) -> None:
        bench, _, workers = crew(make_bench, 4, memory_limit_mb=50)
        for worker in workers:
            bench.sample(worker, 45)
        assert bench.core.governor.critical_since is None
        bench.now = 7.0
        bench.do(bench.core.resize, 1, None)
        assert bench.core.governor.critical_since == 7.0

    @pytest.mark.parametrize(("leaving_mb", "is_stopped"), [(50, False), (49, True)])
    def test_nobody_is_stopped_where_those_who_leave_bring_it_down_to_the_critical_value(
        self, make_bench, leaving_mb, is_stopped
    ) -> None:
        bench, (task, _), (worker, other) = crew(make_bench, 2, critical_memory_mb=100)
        bench.sample(other, leaving_mb)
        bench.do(bench.core.kill_worker, other.id, "by hand")
        for _ in range(3):
            bench.now += 1.0
            bench.sample(worker, 100 + (50 - leaving_mb))
        assert (task.stop is not None) is is_stopped

    def test_who_is_stopped_for_all_is_told_the_limit_of_all(self, make_bench) -> None:
        bench, (task, _), (worker, _) = crew(make_bench, 2, critical_memory_mb=100)
        for _ in range(3):
            bench.now += 1.0
            bench.sample(worker, 150)
        bench.exit(worker)
        assert bench.outcomes[task.id][1].limit_bytes == 100 * MB


class TestWhenAWorkerIsMeasured:
    def test_one_that_starts_has_the_limit_of_a_task(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=100)
        bench.now = 5.0
        bench.submit()
        (worker,) = bench.spawned()
        bench.core.worker_spawned(bench.now, worker, 101)
        assert worker.pid == 101
        assert worker.sample_timer.when == pytest.approx(5.0 + 100 / 1024)
        bench.sample(worker, 60)
        assert worker.sample_interval == pytest.approx(40 / 1024)

    def test_an_idle_one_seldom_whatever_the_limit_of_a_task(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=100, cleanup_interval=30.0)
        worker = bench.idle_worker()
        bench.sample(worker, 60)
        assert worker.sample_interval == 30.0

    def test_one_that_is_being_killed_as_seldom(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=100, cleanup_interval=30.0)
        _, worker = bench.started()
        bench.do(bench.core.kill_worker, worker.id, "by hand")
        bench.sample(worker, 60)
        assert (worker.state, worker.sample_interval) == (WorkerState.KILLED, 30.0)

    def test_one_in_a_pool_that_may_stop_it_by_what_is_left_for_all(self, make_bench) -> None:
        bench, _, (worker, other) = crew(make_bench, 2, critical_memory_mb=150)
        bench.sample(other, 30)
        bench.sample(worker, 60)
        assert worker.sample_interval == pytest.approx((150 - 30 - 60) / 1024)

    @staticmethod
    def worker(*readings_mb: float, interval: float = 0.0) -> WorkerRecord:
        worker = WorkerRecord(1, 0.0)
        worker.sample_interval = interval
        for second, each in enumerate(readings_mb):
            recycling.record_reading(worker, float(second), TreeState(int(each * MB)))
        return worker

    def test_steady_ones_each_time_half_as_late_again(self) -> None:
        assert recycling.next_sample_interval(self.worker(interval=1.0), None, 60.0) == 1.5

    def test_one_that_could_pass_its_limit_before_that_as_if_it_took_a_gigabyte_a_second(self) -> None:
        interval = recycling.next_sample_interval(self.worker(interval=1.0), 512 * MB, 60.0)
        assert interval == pytest.approx(0.5, rel=1e-6)

    def test_one_that_grows_slowly_far_below_its_limit_as_a_steady_one(self) -> None:
        assert recycling.next_sample_interval(self.worker(1, 2, interval=1.0), 64 * GIB, 60.0) == 1.5

    def test_growth_is_that_between_the_last_two_readings(self) -> None:
        interval = recycling.next_sample_interval(self.worker(0, 500, 500, 600), 640 * MB, 60.0)
        assert interval == pytest.approx(40 / 1024)
        interval = recycling.next_sample_interval(self.worker(0, 0, 0, 1000), 1500 * MB, 60.0)
        assert interval == pytest.approx(500 / 1000 / 4)


class TestStopping:
    def test_after_a_tool_was_stopped_it_needs_two_readings_again(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=100)
        _, worker = bench.started(spares_task=True)
        for mb, stopped in ((200, 1), (110, 0), (110, 1), (200, 1)):
            bench.core.worker_sampled(bench.now, worker, TreeState(mb * MB, processes=2))
            bench.take()
            assert len(bench.asked(act.StopTool)) == stopped
        assert bench.core.counters.tools_stopped == 3

    @pytest.mark.parametrize("is_timeout", [True, False])
    def test_the_worker_is_asked_to_stop_that_task_and_for_its_stack_where_time_ran_out(
        self, make_bench, is_timeout
    ) -> None:
        bench = make_bench(max_workers=2)
        bench.started()
        task, worker = bench.started(timeout=3.0)
        if is_timeout:
            bench.advance(3.0)
        else:
            bench.do(bench.core.kill_task, task, TaskTimeoutError("by hand"))
        (asked,) = bench.asked(act.AskToStop)
        assert (asked.worker, asked.task, asked.wants_stack) == (worker, task, is_timeout)


class TestChecks:
    def test_an_idle_worker_over_its_limit_collects_and_is_measured_and_serves_on(self, make_bench) -> None:
        bench = make_bench(memory_limit_mb=50, max_workers=2)
        worker = bench.idle_worker()
        bench.asked(act.SampleWorker)
        bench.sample(worker, 60)
        assert bench.asked(act.Collect) == [act.Collect(worker)]
        bench.do(bench.core.worker_collected, worker)
        assert bench.asked(act.SampleWorker) == [act.SampleWorker(worker)]
        bench.sample(worker, 40)
        assert worker.state is WorkerState.IDLE

    def test_whoever_has_to_collect_is_not_waited_for(self, make_bench) -> None:
        bench = make_bench(memory_limit_mb=50, max_workers=2)
        worker = bench.idle_worker()
        bench.sample(worker, 60)
        bench.do(bench.core.worker_collected, worker)
        bench.submit()
        assert len(bench.spawned()) == 1

    def test_a_reading_over_the_limit_while_it_ran_is_not_forgotten_for_what_the_worker_says(self, make_bench) -> None:
        bench = make_bench(memory_limit_mb=50)
        task, worker = bench.started(soft_limit_bytes=45 * MB)
        bench.sample(worker, 60)
        bench.finish(task, rss_bytes=30 * MB)
        assert worker.state is WorkerState.CHECKING

    def test_where_the_worker_says_nothing_another_limit_is_worth_a_look(self, make_bench) -> None:
        bench = make_bench(memory_limit_mb=50)
        task, worker = bench.started(soft_limit_bytes=45 * MB)
        bench.finish(task)
        assert worker.state is WorkerState.CHECKING


class TestOthersOnTheCpu:
    @pytest.mark.parametrize(("used", "seconds", "others"), [
        (4.0, 4.0, 30.0),  # half of two processors is the pool's own
        (0.0, 4.0, 80.0),
        (-5.0, 4.0, 80.0),  # a worker that had used much is gone
        (4.0, 0.0, 80.0),  # nothing can be said of no time
    ])
    def test_others_have_what_this_pool_has_not(self, make_bench, used, seconds, others) -> None:
        bench = make_bench()
        bench.host = None
        bench.now = 100.0
        bench.submit()
        bench.do(bench.core.host_sampled, HostState(GIB, GIB))
        (worker,) = bench.spawned()
        bench.ready(worker)
        host = HostState(GIB, GIB, cpu_percent=80.0)
        bench.core.worker_sampled(bench.now, worker, TreeState(MB, cpu_seconds=1000.0))
        bench.do(bench.core.host_sampled, host, 2)
        bench.now += seconds
        bench.core.worker_sampled(bench.now, worker, TreeState(MB, cpu_seconds=1000.0 + used))
        bench.do(bench.core.host_sampled, host, 2)
        assert bench.core.governor.others_cpu_percent == pytest.approx(others)

    def test_of_the_first_reading_nothing_is_the_pools(self, make_bench) -> None:
        bench = make_bench()
        bench.do(bench.core.host_sampled, HostState(GIB, GIB, cpu_percent=80.0), 2)
        assert bench.core.governor.others_cpu_percent == 80.0


def test_a_mean_rises_by_half_and_falls_by_an_eighth() -> None:
    durations = Durations()
    for seconds, mean in ((1.0, 1.0), (2.0, 1.5), (0.7, 1.4)):
        durations.measured("f", seconds)
        assert durations.expected("f", 1) == pytest.approx(mean)
    assert math.isclose(durations.expected("f", 10) or 0.0, 14.0)
