"""What idle workers cost: the CPU time of a pool with nothing to do, as per cent of one core.

    python stress/bench/idle_workers.py                          # 64 workers, 60 s
    python stress/bench/idle_workers.py --workers 8 --seconds 180
    python stress/bench/idle_workers.py --json                   # the figures as JSON

The pool lives in a process of its own that does nothing else. This driver reads, from outside, the CPU time of that
process, of the keeper and of all workers, when all are idle and again after the seconds. CPU times come from
/proc/<pid>/schedstat (nanoseconds) where the kernel has it, else from /proc/<pid>/stat (10 ms steps, so that what wakes
up shortly may not show). Each idle worker is read once in `cleanup_interval`, 60 s by default: a shorter time than that
may fall between two readings and show nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil

#: The promise: idle workers cost less than this, in per cent of one core.
PROMISE_PERCENT = 0.5
#: Seconds after the last worker was ready before measuring begins: what a start leaves to do is done by then.
SETTLE_SECONDS = 2.0

POOL = """
import sys, time
from agentpool import AgentPool

workers = int(sys.argv[1])
with AgentPool(max_workers=workers, min_workers=workers, idle_timeout=None) as pool:
    while pool.get_pool_stats()["agents_by_status"]["idle"] < workers:
        time.sleep(0.05)
    print("idle", flush=True)
    sys.stdin.read()
"""


def cpu_seconds(pid: int) -> float:
    """All threads of a process together."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return sum(int(task.joinpath("schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except FileNotFoundError:
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)


def wakeups(pid: int) -> int:
    """How often threads of a process were given the CPU, of their own accord or not."""
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = task.joinpath("status").read_text().splitlines()
        count += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return count


def measure(workers: int, seconds: float) -> dict[str, float]:
    """One pool, watched from outside."""
    child = subprocess.Popen([sys.executable, "-c", POOL, str(workers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        if child.stdout.readline() != b"idle\n":
            raise SystemExit("the pool did not start")
        time.sleep(SETTLE_SECONDS)
        [keeper] = psutil.Process(child.pid).children()
        below = [process.pid for process in keeper.children()]
        if len(below) != workers:
            raise SystemExit(f"{len(below)} workers are there, not {workers}")
        groups = {"parent": [child.pid], "keeper": [keeper.pid], "workers": below}
        before = {name: (sum(map(cpu_seconds, pids)), sum(map(wakeups, pids))) for name, pids in groups.items()}
        started = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - started
        found: dict[str, float] = {"workers": workers, "seconds": round(elapsed, 3)}
        for name, pids in groups.items():
            cpu, woken = sum(map(cpu_seconds, pids)), sum(map(wakeups, pids))
            found[f"{name}_percent"] = 100 * (cpu - before[name][0]) / elapsed
            found[f"{name}_wakeups_per_second"] = (woken - before[name][1]) / elapsed
        found["percent"] = sum(found[f"{name}_percent"] for name in groups)
        return found
    finally:
        child.communicate()


def machine() -> str:
    """Where it was measured."""
    memory = psutil.virtual_memory().total / 1024**3
    return (f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release().split('-')[0]}, "
            f"Python {platform.python_version()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    found = measure(options.workers, options.seconds)
    if options.json:
        print(json.dumps({"machine": machine(), **found}, indent=2))
    else:
        print(f"{options.workers} idle workers for {found['seconds']:g} s: {found['percent']:.3f} % of one core "
              f"(promised: under {PROMISE_PERCENT} %)")
        for name in ("parent", "keeper", "workers"):
            print(f"  {name}: {found[f'{name}_percent']:.3f} %, "
                  f"{found[f'{name}_wakeups_per_second']:.1f} wake-ups a second")
    if found["percent"] >= PROMISE_PERCENT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
