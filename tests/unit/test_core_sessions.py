"""Sessions: one worker, in order, one at a time; how they end and how they are lost."""

from __future__ import annotations

import pickle

import pytest
import tenacity

from agentpool.config import MB
from agentpool.core import actions as act
from agentpool.core import failures
from agentpool.core.records import HostState, SessionRecord, TaskRecord, TaskSpec, WorkerExit
from agentpool.core.retry import RetryPolicy, compile_policy
from agentpool.core.transitions import TaskState, WorkerState
from agentpool.errors import (
    PoolClosedError,
    SessionLostError,
    TaskKilledError,
    TaskTimeoutError,
    WorkerCrashedError,
)


def opened(number: int = 1, key: str | None = None, idle_timeout: float | None = None) -> SessionRecord:
    return SessionRecord(number, key, idle_timeout)


def error_of(bench, task) -> BaseException:
    is_value, payload = bench.outcomes[task.id]
    assert not is_value
    return payload


def pinned(make_bench, *, idle_timeout: float | None = None, **settings):
    """A bench with a session whose worker is idle."""
    bench = make_bench(**({"max_workers": 2, "max_concurrent": 2} | settings))
    session = opened(key="k", idle_timeout=idle_timeout)
    task, worker = bench.started(session=session)
    bench.finish(task)
    assert worker.state is WorkerState.IDLE
    return bench, session, worker


