"""Hard limits on a task's process tree, and limits on all workers together."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool import AgentFuture, AgentPool, MemoryLimitError, SettingsError
from agentpool.config import MB

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
IsAlive = Callable[[int], bool]
#: Takes memory, says so, and stays until it is killed.
HELPER = "import sys, time; data = b'x' * (int(sys.argv[1]) << 20); print('ready', flush=True); time.sleep(600)"


def memory_error(future: AgentFuture[Any]) -> MemoryLimitError:
    with pytest.raises(MemoryLimitError) as info:
        future.result(30)
    assert isinstance(info.value, MemoryError)
    return info.value


def await_file(path: Path, wait_until: WaitUntil) -> str:
    wait_until(lambda: path.exists() and path.read_text(), f"{path.name} was not written")
    return path.read_text()


# what runs in the workers


def write(path: Path, text: object) -> None:
    """At once, so that a reader sees nothing or all."""
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)


def hold(megabytes: int, here: Path, gate: Path) -> int:
    """Holds memory until the gate opens, then lets go of it."""
    data = b"x" * (megabytes * MB)
    write(here, os.getpid())
    while not gate.exists():
        time.sleep(0.005)
    return len(data) // MB


def hoard_and_hold(megabytes: int, here: Path, gate: Path) -> int:
    """Holds memory until the gate opens, and keeps it in the worker."""
    builtins.hoarded = b"x" * (megabytes * MB)  # type: ignore[attr-defined]
    return hold(0, here, gate)


def grow(step_mb: int, most_mb: int) -> str:
    """Takes memory by and by."""
    data = []
    for _ in range(0, most_mb, step_mb):
        data.append(b"x" * (step_mb * MB))
        time.sleep(0.01)  # a task that takes its time
    return f"{len(data)} steps"


def take_at_once(megabytes: int) -> int:
    data = b"x" * (megabytes * MB)
    time.sleep(60)
    return len(data)


def have_helpers_hold(megabytes: int, count: int, here: Path) -> None:
    """Runs processes that hold memory, each in a session of its own, and waits for the first."""
    helpers = [subprocess.Popen([sys.executable, "-c", HELPER, str(megabytes)], stdout=subprocess.DEVNULL,
                                start_new_session=True) for _ in range(count)]
    write(here, " ".join(str(helper.pid) for helper in helpers))
    helpers[0].wait()


def have_a_daemon_hold(megabytes: int, here: Path) -> None:
    """Runs a process that is nobody's child any more and holds memory."""
    code = f"import os\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n{HELPER}"
    write(here, "started")
    subprocess.run([sys.executable, "-c", code, str(megabytes)], stdout=subprocess.DEVNULL, check=True)
    time.sleep(60)


def take_shortly(megabytes: int) -> int:
    return len(b"x" * (megabytes * MB)) // MB


# hard_memory_limit_mb


def test_a_task_that_passes_its_hard_limit_is_stopped(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: IsAlive, tmp_path: Path
) -> None:
    pool = make_pool(2)
    other = pool.submit(hold, 5, tmp_path / "other", tmp_path / "gate")
    bystander = int(await_file(tmp_path / "other", wait_until))
    task = pool.options(hard_memory_limit_mb=100, name="greedy").submit(grow, 5, 600)
    error = memory_error(task)
    assert error.limit_bytes == 100 * MB
    assert 100 * MB < error.peak_rss_bytes < 600 * MB
    assert task.peak_rss_bytes == error.peak_rss_bytes
    assert error.samples
    assert max(rss for _, rss in error.samples) == error.peak_rss_bytes
    assert [when for when, _ in error.samples] == sorted(when for when, _ in error.samples)
    for words in ("(greedy)", "its hard memory limit of 100 MB", "it grew by", "hard_memory_limit_mb=..."):
        assert words in str(error)
    assert task.worker_pid is not None
    wait_until(lambda: not is_alive(task.worker_pid or 0), "its worker was not killed")
    assert is_alive(bystander)
    (tmp_path / "gate").touch()
    assert other.result(30) == 5, "another task was harmed"
    assert pool.submit(os.getpid).result(30) == bystander
    counters = pool.get_pool_stats()["counters"]
    assert (counters["memory_killed"], counters["crashed"], counters["start_failures"]) == (1, 0, 0)
    assert pool.breaker.state == "closed"


def test_memory_that_is_taken_at_once_is_noticed_soon(make_pool: MakePool) -> None:
    pool = make_pool(1, hard_memory_limit_mb=100)
    started = time.monotonic()
    error = memory_error(pool.submit(take_at_once, 300))
    assert time.monotonic() - started < 10
    assert error.peak_rss_bytes > 100 * MB
    assert pool.submit(grow, 5, 20).result(30) == "4 steps"


