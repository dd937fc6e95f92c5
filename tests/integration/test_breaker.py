"""The circuit breaker in front of the spawn path: what opens it, what waits meanwhile, how it recovers."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agentpool import (
    AgentPool,
    BreakerSettings,
    CircuitOpenError,
    InitializerError,
    QueueTimeoutError,
    ResourceCircuitBreaker,
)

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
QUICK = BreakerSettings(failure_threshold=2, open_seconds=0.2, max_open_seconds=0.4)


class Changes:
    """Listens to a breaker."""

    def __init__(self, pool: AgentPool) -> None:
        self.all: list[tuple[str, str, str]] = []
        self.threads: set[str] = set()
        pool.breaker.add_listener(self._heard)

    def _heard(self, old: str, new: str, reason: str) -> None:
        self.all.append((old, new, reason))
        self.threads.add(threading.current_thread().name)

    @property
    def states(self) -> list[str]:
        return [new for _, new, _ in self.all]


def look_on(seconds: float, wait_until: WaitUntil) -> None:
    """For what must not happen: gives it the time to."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until, "time does not pass")


# what runs in the workers


def begin_if(allowed: Path) -> None:
    """An initializer that crashes unless a file is there."""
    if not allowed.exists():
        sys.stderr.write("the initializer's last words\n")
        sys.stderr.flush()
        os._exit(7)


