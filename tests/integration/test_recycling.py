"""Which workers are retired, and when their successors come: memory, idleness, tasks per worker, the floor."""

from __future__ import annotations

import atexit
import builtins
import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

from agentpool import AgentPool
from agentpool.config import MB

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # so that workers need not import pytest

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
#: Takes memory, says so, and stays until it is killed.
HELPER = "import sys, time; data = b'x' * (int(sys.argv[1]) << 20); print('ready', flush=True); time.sleep(600)"


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """The warnings of the logger "agentpool" that contain these words."""
    caplog.set_level(logging.WARNING, logger="agentpool")

    def logged(words: str) -> list[str]:
        return [record.getMessage() for record in caplog.records
                if record.name == "agentpool" and record.levelno == logging.WARNING and words in record.getMessage()]

    return logged


def recycled(pool: AgentPool) -> dict[str, int]:
    counters: dict[str, int] = pool.get_pool_stats()["counters"]["recycled"]
    return counters


def pids(pool: AgentPool) -> set[int]:
    return {worker["pid"] for worker in pool.get_pool_stats()["workers"]}


# what runs in the workers


def hoard(megabytes: int) -> int:
    """Keeps memory as a leaking module would."""
    builtins.hoarded = [*getattr(builtins, "hoarded", []), b"x" * (megabytes * MB)]  # type: ignore[attr-defined]
    return os.getpid()


def litter(megabytes: int, log: Path) -> int:
    """Leaves garbage that only the collector finds, and notes in `log` when that runs."""
    gc.disable()
    cycle: list[object] = [b"x" * (megabytes * MB)]
    cycle.append(cycle)

    def note(phase: str, info: dict[str, int]) -> None:
        with open(log, "a") as file:
            file.write(f"{phase} {info['generation']}\n")

    gc.callbacks.append(note)
    return os.getpid()


def start_helper(megabytes: int, seconds: float) -> int:
    """Leaves a process behind that holds memory; takes at least `seconds`."""
    until = time.monotonic() + seconds
    helper = subprocess.Popen([sys.executable, "-c", HELPER, str(megabytes)], stdout=subprocess.PIPE,
                              start_new_session=True)
    builtins.helpers = [*getattr(builtins, "helpers", []), helper]  # type: ignore[attr-defined]
    assert helper.stdout is not None
    assert helper.stdout.readline() == b"ready\n"
    while time.monotonic() < until:
        time.sleep(0.01)
    return helper.pid


def start_growing_helper(megabytes: int) -> int:
    """Leaves a process behind that has not yet taken its memory when the task ends."""
    helper = subprocess.Popen([sys.executable, "-c", HELPER, str(megabytes)], stdout=subprocess.DEVNULL)
    builtins.helper = helper  # type: ignore[attr-defined]
    return helper.pid


def linger(until: Path) -> int:
    """Has this worker, when it ends, wait for a file."""

    def wait() -> None:
        while not until.exists():
            time.sleep(0.005)

    atexit.register(wait)
    return os.getpid()


def hoard_and_linger(megabytes: int, until: Path) -> int:
    linger(until)
    return hoard(megabytes)


def meet(mine: Path, others: list[Path]) -> int:
    """Returns when all of them run: each needs a worker of its own."""
    mine.touch()
    while not all(other.exists() for other in others):
        time.sleep(0.005)
    return os.getpid()


def note(log: Path, number: int, megabytes: int) -> int:
    with open(log, "a") as file:
        file.write(f"{number}\n")
    hoard(megabytes)
    return number


def run_together(pool: AgentPool, count: int, folder: Path) -> set[int]:
    """Has `count` workers at once; returns their pids."""
    places = [folder / f"{number}.here" for number in range(count)]
    found = {future.result(30) for future in [pool.submit(meet, place, places) for place in places]}
    for place in places:
        place.unlink()
    assert len(found) == count
    return found


# memory


def test_a_worker_over_its_limit_after_a_task_is_recycled(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: Callable[[int], bool]
) -> None:
    pool = make_pool(1, memory_limit_mb=60)
    first = pool.submit(os.getpid).result(30)
    assert pool.submit(hoard, 80).result(30) == first, "within its limit a worker is kept"
    second = pool.submit(os.getpid).result(30)
    assert second != first
    assert recycled(pool) == {"memory": 1}
    wait_until(lambda: not is_alive(first), "the old worker is still there")
    assert pool.submit(os.getpid).result(30) == second
    stats = pool.get_pool_stats()
    assert stats["counters"]["completed"] == 4
    assert stats["counters"]["crashed"] == stats["counters"]["start_failures"] == 0


