"""Cases of cost: what starting takes, and what workers and pending tasks take while nothing happens.

Workers import the module where a task stands, unless they are forked from a parent that has it. For starts and memory
that module is a program of usual size, and not the light `tasks`: the cost of it belongs to the pool's figures.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from stress.bench import tasks
from stress.bench.contenders import Contender, hold
from stress.bench.meters import (
    MIB,
    Meter,
    descendants,
    is_alive,
    memory_mib,
    peak_rss_mib,
    reset_peak_rss,
    rss_mib,
    timed,
)
from stress.bench.registry import Metric, Setting, case

if TYPE_CHECKING:
    from types import ModuleType

    from stress.bench.registry import Found

PROGRAM_LINES = 2700
FILLER = '''

class Part{0}:
    """Part {0} of a program: text that nobody reads here."""

    name, size, limits = "part {0}", {0}, ({0}.5, None)

    def step(self, first, second={0}, *rest, key_{0}="value {0}", **others):
        """Step {0}: what it does does not matter, as it is only imported."""
        total_{0} = 0
        for index, item in enumerate(rest):
            if item is None or item == key_{0}:
                total_{0} += index * second
            elif item in others:
                total_{0} -= others[item]
        return first, total_{0}, f"{{first}} and {{total_{0}}}: {0}"

    def __repr__(self):
        return f"Part{0}({{self.name}})"


def function_{0}(parts, *, key_{0}=None):
    """Function {0}: the same goes for it."""
    found_{0} = [part.step(index, key_{0}) for index, part in enumerate(parts) if part.size > {0}]
    while len(found_{0}) > {0}:
        found_{0}.pop()
    for index, (first, total, text) in enumerate(found_{0}):
        if not total:
            raise ValueError(f"{{text}}: nothing for {{first}} at {{index}}")
    return found_{0} or None
'''


def program(setting: Setting) -> ModuleType:
    """The tasks, in a module of `PROGRAM_LINES` lines that imports pickle.

    Another process compiles it: its bytecode is cached, as of any module that ran before, and this process is none the
    larger for it.
    """
    import importlib

    with open(tasks.__file__) as file:
        text = file.read().replace("import os\n", "import os\nimport pickle\n")
    count = (PROGRAM_LINES - text.count("\n")) // FILLER.count("\n")
    with open(os.path.join(setting.scratch, "bench_program.py"), "w") as file:
        file.write(text + "".join(FILLER.format(number) for number in range(count)))
    os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", "import bench_program"])
    return importlib.import_module("bench_program")


@case(
    "cold-first",
    "From constructor to first result, 2 workers asked for",
    metrics={
        "import_ms": Metric("import ms", 0, True),
        "first_ms": Metric("first result ms", 1, True),
        "second_us": Metric("second result µs", 0),
        "shutdown_ms": Metric("shutdown ms", 1, True),
    },
)
def cold_first_case(contender: Contender, setting: Setting) -> Found:
    """import: the package alone, in a bare interpreter, from cached bytecode. The no-op stands in a module of 2,700
    lines, which workers that are not forked import."""
    noop = program(setting).noop
    found: Found = {"import_ms": timed(contender.load) * 1e3}
    started = time.perf_counter()
    contender.start(2)
    contender.result(contender.submit(noop))
    found["first_ms"] = (time.perf_counter() - started) * 1e3
    found["second_us"] = timed(lambda: contender.result(contender.submit(noop))) * 1e6
    found["shutdown_ms"] = timed(contender.shutdown) * 1e3
    return found


@case(
    "cold-16",
    "Cold start to all of 16 workers having answered; idle memory",
    metrics={
        "all_ms": Metric("all answered ms", 0, True),
        "met": Metric("workers met"),
        "rss": Metric("RSS MiB/worker", 1),
        "uss": Metric("USS MiB/worker", 2),
        "pss": Metric("PSS MiB/worker", 2),
        "helpers": Metric("helpers"),
        "helpers_mib": Metric("helpers USS MiB", 1),
        "parent_mib": Metric("parent RSS + MiB", 1),
        "threads": Metric("parent threads"),
    },
)
def cold_16_case(contender: Contender, setting: Setting) -> Found:
    """Memory 0.3 s after each worker's share of 16 no-ops; the tasks stand in a module of 2,700 lines. Helpers:
    processes that are neither parent nor worker."""
    me = os.getpid()
    module = program(setting)
    bare = rss_mib()
    contender.load()
    started = time.perf_counter()
    contender.start(16)
    workers = contender.pids(16, meet=module.meet)
    found: Found = {"all_ms": (time.perf_counter() - started) * 1e3, "met": len(workers)}
    contender.burst(module.noop, 16)
    time.sleep(0.3)
    left = [pid for pid in workers if is_alive(pid)]
    sizes = [memory_mib(pid) for pid in left]
    for key in ("rss", "uss", "pss"):
        found[key] = sum(size[key] for size in sizes) / len(sizes)
    helpers = [pid for pid in descendants(me) if pid not in left]
    found["helpers"] = len(helpers)
    found["helpers_mib"] = sum(memory_mib(pid)["uss"] for pid in helpers if is_alive(pid))
    found["parent_mib"] = rss_mib() - bare
    found["threads"] = len(os.listdir("/proc/self/task"))
    return found


@case(
    "pending",
    "100,000 no-op tasks submitted while both workers are held",
    limit_seconds=90,
    rounds=2,
    abrupt=True,
    metrics={
        "bytes_task": Metric("parent's bytes/pending task", 0, True),
        "submit_us": Metric("submit µs/task", 1, True),
    },
)
def pending_case(contender: Contender, setting: Setting) -> Found:
    """How far the parent's highest RSS rose, threads that feed pipes included."""
    count = 100_000
    contender.start(2)
    contender.pids(2)
    contender.burst(tasks.noop, 200)
    held = hold(contender, 2, os.path.join(setting.scratch, "gate"))
    before = rss_mib()
    reset_peak_rss()
    handles: list[Any] = []
    seconds = timed(lambda: handles.extend(contender.submit(tasks.noop) for _ in range(count)))
    time.sleep(0.5)
    found: Found = {"bytes_task": (peak_rss_mib() - before) * MIB / count, "submit_us": seconds / count * 1e6}
    del held
    return found


@case(
    "idle",
    "10 s idle, 16 workers",
    rounds=1,
    metrics={
        "cpu_ms": Metric("CPU ms in 10 s", 1, True),
        "parent_ms": Metric("of it the parent", 1),
        "wakeups": Metric("wake-ups/s, all processes", 1),
        "left": Metric("workers left"),
    },
)
def idle_case(contender: Contender, setting: Setting) -> Found:
    """Each with the monitoring that it has by default: agentpool's is on. loky's workers leave after 10 s idle, and
    take their CPU time with them."""
    contender.start(16)
    workers = contender.pids(16)
    time.sleep(1)
    me = os.getpid()
    others, parent = Meter(descendants(me)), Meter([me])
    time.sleep(10)
    mine, theirs = parent.read(), others.read()
    return {
        "cpu_ms": (mine[0] + theirs[0]) / 1e6,
        "parent_ms": mine[0] / 1e6,
        "wakeups": (mine[1] + theirs[1]) / 10,
        "left": sum(map(is_alive, workers)),
    }