def begin_slowly(gate: Path, log: Path) -> None:
    """An initializer that waits for a file, and notes that it began."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    while not gate.exists():
        time.sleep(0.005)


def raise_in_initializer() -> None:
    raise ValueError("no such model")


def hold(here: Path, gate: Path) -> int:
    here.touch()
    while not gate.exists():
        time.sleep(0.005)
    return os.getpid()


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# failed starts


def test_five_failed_starts_open_it(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="agentpool")
    pool = make_pool(initializer=begin_if, initargs=(tmp_path / "never",))
    changes = Changes(pool)
    tasks = [pool.submit(os.getpid) for _ in range(3)]
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    assert pool.breaker.failure_count >= 5
    reason = pool.breaker.reason
    assert reason.startswith("5 failed starts within 60 s, last: a worker exited with code 7 before it was ready")
    assert "the initializer's last words" in reason
    wait_until(lambda: pool.get_pool_stats()["total_agents"] == 0, "a start that was under way does not end")
    stats = pool.get_pool_stats()
    assert stats["circuit_breaker"] == pool.breaker.as_dict()
    assert (stats["status"], stats["reasons"]) == ("degraded", [reason])
    assert stats["counters"]["start_failures"] == stats["counters"]["spawned"]
    wait_until(lambda: changes.all, "the listener was not told")
    assert changes.all == [("closed", "open", reason)]
    assert changes.threads == {f"agentpool-manager-{pool.name}"}
    wait_until(lambda: f"circuit breaker open: {reason}" in caplog.messages, "it is not in the log")
    spawned = stats["counters"]["spawned"]
    look_on(0.5, wait_until)
    assert pool.get_pool_stats()["counters"]["spawned"] == spawned, "while it is open nothing is started"
    assert not any(task.done() for task in tasks), "tasks wait"


def test_starts_that_fail_are_made_again_ever_later(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(1, initializer=begin_if, initargs=(tmp_path / "allowed",))
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.get_pool_stats()["counters"]["start_failures"] >= 2, "it gave up at once")
    (tmp_path / "allowed").touch()
    assert task.result(30)
    assert task.attempts == 1
    assert pool.breaker.state == "closed"
    assert pool.breaker.failure_count >= 2


def test_it_recovers_by_itself(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(2, initializer=begin_if, initargs=(tmp_path / "allowed",), breaker=QUICK)
    changes = Changes(pool)
    tasks = [pool.submit(os.getpid) for _ in range(6)]
    wait_until(lambda: changes.states[:4] == ["open", "half_open", "open", "half_open"], "no probes are made")
    assert changes.all[2][2].startswith("the probe failed: a worker exited with code 7 before it was ready")
    (tmp_path / "allowed").touch()
    assert all(task.result(30) for task in tasks)
    wait_until(lambda: changes.states[-2:] == ["half_open", "closed"], "it does not close")
    assert {old for old, _, _ in changes.all} == {"closed", "open", "half_open"}
    assert [old for old, _, _ in changes.all[1:]] == changes.states[:-1]
    assert (pool.breaker.state, pool.breaker.failure_count, pool.breaker.reason) == ("closed", 0, "")
    assert {task.attempts for task in tasks} == {1}
    assert pool.get_pool_stats()["status"] == "ok"


def test_a_floor_without_tasks_recovers_as_well(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(2, min_workers=2, initializer=begin_if, initargs=(tmp_path / "allowed",), breaker=QUICK)
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    (tmp_path / "allowed").touch()
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 2, "the floor is not made good")
    assert pool.breaker.state == "closed"


def test_fresh_interpreters_that_cannot_start_open_it(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises_when_imported.py").write_text("raise RuntimeError('no licence for this')\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = make_pool(1, "spawn", preload=("raises_when_imported",), breaker=QUICK)
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    assert "no licence for this" in pool.breaker.reason
    (tmp_path / "raises_when_imported.py").write_text("licence = True\n")
    assert task.result(30), "a fresh interpreter imports it anew"


def test_half_open_it_lets_one_start_at_a_time(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(4, initializer=begin_if, initargs=(tmp_path / "allowed",),
                     breaker=BreakerSettings(failure_threshold=4, open_seconds=0.1, max_open_seconds=0.2))
    changes = Changes(pool)
    tasks = [pool.submit(os.getpid) for _ in range(8)]
    wait_until(lambda: "half_open" in changes.states, "no probe is made")
    before = pool.get_pool_stats()["counters"]["spawned"]
    wait_until(lambda: changes.states.count("open") >= 3, "probes end")
    probes = changes.states.count("open") - 1
    assert pool.get_pool_stats()["counters"]["spawned"] - before <= probes + 1
    (tmp_path / "allowed").touch()
    assert all(task.result(30) for task in tasks)


def test_while_a_probe_is_under_way_nothing_else_starts(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(2, initializer=begin_slowly, initargs=(tmp_path / "gate", tmp_path / "log"), start_timeout=0.5,
                     breaker=BreakerSettings(failure_threshold=1, open_seconds=0.2))
    tasks = [pool.submit(os.getpid) for _ in range(8)]
    wait_until(lambda: pool.breaker.state == "open", "starts that hang do not count", 20)
    assert "did not become ready within its start_timeout of 0.5 s" in pool.breaker.reason
    wait_until(lambda: pool.get_pool_stats()["total_agents"] == 0, "the first ones do not end")
    seen = []

    def is_probing() -> bool:
        stats = pool.get_pool_stats()
        if stats["circuit_breaker"]["state"] == "half_open" and stats["total_agents"]:
            seen.append(stats["agents_by_status"])
        return len(seen) > 20

    wait_until(is_probing, "no probe is made", 20)
    assert {each["starting"] for each in seen} == {1}
    assert {each["busy"] + each["idle"] for each in seen} == {0}
    (tmp_path / "gate").touch()
    assert all(task.result(30) for task in tasks)
    wait_until(lambda: pool.breaker.state == "closed", "it does not close")


def test_a_module_to_preload_that_cannot_be_imported_opens_it(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises_when_imported.py").write_text("raise RuntimeError('no licence for this')\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = make_pool(preload=("raises_when_imported",), breaker=QUICK)
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    assert "no licence for this" in pool.breaker.reason
    assert not task.done()


def test_a_module_to_preload_that_ends_the_interpreter_opens_it(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exits_when_imported.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = make_pool(preload=("exits_when_imported",), breaker=QUICK)
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    assert "keeper" in pool.breaker.reason
    assert not task.done()


def test_an_interpreter_that_is_not_there_opens_it_and_it_recovers(
    make_pool: MakePool, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        pool = make_pool(breaker=QUICK)
        task = pool.submit(os.getpid)
        wait_until(lambda: pool.breaker.state == "open", "it stays closed")
        assert "No such file or directory: '/nowhere/python'" in pool.breaker.reason
        assert not task.done()
    assert task.result(30)
    wait_until(lambda: pool.breaker.state == "closed", "it does not recover")


def test_an_interpreter_that_ends_at_once_opens_it_and_it_recovers(
    make_pool: MakePool, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        pool = make_pool(breaker=QUICK)
        task = pool.submit(os.getpid)
        wait_until(lambda: pool.breaker.state == "open", "it stays closed")
        assert "keeper" in pool.breaker.reason
    assert task.result(30)


def test_a_program_without_an_interpreter_of_its_own_gets_an_answer(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that embeds Python may have no `sys.executable`."""
    monkeypatch.setattr(sys, "executable", None)
    pool = make_pool(breaker=QUICK, queue_timeout=1)
    with pytest.raises(CircuitOpenError):
        pool.submit(os.getpid).result(30)


