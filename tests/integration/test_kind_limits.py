"""Limits of a kind of tasks: groups, promised memory, growth over a warm baseline."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import cloudpickle
import psutil
import pytest

from agentpool import AgentPool, MemoryReservationError, QueueTimeoutError, SettingsError
from agentpool.config import MB

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]


def hold(gate: str) -> int:
    """Runs until somebody makes that file."""
    while not os.path.exists(gate):
        time.sleep(0.005)
    return os.getpid()


def grow(megabytes: int) -> int:
    """Keeps so much, and touches it."""
    import agentpool_worker.main as somewhere_that_stays

    kept = somewhere_that_stays.__dict__.setdefault("_kept_by_a_test", [])
    kept.append(b"x" * (megabytes * 1024 * 1024))
    return os.getpid()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def test_a_group_never_exceeds_its_limit_and_all_complete(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(4)
    grouped = pool.options(group="g", group_limit=2)
    folder = tmp_path / "running"
    folder.mkdir()

    def count(folder: Path, number: int) -> int:
        mine = folder / str(number)
        mine.touch()
        try:
            time.sleep(0.01)
            return len(list(folder.iterdir()))
        finally:
            mine.unlink()

    futures = [grouped.submit(count, folder, number) for number in range(40)]
    plain = [pool.submit(abs, -number) for number in range(40)]
    assert max(future.result(60) for future in futures) <= 2
    assert [future.result(60) for future in plain] == list(range(40))


def test_others_overtake_those_that_wait_for_their_group(make_pool: MakePool, gate: Path,
                                                         wait_until: WaitUntil) -> None:
    pool = make_pool(2)
    grouped = pool.options(group="g", group_limit=1)
    held = [grouped.submit(hold, str(gate)) for _ in range(3)]
    wait_until(held[0].running, "it runs")
    assert pool.submit(abs, -1).result(30) == 1
    assert not held[1].running()
    assert [task["kind"] for task in pool.get_pool_stats()["queued_tasks"]] == [None, None]
    gate.touch()
    wait(held, 30)
    assert all(future.result(0) for future in held)


def test_the_same_memory_is_not_promised_twice(make_pool: MakePool, gate: Path, wait_until: WaitUntil) -> None:
    """Each expects more than half of what is available: while the first has used none of it, the second waits."""
    available = psutil.virtual_memory().available / MB
    pool = make_pool(3, min_available_mb=0)
    greedy = pool.options(expected_memory_mb=available * 0.55)
    first, second = greedy.submit(hold, str(gate)), greedy.submit(hold, str(gate))
    wait_until(first.running, "the first runs")
    assert pool.submit(abs, -1).result(30) == 1, "others overtake"
    assert not second.running()
    with pytest.raises(QueueTimeoutError, match=r"expects \d+ MB \(expected_memory_mb\), and \d+ MB can be promised"):
        greedy.options(queue_timeout=0.3).submit(abs, 1).result(30)
    gate.touch()
    assert first.result(30)
    assert second.result(30)


def test_what_can_never_fit_fails_and_says_why(make_pool: MakePool) -> None:
    pool = make_pool(1)
    with pytest.raises(MemoryReservationError, match="expects 1000000000 MB") as caught:
        pool.options(expected_memory_mb=10**9).submit(abs, 1).result(30)
    assert caught.value.expected_bytes == 10**9 * MB
    assert 0 < caught.value.givable_bytes <= psutil.virtual_memory().total
    assert pool.submit(abs, -1).result(30) == 1


def test_growth_over_the_warm_baseline_recycles(make_pool: MakePool, wait_until: WaitUntil) -> None:
    """The first task may take 120 MB, above the pool's limit: that is the baseline. What grows from there is judged."""
    pool = make_pool(1, memory_limit_mb=100, critical_memory_mb=4000)
    kind = pool.options(memory_growth_mb=60)
    first = kind.submit(grow, 120).result(30)
    assert kind.submit(os.getpid).result(30) == first
    assert kind.submit(grow, 20).result(30) == first
    assert kind.submit(os.getpid).result(30) == first
    assert kind.submit(grow, 80).result(30) == first
    wait_until(lambda: pool.get_pool_stats()["counters"]["recycled"].get("memory") == 1, "it is recycled")
    assert kind.submit(os.getpid).result(30) != first


@pytest.mark.parametrize(("options", "message"), [
    ({"group_limit": 2}, r"group_limit \(2\) needs a group"),
    ({"group": "g", "group_limit": 0}, "group_limit must be greater than 0"),
    ({"group": ""}, "group must be a string that is not empty"),
    ({"expected_memory_mb": -1}, "expected_memory_mb must be greater than 0"),
    ({"expected_memory_mb": 500, "hard_memory_limit_mb": 300, "memory_limit_mb": 100},
     r"expected_memory_mb \(500\) is above hard_memory_limit_mb \(300\)"),
    ({"memory_growth_mb": "much"}, "memory_growth_mb must be a number"),
])
def test_options_that_cannot_be(make_pool: MakePool, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_pool(1).options(**options)  # type: ignore[arg-type]
