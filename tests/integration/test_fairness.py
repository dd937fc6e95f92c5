"""What must not happen for speed's sake: a slow task that holds up others, lost priorities, a busy loop, a parent whose
other threads starve, memory that grows with the tasks done.

How fast things are is measured by `python -m stress.bench`; here stand conditions, and bounds that only a fault passes.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import cloudpickle
import pytest

from agentpool import AgentPool

# Workers need not import this module, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WaitUntil = Callable[..., None]
MakePool = Callable[..., AgentPool]
LONG = 60.0
MB = 1024 * 1024


def work(gate: str = "", spin_seconds: float = 0.0) -> tuple[float, int]:
    """When it began, and where. Nothing to do, or waiting for a file: one function, whose calls look alike."""
    began = time.monotonic()
    if gate:
        Path(f"{gate}.{os.getpid()}").touch()
        while not os.path.exists(gate):
            time.sleep(0.001)
    while spin_seconds and time.monotonic() < began + spin_seconds:
        pass
    return began, os.getpid()


def held(gate: Path) -> int:
    """How many workers wait for it."""
    return len(list(gate.parent.glob(f"{gate.name}.*")))


def teach(pool: AgentPool, calls: int) -> None:
    """One by one: after four results of a function the pool trusts that it is short."""
    for _ in range(calls):
        pool.submit(work).result(LONG)


# --- one slow task among many short ones ---


@pytest.mark.parametrize("taught", [0, 4, 200])
@pytest.mark.parametrize("position", [0, 500, 999])
def test_a_slow_task_holds_up_nobody(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, taught: int, position: int
) -> None:
    """All others are done while it still runs: wherever it stands, and whatever the pool knows of the function."""
    gate = tmp_path / "gate"
    pool = make_pool(max_workers=2)
    teach(pool, taught)
    futures = [pool.submit(work, str(gate) if number == position else "") for number in range(1000)]
    slow = futures.pop(position)
    assert not wait(futures, LONG).not_done, "some wait behind the slow one"
    wait_until(lambda: held(gate) == 1, "the slow one did not begin")
    assert not slow.done()
    gate.touch()
    slow.result(LONG)
    assert {future.attempts for future in futures} == {1}


def test_a_fast_function_that_is_slow_once_while_its_batches_run(make_pool: MakePool, tmp_path: Path) -> None:
    """Again and again: each time what was sent ahead behind the slow call is done by the other worker."""
    pool = make_pool(max_workers=2)
    for turn in range(5):
        gate = tmp_path / f"gate {turn}"
        futures = [pool.submit(work, str(gate) if number == 40 else "") for number in range(300)]
        slow = futures.pop(40)
        assert not wait(futures, LONG).not_done, f"turn {turn}: some wait behind the slow one"
        assert not slow.done()
        gate.touch()
        slow.result(LONG)


# --- priorities while batches are under way ---


@pytest.mark.parametrize("workers", [1, 2])
def test_a_late_task_of_higher_priority_overtakes_what_has_not_begun(
    make_pool: MakePool, tmp_path: Path, wait_until: WaitUntil, workers: int
) -> None:
    """Each worker is held in the middle of a batch; what was sent behind the held calls is given back meanwhile."""
    gate = tmp_path / "gate"
    pool = make_pool(max_workers=workers)
    teach(pool, 20)
    low = [pool.submit(work, str(gate) if 40 <= number < 40 + workers else "") for number in range(5000)]
    wait_until(lambda: held(gate) == workers, "the slow ones did not begin")
    high = [pool.options(priority=1).submit(work) for _ in range(20)]

    def is_all_queued() -> bool:
        stats = pool.get_pool_stats()
        done = sum(future.done() for future in low)
        return bool(stats["queue_length"] == len(low) + len(high) - done - workers)

    wait_until(is_all_queued, "what waits behind the slow ones was not given back")
    begun = {number for number, future in enumerate(low) if future.done()} | set(range(40, 40 + workers))
    gate.touch()
    went: dict[int, list[tuple[float, str]]] = {}
    for name, futures in (("high", high), ("low", [future for n, future in enumerate(low) if n not in begun])):
        for future in futures:
            when, pid = future.result(LONG)
            went.setdefault(pid, []).append((when, name))
    # Worker by worker: one may be at the low ones already while the last of the high ones is on its way to another.
    for order in went.values():
        names = [name for _, name in sorted(order)]
        assert names == sorted(names), "a task of lower priority went first"
    assert sum(name == "low" for order in went.values() for _, name in order) > 300


def test_a_late_task_of_higher_priority_need_not_wait_for_the_queue(make_pool: MakePool) -> None:
    """Nobody is held: what is on its way to a worker goes first, and that is little of what is queued."""
    pool = make_pool(max_workers=2)
    teach(pool, 20)
    low = [pool.submit(work, spin_seconds=0.0002) for _ in range(4000)]
    low[100].result(LONG)
    high = [pool.options(priority=1).submit(work) for _ in range(20)]
    latest = max(future.result(LONG)[0] for future in high)
    later = sum(future.result(LONG)[0] > latest for future in low)
    assert later > len(low) / 4, f"only {later} of {len(low)} tasks of lower priority began after the last urgent one"


# --- nobody spins ---


def wakeups(threads: list[int]) -> int:
    """How often threads of this process gave the CPU away: each time they wake up they will again."""
    count = 0
    for thread in threads:
        lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
        count += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return count


def cpu_seconds(threads: list[int]) -> float:
    return sum(int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) for thread in threads) / 1e9


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="needs Linux with schedstat")
@pytest.mark.parametrize("asleep", [0, 4])
def test_no_busy_loop(make_pool: MakePool, wait_until: WaitUntil, asleep: int) -> None:
    """With nothing to do, and with all workers asleep in a task: the pool's threads sleep, too."""
    others = {thread.native_id for thread in threading.enumerate()}
    pool = make_pool(max_workers=4)
    for future in [pool.submit(work, spin_seconds=0.01) for _ in range(8)]:
        future.result(LONG)
    sleepers = [pool.submit(time.sleep, 3600) for _ in range(asleep)]
    wait_until(lambda: all(future.running() for future in sleepers), "they do not run")
    threads = [thread.native_id for thread in threading.enumerate()
               if thread.native_id is not None and thread.native_id not in others]
    assert threads, "the pool has a manager thread"

    def over_a_second() -> tuple[int, float]:
        before = wakeups(threads), cpu_seconds(threads)
        time.sleep(1)  # what is measured, and no wait for anything
        return wakeups(threads) - before[0], cpu_seconds(threads) - before[1]

    # The first look may still see what the last result left to do, and the first readings of new workers.
    seen = [over_a_second()]
    while len(seen) < 3 and (seen[-1][0] > 20 or seen[-1][1] > 0.05):
        seen.append(over_a_second())
    assert seen[-1][0] <= 20, f"wake-ups and CPU seconds, second by second: {seen}"
    assert seen[-1][1] <= 0.05, f"wake-ups and CPU seconds, second by second: {seen}"