def test_what_a_tasks_processes_hold_counts_together_and_they_are_stopped_too(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: IsAlive, tmp_path: Path
) -> None:
    pool = make_pool(1, hard_memory_limit_mb=150)
    task = pool.submit(have_helpers_hold, 70, 2, tmp_path / "helpers")
    helpers = [int(word) for word in await_file(tmp_path / "helpers", wait_until).split()]
    assert memory_error(task).peak_rss_bytes > 150 * MB
    wait_until(lambda: not any(map(is_alive, helpers)), "its processes were not killed")


def test_a_daemon_of_the_task_counts_and_is_stopped_too(make_pool: MakePool, tmp_path: Path) -> None:
    """The leak check sees to it that it is gone."""
    pool = make_pool(1, hard_memory_limit_mb=100)
    assert memory_error(pool.submit(have_a_daemon_hold, 150, tmp_path / "here")).peak_rss_bytes > 100 * MB
    assert (tmp_path / "here").exists()


def test_a_fresh_interpreter_is_measured_alike(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, "spawn", memory_limit_mb=60, hard_memory_limit_mb=150)
    memory_error(pool.submit(grow, 5, 600))
    task = pool.submit(hoard_and_hold, 80, tmp_path / "here", tmp_path)
    assert task.result(30) == 0
    assert pool.submit(os.getpid).result(30) != task.worker_pid
    assert pool.get_pool_stats()["counters"]["recycled"] == {"memory": 1}


def test_a_view_may_allow_more_than_its_pool(make_pool: MakePool) -> None:
    pool = make_pool(1, hard_memory_limit_mb=60)
    assert pool.options(hard_memory_limit_mb=300).submit(grow, 20, 160).result(30) == "8 steps"
    memory_error(pool.submit(grow, 20, 600))


def test_each_of_several_tasks_is_judged_alone(make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil) -> None:
    pool = make_pool(3, hard_memory_limit_mb=120)
    tasks = [pool.submit(hold, 80, tmp_path / f"{number}", tmp_path / "gate") for number in range(3)]
    for number in range(3):
        await_file(tmp_path / f"{number}", wait_until)
    wait_until(lambda: pool.get_pool_stats()["memory_mb"] > 240, "they were not measured")
    (tmp_path / "gate").touch()
    assert [task.result(30) for task in tasks] == [80] * 3


def test_the_peak_of_a_task_is_known_even_where_it_was_short(make_pool: MakePool) -> None:
    pool = make_pool(1)
    task = pool.submit(take_shortly, 80)
    assert task.result(30) == 80
    assert task.peak_rss_bytes > 80 * MB
    assert task.snapshot().peak_rss_bytes == task.peak_rss_bytes
    following = pool.submit(os.getpid)
    following.result(30)
    assert following.peak_rss_bytes < 80 * MB, "the peak is that of the task, not of its worker's life"


def test_a_hard_limit_below_the_soft_one_is_refused(make_pool: MakePool) -> None:
    with pytest.raises(SettingsError, match="hard_memory_limit_mb"):
        AgentPool(memory_limit_mb=100, hard_memory_limit_mb=50)
    pool = make_pool()
    with pytest.raises(SettingsError, match="hard_memory_limit_mb"):
        pool.options(memory_limit_mb=100, hard_memory_limit_mb=50)


# alert_memory_mb


def test_an_alert_degrades_the_pool_as_long_as_it_lasts(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(2, memory_limit_mb=None, alert_memory_mb=80, cleanup_interval=0.1)
    task = pool.submit(hold, 100, tmp_path / "here", tmp_path / "gate")
    wait_until(lambda: pool.get_pool_stats()["status"] == "degraded", "no alert")
    [reason] = pool.get_pool_stats()["reasons"]
    assert reason.startswith("all workers use ")
    assert reason.endswith(" MB together, above alert_memory_mb (80)")
    assert pool.submit(os.getpid).result(30) != task.worker_pid, "an alert keeps no task waiting"
    (tmp_path / "gate").touch()
    assert task.result(30) == 100
    wait_until(lambda: pool.get_pool_stats()["status"] == "ok", "the alert stays")
    assert pool.get_pool_stats()["reasons"] == []


def test_while_there_is_an_alert_no_spare_is_started(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(2, min_workers=2, memory_limit_mb=None, alert_memory_mb=80, cleanup_interval=0.1)
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 2, "no worker was started")
    task = pool.submit(hold, 100, tmp_path / "here", tmp_path / "gate")
    wait_until(lambda: pool.get_pool_stats()["status"] == "degraded", "no alert")
    [spare] = [worker["pid"] for worker in pool.get_pool_stats()["workers"] if worker["status"] == "idle"]
    os.kill(spare, signal.SIGKILL)
    wait_until(lambda: pool.get_pool_stats()["total_agents"] == 1, "its death went unnoticed")
    readings = time.monotonic() + 0.5
    wait_until(lambda: time.monotonic() > readings, "time does not pass")
    assert pool.get_pool_stats()["counters"]["spawned"] == 2
    (tmp_path / "gate").touch()
    task.result(30)
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 2, "the floor was not made good after it")