def test_deaths_of_idle_workers_open_it(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(1)
    for _ in range(5):
        worker = pool.submit(os.getpid).result(30)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: pool.get_pool_stats()["total_agents"] == 0, "its death goes unnoticed")
    assert pool.breaker.state == "open"
    assert pool.breaker.reason == "5 failed starts within 60 s, last: an idle worker was killed by SIGKILL"


def test_what_tasks_do_does_not_open_it(make_pool: MakePool) -> None:
    pool = make_pool(2, breaker=BreakerSettings(failure_threshold=1))
    changes = Changes(pool)
    futures = [pool.submit(crash) for _ in range(4)]
    futures += [pool.options(timeout=0.05).submit(time.sleep, 60) for _ in range(2)]
    futures += [pool.submit(divmod, 1, 0) for _ in range(4)]
    wait(futures, timeout=60)
    assert all(future.exception(0) for future in futures)
    assert pool.submit(os.getpid).result(30)
    assert (changes.all, pool.breaker.failure_count) == ([], 0)


def test_an_initializer_that_raises_breaks_the_pool_and_does_not_open_it(make_pool: MakePool) -> None:
    pool = make_pool(initializer=raise_in_initializer)
    task = pool.submit(os.getpid)
    with pytest.raises(InitializerError, match="no such model"):
        task.result(30)
    assert pool.breaker.state == "closed"
    assert pool.get_pool_stats()["status"] == "broken"


# tasks meanwhile


