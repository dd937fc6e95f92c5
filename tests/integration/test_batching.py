"""Many short tasks: calls that travel together change nothing that a user can observe but time.

What is batched is decided by measured durations, so the tests first let the pool learn that a function is short. Each
task leaves a line in a file: what ran, and how often, is counted there and not taken from the pool's word.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from pathlib import Path

import cloudpickle
import pytest

from agentpool import AgentFuture, AgentPool, TaskKilledError, TaskTimeoutError, WorkerCrashedError

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
IsAlive = Callable[[int], bool]
MakePool = Callable[..., AgentPool]
LONG = 60.0


class Tasks:
    """One short function that does what the files of a folder tell it to; all its calls look alike to the pool."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        folder, log = self.folder, self.log

        def run(number: int, action: str = "") -> int:
            file = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.write(file, b"%d\n" % number)
            os.close(file)
            if action == "crash":
                os._exit(13)
            elif action == "fail":
                raise ValueError(number)
            elif action == "hold on":
                (folder / f"began {number}").write_text(str(os.getpid()))
                while True:
                    try:
                        time.sleep(3600)
                    except BaseException:
                        continue
            elif action:
                (folder / f"began {number}").write_text(str(os.getpid()))
                while not (folder / action).exists():
                    time.sleep(0.001)
            return number

        self.run = run

    def teach(self, pool: AgentPool) -> None:
        """Let the pool learn that it is short."""
        for _ in range(3):
            for future in [pool.submit(self.run, -1) for _ in range(20)]:
                assert future.result(LONG) == -1

    def began(self, number: int) -> bool:
        return (self.folder / f"began {number}").exists()

    def release(self, action: str) -> None:
        (self.folder / action).touch()

    def counts(self) -> Counter[int]:
        """How often each number ran."""
        counts = Counter(map(int, self.log.read_text().split()))
        del counts[-1]
        return counts


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path)


# --- nothing is lost, nothing is held up ---


def test_20000_tasks(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=2)
    futures = [pool.submit(abs, -number) for number in range(20_000)]
    assert [future.result(LONG) for future in futures] == list(range(20_000))
    counters = pool.get_pool_stats()["counters"]
    assert (counters["submitted"], counters["completed"]) == (20_000, 20_000)
    assert counters["failed"] == counters["cancelled"] == counters["crashed"] == 0


def test_each_task_runs_once(make_pool: MakePool, tasks: Tasks) -> None:
    pool = make_pool(max_workers=2)
    futures = [pool.submit(tasks.run, number) for number in range(3000)]
    assert [future.result(LONG) for future in futures] == list(range(3000))
    assert tasks.counts() == Counter(range(3000))
    assert all(future.attempts == 1 for future in futures)


@pytest.mark.parametrize("position", [0, 1, 100, 500, 999])
def test_one_slow_task_holds_up_nobody(
    make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil, position: int
) -> None:
    """Whatever was sent to a worker behind it comes back and is done elsewhere, while the slow one still runs."""
    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number, "release" if number == position else "") for number in range(1000)]
    others = [future for number, future in enumerate(futures) if number != position]
    assert wait(others, LONG).not_done == set()
    slow = futures[position]
    assert not slow.done()
    wait_until(slow.running, "it is not said to run")
    tasks.release("release")
    assert slow.result(LONG) == position
    assert tasks.counts() == Counter(range(1000))


def test_all_workers_slow_then_free(make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number, "release" if number % 250 == 0 else "") for number in range(1000)]
    wait_until(lambda: sum(tasks.began(number) for number in (0, 250, 500, 750)) == 2, "the slow ones did not begin")
    tasks.release("release")
    assert [future.result(LONG) for future in futures] == list(range(1000))
    assert tasks.counts() == Counter(range(1000))


def test_results_before_a_slow_task_arrive_while_it_runs(
    make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil
) -> None:
    """One worker: results of short calls wait for company in its outbox, but not for the end of a slow call."""
    pool = make_pool(max_workers=1)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number, "release" if number == 50 else "") for number in range(100)]
    assert [future.result(LONG) for future in futures[:50]] == list(range(50))
    assert not futures[50].done()
    assert not any(future.done() for future in futures[50:])
    tasks.release("release")
    assert [future.result(LONG) for future in futures[50:]] == list(range(50, 100))


