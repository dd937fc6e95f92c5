"""The process that the keeper forks ahead while workers are being replaced: it becomes the next one, or goes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from agentpool import AgentPool

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
LONG = 60.0


def keeper_of(pool: AgentPool) -> psutil.Process:
    keeper = pool._manager._staff.keeper
    assert keeper is not None
    return psutil.Process(keeper.pid)


def replace_worker(pool: AgentPool, wait_until: WaitUntil) -> set[int]:
    """Have a worker replaced, and wait for the spare that comes of it; returns the pids of spares."""
    for _ in range(3):
        pool.submit(os.getpid).result(LONG)
    wait_until(lambda: spares(pool), "no process was forked ahead")
    return spares(pool)


def spares(pool: AgentPool) -> set[int]:
    """Children of the keeper that are no workers and never were."""
    with pool._manager.lock:
        children = {child.pid for child in keeper_of(pool).children() if is_running(child)}
        workers = {link.pid for link in pool._manager._staff.links.values()}
        return set() if None in workers else children - workers


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_it_becomes_the_next_worker(make_pool: MakePool, wait_until: WaitUntil) -> None:
    with make_pool(1, max_tasks_per_child=1, retry=None) as pool:
        ahead = replace_worker(pool, wait_until)
        used = {pool.submit(os.getpid).result(LONG) for _ in range(4)}
        assert len(used) == 4
        assert ahead & used, "the process that was ready was not used"


def test_there_is_none_while_no_worker_is_replaced(make_pool: MakePool) -> None:
    with make_pool(3) as pool:
        assert len({future.result(LONG) for future in [pool.submit(os.getpid) for _ in range(30)]}) <= 3
        assert spares(pool) == set()


def test_it_goes_when_workers_are_no_longer_replaced(make_pool: MakePool, wait_until: WaitUntil) -> None:
    with make_pool(1, max_tasks_per_child=1, idle_timeout=LONG) as pool:
        replace_worker(pool, wait_until)
        wait_until(lambda: not spares(pool), "a process that nobody needs is kept", 30)
        assert pool.submit(os.getpid).result(LONG)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_was_killed_is_no_failed_start(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: Callable[[int], bool], number: int
) -> None:
    with make_pool(1, max_tasks_per_child=1) as pool:
        ahead = replace_worker(pool, wait_until)
        for pid in ahead:
            os.kill(pid, number)
        wait_until(lambda: not any(map(is_alive, ahead)), "a signal did not end it")
        assert all(pool.submit(os.getpid).result(LONG) for _ in range(5))
        assert pool.breaker.failure_count == 0


def import_path() -> list[str]:
    return list(sys.path)


def test_it_knows_what_the_program_has_changed_since(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_pool(1, max_tasks_per_child=1) as pool:
        replace_worker(pool, wait_until)
        monkeypatch.syspath_prepend(str(tmp_path))
        pool.submit(os.getpid).result(LONG)  # by a worker that may have been started before
        assert str(tmp_path) in pool.submit(import_path).result(LONG)


def open_files() -> dict[str, str]:
    return {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) >= 100}


def test_a_worker_made_of_it_has_the_descriptors_of_any_other(make_pool: MakePool, wait_until: WaitUntil) -> None:
    with make_pool(1, max_tasks_per_child=1) as pool:
        kinds = [sorted(link.split(":")[0].split(" ")[0] for link in pool.submit(open_files).result(LONG).values())]
        replace_worker(pool, wait_until)
        for _ in range(4):
            files = pool.submit(open_files).result(LONG)
            kinds.append(sorted(link.split(":")[0].split(" ")[0] for link in files.values()))
    assert all(kind == kinds[0] for kind in kinds), kinds


def test_it_dies_with_the_keeper(make_pool: MakePool, wait_until: WaitUntil, is_alive: Any) -> None:
    with make_pool(1, max_tasks_per_child=1) as pool:
        ahead = replace_worker(pool, wait_until)
        os.kill(keeper_of(pool).pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, ahead)), "a process that was forked ahead outlives the keeper")
        assert pool.submit(os.getpid).result(LONG)
