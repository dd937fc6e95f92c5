"""How much runs at once, and what the state of the machine lets start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from agentpool import AgentPool, CircuitOpenError, MemoryLimitError, QueueTimeoutError
from agentpool.config import MB
from agentpool.io.host import HostSampler

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
#: More than any machine has, in MB.
NO_MACHINE_HAS = 10**9
BURNER = "import os\nprint('ready', flush=True)\nwhile os.getppid() == {parent}: sum(range(100_000))"


@pytest.fixture
def burner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps a CPU busy, and is not the pool's."""
    process = subprocess.Popen([sys.executable, "-c", BURNER.format(parent=os.getpid())], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


class Container:
    """A cgroup to measure instead of the one that the tests run in: real files, read by the real sampler."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroup = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "pressure").mkdir()
        self.cgroup.mkdir()
        (self.proc / "self" / "cgroup").write_text("0::/\n")
        (self.proc / "self" / "mountinfo").write_text("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        self.say("memory.max", f"{1000 * MB}\n")
        self.available(1000)
        self.pressure(0)

    def say(self, name: str, text: str) -> None:
        """Replaced at once: a reader sees the old or the new."""
        (self.cgroup / f"{name}.new").write_text(text)
        (self.cgroup / f"{name}.new").rename(self.cgroup / name)

    def available(self, megabytes: int) -> None:
        self.say("memory.current", f"{(1000 - megabytes) * MB}\n")

    def pressure(self, percent: float) -> None:
        self.say("memory.pressure", f"some avg10={percent:.2f} avg60=0.00 avg300=0.00 total=0\n")

    def holds(self, pool: AgentPool) -> AgentPool:
        """Makes `pool`, which has not started anything yet, believe that it runs in here."""
        pool._manager._host = HostSampler(self.proc, self.cgroup)
        return pool


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path / "container")


def look_on(seconds: float, wait_until: WaitUntil) -> None:
    """For what must not happen: gives it the time to."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until, "time does not pass")


# what runs in the workers


def clock(log: Path, seconds: float) -> int:
    """Notes when it begins and ends. Appended lines keep the order of events, across processes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"+%d\n" % os.getpid())
    time.sleep(seconds)  # the task's own time
    os.write(descriptor, b"-%d\n" % os.getpid())
    os.close(descriptor)
    return os.getpid()


def overlap(log: Path) -> int:
    """The most that ran at once, by the tasks' own account."""
    running = most = 0
    for line in log.read_text().split():
        running += 1 if line[0] == "+" else -1
        most = max(most, running)
    assert running == 0
    return most


def write(path: Path, text: object) -> None:
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)


def hold(here: Path, gate: Path, megabytes: int = 0) -> int:
    data = b"x" * (megabytes * MB)
    write(here, os.getpid())
    while not gate.exists():
        time.sleep(0.005)
    return len(data) // MB


def burn(here: Path, gate: Path) -> None:
    write(here, os.getpid())
    while not gate.exists():
        sum(range(100_000))


# how much at once