class TestOrder:
    def test_one_at_a_time_in_order_in_one_worker(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        tasks = [bench.submit("f", session=session) for _ in range(3)]
        for number, task in enumerate(tasks):
            assert [other.state is TaskState.RUNNING for other in tasks].index(True) == number
            assert task.worker is worker
            bench.finish(task)

    def test_nobody_else_gets_the_worker(self, make_bench) -> None:
        bench, _, worker = pinned(make_bench, max_workers=1, max_concurrent=1)
        other = bench.submit()
        assert other.state is TaskState.QUEUED
        assert (bench.core.idle, list(bench.core.kept.values())) == ({}, [worker])

    def test_more_sessions_than_workers_wait_in_the_queue(self, make_bench) -> None:
        bench, first, worker = pinned(make_bench, max_workers=1, max_concurrent=1)
        waiting = bench.submit(session=opened(2))
        bench.do(bench.core.close_session, first)
        bench.exit(worker, 0)
        (fresh,) = bench.spawned()
        bench.ready(fresh)
        assert waiting.worker is fresh

    def test_each_session_has_a_worker_of_its_own(self, make_bench) -> None:
        bench = make_bench(max_workers=3, max_concurrent=3)
        tasks = [bench.submit(session=opened(number)) for number in (1, 2, 3)]
        for worker in bench.spawned():
            bench.ready(worker)
        assert len({task.worker.id for task in tasks}) == 3

    def test_a_task_that_is_tried_again_keeps_its_turn(self, make_bench) -> None:
        bench, session, _ = pinned(make_bench)
        again = RetryPolicy(wait=tenacity.wait_fixed(2), retry=tenacity.retry_if_exception_type(OSError))
        first, second = bench.submit(session=session, policy=again), bench.submit(session=session)
        bench.fail(first, OSError())
        assert (first.state, second.state) == (TaskState.WAITING_RETRY, TaskState.QUEUED)
        bench.advance(2.0)
        assert (first.state, second.state) == (TaskState.RUNNING, TaskState.QUEUED)
        bench.finish(first)
        assert second.state is TaskState.RUNNING

    def test_plain_calls_are_not_sent_ahead_into_it(self, make_bench) -> None:
        bench = make_bench(max_workers=1)
        session = opened()
        for _ in range(8):
            bench.finish(bench.started(call_key="f", session=session)[0])
        head = bench.submit("f", session=session)
        bench.submit("f", session=session)
        plain = [bench.submit("f") for _ in range(4)]
        bench.finish(head)
        assert [task.state for task in plain] == [TaskState.QUEUED] * 4

    def test_a_group_counts_its_tasks_too(self, make_bench) -> None:
        bench, session, _ = pinned(make_bench)
        bench.started(group="g", group_limit=1)
        waiting = bench.submit(session=session, group="g", group_limit=1)
        assert waiting.state is TaskState.QUEUED

    def test_what_a_group_or_a_session_holds_up_is_not_startable(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench, max_workers=4, max_concurrent=1)
        bench.do(bench.core.pause)
        plain = bench.submit()
        other = opened(2)
        for _ in range(3):
            bench.submit(session=session)
            bench.submit(session=other)
            bench.submit(group="g", group_limit=2)
        assert bench.core.startable(99) == 1 + 1 + 1 + 2
        assert bench.core.startable(0) == 1, "lines are not looked at where enough is known"
        alone = bench.submit(group="h", group_limit=1)
        assert bench.core.startable(99) == 1 + 1 + 1 + 2 + 1
        for task in (plain, alone):
            assert bench.core.cancel(bench.now, task)
        assert bench.core.startable(99) == 1 + 1 + 2, "a line that ran empty counts for nothing"
        bench.take()
        bench.exit(worker, -9)
        assert bench.core.startable(99) == 1 + 2, "what was in the lost session is resolved"

    def test_what_runs_holds_up_those_behind_it(self, make_bench) -> None:
        bench, session, _ = pinned(make_bench, max_workers=4, max_concurrent=4)
        bench.submit(session=session)
        for _ in range(2):
            bench.submit(session=session)
            bench.submit(group="g", group_limit=1)
        (worker,) = bench.spawned()
        bench.ready(worker)
        assert bench.core.active == 2
        assert (bench.core.queue_length, bench.core.startable(99)) == (3, 0)


class TestTheEnd:
    def test_closing_retires_the_worker(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        bench.do(bench.core.close_session, session)
        bench.do(bench.core.close_session, session)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session closed")]
        assert bench.core.sessions == {}
        with pytest.raises(PoolClosedError, match="after the session was closed"):
            bench.submit(session=session)
        assert session.error is None

    def test_closing_one_whose_worker_is_being_killed_asks_for_nothing_more(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        assert bench.do(bench.core.kill_worker, worker.id, "it hangs")
        bench.do(bench.core.close_session, session)
        assert bench.asked(act.Retire) == []
        bench.exit(worker, -9)
        assert bench.core.sessions == {}

    def test_what_was_accepted_is_finished_first(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        tasks = [bench.submit(session=session) for _ in range(2)]
        bench.do(bench.core.close_session, session)
        for task in tasks:
            assert task.state is TaskState.RUNNING
            bench.finish(task)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session closed")]

    def test_one_that_never_began_needs_no_worker(self, make_bench) -> None:
        bench = make_bench()
        session = opened()
        task = bench.submit(session=session)
        bench.do(bench.core.close_session, session)
        assert bench.do(bench.core.cancel, task)
        assert bench.core.sessions == {}

    def test_the_last_task_is_cancelled(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        bench.do(bench.core.pause)
        task = bench.submit(session=session)
        bench.do(bench.core.close_session, session)
        assert bench.do(bench.core.cancel, task)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session closed")]

    def test_a_shutdown_ends_those_that_are_idle_so_that_others_can_begin(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench, max_workers=1, max_concurrent=1)
        waiting = bench.submit(session=opened(2))
        bench.do(bench.core.shutdown, cancel_futures=False)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session closed")]
        bench.exit(worker, 0)
        bench.ready(bench.spawned()[0])
        bench.finish(waiting)
        assert session.error is None


class TestLost:
    def test_the_worker_crashes_under_a_task(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        running, waiting = (bench.submit(session=session, policy=compile_policy(3)) for _ in range(2))
        bench.exit(worker, -11)
        for task in (running, waiting):
            error = error_of(bench, task)
            assert type(error) is SessionLostError
            assert (error.key, error.reason, error.exit_code) == ("k", "crashed", -11)
            assert "session 1 (k) is lost: its worker (pid" in str(error)
            assert "was killed by SIGSEGV" in str(error)
        assert error_of(bench, running) is not error_of(bench, waiting)
        assert isinstance(error_of(bench, running).__cause__, WorkerCrashedError)
        assert waiting.attempts == 0
        with pytest.raises(SessionLostError, match="open a new one"):
            bench.submit(session=session)
        assert bench.core.sessions == {}

    def test_the_error_survives_pickling(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        bench.exit(worker, 3)
        error = pickle.loads(pickle.dumps(session.error))
        assert (str(error), error.exit_code, error.reason) == (str(session.error), 3, "crashed")

    def test_before_its_task_began(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        task = bench.submit(session=session)
        bench.exit(worker, began=False)
        assert isinstance(error_of(bench, task), SessionLostError)
        assert task.attempts == 0

    def test_it_is_killed_by_hand(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        task = bench.submit(session=session)
        bench.do(bench.core.kill_worker, worker.id, "it looks hung")
        bench.exit(worker)
        assert error_of(bench, task).reason == "killed"
        assert "was stopped (it looks hung)" in str(error_of(bench, task))

    def test_it_is_recycled_for_its_memory(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        first = bench.submit(session=session)
        bench.finish(first, seconds=1.0)
        waiting = bench.submit(session=session)
        bench.sample(worker, 150)
        bench.do(bench.core.worker_collected, worker)
        bench.sample(worker, 150)
        error = error_of(bench, waiting)
        assert error.reason == "memory"
        assert "over its memory limit after a task; allow it more with options(memory_limit_mb=...)" in str(error)

    def test_nobody_uses_it_for_too_long(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench, idle_timeout=10.0)
        bench.advance(8.0)
        bench.finish(bench.submit(session=session))
        bench.advance(8.0)
        assert session.error is None, "it was used"
        bench.advance(2.0)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session idle")]
        assert session.error.reason == "idle"
        assert "it was not used for longer than its idle_timeout of 10 s" in str(session.error)

    def test_one_that_is_busy_when_its_time_is_over_has_it_again_when_it_is_idle(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench, idle_timeout=10.0)
        bench.advance(9.0)
        task = bench.submit(session=session)
        bench.advance(30.0)
        assert bench.asked(act.Retire) == []
        bench.finish(task)
        bench.advance(9.9)
        assert bench.asked(act.Retire) == []
        bench.advance(0.1)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session idle")]

    def test_tasks_that_wait_for_a_pause_keep_it(self, make_bench) -> None:
        bench, session, _ = pinned(make_bench, idle_timeout=10.0)
        bench.do(bench.core.pause)
        task = bench.submit(session=session)
        bench.advance(100.0)
        assert session.error is None
        bench.do(bench.core.resume)
        assert task.state is TaskState.RUNNING

    def test_a_task_of_it_passes_its_timeout(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        late, waiting = bench.submit(session=session, timeout=1.0), bench.submit(session=session)
        bench.advance(1.0)
        bench.do(bench.core.stop_acknowledged, worker, late)
        bench.fail(late, KeyboardInterrupt())
        assert isinstance(error_of(bench, late), TaskTimeoutError)
        assert error_of(bench, waiting).reason == "stopped"

    def test_a_task_of_it_waits_to_be_tried_again(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        again = RetryPolicy(wait=tenacity.wait_fixed(2), retry=tenacity.retry_if_exception_type(OSError))
        task = bench.submit(session=session, policy=again)
        bench.fail(task, OSError())
        bench.exit(worker)
        assert isinstance(error_of(bench, task), SessionLostError)

    def test_a_killed_task_has_its_own_error(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        task = bench.submit(session=session)
        bench.do(bench.core.kill_task, task, TaskKilledError("by hand"))
        bench.advance(5.0)
        bench.exit(worker)
        assert isinstance(error_of(bench, task), TaskKilledError)
        assert session.error.reason == "stopped"


class TestItsWorkerStays:
    def test_whatever_recycles_others(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench, idle_timeout=None, max_tasks_per_child=2)
        for _ in range(5):
            bench.finish(bench.submit(session=session))
        assert bench.do(bench.core.recycle, None) == 0
        assert bench.do(bench.core.recycle, worker.id) == 0
        bench.advance(1000.0)
        assert bench.asked(act.Retire) == []
        assert bench.submit(session=session).worker is worker

    def test_a_pool_that_shrinks(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_concurrent=2)
        sessions = [opened(1), opened(2)]
        tasks = [bench.submit(session=session) for session in sessions]
        for worker in bench.spawned():
            bench.ready(worker)
        bench.do(bench.core.resize, 1, None)
        for task in tasks:
            bench.finish(task)
        assert bench.asked(act.Retire) == []
        bench.do(bench.core.close_session, sessions[0])
        assert [retired.reason for retired in bench.asked(act.Retire)] == ["session closed"]

    def test_its_memory_may_grow_to_its_limit(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        task = bench.submit(session=session, soft_limit_bytes=500 * MB)
        bench.finish(task, seconds=1.0)
        bench.sample(worker, 190)
        assert session.error is None

    def test_it_is_not_looked_at_again_while_it_runs_or_is_measured(self, make_bench) -> None:
        """Its timer fires under a task, and by the time it would fire again, its memory is being looked at."""
        bench, session, worker = pinned(make_bench, idle_timeout=10.0)
        bench.advance(1.0)
        task = bench.submit(session=session)
        bench.advance(13.9)
        bench.finish(task, seconds=13.9)
        assert worker.state is WorkerState.CHECKING
        bench.advance(0.5)
        assert worker.state is WorkerState.CHECKING
        assert session.error is None


class TestTime:
    def test_it_ends_to_the_moment_when_it_was_used_in_between(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench, idle_timeout=10.0)
        bench.advance(1.0)
        bench.finish(bench.submit(session=session))
        bench.advance(9.9)
        assert not bench.asked(act.Retire)
        bench.advance(0.1)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session idle")]

    def test_while_a_task_of_it_waits_it_is_looked_at_twice_in_that_time(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench, idle_timeout=10.0)
        bench.advance(1.0)
        again = RetryPolicy(wait=tenacity.wait_fixed(100), retry=tenacity.retry_if_exception_type(OSError))
        task = bench.submit(session=session, policy=again)
        bench.fail(task, OSError())
        bench.advance(10.0)
        assert bench.do(bench.core.cancel, task)
        bench.advance(3.9)
        assert not bench.asked(act.Retire)
        bench.advance(0.1)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session idle")], "at 10 + 5"

    def test_nothing_of_it_is_left_to_wake_up_for(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench, idle_timeout=1000.0)
        bench.do(bench.core.close_session, session)
        assert session.timer is None
        bench.exit(worker, 0)
        bench.advance(100.0)
        assert bench.core.next_deadline() is None


class TestPlaces:
    def test_a_session_wants_one_worker_however_many_tasks_it_has(self, make_bench) -> None:
        bench = make_bench(max_workers=4, max_concurrent=4)
        session = opened()
        tasks = [bench.submit(session=session) for _ in range(3)]
        (worker,) = bench.spawned()
        bench.ready(worker)
        assert not bench.spawned(), "its tasks wait for this one"
        bench.finish(tasks[0], seconds=1.0)
        assert worker.state is WorkerState.CHECKING
        assert not bench.spawned(), "while it is measured too"

    def test_the_next_begins_when_one_that_waits_to_be_tried_again_is_cancelled(self, make_bench) -> None:
        bench, session, _ = pinned(make_bench)
        again = RetryPolicy(wait=tenacity.wait_fixed(100), retry=tenacity.retry_if_exception_type(OSError))
        first, second = bench.submit(session=session, policy=again), bench.submit(session=session)
        bench.fail(first, OSError())
        assert second.state is TaskState.QUEUED
        assert bench.do(bench.core.cancel, first)
        assert second.state is TaskState.RUNNING

    def test_what_can_begin_is_what_has_its_turn_a_worker_and_room_in_its_group(self, make_bench) -> None:
        """For the invariants, which ask it of heads of lines only."""
        bench, session, _ = pinned(make_bench, max_workers=3, max_concurrent=3)
        could = bench.core._could_begin

        def task(**spec) -> TaskRecord:
            return TaskRecord(99, TaskSpec(**spec), None)

        in_it, in_new, grouped = task(session=session), task(session=opened(2)), task(group="g", group_limit=1)
        assert not could(task(expected_bytes=1)), "that depends on memory"
        assert could(in_it)
        assert not could(in_new), "no worker is idle but the session's"
        assert not could(grouped)
        other, _ = bench.started(session=opened(3))
        bench.finish(other)
        bench.do(bench.core.close_session, other.spec.session)
        plain, _ = bench.started()
        bench.finish(plain)
        assert could(in_new)
        assert could(grouped)
        assert not could(task(group="g", group_limit=0))
        in_new.spec.session.current = plain
        assert not could(in_new), "another one has its turn"
        in_new.spec.session.current = in_new
        assert could(in_new)
        session.current = plain
        assert not could(in_it)
        session.current = None
        bench.started(session=session)
        assert not could(in_it), "its worker is busy"

    def test_a_session_weighs_memory_and_what_its_worker_has_is_part_of_it(self, make_bench) -> None:
        bench = make_bench(max_workers=2, max_concurrent=2, min_available_mb=100)
        bench.host = HostState(total_bytes=10_000 * MB, available_bytes=300 * MB)
        session = opened()
        first = bench.submit(session=session, expected_bytes=150 * MB)
        (worker,) = bench.spawned()
        bench.ready(worker, 120 * MB)
        assert first.worker is worker
        bench.finish(first)
        assert worker.state is WorkerState.IDLE
        second = bench.submit(session=session, expected_bytes=320 * MB)
        assert second.worker is worker, "200 MB are free, and 120 it has"


class TestWhatIsTold:
    def test_the_whole_refusal(self, make_bench) -> None:
        bench, session, _ = pinned(make_bench)
        bench.do(bench.core.close_session, session)
        with pytest.raises(PoolClosedError, match=r"^cannot schedule new futures after the session was closed$"):
            bench.submit(session=session)

    def test_one_without_a_key_and_one_that_was_recycled_for_a_reason_of_its_own(self, make_bench) -> None:
        bench = make_bench()
        session = opened(7)
        task, worker = bench.started(session=session)
        bench.finish(task)
        error = failures.session_retired(session, worker, "by the moon")
        assert str(error) == (
            f"session 7 is lost: its worker (pid {worker.pid}) was recycled (by the moon). "
            "What its tasks had left there is gone: open a new one")
        assert (error.key, error.reason, error.worker_pid) == (None, "recycled", worker.pid)

    def test_the_error_knows_session_and_process(self, make_bench) -> None:
        _, session, worker = pinned(make_bench, idle_timeout=10.0)
        idle = failures.session_retired(session, worker, "session idle")
        assert str(idle).startswith("session 1 (k) is lost: it was not used for longer than its idle_timeout of 10 s. ")
        assert (idle.key, idle.reason, idle.worker_pid) == ("k", "idle", worker.pid)
        memory = failures.session_retired(session, worker, "memory")
        assert str(memory).startswith(f"session 1 (k) is lost: its worker (pid {worker.pid}) was recycled, as it")
        assert "(memory_limit_mb=...). What" in str(memory)
        crash = failures.session_crashed(session, worker, WorkerExit(exit_code=3, stderr_tail="last words"))
        assert (crash.key, crash.exit_code, crash.worker_pid) == ("k", 3, worker.pid)

    @pytest.mark.parametrize(("is_ordered", "crashed"), [(False, 1), (True, 0)])
    def test_a_crash_counts_once_and_an_order_does_not(self, make_bench, is_ordered: bool, crashed: int) -> None:
        bench, session, worker = pinned(make_bench)
        lost, other = bench.started()
        bench.exit(other)
        assert bench.core.counters.crashed == 1
        bench.submit(session=session)
        if is_ordered:
            bench.do(bench.core.kill_worker, worker.id, "by hand")
        bench.exit(worker)
        assert bench.core.counters.crashed == 1 + crashed
        assert bench.outcomes[lost.id][0] is False

    def test_every_loss_is_told_as_a_failure(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        again = RetryPolicy(wait=tenacity.wait_fixed(100), retry=tenacity.retry_if_exception_type(OSError))
        first, second = bench.submit(session=session, policy=again), bench.submit(session=session)
        bench.fail(first, OSError())
        bench.exit(worker)
        assert [bench.outcomes[task.id][0] for task in (first, second)] == [False, False]
        assert len(bench.core.queue) == 0
        fresh = bench.submit(session=opened(5))
        assert fresh.state is TaskState.QUEUED
        assert bench.core.startable(9) == 1

    def test_closing_one_that_waits_to_be_tried_again_keeps_it_until_then(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        again = RetryPolicy(wait=tenacity.wait_fixed(5), retry=tenacity.retry_if_exception_type(OSError))
        task = bench.submit(session=session, policy=again)
        bench.fail(task, OSError())
        bench.do(bench.core.close_session, session)
        assert not bench.asked(act.Retire)
        bench.advance(5.0)
        assert task.worker is worker
        bench.finish(task)
        assert bench.asked(act.Retire) == [act.Retire(worker, "session closed")]

    def test_one_that_was_never_used_can_be_closed(self, make_bench) -> None:
        bench = make_bench()
        session = opened()
        bench.do(bench.core.close_session, session)
        with pytest.raises(PoolClosedError):
            bench.submit(session=session)


class TestWhatHoldsUp:
    def test_what_has_its_turn_holds_up_the_others_wherever_it_waits(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        again = RetryPolicy(wait=tenacity.wait_fixed(100), retry=tenacity.retry_if_exception_type(OSError))
        first = bench.submit(session=session, policy=again)
        bench.submit(session=session)
        bench.fail(first, OSError())
        assert (worker.state, bench.core.startable(9)) == (WorkerState.IDLE, 0)

    def test_while_its_worker_is_measured_none_could_start(self, make_bench) -> None:
        bench, session, worker = pinned(make_bench)
        first = bench.submit(session=session)
        bench.submit(session=session)
        bench.finish(first, seconds=1.0)
        assert (worker.state, bench.core.startable(9)) == (WorkerState.CHECKING, 0)
        bench.sample(worker, 20)
        assert bench.core.active == 1

    def test_no_worker_is_started_for_one_whose_own_is_measured(self, make_bench) -> None:
        """As its memory had to be collected: by then others could be started in its place."""
        bench, session, worker = pinned(make_bench, max_workers=4, max_concurrent=4)
        first = bench.submit(session=session, soft_limit_bytes=100 * MB)
        bench.submit(session=session, soft_limit_bytes=100 * MB)
        bench.finish(first, seconds=1.0)
        bench.sample(worker, 150)
        assert worker.check_stage == 1
        assert not bench.spawned()
        assert session.current is None