def test_a_worker_that_is_free_takes_what_another_cannot(
    make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil
) -> None:
    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    blocker = pool.submit(tasks.run, 0, "release")
    wait_until(lambda: tasks.began(0), "it did not begin")
    futures = [pool.submit(tasks.run, number) for number in range(1, 500)]
    assert [future.result(LONG) for future in futures] == list(range(1, 500))
    tasks.release("release")
    assert blocker.result(LONG) == 0


def test_functions_of_different_length_mixed(make_pool: MakePool) -> None:
    """Durations are known per function; calls of one do not wait behind calls of another."""

    def short(number: int) -> int:
        return number

    def longer(number: int) -> int:
        time.sleep(0.003)
        return -number

    pool = make_pool(max_workers=2)
    futures = [pool.submit(longer if number % 10 == 0 else short, number) for number in range(1000)]
    assert [future.result(LONG) for future in futures] == [-n if n % 10 == 0 else n for n in range(1000)]


# --- errors and crashes in the middle ---


def test_errors_in_the_middle(make_pool: MakePool, tasks: Tasks) -> None:
    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number, "fail" if number % 7 == 0 else "") for number in range(1000)]
    for number, future in enumerate(futures):
        if number % 7:
            assert future.result(LONG) == number
        else:
            with pytest.raises(ValueError, match=f"^{number}$"):
                future.result(LONG)
    assert tasks.counts() == Counter(range(1000))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_in_the_middle_costs_its_own_task_only(make_pool: MakePool, tasks: Tasks, workers: int) -> None:
    """What was finished before it arrives, what was sent behind it runs elsewhere, and neither twice."""
    pool = make_pool(max_workers=workers)
    tasks.teach(pool)
    bad = {100, 333, 334, 700}
    futures = [pool.submit(tasks.run, number, "crash" if number in bad else "") for number in range(1000)]
    for number, future in enumerate(futures):
        if number in bad:
            with pytest.raises(WorkerCrashedError, match="exited with code 13"):
                future.result(LONG)
        else:
            assert future.result(LONG) == number
        assert future.attempts == 1, number
    assert tasks.counts() == Counter(range(1000))
    counters = pool.get_pool_stats()["counters"]
    assert counters["crashed"] == len(bad)
    assert pool.breaker.failure_count == 0, "a task is to blame, not the machine"


def test_a_crash_that_is_retried_in_the_middle(make_pool: MakePool, tasks: Tasks, tmp_path: Path) -> None:
    flag = tmp_path / "crashed once"
    pool = make_pool(max_workers=1)
    tasks.teach(pool)
    run = tasks.run

    def crash_once(number: int) -> int:
        if number == 60 and not flag.exists():
            flag.touch()
            os._exit(1)
        return run(number)

    futures = [pool.options(retry=2).submit(crash_once, number) for number in range(200)]
    assert [future.result(LONG) for future in futures] == list(range(200))
    assert tasks.counts() == Counter(range(200))
    assert futures[60].attempts == 2
    assert all(future.attempts == 1 for number, future in enumerate(futures) if number != 60)


def test_a_worker_that_is_killed_from_outside(make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil) -> None:
    """At most the task that ran is lost: nothing else fails, and nothing runs twice."""
    import signal

    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number) for number in range(4000)]
    killed = 0
    for index in (500, 1500, 2500):
        futures[index].exception(LONG)
        for worker in pool.get_pool_stats()["workers"]:
            if worker["status"] == "busy":
                with contextlib.suppress(ProcessLookupError):  # one that died a moment ago
                    os.kill(worker["pid"], signal.SIGKILL)
                killed += 1
                break
    outcomes = [future.exception(LONG) for future in futures]
    lost = [number for number, error in enumerate(outcomes) if error is not None]
    assert killed
    assert len(lost) <= killed
    assert all(isinstance(error, WorkerCrashedError) for error in outcomes if error)
    counts = tasks.counts()
    assert max(counts.values()) == 1, "a task ran twice"
    assert set(range(4000)) - set(counts) <= set(lost)


def test_a_timeout_in_the_middle(make_pool: MakePool, tasks: Tasks) -> None:
    pool = make_pool(max_workers=1, kill_grace=0.2)
    tasks.teach(pool)
    view = pool.options(timeout=0.5)
    futures = [view.submit(tasks.run, number, "never" if number == 50 else "") for number in range(200)]
    for number, future in enumerate(futures):
        if number == 50:
            with pytest.raises(TaskTimeoutError):
                future.result(LONG)
        else:
            assert future.result(LONG) == number
    assert tasks.counts() == Counter(range(200))


# --- cancelling and killing what was sent ahead ---


