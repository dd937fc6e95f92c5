"""What is run again, when, how often, and what never is."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import tenacity
from tenacity import (
    retry_if_exception_message,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
    wait_fixed,
    wait_none,
)

from agentpool import (
    Agent,
    AgentFuture,
    AgentPool,
    MemoryLimitError,
    QuarantinedError,
    RetryPolicy,
    SettingsError,
    TaskTimeoutError,
    WorkerCrashedError,
)
from agentpool.config import MB

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]


def crash_error(future: AgentFuture[Any]) -> WorkerCrashedError:
    with pytest.raises(WorkerCrashedError) as info:
        future.result(30)
    assert isinstance(info.value, BrokenProcessPool)
    return info.value


def counters(pool: AgentPool) -> dict[str, Any]:
    found: dict[str, Any] = pool.get_pool_stats()["counters"]
    return found


# what runs in the workers; each notes that it began


def begin(log: Path) -> int:
    """Notes an attempt; says how many there have been."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {time.monotonic()}\n")
    return len(log.read_text().splitlines())


def attempts(log: Path) -> list[int]:
    """The pids of the workers in which it began."""
    return [int(line.split()[0]) for line in log.read_text().splitlines()]


def gaps(log: Path) -> list[float]:
    times = [float(line.split()[1]) for line in log.read_text().splitlines()]
    return [after - before for before, after in itertools.pairwise(times)]