# critical_memory_mb


def test_above_a_critical_value_of_the_users_the_biggest_task_is_stopped(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(3, memory_limit_mb=None, critical_memory_mb=200, cleanup_interval=0.1)
    changes: list[tuple[str, str, str]] = []
    pool.breaker.add_listener(lambda *change: changes.append(change))
    gate = tmp_path / "gate"
    tasks = [pool.submit(hold, 20, tmp_path / name, gate) for name in ("small", "gone soon")]
    idle = pool.submit(os.getpid).result(30)
    small = int(await_file(tmp_path / "small", wait_until))
    await_file(tmp_path / "gone soon", wait_until)
    tasks.append(pool.submit(hold, 30, tmp_path / "big", gate))
    await_file(tmp_path / "big", wait_until)
    wait_until(lambda: pool.get_pool_stats()["memory_mb"] > 100, "they were not measured")
    assert tasks[2].worker_pid == idle
    assert pool.breaker.state == "closed", "all together are below it"
    tasks[1].kill()
    last = pool.submit(hold, 180, tmp_path / "biggest", gate)
    error = memory_error(last)
    assert error.limit_bytes == 200 * MB
    assert "MB together, above critical_memory_mb (200)" in str(error)
    wait_until(lambda: not is_alive(last.worker_pid or 0), "its worker was not killed")
    assert is_alive(small)
    wait_until(lambda: pool.breaker.state == "closed", "the breaker does not recover")
    assert changes[0][:2] == ("closed", "open")
    assert "MB together, above critical_memory_mb (200)" in changes[0][2]
    assert pool.submit(lambda: "goes on").result(30) == "goes on"
    wait_until(lambda: pool.get_pool_stats()["status"] == "ok", "the pool stays degraded")
    gate.touch()
    assert (tasks[0].result(30), tasks[2].result(30)) == (20, 30)
    assert pool.get_pool_stats()["counters"]["memory_killed"] == 1


def test_above_a_critical_value_idle_workers_go_first(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, is_alive: IsAlive
) -> None:
    pool = make_pool(2, memory_limit_mb=None, critical_memory_mb=150, cleanup_interval=0.1)
    gate = tmp_path / "gate"
    gate.touch()
    tasks = [pool.submit(hoard_and_hold, 60, tmp_path / name, gate) for name in ("one", "two")]
    for task in tasks:
        task.result(30)
    one, two = (int(await_file(tmp_path / name, wait_until)) for name in ("one", "two"))
    if one == two:  # the first was so quick that it ran both: what it keeps is below the limit
        pytest.fail("two tasks at once ran in one worker")
    gate.unlink()
    task = pool.submit(hold, 60, tmp_path / "three", gate)
    busy = int(await_file(tmp_path / "three", wait_until))
    idle = ({one, two} - {busy}).pop()
    wait_until(lambda: not is_alive(idle), "the idle worker was not recycled")
    assert pool.get_pool_stats()["counters"]["recycled"] == {"pool over critical_memory_mb": 1}
    wait_until(lambda: pool.breaker.state == "closed", "the breaker does not recover")
    gate.touch()
    assert task.result(30) == 60, "that was enough: no task had to be stopped"
    assert pool.get_pool_stats()["counters"]["memory_killed"] == 0


def test_a_derived_critical_value_stops_no_task(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil
) -> None:
    pool = make_pool(1, memory_limit_mb=40, cleanup_interval=0.1)
    assert pool.get_pool_stats()["thresholds"]["critical_memory_mb"] == 80
    task = pool.submit(hoard_and_hold, 120, tmp_path / "here", tmp_path / "gate")
    wait_until(lambda: pool.breaker.state == "open", "the breaker stays closed")
    assert "MB together, above critical_memory_mb (80)" in pool.breaker.reason
    waiting = pool.submit(os.getpid)
    readings = time.monotonic() + 1
    wait_until(lambda: time.monotonic() > readings, "time does not pass")
    assert task.running()
    (tmp_path / "gate").touch()
    assert task.result(30) == 0
    assert waiting.result(30) not in (None, task.worker_pid)
    wait_until(lambda: pool.breaker.state == "closed", "the breaker does not recover")
    counters = pool.get_pool_stats()["counters"]
    assert counters["memory_killed"] == 0
    assert sum(counters["recycled"].values()) == 1