def test_a_pool_without_a_worker_fails_what_waits_past_its_queue_timeout(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(1, initializer=begin_if, initargs=(tmp_path / "never",),
                     breaker=BreakerSettings(failure_threshold=1))
    task = pool.options(queue_timeout=0.5, name="impatient").submit(os.getpid)
    with pytest.raises(CircuitOpenError, match=r"\(impatient\) waited .* circuit breaker starts none: 1 failed starts"):
        task.result(30)
    assert task.attempts == 0


def test_a_pool_with_a_worker_goes_on_with_it(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.touch()
    pool = make_pool(2, initializer=begin_if, initargs=(allowed,), breaker=BreakerSettings(failure_threshold=1))
    worker = pool.submit(os.getpid).result(30)
    allowed.unlink()
    first = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    others = [pool.submit(os.getpid) for _ in range(10)]
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    late = pool.options(queue_timeout=0.1).submit(os.getpid)
    with pytest.raises(QueueTimeoutError):
        late.result(30)
    (tmp_path / "gate").touch()
    assert first.result(30) == worker
    assert {task.result(30) for task in others} == {worker}, "graceful degradation"


# by hand


def test_forced_open_it_starts_nothing_until_it_is_reset(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(breaker=QUICK)
    changes = Changes(pool)
    breaker = ResourceCircuitBreaker(pool)
    breaker.force_open("maintenance at noon")
    task = pool.submit(os.getpid)
    assert (breaker.get_state(), breaker.reason) == ("forced_open", "maintenance at noon")
    look_on(1, wait_until)
    assert pool.get_pool_stats()["counters"]["spawned"] == 0, "it does not recover by itself"
    assert not task.done()
    assert pool.get_pool_stats()["reasons"] == ["maintenance at noon"]
    breaker.reset()
    assert task.result(30)
    assert (breaker.state, breaker.reason) == ("closed", "")
    wait_until(lambda: len(changes.all) == 2, "the listener was not told")
    assert changes.all == [("closed", "forced_open", "maintenance at noon"), ("forced_open", "closed", "")]


def test_forced_open_running_workers_go_on(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(2)
    first = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    wait_until((tmp_path / "here").exists, "it did not start")
    pool.breaker.force_open()
    assert pool.breaker.reason == "forced open by hand"
    others = [pool.submit(os.getpid) for _ in range(5)]
    (tmp_path / "gate").touch()
    assert {task.result(30) for task in others} == {first.result(30)}


def test_a_task_that_waits_for_a_breaker_that_was_forced_open_is_told_so(make_pool: MakePool) -> None:
    pool = make_pool(queue_timeout=0.2)
    pool.breaker.force_open("maintenance")
    with pytest.raises(CircuitOpenError, match=r"none: maintenance\. It was opened by hand, and closes by hand"):
        pool.submit(os.getpid).result(30)


def test_shutdown_does_not_wait_for_a_breaker_that_was_forced_open(make_pool: MakePool) -> None:
    with make_pool() as pool:
        pool.breaker.force_open()
        tasks = [pool.submit(os.getpid) for _ in range(3)]
    for task in tasks:
        with pytest.raises(CircuitOpenError, match=r"its pool shuts down, .* starts none: forced open by hand"):
            task.result(0)


def test_shutdown_does_not_wait_for_starts_that_fail(make_pool: MakePool, tmp_path: Path) -> None:
    with make_pool(2, initializer=begin_if, initargs=(tmp_path / "never",), breaker=QUICK) as pool:
        tasks = [pool.submit(os.getpid) for _ in range(3)]
    for task in tasks:
        with pytest.raises(CircuitOpenError, match="a worker exited with code 7 before it was ready"):
            task.result(0)


def test_forced_open_while_it_shuts_down_it_does_not_hang(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(1, max_tasks_per_child=1)
    first = pool.submit(hold, tmp_path / "here", tmp_path / "gate")
    second = pool.submit(os.getpid)
    wait_until((tmp_path / "here").exists, "it did not start")
    pool.shutdown(wait=False)
    pool.breaker.force_open()
    (tmp_path / "gate").touch()
    pool.shutdown()
    assert first.result(0)
    with pytest.raises(CircuitOpenError):
        second.result(0)


def test_cancelled_at_shutdown_while_it_is_open(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(1, initializer=begin_if, initargs=(tmp_path / "never",),
                     breaker=BreakerSettings(failure_threshold=1))
    tasks = [pool.submit(os.getpid) for _ in range(3)]
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    pool.shutdown(cancel_futures=True)
    assert all(task.cancelled() for task in tasks)


def test_reset_closes_it_at_once(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(1, initializer=begin_if, initargs=(tmp_path / "allowed",))
    task = pool.submit(os.getpid)
    wait_until(lambda: pool.breaker.state == "open", "it stays closed")
    (tmp_path / "allowed").touch()
    pool.breaker.reset()
    assert task.result(30), "it did not wait for half a minute"
    assert pool.breaker.failure_count == 0


def test_a_listener_that_raises_harms_nobody(
    make_pool: MakePool, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(1)

    def listen(old: str, new: str, reason: str) -> None:
        raise ValueError("deaf")

    pool.breaker.add_listener(listen)
    changes = Changes(pool)
    pool.breaker.force_open()
    pool.breaker.reset()
    assert pool.submit(os.getpid).result(30)
    wait_until(lambda: changes.states == ["forced_open", "closed"], "the next listener was not told")
    assert "a listener of the circuit breaker raised" in caplog.messages


def test_a_listener_may_use_the_pool(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(1)
    heard: list[Any] = []

    def listen(old: str, new: str, reason: str) -> None:
        heard.append((pool.breaker.state, pool.get_pool_stats()["status"], pool.submit(os.getpid)))
        if new == "forced_open":
            pool.breaker.reset()

    pool.breaker.add_listener(listen)
    pool.breaker.force_open()
    task = pool.submit(os.getpid)
    assert task.result(30)
    wait_until(lambda: len(heard) == 2, "it was not told")
    assert [each.result(30) for _, _, each in heard] == [task.result(0)] * 2


def test_a_breaker_can_be_forced_open_before_anything_was_submitted(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(1)
    pool.breaker.force_open()
    assert pool.breaker.state == "forced_open"
    pool.breaker.reset()
    assert pool.submit(os.getpid).result(30)


def test_the_floor_is_not_started_while_it_is_open(make_pool: MakePool, wait_until: WaitUntil) -> None:
    pool = make_pool(2, min_workers=2)
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 2, "no worker was started")
    pool.breaker.force_open()
    lost = pool.get_pool_stats()["workers"][0]["pid"]
    os.kill(lost, signal.SIGKILL)
    wait_until(lambda: pool.get_pool_stats()["total_agents"] == 1, "its death goes unnoticed")
    look_on(0.5, wait_until)
    assert pool.get_pool_stats()["total_agents"] == 1
    pool.breaker.reset()
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 2, "the floor is not made good")
