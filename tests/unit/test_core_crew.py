"""Starting workers, losing them, sending them home."""

from __future__ import annotations

from typing import Any

import pytest

from agentpool.config import MB, BreakerSettings
from agentpool.core import actions as act
from agentpool.core.crew import RETIRE_GRACE
from agentpool.core.records import HostState
from agentpool.core.transitions import BreakerState, TaskState, WorkerState
from agentpool.errors import InitializerError, InternalError

SHORT = HostState(total_bytes=10_000 * MB, available_bytes=100 * MB)
BUSY_CPU = HostState(total_bytes=10_000 * MB, available_bytes=8_000 * MB, cpu_percent=99)


class TestStarting:
    def test_work_starts_as_many_workers_as_may_run_at_once(self, make_bench) -> None:
        bench = make_bench(max_workers=4, max_concurrent=2)
        for _ in range(10):
            bench.submit()
        assert len(bench.spawned()) == 2
        assert bench.core.counters.spawned == 2

    def test_those_who_run_count(self, make_bench) -> None:
        bench = make_bench(max_workers=4, max_concurrent=2)
        bench.started()
        for _ in range(10):
            bench.submit()
        assert len(bench.spawned()) == 1

    def test_no_more_than_there_is_work_for(self, make_bench) -> None:
        bench = make_bench(max_workers=4)
        bench.submit()
        assert len(bench.spawned()) == 1

    def test_the_floor_is_started_ahead_of_work_and_kept(self, make_bench) -> None:
        bench = make_bench(max_workers=4, min_workers=2)
        bench.do(bench.core.start)
        first, second = bench.spawned()
        bench.ready(first)
        bench.ready(second)
        bench.exit(first)
        bench.advance(1.0)
        assert len(bench.spawned()) == 1

    def test_the_machine_is_measured_before_a_start(self, make_bench) -> None:
        bench = make_bench()
        bench.host = None
        bench.submit()
        bench.submit()
        assert bench.host_asked == 1
        assert bench.spawned() == []
        bench.do(bench.core.host_sampled, HostState(100, 90))
        assert len(bench.spawned()) == 2

    def test_a_reading_serves_for_a_second(self, make_bench) -> None:
        bench = make_bench(max_workers=3)
        bench.submit()
        bench.advance(0.9)
        bench.submit()
        assert bench.host_asked == 1
        bench.advance(0.2)
        bench.submit()
        assert bench.host_asked == 2

    def test_with_too_little_memory_nothing_starts_until_it_is_back(self, make_bench) -> None:
        bench = make_bench()
        bench.host = SHORT
        bench.submit()
        assert bench.spawned() == []
        assert bench.asked(act.BreakerChanged) == [
            act.BreakerChanged("closed", "open", "host has 100 MB available, needs 500")
        ]
        bench.host = HostState(10_000 * MB, 9_000 * MB)
        bench.advance(10.0)
        assert len(bench.spawned()) == 1
        assert bench.asked(act.BreakerChanged) == [act.BreakerChanged("open", "closed", "")]

    def test_a_degraded_pool_starts_no_spare_and_does_when_it_is_well_again(self, make_bench) -> None:
        bench = make_bench(min_workers=1)
        for _ in range(3):
            bench.core.host_sampled(bench.now, BUSY_CPU)
        bench.do(bench.core.start)
        assert bench.spawned() == []
        bench.advance(60.0)
        assert len(bench.spawned()) == 1

    def test_throttled_by_the_cpu_of_others_it_keeps_one_worker_and_adds_none(self, make_bench) -> None:
        bench = make_bench(max_workers=3, cpu_policy="throttle")
        bench.host = BUSY_CPU
        for _ in range(3):
            bench.core.host_sampled(bench.now, BUSY_CPU)
        for _ in range(3):
            bench.submit()
        (worker,) = bench.spawned()
        bench.ready(worker)
        assert bench.spawned() == []
        bench.host = HostState(10_000 * MB, 9_000 * MB, cpu_percent=10)
        bench.advance(10.0)
        assert len(bench.spawned()) == 2

    def test_what_is_told_to_end_is_replaced_before_it_is_gone_but_not_without_bound(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_tasks_per_child=1)
        generations = []
        for _ in range(3):
            bench.submit()
        for _ in range(3):
            generations += bench.spawned()
            if generations[-1].state is WorkerState.STARTING:
                bench.ready(generations[-1])
                bench.finish(generations[-1].running)
        assert len(generations) == 2, "two workers that take their time to end are enough"
        bench.exit(generations[0], 0)
        assert len(bench.spawned()) == 1

    def test_a_start_that_takes_too_long_is_killed_and_counts_against_the_breaker(self, make_bench) -> None:
        bench = make_bench(start_timeout=5)
        bench.submit()
        (worker,) = bench.spawned()
        bench.advance(5.0)
        (kill,) = bench.asked(act.Kill)
        assert kill.worker is worker
        assert kill.reason == "did not become ready within its start_timeout of 5 s"
        bench.core.worker_ready(bench.now, worker, 7, 5)
        assert worker.state is WorkerState.KILLED, "it was quicker, too late"
        bench.exit(worker)
        assert bench.core.counters.start_failures == 1

    def test_failed_starts_back_off_then_open_the_breaker_and_a_probe_closes_it(self, make_bench) -> None:
        bench = make_bench(max_workers=1, breaker=BreakerSettings(failure_threshold=3))
        task = bench.submit()
        moments = []
        while bench.core.breaker.state is BreakerState.CLOSED:
            moments.append(bench.now)
            (worker,) = bench.spawned()
            bench.exit(worker, 1, stderr_tail="ImportError: no module named x")
            bench.advance(10.0 if len(moments) == 3 else 0.5)
        assert len(moments) == 3
        assert bench.core.breaker.reason == (
            "3 failed starts within 60 s, last: a worker exited with code 1 before it was ready: "
            "ImportError: no module named x"
        )
        assert bench.spawned() == []
        bench.advance(30.0)
        (probe,) = bench.spawned()
        assert probe.is_probe
        bench.ready(probe)
        assert bench.core.breaker.state is BreakerState.CLOSED
        assert task.state is TaskState.RUNNING

    def test_the_back_off_grows_with_failures_in_a_row(self, make_bench) -> None:
        bench = make_bench(max_workers=1, breaker=BreakerSettings(failure_threshold=100))
        bench.submit()
        waits, failed_at = [], 0.0
        for _ in range(6):
            (worker,) = bench.spawned()
            waits.append(bench.now - failed_at)
            failed_at = bench.now
            bench.exit(worker, 1)
            while not any(isinstance(action, act.Spawn) for action in bench.actions):
                bench.advance(bench.core.next_deadline() - bench.now)
        assert waits == sorted(waits)
        assert waits[-1] > 0.5

    def test_starts_that_fail_together_count_as_one_for_the_back_off_and_each_for_the_breaker(self, make_bench) -> None:
        bench = make_bench(max_workers=8, breaker=BreakerSettings(failure_threshold=100))
        for _ in range(8):
            bench.submit()
        workers = bench.spawned()
        for worker in workers:
            bench.advance(0.001)
            bench.exit(worker, 1)
        bench.advance(0.3)  # twice the first step
        assert len(bench.spawned()) == 8
        assert bench.core.breaker.failure_count(bench.now) == 8

    def test_a_start_that_is_overdue_is_tried_again_when_it_is_gone(self, make_bench) -> None:
        bench = make_bench(max_workers=4, start_timeout=5, breaker=BreakerSettings(failure_threshold=1))
        bench.submit()
        (worker,) = bench.spawned()
        bench.advance(5.5)
        assert bench.spawned() == []
        bench.exit(worker)
        bench.advance(5.5)
        assert bench.spawned() == [], "that one was enough to open the breaker"
        assert bench.core.breaker.state is BreakerState.OPEN

    def test_the_probe_of_a_half_open_breaker_does_not_wait_for_the_back_off(self, make_bench) -> None:
        settings = BreakerSettings(failure_threshold=12, open_seconds=0.5)
        bench = make_bench(max_workers=1, breaker=settings)
        bench.submit()
        while bench.core.breaker.state is BreakerState.CLOSED:
            for worker in bench.spawned():
                bench.exit(worker, 1)
            bench.advance(0.01)
        failed_at = bench.now
        while not (probes := bench.spawned()):
            bench.advance(0.01)
        assert bench.now - failed_at < 0.6  # the back-off would be several seconds by now
        assert probes[0].is_probe

    def test_reset_ends_the_back_off(self, make_bench) -> None:
        bench = make_bench()
        bench.submit()
        bench.exit(bench.spawned()[0], 1)
        assert bench.spawned() == []
        bench.do(bench.core.reset_breaker)
        assert len(bench.spawned()) == 1

    def test_a_probe_that_the_pool_itself_stops_is_not_held_against_it(self, make_bench) -> None:
        bench = make_bench(max_workers=1, breaker=BreakerSettings(failure_threshold=1))
        task = bench.submit()
        bench.exit(bench.spawned()[0], 1)
        bench.advance(31.0)
        (probe,) = bench.spawned()
        bench.do(bench.core.cancel, task)
        bench.do(bench.core.shutdown, cancel_futures=True)
        bench.exit(probe)
        assert not bench.core.breaker.is_probing
        assert bench.core.breaker.state is BreakerState.HALF_OPEN
        assert bench.core.counters.start_failures == 1


