"""Details of the core that mutation testing found nobody looking at. See docs/mutants.md."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity

from agentpool.config import MB
from agentpool.core import actions as act
from agentpool.core import failures, recycling
from agentpool.core.placement import Durations
from agentpool.core.queueing import TaskQueue
from agentpool.core.records import TaskRecord, TaskSpec, WorkerExit, WorkerRecord
from agentpool.core.retry import Escalate, RetryPolicy, compile_policy
from agentpool.core.transitions import TaskState, WorkerState
from agentpool.errors import (
    CircuitOpenError,
    MemoryLimitError,
    SettingsError,
    TaskKilledError,
    WorkerCrashedError,
)


def deep(bench, *, behind: int, **spec: Any) -> WorkerRecord:
    """A worker with so many calls sent ahead behind the one that it runs."""
    _, worker = bench.started(call_key="f", **spec)
    for _ in range(30):
        bench.submit(call_key="f", **spec)
    while len(worker.backlog) < behind:
        bench.finish(worker.running, seconds=0.0001)
    return worker


class TestStopping:
    def test_a_pool_without_a_worker_closes_at_once(self, make_bench) -> None:
        bench = make_bench()
        bench.do(bench.core.stop_all, TaskKilledError("stop"))
        assert bench.asked(act.Close) == [act.Close()]

    def test_what_was_sent_ahead_and_never_began_fails_as_well(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        worker = deep(bench, behind=3)
        behind = list(worker.backlog)
        bench.do(bench.core.stop_all, TaskKilledError("stop"))
        bench.exit(worker)
        assert len(behind) >= 3
        assert {bench.outcomes[task.id][0] for task in behind} == {False}
        assert {type(bench.outcomes[task.id][1]) for task in behind} == {TaskKilledError}

    def test_so_does_what_had_begun_behind_another(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        worker = deep(bench, behind=3)
        begun = worker.backlog[1]
        bench.do(bench.core.stop_all, TaskKilledError("stop"))
        bench.exit(worker, begun=frozenset({begun.id}))
        assert bench.outcomes[begun.id][0] is False
        assert bench.core.counters.completed == len([one for one in bench.outcomes.values() if one[0]])


class TestWhatHadBegunBehindAnother:
    def test_each_is_counted_and_charged_whoever_waited_before_it(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        bench.now = 50.0
        worker = deep(bench, behind=4)
        first, second, third, fourth = list(worker.backlog)[:4]
        second.attempts, second.first_started_at = 2, 7.0
        bench.exit(worker, begun=frozenset({second.id, fourth.id}))
        assert (second.attempts, second.first_started_at, second.started_at) == (3, 7.0, 50.0)
        assert (fourth.attempts, fourth.first_started_at) == (1, 50.0)
        assert [bench.outcomes[task.id][0] for task in (second, fourth)] == [False, False]
        assert not {first.id, third.id} & bench.outcomes.keys()
        assert bench.core.counters.crashed == 3, "these two and the head"


class TestWordsOfFailures:
    def test_an_acknowledgement_without_a_stack_adds_nothing(self, make_bench) -> None:
        bench = make_bench(kill_grace=2)
        task, worker = bench.started(timeout=1.0)
        bench.advance(1.0)
        bench.do(bench.core.stop_acknowledged, worker, task)
        bench.exit(worker)
        error = bench.outcomes[task.id][1]
        assert (error.stack, getattr(error, "__notes__", [])) == ("", [])

    def test_a_task_says_how_long_it_waited_for_an_open_breaker(self, make_bench) -> None:
        bench = make_bench()
        bench.now = 1000.0
        bench.do(bench.core.force_open, "by a test")
        task = bench.submit(queue_timeout=30.0)
        bench.advance(30.0)
        error = bench.outcomes[task.id][1]
        assert isinstance(error, CircuitOpenError)
        assert "waited 30 s" in str(error)
        assert bench.outcomes[task.id][0] is False

    @pytest.mark.parametrize(("readings", "growth"), [
        ([], ""), ([(1.0, 10)], ""), ([(1.0, 10), (1.5, 20), (3.0, 310)], ", it grew by 300 MB in the last 2.00 s")])
    def test_the_growth_is_told_where_two_readings_show_it(self, readings, growth) -> None:
        worker = WorkerRecord(1, 0.0)
        worker.rss_bytes = 310 * MB
        worker.samples.extend((at, mb * MB) for at, mb in readings)
        task = TaskRecord(3, TaskSpec(), None)
        assert f"its process tree had 310 MB{growth}. Allow" in str(failures.memory_limit(task, worker, 300 * MB))

    def test_of_long_last_words_the_end_is_told(self) -> None:
        worker = WorkerRecord(1, 0.0)
        text = failures.start_words(worker, WorkerExit(exit_code=1, stderr_tail="a" * 400 + "b" * 500))
        assert "b" * 500 in text
        assert "ab" not in text

    def test_a_worker_that_is_killed_for_memory_while_it_stops_tells_why_it_stopped(self, make_bench) -> None:
        bench = make_bench(max_workers=1, hard_memory_limit_mb=300)
        task, worker = bench.started(timeout=1.0)
        bench.advance(1.0)
        bench.asked(act.Kill)
        bench.sample(worker, 900)
        bench.sample(worker, 900)
        (kill, *_) = bench.asked(act.Kill)
        assert kill.reason == str(task.stop.error)
        assert worker.reason == kill.reason


class TestCounters:
    def test_everyone_stopped_for_memory_counts(self, make_bench) -> None:
        bench = make_bench(max_workers=1, hard_memory_limit_mb=300)
        for count in (1, 2):
            task = bench.submit()
            while task.state is not TaskState.RUNNING:
                bench.advance(1.0)
                for worker in bench.spawned():
                    bench.ready(worker)
            bench.sample(task.worker, 900)
            bench.sample(task.worker, 900)
            bench.exit(task.worker)
            assert isinstance(bench.outcomes[task.id][1], MemoryLimitError)
            assert bench.core.counters.memory_killed == count

    def test_every_failed_start_counts(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        bench.submit()
        for count in (1, 2, 3):
            while not (spawned := bench.spawned()):
                bench.advance(1.0)
            bench.exit(spawned[0], 1)
            assert bench.core.counters.start_failures == count

    def test_every_worker_killed_by_hand_counts(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        for _ in range(2):
            bench.started()
        for count, worker in enumerate(list(bench.core.workers.values()), 1):
            assert bench.do(bench.core.kill_worker, worker.id, "by hand")
            assert bench.core.counters.workers_killed == count


    def test_every_further_attempt_counts(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        policy = RetryPolicy(stop=tenacity.stop_after_attempt(9), wait=tenacity.wait_none(),
                             retry=tenacity.retry_if_exception_type())
        task, _ = bench.started(policy=policy)
        for count in (1, 2, 3):
            bench.fail(task, OSError())
            bench.advance(0.0)
            assert bench.core.counters.retried == count

    def test_every_timeout_counts(self, make_bench) -> None:
        bench = make_bench(max_workers=2)
        tasks = [bench.started(timeout=float(seconds))[0] for seconds in (1, 2)]
        for count in (1, 2):
            bench.advance(1.0)
            assert bench.core.counters.timed_out == count
        assert {task.state for task in tasks} == {TaskState.STOPPING}

    def test_every_lost_dispatch_counts_and_the_waits_grow(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        task, worker = bench.started()
        waits = []
        for count in (1, 2, 3, 4):
            bench.exit(worker, -9, began=False, keeper_lost=True)
            assert task.dispatch_failures == count
            waits.append(task.timer.when - bench.now)
            while task.state is not TaskState.RUNNING:
                bench.advance(0.05)
                for worker in bench.spawned():
                    bench.ready(worker)
            worker = task.worker
        assert waits[3] > 0.4 > 0.15 > waits[0]

    def test_several_may_be_leaving_at_once(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_tasks_per_child=3)
        tasks = [bench.submit(call_key="f") for _ in range(12)]
        for worker in bench.spawned():
            bench.ready(worker)
        workers = [task.worker for task in tasks[:2]]
        for worker in workers:
            bench.finish(worker.running, seconds=0.5)
            bench.sample(worker, 20)
        for worker in workers:
            bench.finish(worker.running, seconds=0.5)
            bench.sample(worker, 20)
        assert [worker.is_leaving for worker in workers] == [True, True]
        assert bench.core.leaving == 2
        assert len(bench.spawned()) == 2


class TestStory:
    def test_it_tells_what_happened_when(self, make_bench) -> None:
        bench = make_bench()
        bench.now = 12.5
        bench.do(bench.core.force_open, "by a test")
        bench.do(bench.core.reset_breaker)
        bench.do(bench.core.pause)
        bench.do(bench.core.resume)
        bench.do(bench.core.drain)
        bench.do(bench.core.stop_all, TaskKilledError("enough"))
        story = bench.core.story()
        for words in ("breaker forced_open: by a test", "breaker closed: ", "paused", "resumed", "draining",
                      "stopped: enough"):
            assert f"12.500000 {words}\n" in f"{story}\n"

    def test_an_initializer_that_raised_is_in_it(self, make_bench) -> None:
        bench = make_bench()
        bench.submit()
        (worker,) = bench.spawned()
        bench.now = 3.0
        bench.do(bench.core.initializer_failed, worker, OSError())
        assert f"3.000000 {worker!r}".split(" STARTING")[0] in bench.core.story()
        assert ": initializer failed" in bench.core.story()

    def test_an_idle_worker_has_no_tasks_in_it(self, make_bench) -> None:
        bench = make_bench()
        worker = bench.idle_worker()
        assert f"{worker!r}  []" in bench.core.story()

    def test_an_action_shows_its_fields(self) -> None:
        assert repr(act.BreakerChanged("closed", "open", "why")) == (
            "BreakerChanged(old='closed', new='open', reason='why')")

    def test_an_action_knows_whom_it_concerns(self) -> None:
        worker = WorkerRecord(1, 0.0)
        assert [kind(worker).worker for kind in (act.Revoke, act.Collect, act.DumpStack, act.StopTool)] == [worker] * 4
        task = TaskRecord(1, TaskSpec(), None)
        asked = act.AskToStop(worker, task, True)
        assert (asked.worker, asked.task, asked.wants_stack) == (worker, task, True)
        changed = act.BreakerChanged("closed", "open", "why")
        assert (changed.old, changed.new, changed.reason) == ("closed", "open", "why")


class TestWaiting:
    @pytest.mark.parametrize(("waited", "longest"), [(0.0, 10.1), (9.99, 0.011), (10.0, 0.0)])
    def test_a_lost_dispatch_is_not_made_again_later_than_its_time_in_the_queue(
        self, make_bench, waited, longest
    ) -> None:
        bench = make_bench(max_workers=1)
        bench.now = 500.0
        task, worker = bench.started(queue_timeout=10.0)
        bench.now += waited
        bench.exit(worker, -9, began=False)
        assert task.timer.when - bench.now <= longest

    def test_a_queue_that_was_emptied_is_a_queue(self) -> None:
        queue = TaskQueue()
        queue.push(TaskRecord(1, TaskSpec(), None))
        queue.clear()
        assert queue.peek() is None
        queue.push_front(task := TaskRecord(2, TaskSpec(), None))
        assert queue.pop() is task

    def test_what_was_dropped_goes_once_it_is_more_than_what_is_queued(self) -> None:
        queue = TaskQueue()
        tasks = [TaskRecord(number, TaskSpec(priority=number % 2), None) for number in range(200)]
        for task in tasks:
            queue.push(task)

        def drop(count: int) -> None:
            for _ in range(count):
                task = next(iter(reversed(list(queue))))
                task.state = TaskState.RESOLVED
                queue.discard()

        def held() -> int:
            return sum(map(len, queue._lanes.values()))

        drop(100)
        assert (len(queue), held()) == (100, 200), "as many as are queued"
        drop(1)
        assert (len(queue), held()) == (99, 99)
        assert queue.peek() is tasks[1]
        drop(64)
        assert (len(queue), held()) == (35, 99), "no more than 64"
        drop(1)
        assert (len(queue), held()) == (34, 34)
        drop(34)
        assert (len(queue), queue.peek()) == (0, None)
        queue.push(task := TaskRecord(999, TaskSpec(), None))
        assert queue.pop() is task

    def test_a_queue_whose_tasks_were_all_dropped_is_a_queue(self) -> None:
        queue = TaskQueue()
        tasks = [TaskRecord(number, TaskSpec(), None) for number in range(65)]
        for task in tasks:
            queue.push(task)
        for task in tasks:
            task.state = TaskState.RESOLVED
            queue.discard()
        assert (len(queue), queue._lanes, queue.peek()) == (0, {}, None)
        queue.push_front(again := TaskRecord(99, TaskSpec(), None))
        assert queue.peek() is again

    def test_the_time_of_several_calls_is_that_many_times_that_of_one(self) -> None:
        durations = Durations()
        durations.measured("f", 0.5)
        assert durations.expected("f", 4) == 2.0


class TestChecks:
    def test_a_collection_that_nobody_waits_for_changes_nothing(self, make_bench) -> None:
        bench = make_bench(max_workers=1, memory_limit_mb=100)
        worker = bench.idle_worker()
        worker.check_stage = 1  # from an earlier check
        bench.do(bench.core.worker_collected, worker)
        assert bench.asked(act.SampleWorker) == []
        worker.check_stage = 0
        bench.sample(worker, 150)
        assert worker.state is WorkerState.CHECKING
        worker.check_stage = 0  # its first reading is still on its way
        bench.asked(act.SampleWorker)
        bench.do(bench.core.worker_collected, worker)
        assert bench.asked(act.SampleWorker) == []

    def test_the_third_worker_in_a_row_is_worth_the_warning_and_no_other(self, make_bench) -> None:
        bench = make_bench(max_workers=1, memory_limit_mb=100)
        for count in (1, 2, 3):
            task = bench.submit()
            while task.state is not TaskState.RUNNING:
                bench.advance(1.0)
                for worker in bench.spawned():
                    bench.ready(worker)
            worker = task.worker
            bench.finish(task, rss_bytes=150 * MB)
            bench.sample(worker, 150)
            bench.do(bench.core.worker_collected, worker)
            bench.sample(worker, 150)
            assert worker.state is WorkerState.RETIRING
            assert len(bench.asked(act.Warn)) == (count == 3)
            bench.exit(worker, 0)

    def test_that_warning_in_full(self) -> None:
        worker = WorkerRecord(1, 0.0)
        worker.limit_bytes, worker.rss_bytes = 100 * MB, 150 * MB
        assert recycling.always_over_warning(worker) == (
            "worker after worker is above its memory limit (100 MB) after its first task (now 150 MB), so each task "
            "pays for a new process. Usually that is what the task imports: raise memory_limit_mb, or name those "
            "modules in preload=(...), which makes them part of the baseline")


class TestHardLimit:
    @pytest.mark.parametrize(("rss_mb", "readings"), [(100, None), (100.5, 2), (125, 2), (125.5, 1)])
    def test_at_the_limit_nothing_a_little_over_it_twice_plainly_over_it_once(
        self, make_bench, rss_mb, readings
    ) -> None:
        bench = make_bench(max_workers=1, hard_memory_limit_mb=100)
        task, worker = bench.started()
        for count in (1, 2, 3):
            bench.sample(worker, rss_mb)
            assert (task.stop is not None) == (readings is not None and count >= readings)

    def test_two_readings_of_one_moment_are_no_growth(self) -> None:
        worker = WorkerRecord(1, 0.0)
        assert recycling._growth_per_second(worker) == 0.0
        worker.samples.append((1.0, 5))
        assert recycling._growth_per_second(worker) == 0.0
        worker.samples.append((3.0, 15))
        assert recycling._growth_per_second(worker) == 5.0


class TestPolicies:
    def test_escalate_by_itself(self) -> None:
        policy = Escalate()
        assert policy.after_memory_limit(100) == (150, False)
        stop = policy._retrying.stop
        assert isinstance(stop, tenacity.stop_after_attempt)
        assert stop.max_attempt_number == 3

    def test_escalate_waits_as_it_is_told(self) -> None:
        policy = Escalate(wait=tenacity.wait_fixed(7))
        error = WorkerCrashedError("gone")
        assert policy.decide(attempt=1, error=error, value=None, started_at=0.0, now=1.0) == 7.0

    def test_a_strategy_is_told_what_the_documentation_says(self) -> None:
        seen: list[tenacity.RetryCallState] = []

        def retry(state: tenacity.RetryCallState) -> bool:
            seen.append(state)
            return False

        policy = RetryPolicy(retry=retry)
        policy.decide(attempt=3, error=None, value=5, started_at=2.0, now=10.0)
        (state,) = seen
        assert (state.args, state.kwargs, state.fn) == ((), {}, None)
        assert (state.attempt_number, state.seconds_since_start, state.idle_for) == (3, 8.0, 0.0)
        assert state.outcome.attempt_number == 3
        assert state.retry_object is policy._retrying

    @pytest.mark.parametrize(("retry", "message"), [
        (tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(3)),
         "retry must be a tenacity.Retrying, not an AsyncRetrying: nothing is awaited here"),
        (tenacity.Retrying(),
         "retry has no stop: name one, e.g. tenacity.Retrying(stop=stop_after_attempt(3), ...)"),
        (tenacity.Retrying(stop=tenacity.stop_after_attempt(3), before=print, after=print),
         "retry has before, after: a pool uses stop, wait and retry of a tenacity.Retrying, and calls nothing else of "
         "it; leave that out, and look at future.attempts or the pool's counters instead"),
    ])
    def test_what_is_refused_in_full(self, retry, message) -> None:
        with pytest.raises(SettingsError) as caught:
            compile_policy(retry)
        assert str(caught.value) == message


class TestBreaker:
    def test_a_hold_that_says_the_same_again_leaves_the_latest_reason(self, make_bench) -> None:
        breaker = make_bench().core.breaker
        breaker.hold("a", "first")
        breaker.hold("b", "second")
        breaker.hold("a", "first")
        assert breaker.reason == "second"

    def test_a_hold_while_forced_open_leaves_the_reason_that_was_given(self, make_bench) -> None:
        breaker = make_bench().core.breaker
        breaker.force_open("by hand")
        breaker.hold("a", "memory")
        assert breaker.reason == "by hand"

    def test_starts_that_fail_at_the_moment_of_another_failure_count_anew(self, make_bench) -> None:
        """One that was asked for just as another failed was under way after it, not with it."""
        bench = make_bench(max_workers=1, start_timeout=5)
        bench.submit()
        (first,) = bench.spawned()
        bench.exit(first, 1)
        while not (spawned := bench.spawned()):
            bench.advance(0.01)
        (second,) = spawned
        second.spawned_at = bench.core._failed_at
        bench.exit(second, 1)
        assert bench.core._failures_in_a_row == 2


class TestSpared:
    def test_a_worker_that_was_marked_to_go_and_is_spared_serves_on(self, make_bench) -> None:
        bench = make_bench(max_workers=3)
        tasks = [bench.started()[0] for _ in range(3)]
        bench.do(bench.core.resize, 2, None)
        bench.finish(tasks[0])
        workers = [task.worker for task in tasks[1:]]
        for _ in range(2):
            for task in tasks[1:]:
                bench.finish(task)
            tasks[1:] = [bench.submit() for _ in range(2)]
            assert all(task.state is TaskState.RUNNING for task in tasks[1:])
        assert {task.worker for task in tasks[1:]} == set(workers)
        assert all(worker.retire_reason is None for worker in workers)