def test_before_a_worker_is_recycled_its_garbage_is_collected_and_its_memory_read_again(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    log = tmp_path / "collections"
    pool = make_pool(1, memory_limit_mb=60)
    first = pool.submit(litter, 80, log).result(30)
    wait_until(lambda: log.exists() and "stop 2" in log.read_text(), "its garbage was not collected")
    wait_until(lambda: pool.get_pool_stats()["workers"][0]["memory_mb"] < 60, "it was not measured again")
    assert pool.submit(os.getpid).result(30) == first, "garbage costs no worker its life"
    assert recycled(pool) == {}


def test_a_worker_that_is_over_its_limit_when_fresh_gets_one_relative_to_that(
    make_pool: MakePool, warnings_logged: Callable[[str], list[str]], tmp_path: Path
) -> None:
    pool = make_pool(2, initializer=hoard, initargs=(120,))  # the limit is the default of 100 MB
    workers = run_together(pool, 2, tmp_path)
    for _ in range(5):
        assert pool.submit(os.getpid).result(30) in workers
    assert run_together(pool, 2, tmp_path) == workers
    assert recycled(pool) == {}
    [warning] = warnings_logged("a fresh worker already uses")
    for words in ("initializer", "memory_limit_mb (100)", "Set memory_limit_mb above", "memory_growth_mb"):
        assert words in warning


def test_the_relative_limit_is_a_limit(make_pool: MakePool) -> None:
    pool = make_pool(1, memory_limit_mb=40, initializer=hoard, initargs=(60,))
    first = pool.submit(hoard, 20).result(30)
    assert pool.submit(hoard, 40).result(30) == first
    assert pool.submit(os.getpid).result(30) != first
    assert recycled(pool) == {"memory": 1}


def test_what_the_keeper_has_preloaded_belongs_to_the_baseline(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    warnings_logged: Callable[[str], list[str]],
) -> None:
    (tmp_path / "heavy_to_preload.py").write_text("data = b'x' * (120 << 20)\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = make_pool(1, preload=("heavy_to_preload",))
    assert len({pool.submit(os.getpid).result(30) for _ in range(5)}) == 1
    assert pool.submit(lambda: "heavy_to_preload" in sys.modules).result(30)
    assert recycled(pool) == {}
    [warning] = warnings_logged("a fresh worker already uses")
    assert "preload" in warning


@pytest.mark.parametrize(("metric", "is_over"), [("rss", True), ("pss", True), ("uss", False)])
def test_what_counts_may_be_chosen(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_logged: Callable[[str], list[str]],
    metric: str, is_over: bool,
) -> None:
    """What the keeper preloads is shared by it and its one worker: half of 160 MB is each one's, none is its alone."""
    (tmp_path / "shared_data.py").write_text("data = b'x' * (160 << 20)\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = make_pool(1, preload=("shared_data",), memory_metric=metric, memory_limit_mb=60)
    assert len({pool.submit(os.getpid).result(30) for _ in range(3)}) == 1
    assert bool(warnings_logged("a fresh worker already uses")) == is_over
    first = pool.submit(hoard, 130).result(30)
    assert pool.submit(os.getpid).result(30) != first
    assert recycled(pool) == {"memory": 1}


def test_what_an_initializer_has_started_belongs_to_the_baseline(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: Callable[[int], bool],
    warnings_logged: Callable[[str], list[str]],
) -> None:
    pool = make_pool(1, memory_limit_mb=60, initializer=start_helper, initargs=(80, 0.0))
    longer_than_what_goes_unmeasured = 0.1
    workers = {pool.submit(lambda: (time.sleep(longer_than_what_goes_unmeasured), os.getpid())[1]).result(30)
               for _ in range(4)}
    assert len(workers) == 1
    assert recycled(pool) == {}
    assert len(warnings_logged("a fresh worker already uses")) == 1
    [helper] = pool.submit(lambda: [helper.pid for helper in builtins.helpers]).result(30)  # type: ignore[attr-defined]
    pool.shutdown()
    wait_until(lambda: not is_alive(helper), "the helper outlived its worker")


def test_one_warning_when_worker_after_worker_is_over_its_limit(
    make_pool: MakePool, warnings_logged: Callable[[str], list[str]]
) -> None:
    pool = make_pool(1, memory_limit_mb=40)
    assert len({pool.submit(hoard, 60).result(30) for _ in range(6)}) == 6
    pool.submit(os.getpid).result(30)
    assert recycled(pool) == {"memory": 6}, "recycling goes on"
    [warning] = warnings_logged("worker after worker")
    for words in ("memory limit (40 MB)", "after its first task", "raise memory_limit_mb", "preload"):
        assert words in warning


def test_no_warning_when_workers_grow_slowly(
    make_pool: MakePool, warnings_logged: Callable[[str], list[str]]
) -> None:
    pool = make_pool(1, memory_limit_mb=60)
    workers = [pool.submit(hoard, 30).result(30) for _ in range(8)]
    assert Counter(Counter(workers).values()) == {2: 4}
    pool.submit(os.getpid).result(30)
    assert recycled(pool) == {"memory": 4}
    assert warnings_logged("worker after worker") == []


def test_growth_is_counted_from_the_fresh_worker(
    make_pool: MakePool, warnings_logged: Callable[[str], list[str]]
) -> None:
    pool = make_pool(1, memory_limit_mb=None, memory_growth_mb=30, initializer=hoard, initargs=(80,))
    first = pool.submit(hoard, 20).result(30)
    assert pool.submit(hoard, 20).result(30) == first
    assert pool.submit(os.getpid).result(30) != first
    assert recycled(pool) == {"memory": 1}
    assert warnings_logged("") == []


def test_a_task_may_have_a_lower_limit_of_its_own(make_pool: MakePool) -> None:
    pool = make_pool(1)
    first = pool.submit(hoard, 50).result(30)
    assert pool.options(memory_limit_mb=40).submit(os.getpid).result(30) == first
    assert pool.submit(os.getpid).result(30) != first
    assert recycled(pool) == {"memory": 1}


def test_a_task_may_have_a_higher_limit_of_its_own(make_pool: MakePool) -> None:
    pool = make_pool(1, memory_limit_mb=40)
    roomy = pool.options(memory_limit_mb=200)
    first = roomy.submit(hoard, 60).result(30)
    assert roomy.submit(os.getpid).result(30) == first
    assert pool.submit(os.getpid).result(30) == first, "after this one the pool's own limit holds again"
    assert pool.submit(os.getpid).result(30) != first
    assert recycled(pool) == {"memory": 1}


def test_a_process_left_by_a_task_counts_and_ends_with_its_worker(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: Callable[[int], bool]
) -> None:
    pool = make_pool(1, memory_limit_mb=60)
    first = pool.submit(os.getpid).result(30)
    helper = pool.submit(start_helper, 80, 0.1).result(30)
    assert pool.submit(os.getpid).result(30) != first
    assert recycled(pool) == {"memory": 1}
    wait_until(lambda: not is_alive(helper), "the helper outlived its worker")


def test_a_process_left_by_a_short_task_is_found_by_the_next_sweep(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: Callable[[int], bool]
) -> None:
    pool = make_pool(1, memory_limit_mb=60, cleanup_interval=0.1)
    helper = pool.submit(start_growing_helper, 80).result(30)
    wait_until(lambda: recycled(pool) == {"memory": 1}, "an idle worker over its limit was not recycled")
    wait_until(lambda: not is_alive(helper), "the helper outlived its worker")
    assert pool.submit(os.getpid).result(30)


def test_nothing_is_lost_or_done_twice_while_workers_are_recycled(make_pool: MakePool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pool = make_pool(2, memory_limit_mb=40)
    tasks = [pool.submit(note, log, number, 30 if number % 3 == 0 else 0) for number in range(60)]
    assert [task.result(60) for task in tasks] == list(range(60))
    assert Counter(map(int, log.read_text().split())) == Counter(range(60))
    assert {task.attempts for task in tasks} == {1}
    assert recycled(pool)["memory"] >= 5
    assert pool.get_pool_stats()["counters"]["crashed"] == 0


# idleness and the floor


def test_idle_workers_are_recycled(
    make_pool: MakePool, wait_until: WaitUntil, is_alive: Callable[[int], bool], tmp_path: Path
) -> None:
    pool = make_pool(3, idle_timeout=0.3)
    workers = run_together(pool, 3, tmp_path)
    wait_until(lambda: pool.get_pool_stats()["total_agents"] == 0, "idle workers stay")
    wait_until(lambda: not any(map(is_alive, workers)), "their processes stay")
    assert recycled(pool) == {"idle": 3}
    assert pool.submit(os.getpid).result(30) not in workers


def test_idle_workers_are_kept_down_to_the_floor(
    make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path
) -> None:
    pool = make_pool(3, idle_timeout=0.2, min_workers=1)
    workers = run_together(pool, 3, tmp_path)
    wait_until(lambda: recycled(pool) == {"idle": 2}, "idle workers stay")
    kept = pids(pool) & workers
    wait_until(lambda: pool.get_pool_stats()["workers"][0]["age_seconds"] > 1, "time does not pass")
    assert pool.submit(os.getpid).result(30) in kept
    assert recycled(pool) == {"idle": 2}


def test_a_busy_worker_is_not_idle(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, idle_timeout=0.1)

    def work() -> int:
        time.sleep(0.3)  # the task's own time: longer than the time-out
        return os.getpid()

    assert len({future.result(30) for future in [pool.submit(work) for _ in range(3)]}) == 1


def test_the_floor_is_there_before_there_is_work(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(3, min_workers=2)
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"] == {"busy": 0, "idle": 2}, "no worker was started")
    stats = pool.get_pool_stats()
    assert (stats["counters"]["submitted"], stats["counters"]["spawned"]) == (0, 2)
    floor = pids(pool)
    assert run_together(pool, 2, tmp_path) == floor


def test_the_floor_is_made_good(make_pool: MakePool, wait_until: WaitUntil, tmp_path: Path) -> None:
    pool = make_pool(2, min_workers=2)
    wait_until(lambda: pool.get_pool_stats()["agents_by_status"]["idle"] == 2, "no worker was started")
    lost = min(pids(pool))
    os.kill(lost, signal.SIGKILL)
    wait_until(lambda: lost not in pids(pool) and pool.get_pool_stats()["agents_by_status"]["idle"] == 2,
               "the lost worker was not replaced")
    assert lost not in run_together(pool, 2, tmp_path)


# tasks per worker


def test_a_worker_ends_after_its_tasks(make_pool: MakePool) -> None:
    pool = make_pool(1, max_tasks_per_child=2)
    workers = [pool.submit(os.getpid).result(30) for _ in range(6)]
    assert Counter(workers) == dict.fromkeys(workers, 2)
    assert workers == [pid for pid in dict.fromkeys(workers) for _ in range(2)]
    assert recycled(pool) == {"max_tasks_per_child": 3}


@pytest.mark.parametrize("limit", [1, 7])
def test_a_worker_ends_after_its_tasks_when_many_wait(make_pool: MakePool, limit: int) -> None:
    pool = make_pool(2, max_tasks_per_child=limit)
    workers = Counter(pool.map(lambda _: os.getpid(), range(50)))
    assert sum(workers.values()) == 50
    assert max(workers.values()) <= limit


def test_a_view_counts_for_its_pools_workers(make_pool: MakePool) -> None:
    pool = make_pool(1, max_tasks_per_child=2)
    one, other = pool.options(priority=1), pool.options(name="other")
    assert one.submit(os.getpid).result(30) == other.submit(os.getpid).result(30) != one.submit(os.getpid).result(30)


# successors


@pytest.mark.parametrize("reason", ["max_tasks_per_child", "memory"])
def test_the_successor_does_not_wait_for_the_end_of_the_old_worker(
    make_pool: MakePool, tmp_path: Path, is_alive: Callable[[int], bool], wait_until: WaitUntil, reason: str
) -> None:
    gate = tmp_path / "gate"
    if reason == "memory":
        pool = make_pool(1, memory_limit_mb=40)
        old = pool.submit(hoard_and_linger, 60, gate)
    else:
        pool = make_pool(1, max_tasks_per_child=1)
        old = pool.submit(linger, gate)
    waiting = [pool.submit(os.getpid) for _ in range(2)]
    new = waiting[0].result(30)
    assert is_alive(old.result(0)), "the next task ran before the old worker was gone"
    assert new != old.result(0)
    waiting[1].result(30)
    gate.touch()
    wait_until(lambda: not is_alive(old.result(0)), "the old worker stays")


def test_a_worker_that_would_not_end_is_killed(
    make_pool: MakePool, tmp_path: Path, is_alive: Callable[[int], bool], wait_until: WaitUntil
) -> None:
    pool = make_pool(1, max_tasks_per_child=1)
    old = pool.submit(linger, tmp_path / "never").result(30)
    assert pool.submit(os.getpid).result(30) != old
    wait_until(lambda: not is_alive(old), "it lingers for ever")
    assert pool.get_pool_stats()["counters"]["start_failures"] == 0