class TestBaseline:
    def test_a_worker_over_its_limit_when_fresh_is_warned_of_once(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        for _ in range(2):
            bench.submit()
        for worker in bench.spawned():
            bench.ready(worker, 150 * MB)
            assert worker.limit_bytes == 250 * MB
        (warning,) = bench.asked(act.Warn)
        assert "a fresh worker already uses 150 MB" in warning.message

    def test_an_agents_set_up_belongs_to_the_baseline_which_never_sinks(self, make_bench) -> None:
        bench = make_bench()
        _, worker = bench.started(kind="analyst")
        bench.do(bench.core.agent_set_up, worker, 130 * MB)
        assert (worker.baseline_bytes, worker.limit_bytes) == (130 * MB, 230 * MB)
        bench.do(bench.core.agent_set_up, worker, 90 * MB)
        assert worker.baseline_bytes == 130 * MB


class TestIdle:
    def test_an_idle_worker_is_recycled_after_its_timeout(self, make_bench) -> None:
        bench = make_bench(idle_timeout=300)
        worker = bench.idle_worker()
        bench.advance(299.0)
        assert worker.state is WorkerState.IDLE
        bench.advance(1.0)
        assert bench.asked(act.Retire) == [act.Retire(worker, "idle")]
        assert bench.core.counters.recycled == {"idle": 1}
        bench.exit(worker, 0)
        assert bench.spawned() == [], "nothing to do, so no successor"

    def test_work_starts_the_time_anew(self, make_bench) -> None:
        bench = make_bench(idle_timeout=300)
        worker = bench.idle_worker()
        bench.advance(200.0)
        task = bench.submit()
        bench.finish(task)
        bench.advance(250.0)
        assert worker.state is WorkerState.IDLE
        bench.advance(50.0)
        assert worker.state is WorkerState.RETIRING

    def test_a_busy_worker_is_not_idle(self, make_bench) -> None:
        bench = make_bench(idle_timeout=300)
        task, worker = bench.started()
        bench.advance(1000.0)
        assert worker.state is WorkerState.BUSY
        bench.finish(task)
        bench.advance(299.0)
        assert worker.state is WorkerState.IDLE
        bench.advance(1.0)
        assert worker.state is WorkerState.RETIRING

    def test_the_floor_stays(self, make_bench) -> None:
        bench = make_bench(idle_timeout=10, min_workers=1, max_workers=2)
        tasks = [bench.submit(), bench.submit()]
        for worker in bench.spawned():
            bench.ready(worker)
        for task in tasks:
            bench.finish(task)
        bench.advance(100.0)
        assert bench.core.live == 1

    def test_without_a_timeout_it_stays(self, make_bench) -> None:
        bench = make_bench(idle_timeout=None)
        worker = bench.idle_worker()
        bench.advance(5000.0)
        assert worker.state is WorkerState.IDLE

    def test_one_that_does_not_end_when_told_is_killed_and_killed_again(self, make_bench) -> None:
        bench = make_bench(idle_timeout=300)
        worker = bench.idle_worker()
        bench.advance(300.0)
        bench.advance(RETIRE_GRACE)
        assert bench.asked(act.Kill) == [act.Kill(worker, "did not end when told to")]
        bench.advance(RETIRE_GRACE)
        assert bench.asked(act.Kill) == [act.Kill(worker, "still not gone")]


class TestLosing:
    def test_an_idle_worker_that_dies_counts_against_the_breaker_as_nobody_is_to_blame(self, make_bench) -> None:
        bench = make_bench(breaker=BreakerSettings(failure_threshold=1))
        bench.exit(bench.idle_worker(), -9)
        assert bench.core.breaker.reason == "1 failed starts within 60 s, last: an idle worker was killed by SIGKILL"

    def test_with_the_keeper_it_does_not(self, make_bench) -> None:
        bench = make_bench()
        bench.exit(bench.idle_worker(), None, keeper_lost=True)
        assert bench.core.counters.start_failures == 0

    def test_one_that_was_told_to_end_does_not(self, make_bench) -> None:
        bench = make_bench(idle_timeout=10)
        worker = bench.idle_worker()
        bench.advance(10.0)
        bench.exit(worker, 1)
        assert bench.core.counters.start_failures == 0
        assert bench.core.breaker.failure_count(bench.now) == 0

    def test_a_death_is_observed_once(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker()
        bench.exit(worker)
        bench.exit(worker)
        assert bench.core.counters.start_failures == 1
        assert bench.core.pool_bytes == 0

    def test_a_task_that_kills_its_workers_does_not_open_the_breaker(self, make_bench) -> None:
        bench = make_bench(max_workers=1, breaker=BreakerSettings(failure_threshold=1))
        for _ in range(5):
            _, worker = bench.started()
            bench.exit(worker)
        assert bench.core.breaker.state is BreakerState.CLOSED
        assert bench.core.counters.crashed == 5


class TestClosing:
    def test_shutdown_waits_for_work_sends_workers_home_and_closes_when_the_last_is_gone(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        task, worker = bench.started()
        bench.do(bench.core.shutdown, cancel_futures=False)
        assert bench.asked(act.Retire) == []
        bench.finish(task)
        assert bench.asked(act.Retire) == [act.Retire(worker, "shutdown")]
        assert not bench.core.is_closed
        bench.exit(worker, 0)
        assert bench.asked(act.Close) == [act.Close()]
        assert bench.core.is_closed
        assert bench.core.next_deadline() is None
        bench.do(bench.core.shutdown, cancel_futures=True)
        assert bench.asked(act.Close) == [], "closed once"

    def test_a_worker_whose_memory_is_being_looked_at_ends_by_itself_so_that_its_agents_are_closed(
        self, make_bench
    ) -> None:
        bench = make_bench()
        task, worker = bench.started()
        bench.do(bench.core.shutdown, cancel_futures=False)
        bench.finish(task, seconds=1.0)
        assert worker.state is WorkerState.RETIRING
        assert bench.asked(act.Retire) == [act.Retire(worker, "shutdown")]

    def test_one_that_is_starting_is_killed_and_nobody_blamed(self, make_bench) -> None:
        bench = make_bench()
        task = bench.submit()
        (worker,) = bench.spawned()
        bench.do(bench.core.cancel, task)
        bench.do(bench.core.shutdown, cancel_futures=False)
        assert bench.asked(act.Kill) == [act.Kill(worker, "pool stopped")]
        bench.exit(worker)
        assert bench.core.is_closed
        assert bench.core.counters.start_failures == 0

    def test_an_unused_pool_closes_at_once(self, make_bench) -> None:
        bench = make_bench()
        bench.do(bench.core.shutdown, cancel_futures=False)
        assert bench.asked(act.Close) == [act.Close()]


class TestInitializer:
    def test_one_that_raises_breaks_the_pool_and_everybody_gets_an_error_of_his_own(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        tasks = [bench.submit() for _ in range(4)]
        first, second = bench.spawned()
        bench.ready(first)
        error = InitializerError("the initializer raised KeyError: 'x'")
        bench.do(bench.core.initializer_failed, second, error)
        assert {kill.worker.id for kill in bench.asked(act.Kill)} == {first.id, second.id}
        bench.exit(second, 1)
        bench.exit(first)
        outcomes = [bench.outcomes[task.id] for task in tasks]
        assert [is_value for is_value, _ in outcomes] == [False] * 4
        assert all(type(payload) is InitializerError for _, payload in outcomes)
        assert len({id(payload) for _, payload in outcomes}) == 4
        assert bench.core.counters.start_failures == 0
        assert bench.spawned() == [], "nothing spawns for ever"
        assert bench.asked(act.Close) == [], "it is broken, not closed"
        with pytest.raises(InitializerError, match="the initializer raised KeyError") as caught:
            bench.submit()
        assert caught.value is not error

    def test_the_first_error_stays(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        bench.submit()
        bench.submit()
        first, second = bench.spawned()
        bench.do(bench.core.initializer_failed, first, InitializerError("first"))
        bench.do(bench.core.initializer_failed, second, InitializerError("second"))
        assert str(bench.core.broken) == "first"

    def test_a_broken_pool_can_be_shut_down(self, make_bench) -> None:
        bench = make_bench()
        bench.submit()
        (worker,) = bench.spawned()
        bench.do(bench.core.initializer_failed, worker, InitializerError("x"))
        bench.exit(worker)
        bench.do(bench.core.shutdown, cancel_futures=False)
        assert bench.core.is_closed

    def test_one_that_crashes_counts_against_the_breaker_instead(self, make_bench) -> None:
        bench = make_bench()
        bench.submit()
        bench.exit(bench.spawned()[0], -11)
        assert bench.core.broken is None
        assert bench.core.breaker.failure_count(bench.now) == 1


class TestDefects:
    def test_a_move_that_is_not_in_the_table_is_refused_with_the_story(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        with pytest.raises(InternalError, match=r"BUSY done=0> cannot become STARTING\. This is a defect") as caught:
            bench.core._move_worker(worker, WorkerState.STARTING)
        story = caught.value.story
        assert "1 unresolved, 1 active, 1 live" in story
        assert repr(task) in story
        assert "<worker 1 pid=None STARTING done=0>: asked for" in story
        assert "<worker 1 pid=101 IDLE done=0>: ready" in story

    def test_the_story_is_short_however_long_the_life(self, make_bench) -> None:
        bench = make_bench(breaker=BreakerSettings(failure_threshold=10**6))
        bench.submit()
        for _ in range(120):
            for worker in bench.spawned():
                bench.exit(worker, 1)
            bench.advance(11.0)
        assert len(bench.core.story().splitlines()) < 100


class TestMemoryOfStarts:
    """Preload and initializer have the pool's hard limit; what passes it is a failed start."""

    def test_plainly_over_it_is_killed_and_counts(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=200)
        bench.submit()
        (worker,) = bench.spawned()
        bench.core.worker_spawned(bench.now, worker, 7)
        bench.advance(0.25)
        assert bench.asked(act.SampleWorker) == [act.SampleWorker(worker)]
        bench.sample(worker, 260)
        (kill,) = bench.asked(act.Kill)
        assert kill.reason == "used 260 MB before it was ready, above hard_memory_limit_mb (200)"
        bench.exit(worker)
        assert bench.core.counters.start_failures == 1

    def test_little_over_it_is_read_again_at_once(self, make_bench) -> None:
        bench = make_bench(hard_memory_limit_mb=200)
        bench.submit()
        (worker,) = bench.spawned()
        bench.core.worker_spawned(bench.now, worker, 7)
        for size in (210, 150, 210):
            bench.sample(worker, size)
            assert bench.asked(act.Kill) == []
        bench.asked(act.SampleWorker)
        bench.advance(0.011)
        assert bench.asked(act.SampleWorker) == [act.SampleWorker(worker)]
        bench.sample(worker, 211)
        assert len(bench.asked(act.Kill)) == 1

    def test_without_a_limit_it_is_not_looked_at(self, make_bench) -> None:
        bench = make_bench()
        bench.submit()
        (worker,) = bench.spawned()
        bench.core.worker_spawned(bench.now, worker, 7)
        bench.advance(5.0)
        assert bench.asked(act.SampleWorker) == []
        bench.sample(worker, 5000)
        assert bench.asked(act.Kill) == []


class TestSuccessors:
    """A worker that has its last tasks already is succeeded before it is gone."""

    def busy_with_its_last(self, make_bench, *, seconds: float = 0.001, **settings: Any) -> Any:
        bench = make_bench(max_workers=1, max_tasks_per_child=6, **settings)
        _, worker = bench.started(call_key="f")
        worker.task_limit = 6
        queued = [bench.submit(call_key="f") for _ in range(8)]
        while worker.tasks_done < 5 and worker.running is not None and not bench.core.leaving:
            bench.finish(worker.running, seconds=seconds)
            if worker.state is WorkerState.CHECKING:
                bench.sample(worker, 20)
        return bench, worker, queued

    def test_it_is_started_beside_it_and_takes_over(self, make_bench) -> None:
        bench, worker, _ = self.busy_with_its_last(make_bench)
        assert worker.is_leaving
        (successor,) = bench.spawned()
        assert bench.core.live == 2
        bench.ready(successor)
        assert successor.state is WorkerState.IDLE, "the other one still runs"
        while worker.running is not None:
            bench.finish(worker.running, seconds=0.001)
        assert worker.tasks_done == 6
        assert worker.state is WorkerState.RETIRING
        assert successor.state is WorkerState.BUSY
        assert not bench.core.leaving

    def test_not_where_the_last_ones_take_long_or_nobody_knows(self, make_bench) -> None:
        bench, worker, _ = self.busy_with_its_last(make_bench, seconds=2.0)
        assert worker.tasks_done == 5
        assert not worker.is_leaving
        assert bench.spawned() == []

    def test_not_where_no_work_waits(self, make_bench) -> None:
        bench, worker, queued = self.busy_with_its_last(make_bench)
        assert worker.is_leaving
        bench.exit(bench.spawned()[0], 1)
        for task in queued:
            bench.do(bench.core.cancel, task)
        bench.advance(60.0)
        assert bench.spawned() == []

    def test_who_has_a_successor_goes_though_its_last_task_was_taken_back(self, make_bench) -> None:
        bench, worker, _ = self.busy_with_its_last(make_bench)
        bench.ready(bench.spawned()[0])
        assert worker.backlog
        for task in reversed(list(worker.backlog)):
            bench.do(bench.core.task_given_back, task)
        bench.finish(worker.running)
        assert worker.tasks_done < 6
        assert worker.state is WorkerState.RETIRING
        assert bench.core.live == 1

    def test_several_results_of_one_worker_may_come_at_once(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        _, worker = bench.started(call_key="f")
        queued = [bench.submit(call_key="f") for _ in range(50)]
        while not worker.backlog:
            bench.finish(worker.running, seconds=0.0001)
        for _ in range(3):
            bench.core.task_finished(bench.now, worker, worker.running, True, None, 0.0001, 0)
        bench.take()
        assert sum(task.state is TaskState.RESOLVED for task in queued) >= 3

    def test_who_has_none_stays(self, make_bench) -> None:
        bench, worker, _ = self.busy_with_its_last(make_bench)
        bench.exit(bench.spawned()[0], 1)
        for task in reversed(list(worker.backlog)):
            bench.do(bench.core.task_given_back, task)
        bench.finish(worker.running)
        assert worker.state is WorkerState.BUSY
        assert worker.tasks_done < 6


def test_an_action_shows_what_it_asks_for_and_equals_one_that_asks_for_the_same() -> None:
    assert repr(act.Warn("look")) == "Warn(message='look')"
    assert act.Warn("look") == act.Warn("look")
    assert act.Warn("look") != act.Warn("listen")
    assert act.SampleHost() == act.SampleHost()
    assert act.SampleHost() != act.RoomFreed()
