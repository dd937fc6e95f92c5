"""Settings and task options with real workers: views, refusals with cause and cure, priorities, keys, bounds."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle
import pytest
import tenacity

from agentpool import (
    AgentFuture,
    AgentPool,
    BreakerSettings,
    MemoryLimitError,
    PoolClosedError,
    PoolSettings,
    PoolView,
    QueueFullError,
    QueueTimeoutError,
    ResultUnpicklingError,
    SettingsError,
    TaskTimeoutError,
    WorkerCrashedError,
)

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
LONG = 30.0
MB = 1024 * 1024


@pytest.fixture
def pool(make_pool: MakePool) -> AgentPool:
    return make_pool(max_workers=2)


class Busy:
    """Occupies workers until `end()`."""

    def __init__(self, folder: Path, wait_until: WaitUntil) -> None:
        self.folder = folder
        self.futures: list[AgentFuture[int]] = []
        self._wait_until = wait_until

    def occupy(self, executor: AgentPool | PoolView, count: int = 1) -> None:
        folder = self.folder

        def hold(number: int) -> int:
            (folder / f"began {number}").touch()
            while not (folder / "end").exists():
                time.sleep(0.005)
            return os.getpid()

        for _ in range(count):
            self.futures.append(executor.submit(hold, len(self.futures)))
        for number in range(len(self.futures)):
            self._wait_until((folder / f"began {number}").exists, "it did not begin")

    def end(self) -> None:
        (self.folder / "end").touch()


@pytest.fixture
def busy(tmp_path: Path, wait_until: WaitUntil) -> Busy:
    return Busy(tmp_path, wait_until)


def fail(message: str = "flaky") -> NoReturn:
    raise ValueError(message)


# --- views ---


def test_a_view_is_an_executor_on_the_same_workers(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=1)
    view = pool.options(name="seen")
    assert isinstance(view, Executor)
    assert pool.submit(os.getpid).result(LONG) == view.submit(os.getpid).result(LONG)
    assert list(view.map(abs, [-1, -2])) == [1, 2]
    assert view.submit(abs, -1).name == "seen"
    assert pool.submit(abs, -1).name is None, "the pool itself has the view's options"
    with pytest.raises(WorkerCrashedError):
        view.submit(os._exit, 1).result(LONG)


def test_options_of_a_view_are_replaced_one_by_one(pool: AgentPool) -> None:
    first = pool.options(name="one", priority=3)
    second = first.options(name="two", timeout=5)
    assert (first.submit(abs, 1).name, second.submit(abs, 1).name) == ("one", "two")
    assert "'priority': 3" in repr(second)
    assert "'timeout': 5" in repr(second)
    assert "timeout" not in repr(first)
    assert "two" in repr(second)


def test_views_begin_with_the_pools_own_options(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=1, task_timeout=0.05, kill_grace=0.1)
    assert isinstance(pool.submit(time.sleep, 60).exception(LONG), TaskTimeoutError)
    assert isinstance(pool.options(name="x").submit(time.sleep, 60).exception(LONG), TaskTimeoutError)
    assert pool.options(timeout=None).submit(time.sleep, 0.1).result(LONG) is None


def test_shutdown_of_a_view_is_that_of_the_pool(pool: AgentPool) -> None:
    with pool.options(priority=1) as view:
        future = view.submit(abs, -1)
    assert future.result(0) == 1
    assert pool.closed
    with pytest.raises(PoolClosedError):
        pool.submit(abs, 1)


def test_a_view_keeps_its_pool_alive(busy: Busy) -> None:
    view = AgentPool(max_workers=1).options(name="only this is held")
    assert [view.submit(abs, -n).result(LONG) for n in range(3)] == [0, 1, 2]
    view.shutdown()


def test_a_view_runs_agents(pool: AgentPool) -> None:
    future = pool.options(name="by name", timeout=30).submit_agent("command", "echo hello")
    assert future.result(LONG)["stdout"] == b"hello\n"
    assert future.name == "by name"
    assert pool.submit_agent("command", "true").name == "command"


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_workers": 2, "min_workers": 3}, ["min_workers (3)", "max_workers (2)", "lower it, or raise that"]),
        ({"max_workers": 2, "max_concurrent": 3}, ["max_concurrent (3)", "max_workers (2)", "raise", "lower"]),
        ({"memory_limit_mb": 200, "hard_memory_limit_mb": 150},
         ["hard_memory_limit_mb (150)", "memory_limit_mb (200)", "raise", "lower"]),
        ({"alert_memory_mb": 900, "critical_memory_mb": 800},
         ["alert_memory_mb (900)", "critical_memory_mb (800)", "lower it, or raise"]),
        ({"retry": tenacity.Retrying()}, ["no stop", "stop_after_attempt"]),
        ({"retry": tenacity.Retrying(stop=tenacity.stop_after_attempt(2), before_sleep=print)},
         ["before_sleep", "leave that out"]),
        ({"retry": tenacity.AsyncRetrying()}, ["Retrying", "not an AsyncRetrying"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], words: list[str]) -> None:
    """The text names both sides, and what to do."""
    with pytest.raises(SettingsError) as caught:
        AgentPool(**settings)
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_breaker_settings_that_contradict_each_other() -> None:
    with pytest.raises(SettingsError, match=r"max_open_seconds \(5\) must not be below open_seconds \(10\)"):
        BreakerSettings(open_seconds=10, max_open_seconds=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("max_workers", "max_concurrent", "max_pending", "max_tasks_per_child",
                                 "memory_limit_mb", "memory_growth_mb", "hard_memory_limit_mb", "idle_timeout",
                                 "cleanup_interval", "task_timeout", "queue_timeout", "start_timeout",
                                 "alert_memory_mb", "critical_memory_mb", "cpu_threshold_percent")),
        *((name, -1) for name in ("min_workers", "kill_grace", "min_available_mb", "retry")),
        *((name, math.inf) for name in ("task_timeout", "memory_limit_mb", "cleanup_interval", "kill_grace")),
        *((name, math.nan) for name in ("task_timeout", "memory_limit_mb")),
        *((name, "5") for name in ("max_workers", "task_timeout", "memory_limit_mb", "retry", "preload")),
        *((name, True) for name in ("max_workers", "task_timeout", "min_workers", "retry")),
        *((name, 2.5) for name in ("max_workers", "max_pending", "max_tasks_per_child")),
        # Where None has no meaning it is refused, and does not end the manager thread later on.
        *((name, None) for name in ("min_workers", "cleanup_interval", "cpu_threshold_percent", "pressure_threshold",
                                    "start_timeout", "kill_grace", "cpu_policy", "preload", "breaker")),
        ("memory_limit_mb", 10**400),
        ("cpu_policy", "panic"),
        ("preload", ("json", 3)),
        ("breaker", {"failure_threshold": 3}),
        ("retry", object()),
    ],
    ids=lambda value: value if isinstance(value, str) else (repr(value) if len(repr(value)) < 30 else "long"),
)
def test_settings_that_are_refused(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=name):
        AgentPool(**{name: value})


@pytest.mark.parametrize("name", ["failure_threshold", "window_seconds", "open_seconds", "max_open_seconds"])
@pytest.mark.parametrize("value", [0, None, "x", math.inf])
def test_breaker_settings_that_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=name):
        BreakerSettings(**{name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 0}, "timeout must be greater than 0"),
        ({"timeout": math.inf}, "for no limit, say None"),
        ({"queue_timeout": -3}, "queue_timeout must be greater than 0"),
        ({"memory_limit_mb": 100, "hard_memory_limit_mb": 50}, r"hard_memory_limit_mb \(50\) is below"),
        ({"priority": 1.5}, "priority must be a whole number"),
        ({"priority": None}, "priority must be a whole number"),
        ({"key": 7}, "key must be a string"),
        ({"name": 7}, "name must be a string"),
        ({"block": None}, "block must be"),
        ({"retry": -1}, "retry must be the number of attempts"),
        ({"retry": "3"}, "retry must be a number of attempts, a RetryPolicy or"),
        ({"retries": 3}, "unknown option retries; known are block, capture_logging, capture_output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    pool = AgentPool()
    with pytest.raises(SettingsError, match=words):
        pool.options(**options)
    with pytest.raises(SettingsError, match=words):
        pool.options(name="a view").options(**options)
    pool.shutdown()


def test_an_unknown_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting max_wrokers; known are .*max_workers"):
        AgentPool(max_wrokers=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (4, 2, 100)),
        ({"max_workers": 3}, (3, 3, 100)),
        ({"max_concurrent": 6}, (6, 6, 100)),
        ({"max_concurrent": 1}, (4, 1, 100)),
        ({"min_workers": 7}, (7, 2, 100)),
        ({"max_workers": 5, "max_concurrent": 2}, (5, 2, 100)),
        ({"hard_memory_limit_mb": 60}, (4, 2, 60)),
        ({"hard_memory_limit_mb": 500}, (4, 2, 100)),
    ],
    ids=str,
)
def test_defaults_give_way(given: dict[str, Any], found: tuple[int, int, float]) -> None:
    settings = PoolSettings.make(**given)
    assert (settings.max_workers, settings.concurrency, settings.memory_limit_mb) == found


# --- at most so many at once ---


def test_max_concurrent_is_kept(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(max_workers=4, max_concurrent=2)

    def count() -> int:
        mark = tmp_path / str(os.getpid())
        mark.touch()
        here = len(list(tmp_path.iterdir()))
        time.sleep(0.002)
        mark.unlink()
        return here

    futures = [pool.submit(count) for _ in range(60)]
    assert max(future.result(LONG) for future in futures) == 2


def test_default_pool_runs_two_at_once(make_pool: MakePool, busy: Busy) -> None:
    pool = make_pool()
    busy.occupy(pool, 2)
    third = pool.submit(abs, -1)
    stats = pool.get_pool_stats()
    assert (stats["running"], stats["queue_length"], stats["max_concurrent"], stats["max_pool_size"]) == (2, 1, 2, 4)
    busy.end()
    assert third.result(LONG) == 1


def test_min_workers_are_started_ahead_of_work(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=3, min_workers=2)
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"] == {"busy": 0, "idle": 2}, "no workers")
    pids = {worker["pid"] for worker in pool.get_pool_stats()["workers"]}
    assert pool.submit(os.getpid).result(LONG) in pids


# --- priority and key ---


def test_higher_priorities_go_first(make_pool: MakePool, busy: Busy, tmp_path: Path) -> None:
    pool = make_pool(max_workers=1)
    busy.occupy(pool)
    log = tmp_path / "log"

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{what} ")

    order = [(0, "a"), (5, "b"), (-1, "c"), (5, "d"), (0, "e"), (9, "f")]
    futures = [pool.options(priority=priority).submit(note, name) for priority, name in order]
    busy.end()
    for future in futures:
        future.result(LONG)
    assert log.read_text().split() == ["f", "b", "d", "a", "e", "c"]


def test_equal_priorities_keep_their_order(make_pool: MakePool, busy: Busy, tmp_path: Path) -> None:
    pool = make_pool(max_workers=1)
    busy.occupy(pool)
    log = tmp_path / "log"

    def note(number: int) -> None:
        with log.open("a") as file:
            file.write(f"{number} ")

    futures = [pool.submit(note, number) for number in range(300)]
    busy.end()
    for future in futures:
        future.result(LONG)
    assert [int(word) for word in log.read_text().split()] == list(range(300))


def test_an_urgent_task_overtakes_what_was_sent_ahead(make_pool: MakePool, tmp_path: Path) -> None:
    """Short calls travel in batches; one of higher priority does not wait for all that is queued before it."""
    pool = make_pool(max_workers=1)
    log = tmp_path / "log"

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{what}\n")

    futures = [pool.submit(note, "plain") for _ in range(3000)]
    urgent = pool.options(priority=1).submit(note, "urgent")
    urgent.result(LONG)
    for future in futures:
        future.result(LONG)
    assert log.read_text().split().index("urgent") < 2500


def test_tasks_of_a_key_prefer_their_worker(make_pool: MakePool, busy: Busy, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=3)
    busy.occupy(pool, 3)
    busy.end()
    for future in busy.futures:
        future.result(LONG)
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 3, "they are not idle")
    views = {key: pool.options(key=key) for key in ("red", "green", "blue")}

    def ask(key: str) -> int:
        wait_until(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 3, "they are not idle")
        return views[key].submit(os.getpid).result(LONG)

    homes = {key: ask(key) for key in views}
    for _ in range(3):
        for key in ("blue", "red", "green"):
            assert ask(key) == homes[key]


def test_a_key_is_no_promise(make_pool: MakePool, busy: Busy) -> None:
    """Its worker is busy: another one does it."""
    pool = make_pool(max_workers=2)
    keyed = pool.options(key="session")
    home = keyed.submit(os.getpid).result(LONG)
    busy.occupy(keyed)
    assert keyed.submit(os.getpid).result(LONG) != home
    busy.end()
    assert busy.futures[0].result(LONG) == home


# --- bounds ---


def test_submit_waits_for_room(make_pool: MakePool, busy: Busy, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=1, max_pending=2)
    busy.occupy(pool)
    queued = [pool.submit(abs, -n) for n in range(2)]
    done: list[AgentFuture[int]] = []
    thread = threading.Thread(target=lambda: done.append(pool.submit(abs, -7)))
    thread.start()
    with pytest.raises(QueueFullError) as caught:
        pool.options(block=False).submit(abs, 1)
    assert "2 tasks are queued already (max_pending)" in str(caught.value)
    assert not done
    busy.end()
    thread.join(LONG)
    assert done[0].result(LONG) == 7
    assert [future.result(LONG) for future in queued] == [0, 1]


def test_a_cancelled_task_makes_room(make_pool: MakePool, busy: Busy, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=1, max_pending=1)
    busy.occupy(pool)
    queued = pool.submit(abs, -1)
    done: list[AgentFuture[int]] = []
    thread = threading.Thread(target=lambda: done.append(pool.submit(abs, -7)))
    thread.start()
    assert queued.cancel()
    thread.join(LONG)
    assert done
    busy.end()
    assert done[0].result(LONG) == 7


def test_many_waiting_threads_all_get_through(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=2, max_pending=1)
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda base=base: results.extend(pool.map(abs, range(base, base + 50))))  # type: ignore[misc]
        for base in range(0, 600, 100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert sorted(results) == sorted(n for base in range(0, 600, 100) for n in range(base, base + 50))


def test_a_queue_bound_with_retries(make_pool: MakePool, wait_until: WaitUntil) -> None:
    """A task that comes back to be run again was accepted before: it needs no room."""
    pool = make_pool(max_workers=1, max_pending=1)
    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none())
    futures = [pool.options(retry=policy).submit(fail) for _ in range(10)]
    assert all(isinstance(future.exception(LONG), ValueError) for future in futures)
    assert [future.attempts for future in futures] == [3] * 10


# --- one end-to-end look at each of the other options ---


def test_timeout(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=1, kill_grace=0.2)
    future = pool.options(timeout=0.1, name="slow one").submit(time.sleep, 60)
    with pytest.raises(TaskTimeoutError, match=r"\(slow one\) ran longer than its timeout of 0.1 s") as caught:
        future.result(LONG)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.timeout_seconds == 0.1
    assert pool.options(timeout=20).submit(abs, -1).result(LONG) == 1


def test_the_timeouts_clock_starts_with_the_task(make_pool: MakePool, busy: Busy, wait_until: WaitUntil) -> None:
    """Not while it waits in the queue."""
    pool = make_pool(max_workers=1)
    busy.occupy(pool)
    queued = pool.options(timeout=1).submit(abs, -1)
    started = time.monotonic()
    wait_until(lambda: time.monotonic() - started > 1.2, "time stands still")
    busy.end()
    assert queued.result(LONG) == 1


def test_queue_timeout(make_pool: MakePool, busy: Busy) -> None:
    pool = make_pool(max_workers=1)
    busy.occupy(pool)
    waiting = pool.options(queue_timeout=0.1).submit(abs, -1)
    with pytest.raises(QueueTimeoutError, match=r"waited longer than its queue_timeout of 0.1 s") as caught:
        waiting.result(LONG)
    assert isinstance(caught.value, TimeoutError)
    assert waiting.attempts == 0
    busy.end()
    assert pool.options(queue_timeout=20).submit(abs, -1).result(LONG) == 1


def test_hard_memory_limit(make_pool: MakePool) -> None:
    pool = make_pool(max_workers=1)

    def grow() -> NoReturn:
        data = []
        while True:
            data.append(b"x" * 5_000_000)
            time.sleep(0.005)

    with pytest.raises(MemoryLimitError, match="hard memory limit of 120 MB") as caught:
        pool.options(hard_memory_limit_mb=120).submit(grow).result(LONG)
    assert caught.value.limit_bytes == 120 * MB
    assert caught.value.peak_rss_bytes > 120 * MB
    assert isinstance(caught.value, MemoryError)
    assert pool.submit(abs, -1).result(LONG) == 1


def test_memory_limit_of_a_task(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(max_workers=1, memory_limit_mb=400)

    def keep() -> int:
        import builtins

        builtins.kept = b"x" * 80 * MB  # type: ignore[attr-defined]
        return os.getpid()

    first = pool.submit(keep).result(LONG)
    assert pool.options(memory_limit_mb=60).submit(keep).result(LONG) == first
    wait_until(lambda: pool.get_pool_stats()["counters"]["recycled"].get("memory"), "it was not recycled")
    assert pool.submit(os.getpid).result(LONG) != first


def test_retry_by_a_tenacity_policy(pool: AgentPool, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def flaky() -> int:
        with log.open("a") as file:
            file.write("x")
        return log.stat().st_size if log.stat().st_size > 2 else fail()

    policy = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(5),
        wait=tenacity.wait_none(),
        retry=tenacity.retry_if_exception_type(ValueError),
    )
    future = pool.options(retry=policy).submit(flaky)
    assert future.result(LONG) == 3
    assert future.attempts == 3


class Rebuilt:
    """Calls `action` where it is unpickled."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def __reduce__(self) -> tuple[Any, ...]:
        return self.action, ()