def blocked(pool: AgentPool, tasks: Tasks, wait_until: WaitUntil, count: int = 100) -> list[AgentFuture[int]]:
    """The 30th call blocks the only worker, so that the others wait behind it, in the worker at first."""
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number, "release" if number == 30 else "") for number in range(count)]
    wait_until(lambda: tasks.began(30), "it did not begin")
    return futures


def test_cancel_what_was_sent_ahead(make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil) -> None:
    futures = blocked(make_pool(max_workers=1), tasks, wait_until)
    answers = {number: futures[number].cancel() for number in range(31, 60)}
    assert all(answers.values()), "what has not begun can be cancelled"
    assert not futures[30].cancel(), "it runs"
    for number in answers:
        with pytest.raises(CancelledError):
            futures[number].result(0)
    tasks.release("release")
    for number in (*range(31), *range(60, 100)):
        assert futures[number].result(LONG) == number
    assert tasks.counts() == Counter([*range(31), *range(60, 100)])


def test_kill_what_was_sent_ahead(make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil) -> None:
    futures = blocked(make_pool(max_workers=1), tasks, wait_until)
    assert futures[31].kill()
    assert futures[31].cancelled()
    tasks.release("release")
    assert futures[32].result(LONG) == 32
    assert tasks.counts()[31] == 0


def test_kill_of_what_began_behind_others(make_pool: MakePool, tasks: Tasks) -> None:
    """At once, as soon as the task itself says that it began: `kill()` must not call it over, or unbegun."""
    for attempt in range(15):
        pool = make_pool(max_workers=1, kill_grace=0.2)
        tasks.teach(pool)
        base = 1000 * (attempt + 1)
        futures = [pool.submit(tasks.run, base + n, "release" if n == 25 else "") for n in range(60)]
        path = tasks.folder / f"began {base + 25}"
        deadline = time.monotonic() + LONG
        while not path.exists():
            assert time.monotonic() < deadline
        assert futures[25].kill(), "it runs, and was not stopped"
        with pytest.raises(CancelledError):
            futures[25].result(LONG)
        assert not futures[25].cancelled(), "it began"
        assert isinstance(futures[25].exception(0), TaskKilledError)
        assert futures[59].result(LONG) == base + 59
        pool.kill_workers()


def test_kill_of_the_head_returns_what_waits_behind_it(
    make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil
) -> None:
    pool = make_pool(max_workers=1, kill_grace=0.2)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number, "hold on" if number == 30 else "") for number in range(100)]
    wait_until(lambda: tasks.began(30), "it did not begin")
    wait_until(futures[30].running, "it is not said to run")
    assert futures[30].kill()
    for number, future in enumerate(futures):
        if number != 30:
            assert future.result(LONG) == number
            assert future.attempts == 1
    assert isinstance(futures[30].exception(0), TaskKilledError)
    assert tasks.counts() == Counter(range(100))


def test_snapshot_of_what_was_sent_ahead(make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil) -> None:
    futures = blocked(make_pool(max_workers=1), tasks, wait_until)
    wait_until(futures[30].running, "it is not said to run")
    behind = futures[31]
    assert (behind.running(), behind.done(), behind.attempts) == (False, False, 0)
    assert (behind.snapshot().state, behind.snapshot().attempts) == ("queued", 0)
    tasks.release("release")
    assert behind.result(LONG) == 31
    assert behind.attempts == 1


def test_cancel_of_5000_tasks_while_they_run(make_pool: MakePool, tasks: Tasks) -> None:
    """Each is either cancelled and never ran, or ran once and has its result. `cancel()` says which."""
    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number) for number in range(5000)]
    answers = [future.cancel() for future in reversed(futures)][::-1]
    cancelled = {number for number, answer in enumerate(answers) if answer}
    for number, future in enumerate(futures):
        if number in cancelled:
            assert future.cancelled()
        else:
            assert future.result(LONG) == number
    pool.shutdown()
    counts = tasks.counts()
    assert set(counts) == set(range(5000)) - cancelled
    assert max(counts.values(), default=1) == 1
    counters = pool.get_pool_stats()["counters"]
    assert counters["cancelled"] == len(cancelled)
    assert counters["completed"] == 5000 - len(cancelled) + 60


