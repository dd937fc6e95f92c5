from __future__ import annotations

import pickle
from typing import Any

import pytest

from agentpool.config import MB
from agentpool.core import failures
from agentpool.core.records import TaskRecord, TaskSpec, WorkerExit, WorkerRecord
from agentpool.core.retry import RetryPolicy
from agentpool.errors import (
    CircuitOpenError,
    InitializerError,
    MemoryLimitError,
    QuarantinedError,
    QueueTimeoutError,
    TaskKilledError,
    TaskTimeoutError,
)


def task(**spec: Any) -> TaskRecord:
    return TaskRecord(7, TaskSpec(**spec), None)


def worker(reason: str = "", rss_mb: int = 30) -> WorkerRecord:
    record = WorkerRecord(3, 0.0)
    record.pid, record.reason, record.rss_bytes = 4711, reason, rss_mb * MB
    return record


@pytest.mark.parametrize(
    ("words", "how"),
    [
        ("was killed by SIGKILL", {"exit_code": -9}),
        ("was killed by signal 250", {"exit_code": -250}),
        ("exited with code 3", {"exit_code": 3}),
        ("exited with code 0", {"exit_code": 0}),
        ("ended, nobody knows how", {"exit_code": None}),
        ("was lost together with the keeper process", {"exit_code": -9, "keeper_lost": True}),
    ],
)
def test_ends_of_processes_in_words(words: str, how: dict[str, Any]) -> None:
    assert failures.exit_words(WorkerExit(**how)) == words


def test_ends_of_workers_in_words() -> None:
    assert failures.end_words(worker(), WorkerExit(exit_code=1)) == "exited with code 1"
    assert failures.end_words(worker("idle"), WorkerExit(exit_code=0)) == "exited with code 0 (idle)"


class TestStarts:
    def test_a_start_that_ended_by_itself(self) -> None:
        text = failures.start_words(worker(), WorkerExit(exit_code=1, stderr_tail="ImportError: no module x\n"))
        assert text == "a worker exited with code 1 before it was ready: ImportError: no module x"

    def test_a_start_that_took_too_long(self) -> None:
        text = failures.start_words(worker("did not become ready in 5 s"), WorkerExit(exit_code=-9))
        assert text == "a worker did not become ready in 5 s"

    def test_a_start_that_came_to_no_process(self) -> None:
        text = failures.start_words(worker(), WorkerExit(exit_code=None, story="OSError: no more processes"))
        assert text == "a worker could not be started: OSError: no more processes"

    def test_a_start_that_the_keeper_took_along(self) -> None:
        text = failures.start_words(worker(), WorkerExit(exit_code=None, keeper_lost=True))
        assert text == "a worker was lost together with the keeper process before it was ready"


class TestCrash:
    def test_it_names_exit_memory_last_words_and_how_to_allow_a_retry(self) -> None:
        record = task(name="parse")
        record.peak_rss_bytes = 312 * MB
        exit_ = WorkerExit(exit_code=-11, stderr_tail="bad pointer\n", story="Fatal Python error: Segmentation fault\n")
        error = failures.crashed(record, worker(), exit_)
        assert str(error) == (
            "the worker (pid 4711) was killed by SIGSEGV while it ran task 7 (parse); peak memory 312 MB. "
            "Other tasks are not affected. It is not run again, because it had begun; where running it twice is "
            "harmless, allow that with pool.options(retry=3).\n"
            "The interpreter's last report:\nFatal Python error: Segmentation fault\n"
            "The last it wrote to standard error:\nbad pointer"
        )
        assert (error.exit_code, error.worker_pid, error.peak_rss_bytes) == (-11, 4711, 312 * MB)
        assert error.stderr_tail == "bad pointer\n"

    def test_with_a_policy_it_says_which_attempt_that_was(self) -> None:
        record = task(policy=RetryPolicy())
        record.attempts = 2
        text = str(failures.crashed(record, worker(), WorkerExit(exit_code=-9)))
        assert text.endswith("Other tasks are not affected. Attempt 2; its retry policy decides.")

    def test_an_innocent_neighbour_learns_that_the_pool_killed_its_worker(self) -> None:
        error = failures.crashed(task(), worker("task 6 was stopped"), WorkerExit(exit_code=-9))
        assert "the worker (pid 4711) was stopped (task 6 was stopped) while it ran task 7;" in str(error)

    def test_quarantine_is_final_and_says_why(self) -> None:
        record = task(policy=RetryPolicy())
        record.kills = 3
        error = failures.quarantined(record, worker(), WorkerExit(exit_code=-9, stderr_tail="x"))
        assert isinstance(error, QuarantinedError)
        assert "It killed 3 workers by now, and is not run again, whatever its retry policy says." in str(error)
        assert "policy decides" not in str(error)
        assert (error.exit_code, error.stderr_tail, error.worker_pid) == (-9, "x", 4711)


