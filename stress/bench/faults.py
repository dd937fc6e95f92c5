"""Cases of faults: a crash, a time limit, a leak, the parent's death. Also the program of the parent that is killed."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from stress.bench import tasks
from stress.bench.contenders import Contender, all_contenders
from stress.bench.meters import descendants, is_alive, outcome, stat_fields
from stress.bench.registry import Metric, Setting, case

if TYPE_CHECKING:
    import subprocess

    from stress.bench.registry import Found

#: Seconds that a crash may take to be known: billiard reports a lost worker after 10.
CRASH_SECONDS = 13.0
#: Seconds after the parent's death when what is left is counted.
ORPHAN_SECONDS = 5.0


@case(
    "crash",
    "os._exit(1) in task 101 of 200 (5 ms each), 2 workers",
    rounds=2,
    metrics={
        "lost": Metric("others lost, of 199"),
        "error": Metric("the crashed task's fate"),
        "seen_ms": Metric("known after ms", 0),
        "usable": Metric("pool usable"),
        "next_ms": Metric("next result after ms", 1),
        "full": Metric("2 workers again"),
    },
)
def crash_case(contender: Contender, setting: Setting) -> Found:
    """next result: of the same pool, or (rebuilt) of a new one that was made when the fate was known."""
    import threading

    contender.start(2)
    contender.pids(2)
    path = os.path.join(setting.scratch, "crash")
    arrivals: list[tuple[int, float]] = []
    fate: tuple[str, float | None] = ("never", None)
    handles = [
        contender.submit(tasks.die, path) if number == 100 else contender.submit(tasks.nap, 0.005)
        for number in range(200)
    ]
    deadline = time.monotonic() + CRASH_SECONDS

    def watch() -> None:
        nonlocal fate
        name, _ = outcome(contender.result, handles[100], CRASH_SECONDS)
        if time.monotonic() < deadline - 0.1:
            fate = name, time.monotonic()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for number, handle in enumerate(handles):
        if number != 100:
            patience = max(0.01, min(3.0, deadline - time.monotonic()))
            if outcome(contender.result, handle, patience)[0] == "ok":
                arrivals.append((number, time.monotonic()))
    watcher.join(max(0, deadline - time.monotonic()) + 1)
    with open(path) as file:
        crashed = float(file.readline().split()[0])
    known = fate[1]
    found: Found = {
        "lost": 199 - len(arrivals),
        "error": fate[0],
        "seen_ms": (known - crashed) * 1e3 if known else "never",
    }
    after = [when for number, when in arrivals if number > 100 and when > crashed]
    return found | _after_the_crash(contender, crashed, known, after)


def _after_the_crash(contender: Contender, crashed: float, known: float | None, after: list[float]) -> Found:
    """Whether the pool goes on, or how long a new one takes."""
    if outcome(lambda: contender.result(contender.submit(tasks.noop), 5))[0] == "ok":  # submit may raise, too
        name, met = outcome(contender.pids, 2, 5.0)
        return {
            "usable": "yes",
            "next_ms": (min(after) - crashed) * 1e3 if after else "none",
            "full": "yes" if name == "ok" and len(met) == 2 else "no",
        }
    started = time.monotonic()
    name, _ = outcome(_run_again, contender)
    if name == "ok" and known:
        took = time.monotonic() - started
        return {"usable": "no", "next_ms": (known - crashed + took) * 1e3, "full": "rebuilt"}
    return {"usable": "no", "next_ms": "never", "full": "no"}


def _run_again(contender: Contender) -> None:
    """A new pool's first result."""
    contender.restart(2)
    contender.result(contender.submit(tasks.noop), 10)


@case(
    "timeout",
    "A task that sleeps 60 s in C under a limit of 0.5 s, 2 workers",
    rounds=2,
    abrupt=True,
    metrics={
        "own": Metric("own time limit"),
        "resolve_ms": Metric("resolved after ms", 0),
        "error": Metric("as"),
        "gone": Metric("worker gone 1 s later"),
        "full_ms": Metric("2 free workers after ms", 0),
    },
)
def timeout_case(contender: Contender, setting: Setting) -> Found:
    """Where there is no limit of its own, result(timeout=0.5) stands in: only the wait ends."""
    import threading

    path = os.path.join(setting.scratch, "slept")
    contender.start(2, timeouts=True)
    contender.pids(2)
    started = time.monotonic()
    name, _ = outcome(contender.call_with_timeout, tasks.oversleep, 0.5, path, 60)
    found: Found = {"own": "yes"}
    if name == "UnsupportedError":
        found["own"] = "no"
        started = time.monotonic()
        name, _ = outcome(lambda: contender.result(contender.submit(tasks.oversleep, path, 60), 0.5))
    resolved = time.monotonic()
    found["resolve_ms"], found["error"] = (resolved - started) * 1e3, name
    limit = 4.0

    def muster() -> None:
        name, met = outcome(contender.pids, 2, limit)
        if name == "ok" and len(met) == 2:
            found["full_ms"] = (time.monotonic() - resolved) * 1e3

    thread = threading.Thread(target=muster, daemon=True)
    thread.start()
    time.sleep(1)
    with open(path) as file:
        pid = int(file.readline().split()[1])
    found["gone"] = "no" if is_alive(pid) else ("yes" if stat_fields(pid) is None else "zombie")
    thread.join(limit + 1)
    found.setdefault("full_ms", "never")
    return found