def test_cancel_from_the_front_races_the_worker(make_pool: MakePool, tasks: Tasks) -> None:
    """From the front, where tasks are being sent and begun at this very moment; from two threads."""
    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number) for number in range(5000)]
    answers: list[list[bool]] = [[], []]

    def cancel(which: int) -> None:
        answers[which] = [future.cancel() for future in futures[which::2]]

    threads = [threading.Thread(target=cancel, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    for which in (0, 1):
        for future, answer in zip(futures[which::2], answers[which], strict=True):
            assert future.cancelled() == answer
    assert wait(futures, LONG).not_done == set()
    pool.shutdown()
    ran = {number for number, future in enumerate(futures) if not future.cancelled()}
    assert all(futures[number].result(0) == number for number in ran)
    assert tasks.counts() == Counter(ran)


def test_cancel_of_every_other_task(make_pool: MakePool, tasks: Tasks) -> None:
    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    for _ in range(5):
        futures = [pool.submit(tasks.run, number) for number in range(400)]
        cancelled = {number for number in range(0, 400, 2) if futures[number].cancel()}
        for number in set(range(400)) - cancelled:
            assert futures[number].result(LONG) == number
        assert tasks.counts() == Counter(set(range(400)) - cancelled)
        tasks.log.write_text("")


# --- other promises that batches must keep ---


def test_shutdown_with_cancel_futures_takes_back_what_was_sent_ahead(
    make_pool: MakePool, tasks: Tasks, wait_until: WaitUntil
) -> None:
    pool = make_pool(max_workers=1)
    futures = blocked(pool, tasks, wait_until, count=3000)
    pool.shutdown(wait=False, cancel_futures=True)
    tasks.release("release")
    pool.shutdown()
    assert [future.result(0) for future in futures[:31]] == list(range(31))
    assert all(future.cancelled() for future in futures[31:])
    assert tasks.counts() == Counter(range(31))


def test_kill_workers_settles_everything_once(make_pool: MakePool, tasks: Tasks) -> None:
    pool = make_pool(max_workers=2)
    tasks.teach(pool)
    futures = [pool.submit(tasks.run, number) for number in range(5000)]
    futures[700].exception(LONG)
    pool.kill_workers()
    assert all(future.done() for future in futures)
    counts = tasks.counts()
    assert max(counts.values()) == 1
    for number, future in enumerate(futures):
        if future.cancelled():
            assert counts[number] == 0, "cancelled, but it ran"
        elif future.exception(0) is None:
            assert counts[number] == 1
        else:
            assert isinstance(future.exception(0), WorkerCrashedError)


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_max_tasks_per_child_counts_each_call(make_pool: MakePool, limit: int) -> None:
    pool = make_pool(max_workers=1, max_tasks_per_child=limit)
    pids = Counter(future.result(LONG) for future in [pool.submit(os.getpid) for _ in range(limit * 6)])
    assert max(pids.values()) <= limit


def test_callbacks_and_results_of_a_batch_come_in_order(make_pool: MakePool, tasks: Tasks) -> None:
    pool = make_pool(max_workers=1)
    tasks.teach(pool)
    order: list[int] = []
    futures = []
    for number in range(2000):
        future = pool.submit(tasks.run, number)
        future.add_done_callback(lambda future: order.append(future.result(0)))
        futures.append(future)
    wait(futures, LONG)
    pool.shutdown()
    assert order == list(range(2000))


def test_submitting_threads_and_short_tasks(make_pool: MakePool, tasks: Tasks) -> None:
    """Many threads submit, and each waits for its own result: nobody is forgotten."""
    pool = make_pool(max_workers=2)

    def work(base: int) -> None:
        for number in range(base, base + 150):
            assert pool.submit(tasks.run, number).result(LONG) == number

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert tasks.counts() == Counter(1000 * n + i for n in range(6) for i in range(150))


def test_memory_limit_with_short_tasks(make_pool: MakePool, wait_until: WaitUntil) -> None:
    """A worker that grows by many short tasks is recycled all the same, and none of them is lost."""

    def keep() -> int:
        import builtins

        if not hasattr(builtins, "kept"):
            builtins.kept = []  # type: ignore[attr-defined]
        builtins.kept.append(b"x" * 100_000)  # type: ignore[attr-defined]
        return os.getpid()

    pool = make_pool(max_workers=1, memory_limit_mb=60)
    pids = Counter(future.result(LONG) for future in [pool.submit(keep) for _ in range(3000)])
    assert sum(pids.values()) == 3000
    assert len(pids) > 1, "300 MB were kept by one worker with a limit of 60"
    assert pool.get_pool_stats()["counters"]["recycled"]["memory"] >= 1
