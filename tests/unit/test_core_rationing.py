"""Groups, and memory that is promised before it is used."""

from __future__ import annotations

import re

import pytest

from agentpool.config import MB
from agentpool.core import actions as act
from agentpool.core.crew import HOST_READING_AGE
from agentpool.core.failures import memory_awaited
from agentpool.core.records import HostState
from agentpool.core.retry import compile_policy
from agentpool.core.transitions import TaskState
from agentpool.errors import MemoryReservationError, QueueTimeoutError, WorkerCrashedError

#: 1,000 MB of 10,000 can be promised: the floor is 5 %.
TIGHT = HostState(total_bytes=10_000 * MB, available_bytes=1_500 * MB)


def crew(make_bench, count: int, **settings):
    """A bench whose workers are all idle; from now on it asks the host for itself."""
    bench = make_bench(max_workers=count, max_concurrent=count, memory_limit_mb=None, **settings)
    tasks = [bench.submit() for _ in range(count)]
    for worker in bench.spawned():
        bench.ready(worker)
    for task in tasks:
        bench.finish(task)
    bench.host = TIGHT
    bench.advance(5.0)
    return bench


def states(tasks) -> list[str]:
    return [task.state.name for task in tasks]


class TestGroups:
    def test_no_more_run_at_once_and_others_overtake_them(self, make_bench) -> None:
        bench = crew(make_bench, 4)
        grouped = [bench.submit(group="g", group_limit=2) for _ in range(3)]
        other = bench.submit()
        assert states([*grouped, other]) == ["RUNNING", "RUNNING", "QUEUED", "RUNNING"]
        assert bench.core.groups == {"g": 2}
        bench.finish(grouped[0])
        assert states(grouped) == ["RESOLVED", "RUNNING", "RUNNING"]

    def test_who_waited_longer_goes_first_when_both_could(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        first = bench.submit(group="g", group_limit=1)
        bench.submit()
        waiting, plain = bench.submit(group="g", group_limit=1), bench.submit()
        assert bench.core.queue_length == 2
        bench.finish(first)
        assert states([waiting, plain]) == ["RUNNING", "QUEUED"]

    def test_a_higher_priority_goes_first_all_the_same(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        first = bench.submit()
        waiting, urgent = bench.submit(group="g", group_limit=1), bench.submit(priority=1)
        bench.finish(first)
        assert states([waiting, urgent]) == ["QUEUED", "RUNNING"]

    def test_each_task_is_judged_by_its_own_limit(self, make_bench) -> None:
        bench = crew(make_bench, 3)
        tasks = [bench.submit(group="g", group_limit=limit) for limit in (1, 2, 1)]
        assert states(tasks) == ["RUNNING", "RUNNING", "QUEUED"]

    def test_no_worker_is_started_for_one_that_may_not_run(self, make_bench) -> None:
        bench = make_bench(max_workers=4, max_concurrent=4)
        for _ in range(4):
            bench.submit(group="g", group_limit=2)
        assert len(bench.spawned()) == 2

    def test_a_lost_worker_gives_its_place_back(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        lost, waiting = (bench.submit(group="g", group_limit=1) for _ in range(2))
        bench.exit(lost.worker)
        assert isinstance(bench.outcomes[lost.id][1], WorkerCrashedError)
        assert waiting.state is TaskState.RUNNING

    def test_one_that_killed_its_worker_waits_for_its_group_as_well(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        poison = bench.submit(group="g", group_limit=1, policy=compile_policy(3))
        bench.exit(poison.worker)
        other = bench.submit(group="g", group_limit=1)
        bench.advance(1.0)
        for worker in bench.spawned():
            bench.ready(worker)
        assert (poison.is_isolated, states([poison, other])) == (True, ["QUEUED", "RUNNING"])
        bench.finish(other)
        bench.do(bench.core.recycle, other.worker and other.worker.id)
        assert poison.state in (TaskState.RUNNING, TaskState.QUEUED)

    def test_the_error_of_one_that_waited_too_long_names_the_group(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        bench.submit(group="g", group_limit=1)
        late = bench.submit(group="g", group_limit=1, queue_timeout=3.0)
        bench.advance(3.0)
        error = bench.outcomes[late.id][1]
        assert isinstance(error, QueueTimeoutError)
        assert "its group 'g' ran 1 at once all the time (group_limit)" in str(error)

    def test_those_in_lines_count_as_queued(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_pending=1)
        bench.started(group="g", group_limit=1)
        waiting = bench.submit(group="g", group_limit=1)
        assert bench.core.queue_length == 1
        assert bench.do(bench.core.cancel, waiting)
        assert bench.core.queue_length == 0


class TestPromisedMemory:
    def test_the_same_memory_is_not_given_out_twice(self, make_bench) -> None:
        bench = crew(make_bench, 3)
        tasks = [bench.submit(expected_bytes=600 * MB) for _ in range(2)]
        plain = bench.submit()
        assert states([*tasks, plain]) == ["RUNNING", "QUEUED", "RUNNING"]
        assert bench.core.reserved_bytes == 580 * MB, "its worker has 20 already"

    def test_what_readings_show_is_promised_no_longer(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        task = bench.submit(expected_bytes=600 * MB)
        bench.sample(task.worker, 500)
        assert bench.core.reserved_bytes == 580 * MB, "the host's reading is older"
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=1_020 * MB)
        bench.advance(2.0)
        assert bench.core.reserved_bytes == 100 * MB

    def test_it_is_given_back_at_the_end_and_counted_anew(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        first, second = (bench.submit(expected_bytes=600 * MB) for _ in range(2))
        before = bench.host_asked
        bench.finish(first)
        assert bench.host_asked == before + 1, "what it used is not in the last reading"
        assert second.state is TaskState.RUNNING
        bench.finish(second)
        assert bench.core.reserved_bytes == 0

    def test_a_reading_that_is_old_is_not_trusted(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        bench.host = None
        bench.advance(60.0)
        task = bench.submit(expected_bytes=600 * MB)
        assert task.state is TaskState.QUEUED
        bench.do(bench.core.host_sampled, TIGHT)
        assert task.state is TaskState.RUNNING

    def test_what_a_warm_worker_holds_is_part_of_it(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        (worker,) = bench.core.idle.values()
        bench.sample(worker, 500)
        assert bench.submit(expected_bytes=1_400 * MB).state is TaskState.RUNNING
        assert bench.core.reserved_bytes == 900 * MB

    def test_a_smaller_one_does_not_overtake_a_larger_one(self, make_bench) -> None:
        bench = crew(make_bench, 3)
        running = bench.submit(expected_bytes=600 * MB)
        large, small = bench.submit(expected_bytes=900 * MB), bench.submit(expected_bytes=50 * MB)
        in_a_group = bench.submit(expected_bytes=50 * MB, group="g", group_limit=1)
        assert states([large, small, in_a_group]) == ["QUEUED"] * 3
        bench.finish(running)
        assert states([large, small, in_a_group]) == ["RUNNING"] * 3

    def test_it_looks_again_where_the_last_reading_is_fresh_and_no_worker_is_left(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        (worker,) = bench.core.idle.values()
        bench.exit(worker)
        bench.advance(120.0)
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=800 * MB)
        bench.do(bench.core.host_sampled, bench.host)
        task = bench.submit(expected_bytes=600 * MB)
        assert (task.state, bench.core.workers) == (TaskState.QUEUED, {})
        bench.host = TIGHT
        bench.advance(2.0)
        (worker,) = bench.core.workers.values()
        bench.ready(worker)
        assert task.state is TaskState.RUNNING

    def test_it_waits_for_memory_without_a_worker_too(self, make_bench) -> None:
        bench = make_bench(memory_limit_mb=None)
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=800 * MB)
        task = bench.submit(expected_bytes=600 * MB)
        assert bench.spawned() == []
        bench.advance(10.0)
        assert bench.spawned() == [], "it asks again and again"
        bench.host = TIGHT
        bench.advance(2.0)
        (worker,) = bench.spawned()
        bench.ready(worker)
        assert task.state is TaskState.RUNNING

    def test_one_that_can_never_fit_is_told_so(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        never = [bench.submit(expected_bytes=20_000 * MB, group=group, group_limit=3) for group in (None, "g", "g")]
        for task in never:
            is_value, error = bench.outcomes[task.id]
            assert not is_value
            assert isinstance(error, MemoryReservationError)
            assert (error.expected_bytes, error.givable_bytes) == (20_000 * MB, 9_500 * MB)
            assert re.search(r"expects 20000 MB \(expected_memory_mb\), .* only 9500 MB to give", str(error))

    def test_the_error_of_one_that_waited_too_long_names_the_memory(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        bench.submit(expected_bytes=900 * MB)
        late = bench.submit(expected_bytes=600 * MB, queue_timeout=3.0)
        bench.advance(3.0)
        assert re.search(r"it expects 600 MB \(expected_memory_mb\), and 120 MB can be promised, beside 880 MB",
                         str(bench.outcomes[late.id][1]))

    def test_one_that_runs_alone_shares_with_nobody(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task = bench.submit(expected_bytes=600 * MB)
        for worker in bench.spawned():
            bench.ready(worker)
        bench.finish(task)
        task = bench.submit(expected_bytes=600 * MB)
        task.is_isolated = task.is_alone = True
        bench.do(bench.core.task_skipped, task.worker, task)
        bench.exit(next(iter(bench.core.workers.values())))
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=700 * MB)
        bench.do(bench.core.host_sampled, bench.host)
        bench.advance(1.0)
        for worker in bench.spawned():
            bench.ready(worker)
        assert task.state is TaskState.RUNNING


class TestGrowthLimits:
    def test_growth_counts_from_the_first_reading_after_the_first_task(self, make_bench) -> None:
        bench = make_bench(max_workers=1, memory_limit_mb=100, critical_memory_mb=1000)
        task, worker = bench.started(growth_limit_bytes=50 * MB)
        bench.finish(task)
        assert bench.asked(act.SampleWorker) == [act.SampleWorker(worker)]
        bench.sample(worker, 170)
        assert (worker.warm_bytes, worker.limit_bytes) == (170 * MB, 220 * MB), "the pool's 100 MB do not count"
        task = bench.submit(growth_limit_bytes=50 * MB)
        bench.finish(task, seconds=1.0)
        bench.sample(worker, 215)
        assert worker.state.name == "IDLE"
        task = bench.submit(growth_limit_bytes=50 * MB)
        bench.finish(task, seconds=1.0)
        bench.sample(worker, 230)
        bench.do(bench.core.worker_collected, worker)
        bench.sample(worker, 230)
        assert bench.asked(act.Retire) == [act.Retire(worker, "memory")]

    def test_an_agent_that_is_set_up_later_makes_a_new_baseline(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(growth_limit_bytes=50 * MB)
        bench.finish(task)
        bench.sample(worker, 60)
        bench.do(bench.core.agent_set_up, worker, 150 * MB)
        assert worker.warm_bytes is None
        bench.sample(worker, 160)
        assert worker.limit_bytes is None or worker.limit_bytes > 160 * MB

    def test_beside_a_limit_of_its_own_the_lower_counts(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started(growth_limit_bytes=50 * MB, soft_limit_bytes=200 * MB)
        bench.finish(task)
        bench.sample(worker, 180)
        assert worker.limit_bytes == 200 * MB

    def test_the_next_plain_task_is_judged_by_the_pool_again(self, make_bench) -> None:
        bench = make_bench(max_workers=1, memory_limit_mb=100)
        task, worker = bench.started(growth_limit_bytes=50 * MB)
        bench.finish(task)
        bench.sample(worker, 60)
        task = bench.submit()
        bench.finish(task)
        assert worker.limit_bytes == 100 * MB


@pytest.mark.parametrize("paused", [False, True])
def test_a_shutdown_without_waiting_cancels_those_in_lines(make_bench, paused: bool) -> None:
    bench = crew(make_bench, 2)
    bench.submit(group="g", group_limit=1)
    waiting = bench.submit(group="g", group_limit=1)
    if paused:
        bench.do(bench.core.pause)
    assert bench.do(bench.core.shutdown, cancel_futures=True) == [waiting]


class TestToTheByte:
    """Where the limits of what is promised begin."""

    def test_a_task_that_needs_all_that_can_be_promised_begins(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        assert bench.submit(expected_bytes=1_020 * MB).state is TaskState.RUNNING, "20 are its worker's"

    def test_and_not_with_a_byte_more(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        assert bench.submit(expected_bytes=1_020 * MB + 1).state is TaskState.QUEUED

    def test_what_a_worker_holds_already_needs_nothing_however_little_there_is(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=400 * MB)
        bench.do(bench.core.host_sampled, bench.host)
        assert bench.submit(expected_bytes=20 * MB).state is TaskState.RUNNING
        assert bench.core.reserved_bytes == 0

    def test_one_byte_more_than_the_worker_holds_is_a_need(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=400 * MB)
        bench.do(bench.core.host_sampled, bench.host)
        assert bench.submit(expected_bytes=20 * MB + 1).state is TaskState.QUEUED

    def test_one_that_expects_nothing_needs_nothing(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=100 * MB)
        bench.do(bench.core.host_sampled, bench.host)
        assert bench.submit(expected_bytes=0).state is TaskState.RUNNING

    def test_what_the_host_has_in_all_is_not_too_much(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        refused = bench.submit(expected_bytes=9_500 * MB + 1)
        is_value, error = bench.outcomes[refused.id]
        assert is_value is False
        assert str(error) == (
            f"task {refused.id} expects 9500 MB (expected_memory_mb), and this host or container has only 9500 MB to "
            "give, all in all, less min_available_mb; expect less, or run it elsewhere")
        waiting = bench.submit(expected_bytes=9_500 * MB)
        assert waiting.id not in bench.outcomes

    def test_a_reading_of_a_second_ago_is_fresh(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        bench.host = None
        at = bench.core.governor.sampled_at
        bench.now = at + HOST_READING_AGE
        assert bench.submit(expected_bytes=MB).state is TaskState.RUNNING

    def test_memory_that_came_since_is_not_promised_by_the_reading_before(self, make_bench) -> None:
        """A worker that holds more than was expected has nothing promised, not a negative sum."""
        bench = crew(make_bench, 2)
        task = bench.submit(expected_bytes=100 * MB)
        bench.sample(task.worker, 300)
        bench.do(bench.core.host_sampled, TIGHT)
        assert (bench.core.reserved_bytes, task.worker.reserved_bytes) == (0, 0)


class TestWorkersForLines:
    def test_as_many_are_started_as_the_memory_has_room_for(self, make_bench) -> None:
        bench = make_bench(max_workers=5, max_concurrent=5, memory_limit_mb=None)
        bench.host = TIGHT
        for _ in range(4):
            bench.submit(expected_bytes=400 * MB)
        assert len(bench.spawned()) == 2, "1,000 MB can be promised"

    def test_to_the_byte(self, make_bench) -> None:
        bench = make_bench(max_workers=5, max_concurrent=5, memory_limit_mb=None)
        bench.host = TIGHT
        for _ in range(3):
            bench.submit(expected_bytes=500 * MB)
        assert len(bench.spawned()) == 2

    def test_in_lines_and_plain_together_no_more_than_may_run(self, make_bench) -> None:
        bench = make_bench(max_workers=9, max_concurrent=3)
        for group in "abcd":
            bench.submit(group=group, group_limit=2)
            bench.submit(group=group, group_limit=2)
        assert len(bench.spawned()) == 3
        bench = make_bench(max_workers=9, max_concurrent=9)
        bench.submit()
        for group in "ab":
            bench.submit(group=group, group_limit=1)
            bench.submit(group=group, group_limit=1)
        assert len(bench.spawned()) == 3, "one of each line, and the plain one"

    def test_a_line_whose_tasks_were_withdrawn_wants_nobody(self, make_bench) -> None:
        bench = make_bench(max_workers=4, max_concurrent=4)
        bench.do(bench.core.pause)
        gone = bench.submit(group="a", group_limit=1)
        bench.submit(group="b", group_limit=1)
        assert bench.do(bench.core.cancel, gone)
        bench.do(bench.core.resume)
        assert len(bench.spawned()) == 1

    def test_a_group_without_a_limit_is_none(self, make_bench) -> None:
        bench = make_bench(max_workers=3, max_concurrent=3)
        tasks = [bench.submit(group="g", expected_bytes=MB) for _ in range(3)]
        for worker in bench.spawned():
            bench.ready(worker)
        assert states(tasks) == ["RUNNING"] * 3

    def test_a_limit_without_a_group_is_none(self, make_bench) -> None:
        bench = make_bench(max_workers=3, max_concurrent=3)
        tasks = [bench.submit(group_limit=1, expected_bytes=MB) for _ in range(2)]
        for worker in bench.spawned():
            bench.ready(worker)
        assert states(tasks) == ["RUNNING"] * 2


class TestWhyItWaited:
    def test_for_its_group_only_where_that_is_full(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        bench.submit()
        late = bench.submit(group="g", group_limit=1, queue_timeout=1.0)
        bench.advance(1.0)
        assert str(bench.outcomes[late.id][1]) == (
            f"task {late.id} waited longer than its queue_timeout of 1 s and was not started; raise max_concurrent, or "
            "allow it to wait longer")

    def test_for_a_worker_while_another_one_waits_for_memory(self, make_bench) -> None:
        bench = crew(make_bench, 2)
        bench.submit(expected_bytes=900 * MB)
        bench.submit(expected_bytes=900 * MB)
        bench.submit()
        plain = bench.submit(queue_timeout=1.0)
        bench.advance(1.0)
        assert "started; raise max_concurrent" in str(bench.outcomes[plain.id][1])

    def test_for_memory_of_which_nothing_is_known_or_too_much_was_promised(self) -> None:
        for free in (None, 0, -5 * MB):
            assert memory_awaited(600 * MB, free, 300 * MB) == (
                "; it expects 600 MB (expected_memory_mb), and 0 MB can be promised, beside 300 MB that are promised "
                "to tasks that run")


def test_a_group_that_a_finished_task_leaves_lets_the_next_begin_at_once(make_bench) -> None:
    bench = crew(make_bench, 2)
    first, second = (bench.submit(group="g", group_limit=1) for _ in range(2))
    assert states([first, second]) == ["RUNNING", "QUEUED"]
    bench.finish(first, seconds=1.0)
    assert second.state is TaskState.RUNNING, "in the other worker, as the first is measured"


class TestBeforeThereIsAWorker:
    @pytest.mark.parametrize(("available_mb", "expected_bytes", "is_awaited"), [
        (1_500, 1_000 * MB, False), (1_500, 1_000 * MB + 1, True),
        (400, 0, False),  # it says that it needs nothing
    ])
    def test_to_the_byte(self, make_bench, available_mb: int, expected_bytes: int, is_awaited: bool) -> None:
        bench = make_bench(memory_limit_mb=None)
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=available_mb * MB)
        bench.submit(expected_bytes=expected_bytes)
        assert bench.core.is_memory_awaited is is_awaited

    def test_a_line_that_ran_empty_wants_nobody(self, make_bench) -> None:
        bench = make_bench()
        bench.do(bench.core.pause)
        gone = bench.submit(group="a", group_limit=1)
        bench.submit(group="b", group_limit=1)
        assert bench.do(bench.core.cancel, gone)
        assert bench.core._line_demand(9) == 1

    def test_one_that_killed_its_worker_is_weighed_with_the_fresh_one(self, make_bench) -> None:
        bench = crew(make_bench, 1)
        task = bench.submit(expected_bytes=1_020 * MB, policy=compile_policy(3))
        bench.exit(task.worker)
        bench.advance(30.0)
        (worker,) = bench.spawned()
        bench.ready(worker)
        assert task.worker is worker, "1,000 MB can be promised, and 20 are its own"
        assert task.is_isolated