@case(
    "leak",
    "A task that leaks 50 MB, 20 calls in a row, 1 worker (limit of 300 MB where there is one)",
    rounds=1,
    metrics={
        "peak": Metric("peak RSS of a worker, MiB", 0, True),
        "workers": Metric("workers used"),
        "failed": Metric("calls failed"),
    },
)
def leak_case(contender: Contender, setting: Setting) -> Found:
    """Limits: agentpool memory_limit_mb, billiard max_memory_per_child, loky by itself."""
    contender.start(1, memory_limit_bytes=300_000_000)
    seen: list[tuple[int, float]] = []
    failed, end = 0, time.monotonic() + 40
    for _ in range(20):
        name, value = outcome(lambda: contender.result(contender.submit(tasks.leak, 50_000_000), 10))
        if name == "ok":
            seen.append(value)
        else:
            failed += 1
        if time.monotonic() > end:
            break
    return {
        "peak": max((size for _, size in seen), default=None),
        "workers": len({pid for pid, _ in seen}),
        "failed": failed,
    }


@case(
    "orphan",
    "Parent SIGKILLed: what is left 5 s later of 2 workers and 2 grandchildren",
    rounds=1,
    abrupt=True,
    metrics={
        "busy": Metric("workers left (were busy)"),
        "grand": Metric("grandchildren left"),
        "busy_helpers": Metric("helpers left (busy)"),
        "idle": Metric("workers left (were idle)"),
        "idle_helpers": Metric("helpers left (idle)"),
        "busy_gone_ms": Metric("busy workers gone after ms", 0),
        "idle_gone_ms": Metric("idle workers gone after ms", 0),
    },
)
def orphan_case(contender: Contender, setting: Setting) -> Found:
    import signal

    parents = _parents_to_be_killed(contender.name, setting.scratch)
    watched: dict[str, dict[str, list[int]]] = {}
    for mode, parent in parents.items():
        pairs = _read_pairs(os.path.join(setting.scratch, mode))
        workers, grand = [worker for worker, _ in pairs], [child for _, child in pairs if child]
        helpers = [pid for pid in descendants(parent.pid) if pid not in {*workers, *grand}]
        watched[mode] = {"": workers, "_helpers": helpers, "grand": grand}
    found: Found = {}
    started = time.monotonic()
    for parent in parents.values():
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    while time.monotonic() < started + ORPHAN_SECONDS:
        for mode, groups in watched.items():
            if mode + "_gone_ms" not in found and not any(map(is_alive, groups[""])):
                found[mode + "_gone_ms"] = (time.monotonic() - started) * 1e3
        time.sleep(0.01)
    for mode, groups in watched.items():
        found[mode] = sum(map(is_alive, groups[""]))
        found[mode + "_helpers"] = sum(map(is_alive, groups["_helpers"]))
        found.setdefault(mode + "_gone_ms", "never")
        if mode == "busy":
            found["grand"] = sum(map(is_alive, groups["grand"]))
        for pid in [pid for pids in groups.values() for pid in pids if is_alive(pid)]:
            os.kill(pid, signal.SIGKILL)
    return found


def _parents_to_be_killed(name: str, scratch: str) -> dict[str, subprocess.Popen[bytes]]:
    """One whose workers are busy, one whose workers are idle, both in place."""
    import subprocess

    code = "from stress.bench import faults; faults.orphan_parent()"
    parents = {
        mode: subprocess.Popen([sys.executable, "-c", code, name, mode, os.path.join(scratch, mode)])
        for mode in ("busy", "idle")
    }
    end = time.monotonic() + 30
    for mode, parent in parents.items():
        while not os.path.exists(os.path.join(scratch, mode + ".ready")):
            if time.monotonic() > end or parent.poll() is not None:
                raise RuntimeError("the parent to be killed did not start")
            time.sleep(0.02)
    return parents


def orphan_parent() -> None:
    """The parent that is killed: a pool whose workers are busy, or idle."""
    name, mode, path = sys.argv[1:4]
    contender = all_contenders()[name]()
    contender.load()
    contender.start(2)
    contender.pids(2)
    held: list[Any] = []
    if mode == "busy":
        held = [contender.submit(tasks.beget, path) for _ in range(2)]
        while len(_read_pairs(path)) < 2:
            time.sleep(0.01)
    else:
        with open(path, "a") as file:
            file.writelines(f"{pid} 0\n" for pid in contender.pids(2))
    with open(path + ".ready", "w"):
        pass
    time.sleep(60)
    del held


def _read_pairs(path: str) -> list[tuple[int, int]]:
    """Lines of two pids, as far as they are written."""
    try:
        with open(path) as file:
            words = [line.split() for line in file if line.endswith("\n")]
    except FileNotFoundError:
        return []
    return [(int(worker), int(child)) for worker, child in words]
