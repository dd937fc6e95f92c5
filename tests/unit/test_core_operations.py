"""What operators order: resize, pause, drain, recycle, kill a worker."""

from __future__ import annotations

import pytest

from agentpool.core import actions as act
from agentpool.core.operations import BY_HAND, SURPLUS
from agentpool.core.records import SessionRecord
from agentpool.core.retry import compile_policy
from agentpool.core.transitions import TaskState, WorkerState
from agentpool.errors import PoolClosedError, SettingsError, UnknownWorkerError, WorkerKilledError


def idle_crew(make_bench, count: int, **settings):
    """A bench with so many idle workers, each of which has run one task."""
    bench = make_bench(max_workers=count, max_concurrent=count, **settings)
    tasks = [bench.submit() for _ in range(count)]
    for worker in bench.spawned():
        bench.ready(worker)
    for task in tasks:
        bench.finish(task)
    return bench, list(bench.core.workers.values())


class TestResize:
    def test_growing_starts_what_waits(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        bench.started()
        waiting = [bench.submit() for _ in range(3)]
        bench.do(bench.core.resize, 3, None)
        assert bench.core.concurrency == 3, "it follows max_workers, as it was never given"
        for worker in bench.spawned():
            bench.ready(worker)
        assert [task.state.name for task in waiting] == ["RUNNING", "RUNNING", "QUEUED"]

    def test_shrinking_retires_the_longest_idle_at_once(self, make_bench) -> None:
        bench, workers = idle_crew(make_bench, 3)
        bench.do(bench.core.resize, 1, None)
        assert bench.asked(act.Retire) == [act.Retire(worker, SURPLUS) for worker in workers[:2]]
        assert bench.core.counters.recycled == {SURPLUS: 2}

    def test_of_busy_workers_those_go_whose_tasks_end_first(self, make_bench) -> None:
        bench = make_bench(max_workers=3)
        tasks = [bench.submit() for _ in range(3)]
        workers = bench.spawned()
        for worker in workers:
            bench.ready(worker)
        bench.do(bench.core.resize, 1, None)
        assert (bench.core.overhang, bench.core.concurrency) == (2, 1)
        waiting = bench.submit()
        bench.finish(tasks[2])
        bench.finish(tasks[0])
        assert bench.asked(act.Retire) == [act.Retire(workers[2], SURPLUS), act.Retire(workers[0], SURPLUS)]
        assert waiting.state is TaskState.QUEUED
        bench.finish(tasks[1])
        assert waiting.worker is workers[1], "it stays"
        assert bench.core.overhang == 0

    def test_a_worker_that_is_not_ready_yet_is_killed_and_nobody_is_to_blame(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        bench.submit()
        bench.submit()
        first, second = bench.spawned()
        bench.do(bench.core.resize, 1, None)
        assert bench.asked(act.Kill) == [act.Kill(second, SURPLUS)]
        bench.exit(second)
        assert bench.core.counters.start_failures == 0
        bench.ready(first)
        assert first.running is not None

    def test_growing_again_keeps_those_that_were_to_go(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        tasks = [bench.submit() for _ in range(2)]
        for worker in bench.spawned():
            bench.ready(worker)
        bench.do(bench.core.resize, 1, None)
        bench.do(bench.core.resize, 2, None)
        for task in tasks:
            bench.finish(task)
        assert bench.asked(act.Retire) == []
        assert len(bench.core.idle) == 2

    def test_a_throttle_and_a_floor_above_a_small_size_come_back(self, make_bench) -> None:
        bench = make_bench(max_workers=4, max_concurrent=3, min_workers=2)
        bench.do(bench.core.resize, 1, None)
        assert (bench.core.settings.concurrency, bench.core.settings.min_workers) == (1, 1)
        bench.do(bench.core.resize, 8, None)
        assert (bench.core.settings.concurrency, bench.core.settings.min_workers) == (3, 2)

    def test_only_the_throttle(self, make_bench) -> None:
        bench, _ = idle_crew(make_bench, 3)
        bench.do(bench.core.resize, None, 1)
        tasks = [bench.submit() for _ in range(2)]
        assert [task.state.name for task in tasks] == ["RUNNING", "QUEUED"]
        assert bench.asked(act.Retire) == []
        bench.do(bench.core.resize, None, 2)
        assert tasks[1].state is TaskState.RUNNING

    @pytest.mark.parametrize(("most", "at_once", "message"), [
        (None, None, "resize needs max_workers, max_concurrent or both"),
        (0, None, "max_workers must be greater than 0, got 0"),
        ("3", None, "max_workers must be a whole number, got '3'"),
        (2, 3, r"max_concurrent \(3\) is above max_workers \(2\)"),
        (None, True, "max_concurrent must be a whole number, got True"),
    ])
    def test_a_size_that_cannot_be_changes_nothing(self, make_bench, most, at_once, message) -> None:
        bench = make_bench(max_workers=2)
        before = bench.core.settings
        with pytest.raises(SettingsError, match=message):
            bench.core.resize(bench.now, most, at_once)
        assert bench.core.settings is before
        assert bench.core.concurrency == 2

    def test_thresholds_follow_the_size(self, make_bench) -> None:
        bench = make_bench(max_workers=2, memory_limit_mb=100)
        _, worker = bench.started()
        bench.sample(worker, 350)
        assert bench.core.governor.reasons
        bench.do(bench.core.resize, 8, None)
        assert not bench.core.governor.reasons


class TestPause:
    def test_nothing_begins_what_runs_goes_on_and_new_tasks_are_accepted(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        running, _ = bench.started()
        bench.do(bench.core.pause)
        waiting = bench.submit()
        bench.finish(running)
        assert waiting.state is TaskState.QUEUED
        assert bench.spawned() == [], "nobody is started for work that does not begin"
        bench.do(bench.core.resume)
        assert waiting.state is TaskState.RUNNING

    def test_twice_is_once(self, make_bench) -> None:
        bench = make_bench()
        bench.do(bench.core.pause)
        bench.do(bench.core.pause)
        bench.do(bench.core.resume)
        bench.do(bench.core.resume)
        assert (bench.core.is_paused, bench.core.concurrency) == (False, 2)

    def test_what_was_sent_ahead_is_taken_back(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        for _ in range(5):
            task, worker = bench.started(call_key="f")
            bench.finish(task)
        head, *ahead = [bench.submit("f") for _ in range(4)]
        bench.finish(head)
        assert ahead[1].state is TaskState.ASSIGNED
        bench.do(bench.core.pause)
        assert bench.asked(act.Revoke) == [act.Revoke(worker)]
        bench.do(bench.core.task_given_back, ahead[2])
        bench.do(bench.core.task_given_back, ahead[1])
        bench.finish(ahead[0])
        assert [task.state for task in ahead[1:]] == [TaskState.QUEUED] * 2

    def test_a_size_changed_meanwhile_counts_afterwards(self, make_bench) -> None:
        bench, _ = idle_crew(make_bench, 2)
        bench.do(bench.core.pause)
        bench.do(bench.core.resize, None, 1)
        tasks = [bench.submit() for _ in range(2)]
        assert bench.core.active == 0
        bench.do(bench.core.resume)
        assert [task.state.name for task in tasks] == ["RUNNING", "QUEUED"]

    def test_a_floor_is_kept_all_the_same(self, make_bench) -> None:
        bench = make_bench(min_workers=1)
        bench.do(bench.core.pause)
        bench.do(bench.core.start)
        assert len(bench.spawned()) == 1

    @pytest.mark.parametrize("end", ["shutdown", "drain"])
    def test_an_end_of_accepting_ends_it(self, make_bench, end: str) -> None:
        bench, _ = idle_crew(make_bench, 1)
        bench.do(bench.core.pause)
        waiting = bench.submit()
        if end == "shutdown":
            bench.do(bench.core.shutdown, cancel_futures=False)
            bench.do(bench.core.pause)
        else:
            bench.do(bench.core.drain)
        assert not bench.core.is_paused
        assert waiting.state is TaskState.RUNNING

    def test_a_stop_ends_it(self, make_bench) -> None:
        bench, _ = idle_crew(make_bench, 1)
        bench.do(bench.core.pause)
        bench.do(bench.core.stop_all, OSError("stop"))
        assert not bench.core.is_paused


class TestDrain:
    def test_nothing_new_is_accepted_and_what_was_is_run(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        running, _ = bench.started()
        waiting = bench.submit()
        bench.do(bench.core.drain)
        with pytest.raises(PoolClosedError, match=r"draining: .* until pool\.resume\(\)"):
            bench.submit()
        bench.finish(running)
        bench.finish(waiting)
        assert len(bench.core.idle) == 1, "workers stay"
        bench.do(bench.core.resume)
        assert bench.submit().state is TaskState.RUNNING

    def test_who_waits_for_room_is_told(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_pending=1)
        bench.started()
        bench.submit()
        bench.core.want_room()
        bench.do(bench.core.drain)
        assert bench.asked(act.RoomFreed) == [act.RoomFreed()]


class TestRecycle:
    def test_an_idle_one_now_a_busy_one_after_its_task(self, make_bench) -> None:
        bench, (first, second) = idle_crew(make_bench, 2)
        task = bench.submit()
        assert task.worker is second
        assert bench.do(bench.core.recycle, None) == 2
        assert bench.asked(act.Retire) == [act.Retire(first, BY_HAND)]
        assert bench.do(bench.core.recycle, None) == 0, "it is done, or on its way"
        bench.finish(task, "value")
        assert bench.outcomes[task.id] == (True, "value")
        assert bench.asked(act.Retire) == [act.Retire(second, BY_HAND)]

    def test_one_that_is_looked_at(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started()
        bench.finish(task, seconds=1.0)
        assert worker.state is WorkerState.CHECKING
        assert bench.do(bench.core.recycle, worker.id) == 1

    def test_one_that_starts_is_fresh_anyway(self, make_bench) -> None:
        bench = make_bench()
        bench.submit()
        (worker,) = bench.spawned()
        assert bench.do(bench.core.recycle, worker.id) == 0
        assert worker.retire_reason is None

    def test_one_that_was_too_many_goes_for_good(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        tasks = [bench.submit() for _ in range(2)]
        for worker in bench.spawned():
            bench.ready(worker)
        bench.do(bench.core.resize, 1, None)
        assert bench.do(bench.core.recycle, None) == 2
        bench.do(bench.core.resize, 2, None)
        for task in tasks:
            bench.finish(task)
        assert [retired.reason for retired in bench.asked(act.Retire)] == [BY_HAND] * 2

    def test_one_that_is_gone_and_one_that_never_was(self, make_bench) -> None:
        bench, (worker,) = idle_crew(make_bench, 1)
        bench.exit(worker)
        assert bench.do(bench.core.recycle, worker.id) == 0
        for never in (0, 7, "1", True):
            with pytest.raises(UnknownWorkerError, match=f"never had a worker {never!r}; its workers are: none"):
                bench.core.recycle(bench.now, never)


class TestKillWorker:
    def test_its_task_fails_with_an_error_that_says_so(self, make_bench) -> None:
        bench = make_bench()
        task, worker = bench.started()
        assert bench.do(bench.core.kill_worker, worker.id, "it looks hung")
        assert bench.asked(act.Kill) == [act.Kill(worker, "it looks hung")]
        bench.exit(worker)
        is_value, error = bench.outcomes[task.id]
        assert not is_value
        assert type(error) is WorkerKilledError
        assert "was stopped (it looks hung) while it ran task" in str(error)
        counters = bench.core.counters
        assert (counters.workers_killed, counters.crashed, counters.failed) == (1, 0, 1)

    def test_a_policy_for_lost_workers_runs_it_again_and_it_is_not_blamed(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(policy=compile_policy(3))
        bench.do(bench.core.kill_worker, worker.id, "by hand")
        bench.exit(worker)
        assert (task.state, task.kills, task.is_isolated) == (TaskState.WAITING_RETRY, 0, False)

    def test_a_task_that_never_began_runs_elsewhere_uncharged(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started()
        bench.do(bench.core.kill_worker, worker.id, "by hand")
        bench.exit(worker, began=False)
        assert (task.state, task.attempts) == (TaskState.QUEUED, 0)

    @pytest.mark.parametrize("state", ["IDLE", "STARTING", "RETIRING"])
    def test_whatever_it_does(self, make_bench, state: str) -> None:
        bench = make_bench(max_workers=1)
        if state == "STARTING":
            bench.submit()
            (worker,) = bench.spawned()
        else:
            worker = bench.idle_worker()
        if state == "RETIRING":
            bench.do(bench.core.recycle, worker.id)
        assert worker.state.name == state
        assert bench.do(bench.core.kill_worker, worker.id, "by hand")
        assert not bench.do(bench.core.kill_worker, worker.id, "by hand"), "it is being killed"
        bench.exit(worker)
        assert not bench.do(bench.core.kill_worker, worker.id, "by hand"), "it is gone"
        assert bench.core.counters.start_failures == 0, "the breaker has nothing to count"
        assert bench.core.counters.workers_killed == 1


def test_of_workers_that_are_measured_those_of_sessions_stay(make_bench) -> None:
    bench = make_bench(max_workers=2, max_concurrent=2)
    first, kept = bench.started(session=SessionRecord(1, None, None))
    second, other = bench.started()
    for task in (first, second):
        bench.finish(task, seconds=1.0)
    assert [worker.state for worker in (kept, other)] == [WorkerState.CHECKING] * 2
    bench.do(bench.core.resize, 1, None)
    assert [retired.worker for retired in bench.asked(act.Retire)] == [other]
