"""What /proc and the clocks say about processes. Linux only. Imports little, as it is loaded in every cell."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MIB = 1 << 20


def median(values: Iterable[float]) -> float:
    """Without `statistics`, which would be in the memory that cells measure."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Of values in ascending order."""
    return ordered[len(ordered) * percent // 100]


def timed(call: Callable[..., object], *args: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call(*args)
    return time.perf_counter() - started


def outcome(call: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """("ok", its value), or an exception's name and the exception."""
    try:
        return "ok", call(*args)
    except Exception as error:
        return type(getattr(error, "exc", error)).__name__, error  # billiard wraps them


def rss_mib(pid: int | str = "self") -> float:
    """Resident memory."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / MIB


def memory_mib(pid: int) -> dict[str, float]:
    """RSS, USS and PSS."""
    found = dict.fromkeys(("Rss", "Pss", "Private_Clean", "Private_Dirty"), 0.0)
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            key, _, rest = line.partition(":")
            if key in found:
                found[key] = int(rest.split()[0]) / 1024
    return {"rss": found["Rss"], "uss": found["Private_Clean"] + found["Private_Dirty"], "pss": found["Pss"]}


def reset_peak_rss(pid: int | str = "self") -> None:
    """From here on `peak_rss_mib` counts."""
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")


def peak_rss_mib(pid: int | str = "self") -> float:
    """Highest resident memory since the last reset."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def stat_fields(pid: int | str) -> list[str] | None:
    """Of /proc/PID/stat, from the state on; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def is_alive(pid: int) -> bool:
    """It is there, and no zombie."""
    fields = stat_fields(pid)
    return fields is not None and fields[0] not in "ZX"


def descendants(root: int) -> list[int]:
    """Pids below `root`, zombies left out."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := stat_fields(name)) and fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process, exact (what clock_getcpuclockid gives)."""
    try:
        return time.clock_gettime_ns(~pid << 3 | 2)
    except OSError:
        return 0


def switches(pid: int) -> int:
    """Context switches of the threads that a process has now."""
    total = 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/status") as file:
                total += sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
    except OSError:
        pass
    return total


class Meter:
    """CPU time and context switches of some processes between two moments."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._before = {pid: (cpu_ns(pid), switches(pid)) for pid in pids}

    def read(self) -> tuple[int, int]:
        """Nanoseconds of CPU and context switches since then; none of the processes that are gone."""
        gains = [
            (cpu_ns(pid) - cpu, switches(pid) - switched)
            for pid, (cpu, switched) in self._before.items()
            if is_alive(pid)
        ]
        return sum(cpu for cpu, _ in gains), sum(switched for _, switched in gains)


def machine_busy_seconds() -> float:
    """CPU seconds that the whole machine has used since it was started."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, soft, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