def test_the_defaults_are_four_workers_of_which_two_run(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool()
    stats = pool.get_pool_stats()
    assert (stats["max_pool_size"], stats["max_concurrent"]) == (4, 2)
    tasks = [pool.submit(hold, tmp_path / f"{number}", tmp_path / "gate") for number in range(6)]
    wait_until(lambda: len(list(tmp_path.glob("[0-9]"))) == 2, "two do not run at once")
    look_on(0.3, wait_until)
    assert len(list(tmp_path.glob("[0-9]"))) == 2, "more than two ran at once"
    stats = pool.get_pool_stats()
    assert (stats["running"], stats["queue_length"]) == (2, 4)
    assert stats["agents_by_status"] == {"busy": 2, "idle": 0}
    assert [task.snapshot().state for task in tasks] == ["running"] * 2 + ["queued"] * 4
    (tmp_path / "gate").touch()
    assert [task.result(30) for task in tasks] == [0] * 6


@pytest.mark.parametrize(("settings", "most"), [
    ({}, 2),
    ({"max_workers": 3}, 3),
    ({"max_workers": 4, "max_concurrent": 2}, 2),
    ({"max_workers": 2, "max_concurrent": 1}, 1),
    ({"max_concurrent": 3}, 3),
    ({"max_workers": 2, "max_tasks_per_child": 1}, 2),
    ({"max_workers": 3, "max_concurrent": 2, "memory_limit_mb": 5, "idle_timeout": 0.01}, 2),
])
def test_no_more_run_at_once_than_allowed(
    make_pool: MakePool, tmp_path: Path, settings: dict[str, Any], most: int
) -> None:
    pool = make_pool(**settings)
    limit = pool.get_pool_stats()["max_pool_size"]
    tasks = [pool.submit(clock, tmp_path / "log", 0.02) for _ in range(24)]
    workers = busy = 0
    while not all(task.done() for task in tasks):
        stats = pool.get_pool_stats()
        workers, busy = max(workers, stats["total_agents"]), max(busy, stats["agents_by_status"]["busy"])
        time.sleep(0.001)  # to look again, not to wait
    assert {task.exception(0) for task in tasks} == {None}
    assert overlap(tmp_path / "log") == most
    assert busy == most
    assert workers <= limit


def test_short_tasks_that_travel_together_run_one_at_a_time(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(2)
    assert len(list(pool.map(clock, [tmp_path / "log"] * 2000, [0] * 2000))) == 2000
    assert overlap(tmp_path / "log") <= 2


def test_each_pool_has_a_throttle_of_its_own(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    pools = [make_pool(1), make_pool(1)]
    tasks = [pool.submit(hold, tmp_path / f"{number}", tmp_path / "gate") for number, pool in enumerate(pools)]
    wait_until(lambda: len(list(tmp_path.glob("[0-9]"))) == 2, "one pool waits for the other")
    (tmp_path / "gate").touch()
    assert [task.result(30) for task in tasks] == [0, 0]


# CPU


def test_a_busy_host_degrades_the_pool_and_keeps_nothing_waiting(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(2, cpu_threshold_percent=0.01, cleanup_interval=0.1)
    task = pool.submit(burn, tmp_path / "here", tmp_path / "gate")
    wait_until(lambda: pool.get_pool_stats()["status"] == "degraded", "the CPU's load goes unnoticed")
    [reason] = pool.get_pool_stats()["reasons"]
    assert re.fullmatch(r"host CPU is at \d+ %, above the threshold of 0\.01 %", reason)
    assert pool.submit(os.getpid).result(30) != task.worker_pid
    assert pool.breaker.state == "closed"
    (tmp_path / "gate").touch()
    task.result(30)


def test_with_the_policy_throttle_others_work_keeps_the_pool_from_growing(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, burner: subprocess.Popen[bytes]
) -> None:
    pool = make_pool(2, cpu_threshold_percent=1, cpu_policy="throttle", cleanup_interval=0.1)
    first = pool.submit(hold, tmp_path / "first", tmp_path / "gate")
    wait_until(lambda: "cpu" in str(pool.get_pool_stats()["reasons"]).lower(), "the CPU's load goes unnoticed")
    second = pool.submit(os.getpid)
    look_on(0.5, wait_until)
    stats = pool.get_pool_stats()
    assert (stats["total_agents"], stats["queue_length"], second.done()) == (1, 1, False)
    (tmp_path / "gate").touch()
    first.result(30)
    assert second.result(30) == first.worker_pid, "it goes on with what it has"


def test_with_the_policy_throttle_a_pool_without_a_worker_still_gets_one(
    make_pool: MakePool, wait_until: WaitUntil, burner: subprocess.Popen[bytes]
) -> None:
    pool = make_pool(1, cpu_threshold_percent=1, cpu_policy="throttle", cleanup_interval=0.1, max_tasks_per_child=1)
    pool.submit(os.getpid).result(30)
    wait_until(lambda: pool.get_pool_stats()["total_agents"] == 0, "its worker stays")
    assert len({pool.submit(os.getpid).result(30) for _ in range(10)}) == 10


# available memory


def test_where_memory_is_short_nothing_is_started(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(min_available_mb=NO_MACHINE_HAS)
    before = psutil.Process().children()
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "the breaker stays closed")
    assert re.fullmatch(rf"\S.* has \d+ MB available, needs {NO_MACHINE_HAS}", pool.breaker.reason)
    stats = pool.get_pool_stats()
    assert (stats["status"], stats["reasons"]) == ("degraded", [pool.breaker.reason])
    assert (stats["counters"]["spawned"], stats["total_agents"], stats["queue_length"]) == (0, 0, 1)
    assert stats["thresholds"]["min_available_mb"] == NO_MACHINE_HAS
    assert psutil.Process().children() == before, "not even a keeper is needed"
    assert json.loads(json.dumps(stats)) == stats
    assert not task.done()
    assert task.cancel()


def test_a_task_that_waited_in_vain_for_a_worker_says_why(make_pool: MakePool) -> None:
    pool = make_pool(min_available_mb=NO_MACHINE_HAS, queue_timeout=0.3)
    started = time.monotonic()
    with pytest.raises(CircuitOpenError, match=rf"MB available, needs {NO_MACHINE_HAS}") as info:
        pool.submit(os.getpid).result(30)
    assert 0.3 <= time.monotonic() - started < 10
    assert isinstance(info.value, BrokenExecutor)
    assert not isinstance(info.value, QueueTimeoutError)
    assert "recovers by itself" in str(info.value)
    with pytest.raises(CircuitOpenError):
        pool.options(queue_timeout=0.1).submit(os.getpid).result(30)


def test_reset_does_not_make_memory(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(min_available_mb=NO_MACHINE_HAS, cleanup_interval=0.1)
    changes: list[tuple[str, str]] = []
    pool.breaker.add_listener(lambda old, new, reason: changes.append((old, new)))
    task = pool.submit(os.getpid)
    wait_until(lambda: changes == [("closed", "open")], "the breaker stays closed")
    pool.breaker.reset()
    wait_until(lambda: changes == [("closed", "open"), ("open", "closed"), ("closed", "open")],
               "it is not opened again")
    task.cancel()


def test_one_pools_floor_is_not_anothers(make_pool: MakePool, wait_until: WaitUntil) -> None:
    greedy = make_pool(min_available_mb=NO_MACHINE_HAS)
    task = greedy.submit(os.getpid)
    wait_until(lambda: greedy.breaker.state == "open", "the breaker stays closed")
    assert make_pool(min_available_mb=0).submit(os.getpid).result(30)
    assert not task.done()
    task.cancel()


@pytest.mark.parametrize(("shortage", "words"), [
    (lambda container: container.available(100), "cgroup v2 / has 100 MB available, needs 500"),
    (lambda container: container.pressure(75), "memory pressure is 75 % (PSI some avg10), above the threshold of 60 %"),
])
def test_what_waits_for_memory_goes_on_by_itself_when_there_is_some(
    make_pool: MakePool, wait_until: WaitUntil, container: Container,
    shortage: Callable[[Container], None], words: str,
) -> None:
    pool = container.holds(make_pool(2, min_available_mb=500, cleanup_interval=0.1))
    changes: list[tuple[str, str]] = []
    pool.breaker.add_listener(lambda old, new, reason: changes.append((old, new)))
    shortage(container)
    tasks = [pool.submit(os.getpid) for _ in range(4)]
    wait_until(lambda: pool.breaker.state == "open", "the breaker stays closed")
    assert pool.breaker.reason == words
    assert pool.get_pool_stats()["counters"]["spawned"] == 0
    container.available(1000)
    container.pressure(0)
    assert all(task.result(30) for task in tasks)
    assert changes == [("closed", "open"), ("open", "closed")]
    wait_until(lambda: pool.get_pool_stats()["status"] == "ok", "the pool stays degraded")


def test_readings_between_the_floor_and_a_tenth_above_it_change_nothing(
    make_pool: MakePool, wait_until: WaitUntil, container: Container
) -> None:
    pool = container.holds(make_pool(2, min_available_mb=500, cleanup_interval=0.1))
    container.available(100)
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "the breaker stays closed")
    container.available(510)
    look_on(0.5, wait_until)
    assert (pool.breaker.state, task.done()) == ("open", False)
    container.available(600)
    assert task.result(30)


def test_while_memory_is_short_running_workers_go_on(
    make_pool: MakePool, wait_until: WaitUntil, container: Container, tmp_path: Path
) -> None:
    pool = container.holds(make_pool(2, min_available_mb=500, cleanup_interval=0.1))
    first = pool.submit(hold, tmp_path / "first", tmp_path / "gate")
    wait_until((tmp_path / "first").exists, "it did not start")
    container.available(100)
    wait_until(lambda: pool.breaker.state == "open", "the breaker stays closed")
    waiting = [pool.options(queue_timeout=30).submit(os.getpid) for _ in range(5)]
    short = pool.options(queue_timeout=0.1).submit(os.getpid)
    with pytest.raises(QueueTimeoutError):  # there is a worker, which is just not free
        short.result(30)
    assert pool.get_pool_stats()["total_agents"] == 1
    (tmp_path / "gate").touch()
    assert first.result(30) == 0
    assert {task.result(30) for task in waiting} == {first.worker_pid}
    assert pool.breaker.state == "open"


def test_above_a_derived_critical_value_a_task_is_stopped_when_the_host_is_short_too(
    make_pool: MakePool, wait_until: WaitUntil, container: Container, tmp_path: Path
) -> None:
    pool = container.holds(make_pool(2, memory_limit_mb=50, min_available_mb=500, cleanup_interval=0.1))
    assert pool.get_pool_stats()["thresholds"]["critical_memory_mb"] == 200
    small = pool.submit(hold, tmp_path / "small", tmp_path / "gate", 20)
    big = pool.submit(hold, tmp_path / "big", tmp_path / "gate", 250)
    wait_until(lambda: "critical_memory_mb" in pool.breaker.reason, "the breaker stays closed")
    look_on(0.5, wait_until)
    assert (small.running(), big.running()) == (True, True), "there is enough memory for all that"
    container.available(100)
    with pytest.raises(MemoryLimitError, match=r"above critical_memory_mb \(200\)"):
        big.result(30)
    container.available(1000)
    (tmp_path / "gate").touch()
    assert small.result(30) == 20
    assert pool.submit(os.getpid).result(30)
    wait_until(lambda: pool.breaker.state == "closed", "the breaker does not recover")