# --- the parent's other threads ---


def test_other_threads_of_the_parent_are_not_starved(make_pool: MakePool) -> None:
    """A thread that wants to wake up every millisecond does so, if not as often, while 50,000 tasks pass. Its median
    beat is measured by the benchmark's case `ticker`."""
    pool = make_pool(max_workers=2)
    teach(pool, 20)
    submitted = settled = 0
    beats: list[int] = []  # in steps of the pool, not seconds: on a busy machine everybody waits
    over = threading.Event()

    def tick() -> None:
        while not over.is_set():
            beats.append(submitted + settled)
            time.sleep(0.001)
        beats.append(submitted + settled)

    def count(_: object) -> None:  # now and then by the main thread, where the task is done already: a step is lost
        nonlocal settled
        settled += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        futures = []
        for _ in range(50_000):
            futures.append(pool.submit(work))
            futures[-1].add_done_callback(count)
            submitted += 1
        for future in futures:
            future.result(LONG)
    finally:
        over.set()
        thread.join()
    longest = max(after - before for before, after in itertools.pairwise(beats))
    assert longest < 50_000, f"nobody else ran during {longest} of {submitted + settled} steps"


# --- memory ---


def footprint() -> tuple[int, int]:
    """RSS in bytes and objects that the garbage collector knows, of the process that calls it."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE"), len(gc.get_objects())


def test_memory_does_not_grow_with_the_tasks_done(make_pool: MakePool) -> None:
    """Neither the parent's nor the worker's."""
    pool = make_pool(max_workers=1)

    def run(tasks: int) -> None:
        for _ in range(tasks // 1000):
            futures = [pool.submit(work) for _ in range(1000)]
            assert not wait(futures, LONG).not_done

    run(20_000)
    readings = [{"parent": footprint(), "worker": pool.submit(footprint).result(LONG)}]
    # What leaks grows each time; what the allocator makes of the tests before this one does not.
    for _ in range(4):
        run(40_000)
        readings.append({"parent": footprint(), "worker": pool.submit(footprint).result(LONG)})
    assert pool.get_pool_stats()["counters"]["spawned"] == 1, "the worker was replaced by another"
    for who in readings[0]:
        sizes, objects = zip(*(reading[who] for reading in readings), strict=True)
        grown = [(after - before) / MB for before, after in itertools.pairwise(sizes)]
        assert min(grown) < 1, f"{who}: {grown} MB more after 40,000 tasks more, each time"
        more = [after - before for before, after in itertools.pairwise(objects)]
        assert min(more) < 1000, f"{who}: {more} objects more after 40,000 tasks more, each time"
