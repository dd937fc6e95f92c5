"""Details of orders to a running pool that mutation testing found nobody looking at. See docs/mutants.md."""

from __future__ import annotations

import pytest

from agentpool.core import actions as act
from agentpool.core.transitions import TaskState, WorkerState
from agentpool.errors import SettingsError, UnknownWorkerError


def crew(make_bench, *, idle: int = 0, busy: int = 0, starting: int = 0):
    """A pool with so many workers of each kind, and no more places."""
    bench = make_bench(max_workers=idle + busy + starting)
    tasks = [bench.submit() for _ in range(idle + busy)]
    for worker in bench.spawned():
        bench.ready(worker)
    workers = [task.worker for task in tasks]
    for task in tasks[:idle]:
        bench.finish(task)
    assert [worker.state for worker in workers] == [WorkerState.IDLE] * idle + [WorkerState.BUSY] * busy
    for _ in range(idle + starting):
        bench.submit()
    starters = bench.spawned()
    for worker in workers[:idle]:
        bench.finish(worker.running)
    return bench, workers[:idle], workers[idle:], starters


class TestShrinking:
    @pytest.mark.parametrize(("to", "retired", "marked"), [(4, 0, 0), (3, 1, 0), (2, 2, 0), (1, 2, 2)])
    def test_idle_ones_first_and_busy_ones_are_marked_only_where_that_is_not_enough(
        self, make_bench, to, retired, marked
    ) -> None:
        bench, idle, busy, _ = crew(make_bench, idle=2, busy=2)
        bench.do(bench.core.resize, to, None)
        states = [WorkerState.RETIRING] * retired + [WorkerState.IDLE] * (2 - retired)
        assert [worker.state for worker in idle] == states
        assert [worker.retire_reason for worker in busy] == ["resize"] * marked + [None] * (2 - marked)

    def test_one_idle_one_of_three_leaves_two_of_whom_one_is_to_go(self, make_bench) -> None:
        bench, _, busy, _ = crew(make_bench, idle=1, busy=2)
        bench.do(bench.core.resize, 1, None)
        assert [worker.retire_reason for worker in busy] == ["resize"] * 2
        bench.finish(busy[0].running)
        assert (busy[0].state, busy[1].state) == (WorkerState.RETIRING, WorkerState.BUSY)
        bench.finish(busy[1].running)
        assert busy[1].state is WorkerState.IDLE

    def test_of_those_that_start_no_more_than_needed_and_the_latest_first(self, make_bench) -> None:
        bench, _, busy, starters = crew(make_bench, busy=1, starting=3)
        bench.do(bench.core.resize, 2, None)
        killed = {kill.worker for kill in bench.asked(act.Kill)}
        assert killed == set(starters[1:])
        assert busy[0].retire_reason is None

    def test_what_is_too_many_falls_as_they_are_gone(self, make_bench) -> None:
        bench, idle, _, _ = crew(make_bench, idle=5)
        bench.do(bench.core.resize, 4, None)
        assert (bench.core.left_over, bench.core.overhang) == (0, 0)
        bench.do(bench.core.resize, 1, None)
        assert bench.core.left_over == 3
        for count, worker in zip((2, 1, 0, 0), idle, strict=False):
            bench.exit(worker, 0)
            assert bench.core.left_over == count

    def test_a_pause_of_a_pool_where_nothing_runs_lets_nothing_more_run(self, make_bench) -> None:
        bench, *_ = crew(make_bench, idle=2)
        bench.do(bench.core.pause)
        assert bench.core.overhang == 0

    def test_who_leaves_anyway_counts_neither_for_nor_against(self, make_bench) -> None:
        bench = make_bench(max_workers=1, max_tasks_per_child=6)
        _, worker = bench.started(call_key="f")
        worker.task_limit = 6
        for _ in range(8):
            bench.submit(call_key="f")
        while not bench.core.leaving:
            bench.finish(worker.running, seconds=0.001)
        (successor,) = bench.spawned()
        bench.do(bench.core.resize, 1, None)
        assert bench.asked(act.Kill) == []
        bench.ready(successor)
        bench.do(bench.core.resize, 1, None)
        assert successor.state is WorkerState.IDLE
        while worker.running is not None:
            bench.finish(worker.running, seconds=0.001)
        assert (worker.state, successor.state) == (WorkerState.RETIRING, WorkerState.BUSY)


class TestSpared:
    def test_a_worker_that_was_marked_to_go_and_is_spared_serves_on(self, make_bench) -> None:
        bench, _, (first, *others), _ = crew(make_bench, busy=3)
        bench.do(bench.core.resize, 2, None)
        bench.finish(first.running)
        assert first.state is WorkerState.RETIRING
        for _ in range(2):
            for worker in others:
                bench.finish(worker.running)
                assert worker.state is WorkerState.IDLE
                assert worker.retire_reason is None
            assert all(bench.submit().state is TaskState.RUNNING for _ in others)


class TestKilledByHand:
    """Found by the simulator: results that a worker had sent before it was killed still come."""

    def sent_ahead(self, make_bench):
        bench = make_bench(max_workers=1, max_tasks_per_child=12)
        _, worker = bench.started(call_key="f")
        worker.task_limit = 12
        for _ in range(20):
            bench.submit(call_key="f")
        while len(worker.backlog) < 3:
            bench.finish(worker.running, seconds=0.0001)
        bench.do(bench.core.kill_worker, worker.id, "by hand")
        return bench, worker

    def test_it_gets_no_successor_beside_the_one_that_replaces_it(self, make_bench) -> None:
        bench, worker = self.sent_ahead(make_bench)
        while worker.running is not None:
            bench.finish(worker.running, seconds=0.0001)
            assert not worker.is_leaving
        assert bench.core.leaving == 0
        assert len(bench.spawned()) == 1

    def test_nothing_more_is_sent_to_it(self, make_bench) -> None:
        bench, worker = self.sent_ahead(make_bench)
        sent = len(bench.sent)
        bench.finish(worker.running, seconds=0.0001)
        assert len(bench.sent) == sent


class TestWords:
    def test_what_was_ordered_is_in_the_story(self, make_bench) -> None:
        bench = make_bench(max_workers=4)
        bench.now = 5.0
        bench.do(bench.core.resize, 3, 2)
        assert "5.000000 resized to 3 workers, 2 at once" in bench.core.story()

    def test_nothing_to_resize(self, make_bench) -> None:
        bench = make_bench()
        with pytest.raises(SettingsError) as caught:
            bench.do(bench.core.resize, None, None)
        assert str(caught.value) == "resize needs max_workers, max_concurrent or both"

    @pytest.mark.parametrize("unknown", [3, 0, -1, True, "1", None])
    def test_a_worker_that_never_was(self, make_bench, unknown) -> None:
        bench, *_ = crew(make_bench, idle=2)
        with pytest.raises(UnknownWorkerError) as caught:
            bench.do(bench.core.kill_worker, unknown, "")
        assert str(caught.value) == (f"this pool never had a worker {unknown!r}; its workers are: 1, 2. "
                                     "get_pool_stats()['workers'] lists them by id and pid")