@pytest.mark.parametrize("action", [fail, sys.exit])
def test_a_result_policy_and_a_result_that_cannot_be_rebuilt(pool: AgentPool, action: Callable[[], Any]) -> None:
    """Such a policy makes the manager thread rebuild the value: that may raise anything."""
    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(3), retry=tenacity.retry_if_result(bool))
    future = pool.options(retry=policy).submit(Rebuilt, action)
    assert isinstance(future.exception(LONG), ResultUnpicklingError)
    assert pool.submit(abs, -1).result(LONG) == 1


def test_retry_by_the_result(pool: AgentPool, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def count() -> int:
        with log.open("a") as file:
            file.write("x")
        return log.stat().st_size

    policy = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(9), wait=tenacity.wait_none(), retry=tenacity.retry_if_result(lambda n: n < 4)
    )
    future = pool.options(retry=policy).submit(count)
    assert (future.result(LONG), future.attempts) == (4, 4)


def test_a_task_that_began_is_not_run_again_unasked(pool: AgentPool, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def crash() -> NoReturn:
        with log.open("a") as file:
            file.write("x")
        os._exit(1)

    with pytest.raises(WorkerCrashedError):
        pool.submit(crash).result(LONG)
    assert log.read_text() == "x"


def test_stats_are_plain_data_and_agree(pool: AgentPool, busy: Busy) -> None:
    import json

    busy.occupy(pool.options(name="named"))
    pool.submit(abs, -1).result(LONG)
    assert isinstance(pool.submit(fail).exception(LONG), ValueError)
    stats = pool.get_pool_stats()
    assert json.loads(json.dumps(stats, allow_nan=False)) == stats
    assert (stats["status"], stats["running"], stats["queue_length"]) == ("ok", 1, 0)
    assert (stats["counters"]["submitted"], stats["counters"]["completed"], stats["counters"]["failed"]) == (3, 1, 1)
    assert {worker["task"] for worker in stats["workers"]} == {"named", None}
    assert stats["total_agents"] == len(stats["workers"]) == 2
    busy.end()