class TestLimits:
    def test_timeouts_name_their_setting(self) -> None:
        error = failures.task_timeout(task(), 2.5)
        assert isinstance(error, TaskTimeoutError)
        assert str(error) == "task 7 ran longer than its timeout of 2.5 s and was stopped"
        assert error.timeout_seconds == 2.5
        queued = failures.queue_timeout(task(queue_timeout=30))
        assert isinstance(queued, QueueTimeoutError)
        assert "waited longer than its queue_timeout of 30 s and was not started; raise max_concurrent" in str(queued)

    def test_an_open_breaker_is_named_with_its_reason_and_the_way_out(self) -> None:
        error = failures.circuit_open(task(), 31.234, "host has 312 MB available, needs 512", is_forced=False)
        assert isinstance(error, CircuitOpenError)
        assert str(error) == (
            "task 7 waited 31.2 s, the pool has no worker, and its circuit breaker starts none: host has 312 MB "
            "available, needs 512. It recovers by itself when the cause is gone; pool.breaker.reset() closes it at once"
        )
        forced = failures.circuit_open(task(), 1.0, "maintenance", is_forced=True)
        assert "maintenance. It was opened by hand, and closes by hand: pool.breaker.reset()" in str(forced)
        timed = failures.circuit_open(task(), 1.0, "maintenance", is_forced=True, seconds_left=61.54)
        assert "maintenance. It was opened by hand for another 61.5 s; pool.breaker.reset() closes" in str(timed)

    def test_what_a_shutdown_leaves_undone_for_a_breaker_names_both(self) -> None:
        error = failures.shut_down_while_open(task(), "maintenance")
        assert isinstance(error, CircuitOpenError)
        assert str(error) == (
            "task 7 was not run: its pool shuts down, has no worker for it, and its circuit breaker starts none: "
            "maintenance. Where all that was accepted is to run, shut it down when the breaker is closed again: "
            "pool.breaker.reset() closes it at once"
        )

    def test_the_hard_limit_comes_with_the_readings_that_led_to_it(self) -> None:
        record = worker(rss_mb=700)
        record.samples.extend([(1.0, 100 * MB), (3.5, 700 * MB)])
        error = failures.memory_limit(task(), record, 512 * MB)
        assert isinstance(error, MemoryLimitError)
        assert str(error) == (
            "task 7 was stopped: it passed its hard memory limit of 512 MB; its process tree had 700 MB, it grew by "
            "600 MB in the last 2.50 s. Allow it more with pool.options(hard_memory_limit_mb=...), or run fewer tasks "
            "at once"
        )
        assert error.samples == ((1.0, 100 * MB), (3.5, 700 * MB))
        assert (error.limit_bytes, error.peak_rss_bytes) == (512 * MB, 700 * MB)

    def test_the_pools_limit_names_the_pools_setting(self) -> None:
        text = str(failures.memory_limit(task(), worker(), 0, "all workers use 900 MB together"))
        assert "was stopped: all workers use 900 MB together, and it was the biggest; its process tree had" in text
        assert text.endswith("Raise critical_memory_mb, or run fewer tasks at once")


class TestFresh:
    def test_another_instance_that_says_the_same(self) -> None:
        error = InitializerError("it raised", detail=5)
        error.__cause__ = cause = KeyError("x")
        error.add_note("its traceback")
        again = failures.fresh(error)
        assert again is not error
        assert type(again) is InitializerError
        assert (str(again), again.detail) == ("it raised", 5)  # type: ignore[attr-defined]
        assert again.__cause__ is cause
        again.add_note("mine")
        assert error.__notes__ == ["its traceback"]

    def test_without_cause_and_notes_it_gets_none(self) -> None:
        again = failures.fresh(TaskKilledError("killed"))
        assert again.__cause__ is None
        assert not again.__suppress_context__
        assert not hasattr(again, "__notes__")

    def test_what_is_not_ours_is_passed_on_as_it_is(self) -> None:
        error = KeyError("x")
        assert failures.fresh(error) is error


def test_all_of_them_survive_pickling_with_their_attributes() -> None:
    record = worker()
    record.samples.append((1.0, 5))
    for error in (
        failures.crashed(task(), record, WorkerExit(exit_code=-9)),
        failures.quarantined(task(), record, WorkerExit(exit_code=-9)),
        failures.task_timeout(task(), 1.0),
        failures.queue_timeout(task(queue_timeout=1.0)),
        failures.circuit_open(task(), 1.0, "x", is_forced=False),
        failures.memory_limit(task(), record, 1),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), again.__dict__) == (str(error), error.__dict__)
