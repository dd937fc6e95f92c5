"""Cases of crews: workers that are replaced, and very many of them."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

from stress.bench import tasks
from stress.bench.contenders import Contender
from stress.bench.meters import Meter, descendants, median, percentile
from stress.bench.registry import Metric, Setting, case

if TYPE_CHECKING:
    from stress.bench.registry import Found

TASKS_PER_CHILD = 20
SIZES = (10, 100, 300, 1000)
#: MiB of available memory that one sleeping worker is allowed for; a size that does not fit is left out.
MIB_PER_WORKER = 6
#: Seconds that the manager's CPU time is counted for.
CROWD_SECONDS = 5.0
PROBES = 200


@case(
    "recycle",
    f"Hand-over from a retired worker to its successor, {TASKS_PER_CHILD} tasks a worker, 400 no-ops queued, 1 worker",
    wants="recycles",
    metrics={
        "gap_ms": Metric("median ms", 2),
        "p90_ms": Metric("p90 ms", 2),
        "max_ms": Metric("longest ms", 1),
        "workers": Metric("workers used"),
    },
)
def recycle_case(contender: Contender, setting: Setting) -> Found:
    """From the end of a worker's last task to the end of its successor's first, by the workers' own clocks: how long
    nothing was done. ProcessPoolExecutor can retire workers too, but not with fork."""
    contender.start(1, tasks_per_child=TASKS_PER_CHILD)
    contender.gather([contender.submit(tasks.noop) for _ in range(TASKS_PER_CHILD // 2)])
    stamps: list[tuple[int, float]] = contender.gather([contender.submit(tasks.stamp) for _ in range(400)])
    stamps.sort(key=lambda pair: pair[1])
    gaps = sorted(
        (after - before) * 1e3
        for (pid, before), (successor, after) in itertools.pairwise(stamps)
        if pid != successor
    )
    return {
        "gap_ms": median(gaps),
        "p90_ms": percentile(gaps, 90),
        "max_ms": gaps[-1],
        "workers": len({pid for pid, _ in stamps}),
    }


def _crowd_metrics() -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for size in SIZES:
        metrics[f"trip_ms_{size}"] = Metric(f"{size:,} workers: round trip of one more task, median ms", 2)
        metrics[f"p99_ms_{size}"] = Metric(f"{size:,} workers: round trip, p99 ms", 1)
        metrics[f"cpu_us_{size}"] = Metric(f"{size:,} workers: manager's CPU, µs per worker and second", 0)
        metrics[f"start_s_{size}"] = Metric(f"{size:,} workers: all asleep after s", 2)
    return metrics | {"flat": Metric("manager's CPU per worker, 1,000 workers / 10", 2)}


@case(
    "many",
    "Many workers that mostly sleep: each sleeps for about a second at a time, task after task",
    limit_seconds=180,
    rounds=2,
    abrupt=True,
    wants="crowds",
    metrics=_crowd_metrics(),
)
def many_case(contender: Contender, setting: Setting) -> Found:
    """All workers but one are kept asleep; a task that ends is followed by another. Round trip: of a no-op on top of
    that, 200 of them, 5 ms apart. CPU: of the parent (its main thread sleeps) and the keeper, a second and worker."""
    _allow_files()
    found: Found = {}
    for size in SIZES[:2] if setting.quick else SIZES:
        if size * MIB_PER_WORKER > _available_mib():
            continue
        found |= _crowd(contender, size)
    least, most = (found.get(f"cpu_us_{size}") for size in (SIZES[0], SIZES[-1]))
    if isinstance(least, float) and isinstance(most, float):
        found["flat"] = most / least
    return found


def _crowd(contender: Contender, size: int) -> Found:
    """One pool of this size."""
    chance = random.Random(size)
    going = True
    started = time.perf_counter()
    contender.start(size)
    first = [contender.submit(tasks.stamp) for _ in range(size)]
    contender.gather(first)

    def sleep_on(_: Any = None) -> None:
        if going:
            contender.submit(tasks.nap, chance.uniform(0.5, 1.5)).add_done_callback(sleep_on)

    for _ in range(size - 1):
        sleep_on()
    contender.result(contender.submit(tasks.noop))  # goes to the last worker, so all the others are there
    start_seconds = time.perf_counter() - started
    time.sleep(1.5)  # the first naps have ended: the wake-ups are spread

    me = os.getpid()
    below = descendants(me)
    children = {pid for pid in below if _parent_of(pid) == me}
    meter = Meter([me, *children])  # the workers are the keeper's children
    began = time.perf_counter()
    time.sleep(CROWD_SECONDS)
    cpu_us = meter.read()[0] / 1e3 / size / (time.perf_counter() - began)

    times = []
    for _ in range(PROBES):
        began = time.perf_counter()
        contender.result(contender.submit(tasks.noop))
        times.append(time.perf_counter() - began)
        time.sleep(0.005)
    times.sort()
    going = False
    ended = threading.Thread(target=contender.shutdown, daemon=True)
    ended.start()
    ended.join(30)
    return {
        f"trip_ms_{size}": times[len(times) // 2] * 1e3,
        f"p99_ms_{size}": percentile(times, 99) * 1e3,
        f"cpu_us_{size}": cpu_us,
        f"start_s_{size}": start_seconds,
    }


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _allow_files() -> None:
    """A worker takes some descriptors."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _available_mib() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("MemAvailable"))