def crash(log: Path, good: int = 1000) -> str:
    """Kills its worker, until the attempt that is `good`."""
    if begin(log) < good:
        sys.stderr.write("these were my last words\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def leave(log: Path, code: int) -> None:
    begin(log)
    os._exit(code)


def fail(log: Path, good: int = 1000, error: type[Exception] = ConnectionError) -> str:
    attempt = begin(log)
    if attempt < good:
        raise error(f"attempt {attempt}")
    return "done"


def poll(log: Path, good: int) -> str | None:
    return "there" if begin(log) >= good else None


def outgrow(log: Path, good: int) -> str:
    if begin(log) < good:
        data = b"x" * (300 * MB)
        time.sleep(60)
        return str(len(data))
    return "done"


def dawdle(log: Path, good: int) -> str:
    if begin(log) < good:
        time.sleep(60)
    return "done"


def hold(here: Path, gate: Path) -> int:
    here.touch()
    while not gate.exists():
        time.sleep(0.005)
    return os.getpid()


class Careful(Agent):
    idempotent = True

    def run(self, prompt: str, *, log: Path, good: int) -> str:
        return crash(log, good)


class Careless(Agent):
    def run(self, prompt: str, *, log: Path, good: int) -> str:
        return crash(log, good)


# the default


def test_a_task_that_began_is_never_run_again_unasked(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    first = pool.submit(os.getpid).result(30)
    task = pool.submit(crash, tmp_path / "log")
    error = crash_error(task)
    assert attempts(tmp_path / "log") == [first]
    assert (task.attempts, task.worker_pid) == (1, first)
    assert (error.exit_code, error.worker_pid) == (-signal.SIGKILL, first)
    assert error.peak_rss_bytes > 1 * MB
    assert "these were my last words" in error.stderr_tail
    for words in ("was killed by SIGKILL", "these were my last words", "retry=3", "Other tasks are not affected",
                  "peak memory"):
        assert words in str(error)
    assert pool.submit(os.getpid).result(30) != first
    assert counters(pool)["crashed"] == 1
    assert counters(pool)["retried"] == counters(pool)["start_failures"] == 0


@pytest.mark.parametrize("code", [0, 3])
def test_a_task_that_ends_its_worker_has_crashed_it(make_pool: MakePool, tmp_path: Path, code: int) -> None:
    task = make_pool(1).submit(leave, tmp_path / "log", code)
    error = crash_error(task)
    assert error.exit_code == code
    assert f"exited with code {code}" in str(error)
    assert len(attempts(tmp_path / "log")) == 1


def test_a_tasks_own_error_is_not_retried_unasked(make_pool: MakePool, tmp_path: Path) -> None:
    for retry in (None, 0, 1, 3):
        log = tmp_path / str(retry)
        task = make_pool(1).options(retry=retry).submit(fail, log)
        with pytest.raises(ConnectionError, match="attempt 1"):
            task.result(30)
        assert (len(attempts(log)), task.attempts) == (1, 1)


def test_other_tasks_are_not_affected_by_a_crash(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(2)
    tasks = [pool.submit(crash, tmp_path / f"{number}", 1000 if number % 5 == 0 else 1) for number in range(20)]
    for number, task in enumerate(tasks):
        if number % 5 == 0:
            crash_error(task)
        else:
            assert task.result(30) == "done"
        assert len(attempts(tmp_path / f"{number}")) == 1
    assert pool.breaker.state == "closed"


# retry=3


@pytest.mark.parametrize("good", [2, 3])
def test_a_number_is_how_often_a_lost_worker_is_made_good(make_pool: MakePool, tmp_path: Path, good: int) -> None:
    pool = make_pool(1, retry=3)
    task = pool.submit(crash, tmp_path / "log", good)
    assert task.result(30) == "done"
    assert task.attempts == good
    workers = attempts(tmp_path / "log")
    assert len(workers) == len(set(workers)) == good
    assert task.worker_pid == workers[-1]
    assert counters(pool)["retried"] == counters(pool)["crashed"] == good - 1
    assert counters(pool)["completed"] == 1


def test_after_the_last_attempt_the_error_is_that_of_the_last(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    task = pool.options(retry=2).submit(crash, tmp_path / "log")
    error = crash_error(task)
    assert not isinstance(error, QuarantinedError)
    assert (len(attempts(tmp_path / "log")), task.attempts) == (2, 2)
    assert error.worker_pid == attempts(tmp_path / "log")[1]
    assert "Attempt 2" in str(error)
    assert task.snapshot().last_error == f"WorkerCrashedError: {error}"


def test_a_task_that_killed_three_workers_is_quarantined_whatever_its_policy_says(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(2)
    policy = tenacity.Retrying(stop=stop_after_attempt(10), wait=wait_none())
    task = pool.options(retry=policy, name="poison").submit(crash, tmp_path / "log")
    error = crash_error(task)
    assert isinstance(error, QuarantinedError)
    assert "while it ran task 1 (poison)" in str(error)
    assert "killed 3 workers by now, and is not run again" in str(error)
    assert (len(attempts(tmp_path / "log")), task.attempts) == (3, 3)
    assert error.worker_pid == attempts(tmp_path / "log")[2]
    assert counters(pool)["start_failures"] == 0, "a poison task is no crash loop"
    assert (pool.breaker.state, pool.breaker.failure_count) == ("closed", 0)
    assert pool.submit(os.getpid).result(30)


def test_a_task_that_killed_a_worker_runs_again_in_a_fresh_one(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(2)
    used = set(pool.map(hold, [tmp_path / "a", tmp_path / "b"], [tmp_path] * 2))
    assert pool.options(retry=3).submit(crash, tmp_path / "log", 2).result(30) == "done"
    first, second = attempts(tmp_path / "log")
    assert first in used
    assert second not in used


def test_many_poison_tasks_and_good_ones(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(3, retry=3)
    tasks = [pool.submit(crash, tmp_path / f"{number}", 1000 if number % 4 == 0 else 1) for number in range(12)]
    for number, task in enumerate(tasks):
        if number % 4 == 0:
            assert isinstance(crash_error(task), QuarantinedError)
        else:
            assert task.result(30) == "done"
        assert len(attempts(tmp_path / f"{number}")) == (3 if number % 4 == 0 else 1)
    assert pool.breaker.state == "closed"


# tenacity


def test_stop_after_attempt_and_retry_if_exception_type(make_pool: MakePool, tmp_path: Path) -> None:
    policy = tenacity.Retrying(stop=stop_after_attempt(4), wait=wait_none(),
                               retry=retry_if_exception_type(ConnectionError))
    pool = make_pool(1, retry=policy)
    task = pool.submit(fail, tmp_path / "good", 4)
    assert task.result(30) == "done"
    assert (task.attempts, len(attempts(tmp_path / "good"))) == (4, 4)
    task = pool.submit(fail, tmp_path / "bad")
    with pytest.raises(ConnectionError, match="attempt 4"):
        task.result(30)
    assert (task.attempts, len(attempts(tmp_path / "bad"))) == (4, 4)
    task = pool.submit(fail, tmp_path / "other", 1000, ValueError)
    with pytest.raises(ValueError, match="attempt 1"):
        task.result(30)
    assert (task.attempts, len(attempts(tmp_path / "other"))) == (1, 1)
    assert counters(pool)["retried"] == 6
    assert (counters(pool)["completed"], counters(pool)["failed"]) == (1, 2)


def test_stop_after_delay(make_pool: MakePool, tmp_path: Path) -> None:
    policy = tenacity.Retrying(stop=stop_after_delay(0.6), wait=wait_fixed(0.1),
                               retry=retry_if_exception_type(ConnectionError))
    started = time.monotonic()
    task = make_pool(1).options(retry=policy).submit(fail, tmp_path / "log")
    with pytest.raises(ConnectionError):
        task.result(30)
    assert 0.6 <= time.monotonic() - started < 15
    assert 2 <= len(attempts(tmp_path / "log")) == task.attempts <= 7


def test_wait_fixed(make_pool: MakePool, tmp_path: Path) -> None:
    policy = RetryPolicy(stop=stop_after_attempt(3), wait=wait_fixed(0.3),
                         retry=retry_if_exception_type(ConnectionError))
    assert make_pool(1).options(retry=policy).submit(fail, tmp_path / "log", 3).result(30) == "done"
    assert [gap >= 0.3 for gap in gaps(tmp_path / "log")] == [True, True]


def test_wait_exponential_jitter(make_pool: MakePool, tmp_path: Path) -> None:
    with warnings.catch_warnings():  # `initial` is `multiplier` in new versions of tenacity
        warnings.simplefilter("ignore", DeprecationWarning)
        wait = wait_exponential_jitter(initial=0.1, jitter=0.05)
    policy = tenacity.Retrying(stop=stop_after_attempt(4), wait=wait, retry=retry_if_exception_type(ConnectionError))
    assert make_pool(1).options(retry=policy).submit(fail, tmp_path / "log", 4).result(30) == "done"
    for gap, least in zip(gaps(tmp_path / "log"), (0.1, 0.2, 0.4), strict=True):
        assert least <= gap < least + 10


def test_retry_if_result(make_pool: MakePool, tmp_path: Path) -> None:
    policy = tenacity.Retrying(stop=stop_after_attempt(5), wait=wait_fixed(0.01),
                               retry=retry_if_result(lambda value: value is None))
    pool = make_pool(1, retry=policy)
    task = pool.submit(poll, tmp_path / "there", 3)
    assert task.result(30) == "there"
    assert (task.attempts, len(attempts(tmp_path / "there"))) == (3, 3)
    task = pool.submit(poll, tmp_path / "never", 1000)
    assert task.result(30) is None, "the last attempt's value is the task's"
    assert (task.attempts, len(attempts(tmp_path / "never"))) == (5, 5)
    with pytest.raises(ConnectionError):
        pool.submit(fail, tmp_path / "error").result(30)
    assert len(attempts(tmp_path / "error")) == 1


def test_strategies_combined(make_pool: MakePool, tmp_path: Path) -> None:
    policy = tenacity.Retrying(
        stop=stop_after_attempt(6) | stop_after_delay(60),
        wait=wait_fixed(0.05) + wait_fixed(0.05),
        retry=(retry_if_exception_type(WorkerCrashedError) | retry_if_exception_message(match="attempt [12]")
               | retry_if_result(lambda value: value is None)),
    )
    pool = make_pool(1, retry=policy)
    assert pool.submit(fail, tmp_path / "errors", 3).result(30) == "done"
    assert pool.submit(crash, tmp_path / "crashes", 3).result(30) == "done"
    assert pool.submit(poll, tmp_path / "values", 3).result(30) == "there"
    with pytest.raises(ConnectionError, match="attempt 3"):
        pool.submit(fail, tmp_path / "more errors").result(30)
    for log in ("errors", "crashes", "values", "more errors"):
        assert len(attempts(tmp_path / log)) == 3
        assert min(gaps(tmp_path / log)) >= 0.1


def test_a_policy_sees_time_outs_and_memory_limits(make_pool: MakePool, tmp_path: Path) -> None:
    policy = tenacity.Retrying(stop=stop_after_attempt(3), wait=wait_none(),
                               retry=retry_if_exception_type((TaskTimeoutError, MemoryLimitError)))
    pool = make_pool(1, retry=policy, task_timeout=0.5)
    task = pool.submit(dawdle, tmp_path / "dawdled", 2)
    assert (task.result(30), task.attempts) == ("done", 2)
    task = pool.options(hard_memory_limit_mb=100, timeout=60).submit(outgrow, tmp_path / "outgrown", 3)
    assert (task.result(30), task.attempts) == ("done", 3)
    task = pool.submit(dawdle, tmp_path / "always", 1000)
    with pytest.raises(TaskTimeoutError, match=r"ran longer than its timeout of 0\.5 s"):
        task.result(30)
    assert (task.attempts, len(attempts(tmp_path / "always"))) == (3, 3)
    assert counters(pool)["timed_out"] == 4
    assert counters(pool)["memory_killed"] == 2


def test_a_task_may_ask_for_another_attempt(make_pool: MakePool, tmp_path: Path) -> None:
    policy = tenacity.Retrying(stop=stop_after_attempt(3), wait=wait_none(),
                               retry=retry_if_exception_type(ConnectionError))
    task = make_pool(1).options(retry=policy).submit(fail, tmp_path / "log", 3, tenacity.TryAgain)
    assert (task.result(30), task.attempts) == ("done", 3)


def broken_strategy(state: tenacity.RetryCallState) -> bool:
    raise ZeroDivisionError("the strategy is broken")


@pytest.mark.parametrize("which", ["stop", "wait", "retry"])
def test_what_a_strategy_raises_is_the_outcome_and_hurts_nobody_else(
    make_pool: MakePool, tmp_path: Path, which: str
) -> None:
    strategies: dict[str, Any] = {"stop": stop_after_attempt(3), "wait": wait_none(),
                                  "retry": retry_if_exception_type(ConnectionError), which: broken_strategy}
    pool = make_pool(1)
    task = pool.options(retry=tenacity.Retrying(**strategies)).submit(fail, tmp_path / "log")
    with pytest.raises(ZeroDivisionError, match="the strategy is broken") as info:
        task.result(30)
    assert isinstance(info.value.__context__, ConnectionError)
    assert any("retry policy" in note for note in info.value.__notes__)
    assert len(attempts(tmp_path / "log")) == 1
    assert pool.submit(os.getpid).result(30)


@pytest.mark.parametrize(("retry", "words"), [
    (-1, "0 or more"),
    ("three", "must be a number of attempts"),
    (True, "must be a number of attempts"),
    (tenacity.Retrying(), "no stop"),
    (tenacity.AsyncRetrying(stop=stop_after_attempt(2)), "AsyncRetrying"),
    (tenacity.Retrying(stop=stop_after_attempt(2), before_sleep=print), "before_sleep"),
])
def test_a_policy_that_cannot_work_is_refused(make_pool: MakePool, retry: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        AgentPool(retry=retry)
    pool = make_pool()
    with pytest.raises(SettingsError, match=words):
        pool.options(retry=retry)


# back-off


def test_no_slot_is_held_in_a_back_off(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    policy = tenacity.Retrying(stop=stop_after_attempt(2), wait=wait_fixed(60),
                               retry=retry_if_exception_type(ConnectionError))
    pool = make_pool(1)
    task = pool.options(retry=policy).submit(fail, tmp_path / "log")
    wait_until(lambda: task.snapshot().state == "waiting_to_retry", "it is not retried")
    stats = pool.get_pool_stats()
    assert (stats["waiting_to_retry"], stats["running"], stats["queue_length"]) == (1, 0, 0)
    assert not task.running()
    assert not task.done()
    assert task.snapshot().last_error == "ConnectionError: attempt 1"
    assert pool.submit(os.getpid).result(30), "another task runs meanwhile"
    assert task.cancel(), "a task that waits is not running"
    assert task.cancelled()
    assert pool.get_pool_stats()["waiting_to_retry"] == 0


def test_shutdown_waits_for_what_is_to_be_run_again(make_pool: MakePool, tmp_path: Path) -> None:
    policy = tenacity.Retrying(stop=stop_after_attempt(3), wait=wait_fixed(0.2),
                               retry=retry_if_exception_type(ConnectionError))
    with make_pool(1) as pool:
        task = pool.options(retry=policy).submit(fail, tmp_path / "log", 3)
    assert task.result(0) == "done"


# what never began


def test_a_task_that_never_began_is_not_charged(
    make_pool: MakePool, tmp_path: Path, stop: Callable[[int], None]
) -> None:
    pool = make_pool(1)
    worker = pool.submit(os.getpid).result(30)
    stop(worker)  # it takes no more calls
    task = pool.submit(crash, tmp_path / "log", 1)
    os.kill(worker, signal.SIGKILL)
    assert task.result(30) == "done"
    assert task.attempts == 1
    [ran_in] = attempts(tmp_path / "log")
    assert ran_in != worker
    assert counters(pool)["crashed"] == counters(pool)["retried"] == 0
    assert pool.breaker.failure_count == 1, "no task is to blame for this death"


def test_what_never_began_keeps_all_of_its_attempts(
    make_pool: MakePool, tmp_path: Path, stop: Callable[[int], None]
) -> None:
    pool = make_pool(1, retry=2)
    for _ in range(2):
        worker = pool.submit(os.getpid).result(30)
        stop(worker)
        task = pool.submit(crash, tmp_path / f"{worker}", 2)
        os.kill(worker, signal.SIGKILL)
        assert (task.result(30), task.attempts) == ("done", 2)


def test_tasks_sent_ahead_to_a_worker_that_dies_run_elsewhere_once(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(1)
    log = tmp_path / "log"
    assert sum(pool.map(abs, range(2000))) == 1999000  # now it is known that these are short
    killer = [pool.submit(crash_if, log, number, number == 250) for number in range(500)]
    crash_error(killer[250])
    assert [task.result(30) for task in killer if task is not killer[250]] == [n for n in range(500) if n != 250]
    ran = [int(line) for line in log.read_text().split()]
    assert sorted(ran) == list(range(500)), "each began exactly once"
    assert {task.attempts for task in killer} == {1}


def crash_if(log: Path, number: int, is_last: bool) -> int:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"%d\n" % number)
    os.close(descriptor)
    if is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


# agents


def test_an_idempotent_agent_is_run_again_without_being_asked(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    task = pool.submit_agent(Careful, "work", log=tmp_path / "log", good=3)
    assert (task.result(30), task.attempts, len(attempts(tmp_path / "log"))) == ("done", 3, 3)


def test_an_agent_that_promises_nothing_is_not(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    error = crash_error(pool.submit_agent(Careless, "work", log=tmp_path / "log", good=2))
    assert len(attempts(tmp_path / "log")) == 1
    assert re.search(r"ran task \d+ \(.*Careless\)", str(error))
    task = pool.options(retry=2).submit_agent(Careless, "work", log=tmp_path / "asked for", good=2)
    assert (task.result(30), task.attempts) == ("done", 2)


def test_what_the_pool_or_view_says_of_retries_goes_before_what_an_agent_promises(
    make_pool: MakePool, tmp_path: Path
) -> None:
    crash_error(make_pool(1).options(retry=0).submit_agent(Careful, "work", log=tmp_path / "view", good=2))
    crash_error(make_pool(1, retry=1).submit_agent(Careful, "work", log=tmp_path / "pool", good=2))
    assert len(attempts(tmp_path / "view")) == len(attempts(tmp_path / "pool")) == 1
