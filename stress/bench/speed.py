"""Cases of speed: how many tasks, how soon, how many bytes, and what the parent's other threads notice of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sized
from typing import TYPE_CHECKING

from stress.bench import tasks
from stress.bench.contenders import Contender, hold
from stress.bench.meters import MIB, Meter, is_alive, median, peak_rss_mib, percentile, reset_peak_rss, rss_mib, timed
from stress.bench.registry import Metric, Setting, case

if TYPE_CHECKING:
    from stress.bench.registry import Found


@case(
    "noop",
    "20,000 no-op tasks, 2 workers",
    limit_seconds=90,
    metrics={
        "submit": Metric("one by one, tasks/s", 0, True),
        "map_1": Metric("map chunksize 1, tasks/s", 0, True),
        "map_best": Metric("map chunked, tasks/s", 0, True),
        "parent_us": Metric("parent CPU µs/task", 1),
        "worker_us": Metric("workers CPU µs/task", 1),
        "parent_sw": Metric("parent switches/task", 2),
        "worker_sw": Metric("workers switches/task", 2),
    },
)
def noop_case(contender: Contender, setting: Setting) -> Found:
    """Chunked map: 200,000 items, in the chunks that the contender's documentation would have one use. CPU and context
    switches are those of the run one by one."""
    count = 20_000
    found: Found = {}
    contender.start(2)
    workers = contender.pids(2)
    contender.burst(tasks.noop, 100)
    parent, others = Meter([os.getpid()]), Meter(workers)
    found["submit"] = count / timed(contender.burst, tasks.noop, count)
    for who, meter in (("parent", parent), ("worker", others)):
        cpu, switched = meter.read()
        found[who + "_us"] = cpu / count / 1000
        found[who + "_sw"] = switched / count
    items = list(range(10 * count))
    found["map_1"] = count / timed(contender.map, tasks.noop, items[:count], 1)
    chunk = contender.best_chunk(len(items), 2)
    found["map_best"] = len(items) / timed(contender.map, tasks.noop, items, chunk)
    return found


@case(
    "latency",
    "One no-op at a time, 2,000 round trips, 2 workers",
    metrics={
        "p50": Metric("median µs", 0, True),
        "p99": Metric("p99 µs", 0, True),
        "parent_us": Metric("parent CPU µs/task", 0),
        "worker_us": Metric("workers CPU µs/task", 0),
    },
)
def latency_case(contender: Contender, setting: Setting) -> Found:
    count = 2000
    contender.start(2)
    workers = contender.pids(2)
    contender.burst(tasks.noop, 100)
    parent, others, times = Meter([os.getpid()]), Meter(workers), []
    for _ in range(count):
        started = time.perf_counter()
        contender.result(contender.submit(tasks.noop))
        times.append(time.perf_counter() - started)
    cpu: Found = {"parent_us": parent.read()[0] / count / 1000, "worker_us": others.read()[0] / count / 1000}
    times.sort()
    return {"p50": times[count // 2] * 1e6, "p99": percentile(times, 99) * 1e6, **cpu}


@case(
    "busy-parent",
    "40,000 no-ops pending while the parent's main thread computes for 2 s, 2 workers",
    rounds=2,
    abrupt=True,
    metrics={"rate": Metric("results/s", 0, True)},
)
def busy_parent_case(contender: Contender, setting: Setting) -> Found:
    """A thread of the pool that blocked waits up to 5 ms for the GIL, the switch interval, each time it wakes up."""
    contender.start(2)
    contender.pids(2)
    contender.burst(tasks.noop, 200)
    gate = os.path.join(setting.scratch, "gate")
    held = hold(contender, 2, gate)
    handles = [contender.submit(tasks.noop) for _ in range(40_000)]
    time.sleep(0.3)
    if contender.done(handles):
        raise RuntimeError("the workers were to be held, and some were not")
    with open(gate, "w"):
        pass
    started, turns = time.perf_counter(), 0
    while time.perf_counter() - started < 2:
        turns += 1
        if turns % 50_000 == 0 and contender.done(handles[-1:]):
            break
    seconds = time.perf_counter() - started
    del held
    return {"rate": contender.done(handles) / seconds}


@case(
    "payload",
    "Echo of one payload at a time, 2 workers (MiB/s: the payload's size / the round trip)",
    limit_seconds=90,
    rounds=2,
    metrics={
        "b1k": Metric("1 KiB", 1, True),
        "b64k": Metric("64 KiB", 0, True),
        "b1m": Metric("1 MiB", 0, True),
        "b64m": Metric("64 MiB", 0, True),
        "np64m": Metric("numpy 64 MiB", 0, True),
        "parent_x": Metric("parent peak, of 64 MiB", 1),
        "worker_x": Metric("worker peak, of 64 MiB", 1),
    },
)
def payload_case(contender: Contender, setting: Setting) -> Found:
    """Peaks: how far the highest RSS rose during the echo of 64 MiB bytes, in payloads."""
    import numpy

    contender.start(2)
    workers = contender.pids(2)
    found: Found = {}

    def rate(payload: Sized, size: int, times: int) -> float:
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            back = contender.result(contender.submit(tasks.echo, payload))
            seconds.append(time.perf_counter() - started)
            if len(back) != len(payload):
                raise RuntimeError("the echo is not what was sent")
        return size / MIB / median(seconds)

    for key, size, times in (("b1k", 1 << 10, 300), ("b64k", 1 << 16, 150), ("b1m", 1 << 20, 25)):
        short = os.urandom(size)
        rate(short, size, 4)
        found[key] = rate(short, size, times)

    payload = os.urandom(MIB) * 64
    before = {pid: rss_mib(pid) for pid in [os.getpid(), *workers]}
    for pid in before:
        reset_peak_rss(pid)
    found["b64m"] = rate(payload, 64 * MIB, 3)
    growth = {pid: (peak_rss_mib(pid) - before[pid]) / 64 for pid in before if is_alive(pid)}
    found["parent_x"] = growth.pop(os.getpid())
    found["worker_x"] = max(growth.values(), default=None)

    array = numpy.frombuffer(payload, dtype=numpy.float64).copy()
    del payload
    contender.result(contender.submit(tasks.echo, array[:8]))
    found["np64m"] = rate(array, 64 * MIB, 3)
    return found


@case(
    "slow-one",
    "One 2 s task in the middle of 1,000 no-ops, 2 workers",
    rounds=2,
    abrupt=True,
    metrics={"done_ms": Metric("all no-ops done after ms", 0, True)},
)
def slow_one_case(contender: Contender, setting: Setting) -> Found:
    """200 no-ops before it have taught the pool that tasks are short."""
    contender.start(2)
    contender.pids(2)
    contender.burst(tasks.nap_maybe, 200)
    started = time.monotonic()
    handles = [contender.submit(tasks.nap_maybe, 2.0 if number == 500 else 0.0) for number in range(1000)]
    contender.gather([handle for number, handle in enumerate(handles) if number != 500])
    return {"done_ms": (time.monotonic() - started) * 1e3}


@case(
    "ticker",
    "A thread of the parent that beats every 1 ms while 50,000 no-ops pass, 2 workers",
    limit_seconds=90,
    metrics={
        "p50_ms": Metric("median beat ms", 2, True),
        "p99_ms": Metric("p99 ms", 1, True),
        "max_ms": Metric("longest ms", 1),
        "rate": Metric("tasks/s meanwhile", 0, True),
    },
)
def ticker_case(contender: Contender, setting: Setting) -> Found:
    """A beat is the time from one wake-up of the thread to its next; it sleeps for 1 ms of it."""
    import threading

    count = 50_000
    contender.start(2)
    contender.pids(2)
    contender.burst(tasks.noop, 200)
    beats: list[float] = []
    over = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            beats.append(now - last)
            last = now

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    seconds = timed(contender.burst, tasks.noop, count)
    over.set()
    thread.join()
    beats.sort()
    return {
        "p50_ms": beats[len(beats) // 2] * 1e3,
        "p99_ms": percentile(beats, 99) * 1e3,
        "max_ms": beats[-1] * 1e3,
        "rate": count / seconds,
    }
