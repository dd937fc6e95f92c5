"""What `agentpool doctor` checks: what the host has (LOOKS), and whether each part of agentpool works on it (TRIALS).

The trials are the self-tests of the old guide (docs/migration.md), each done for real: a pool with worker processes, a
breaker that is opened, a worker that is recycled, a task that passes its limits, an emergency stop. Main thread only.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from agentpool import AgentPool, ResourceCircuitBreaker, ResourceMonitor
from agentpool.config import MB
from agentpool.control import folder
from agentpool.control.client import find_pools
from agentpool.errors import MemoryLimitError, TaskKilledError, TaskTimeoutError

__all__ = ["LOOKS", "TRIALS", "Check"]

_PR_GET_CHILD_SUBREAPER: Final = 37
#: A pool of 16 workers takes about 150.
_DESCRIPTORS: Final = 1024
_PROCESSES: Final = 256
#: A working host needs tenths of a second for any of this.
_PATIENCE: Final = 30.0


class _Finding(Exception):
    """It is so, and could be better: a warning."""

    def __init__(self, found: str, cure: str) -> None:
        super().__init__(found)
        self.cure = cure


class _Skipped(Exception):
    """It cannot be checked here."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `check` returns what it found in words, and raises what is wrong."""

    name: str
    check: Callable[[], str]
    cure: str = ""

    def run(self) -> dict[str, Any]:
        """`result` ("ok", "warn", "fail" or "skipped"), what was `found`, and the `cure`."""
        try:
            return {"result": "ok", "found": self.check(), "cure": ""}
        except _Finding as finding:
            return {"result": "warn", "found": str(finding), "cure": finding.cure}
        except _Skipped as skipped:
            return {"result": "skipped", "found": str(skipped), "cure": ""}
        except Exception as error:  # whatever goes wrong here is what was looked for
            return {"result": "fail", "found": f"{type(error).__name__}: {error}", "cure": self.cure}


# -- what the host has -----------------------------------------------------------------------------------------------


def _python() -> str:
    return f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}"


def _memory() -> str:
    from agentpool.io.sampler import HostSampler

    host = HostSampler().read()
    floor = host.total_bytes * 0.05
    words = (f"{host.available_bytes / MB:.0f} of {host.total_bytes / MB:.0f} MB available, by {host.limit_source}")
    if host.available_bytes < floor:
        raise _Finding(words, f"Below {floor / MB:.0f} MB (5 %) pools start no worker: free some, or set "
                              "min_available_mb.")
    return words


def _pressure() -> str:
    from agentpool.io.sampler import HostSampler

    pressure = HostSampler().read().pressure_some_avg10
    if pressure is None:
        raise _Finding("the kernel does not tell memory pressure", "Pools go by available memory alone; boot with "
                                                                   "psi=1 to have it.")
    return f"memory pressure (some avg10) is {pressure:.1f} %"


def _pidfd() -> str:
    descriptor = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(descriptor, 0)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if poll.poll(0):
            raise OSError("it says that a living process has ended")
    finally:
        os.close(descriptor)
    return "deaths are seen, and signals sent, by descriptor"


def _subreaper() -> str:
    value = ctypes.c_int()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "daemons of tasks are found and ended with them"


def _descriptors() -> str:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _DESCRIPTORS:
        raise _Finding(f"{soft} descriptors at most (hard limit {hard})", f"Pools with many workers want "
                                                                         f"{_DESCRIPTORS}: ulimit -n {_DESCRIPTORS}")
    return f"{soft} descriptors at most"


def _processes() -> str:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if 0 <= soft < _PROCESSES:
        raise _Finding(f"{soft} processes at most", f"ulimit -u {_PROCESSES} or more")
    return "as many processes as it wants" if soft < 0 else f"{soft} processes at most"


def _control_folder() -> str:
    problems = []
    for path in folder.usable():
        try:
            os.close(folder.open_folder(path, create=True))
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        if not os.access(path, os.W_OK):
            problems.append(f"{path}: it is read-only")
            continue
        return f"sockets of pools are in {path}"
    raise _Finding("; ".join(problems), "Pools work, and cannot be operated from another terminal; name a folder with "
                                        "AgentPool(control=...).")


# -- whether it works ------------------------------------------------------------------------------------------------


def _pool(**settings: Any) -> AgentPool:
    return AgentPool(1, name="doctor", control=False, **settings)


def _start(method: str) -> str:
    began = time.monotonic()
    with AgentPool(1, mp_context=method, control=False) as pool:
        worker = pool.submit(os.getpid).result(_PATIENCE)
    if worker == os.getpid():
        raise RuntimeError("the task ran in this process")
    return f"first result after {1000 * (time.monotonic() - began):.0f} ms"


def _monitor() -> str:
    with _pool() as pool:
        pool.submit(abs, -1).result(_PATIENCE)
        report = ResourceMonitor([pool]).get_health_report()
    memory = report["memory_stats"]
    if not memory["process_memory_mb"] > 0 or memory["registered_agents"] != 1:
        raise RuntimeError(f"the report makes no sense: {memory}")
    return f"status {report['status']}, {report['foreign_agents']['count']} agent programs of no pool"


def _breaker() -> str:
    with _pool() as pool:
        breaker = ResourceCircuitBreaker(pool)
        breaker.force_open("doctor")
        future = pool.submit(abs, -1)
        state, is_done = breaker.get_state(), future.done()
        breaker.reset()
        if (state, is_done, future.result(_PATIENCE)) != ("forced_open", False, 1):
            raise RuntimeError(f"forced open it was {state}, and the task {'ran' if is_done else 'waited'}")
    return "forced open it starts nothing, reset it does"


def _recycling() -> str:
    with _pool(max_tasks_per_child=1) as pool:
        first, second = pool.submit(os.getpid).result(_PATIENCE), pool.submit(os.getpid).result(_PATIENCE)
    if first == second:
        raise RuntimeError("the worker was not replaced")
    return "a worker was replaced after its task"


def _memory_limit() -> str:
    with _pool(memory_limit_mb=50, hard_memory_limit_mb=150, critical_memory_mb=2000) as pool:
        error = pool.submit(_eat).exception(_PATIENCE)
        if not isinstance(error, MemoryLimitError):
            raise RuntimeError(f"a task that took 600 MB ended with {error!r}")
        pool.submit(abs, -1).result(_PATIENCE)
    return f"a task was stopped at {error.peak_rss_bytes / MB:.0f} MB of 150, the pool went on"


def _eat() -> None:
    taken = []
    for _ in range(600):
        taken.append(b"x" * MB)
        time.sleep(0.002)  # as a task that works; the limit is looked at while it runs
    time.sleep(_PATIENCE)


def _timeout() -> str:
    with _pool() as pool:
        error = pool.options(timeout=0.2).submit(time.sleep, _PATIENCE).exception(_PATIENCE)
    if not isinstance(error, TaskTimeoutError):
        raise RuntimeError(f"a task beyond its timeout ended with {error!r}")
    return "a task was stopped at its timeout"


def _emergency() -> str:
    pool = _pool()
    try:
        future = pool.submit(time.sleep, _PATIENCE)
        deadline = time.monotonic() + _PATIENCE
        while not future.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        done = ResourceMonitor([pool]).emergency_shutdown("doctor")
        error = future.exception(_PATIENCE)
    finally:
        pool.kill_workers()
    if not isinstance(error, TaskKilledError) or done["workers_stopped"] != 1:
        raise RuntimeError(f"{done}, and the task ended with {error!r}")
    return "one worker killed, one task stopped, with its reason"


def _control() -> str:
    place = tempfile.mkdtemp(prefix="agentpool-doctor-")
    try:
        with AgentPool(1, name="doctor", control=place) as pool:
            pool.submit(abs, -1).result(_PATIENCE)
            deadline = time.monotonic() + _PATIENCE
            while not (found := find_pools([place])):
                if time.monotonic() > deadline:
                    raise RuntimeError("the pool opened no control socket")
                time.sleep(0.01)
            with found[0].connect() as client:
                completed = client.call("stats")["counters"]["completed"]
        if completed != 1:
            raise RuntimeError(f"it says that {completed} tasks were done, and it was one")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return "a pool answered over its socket"


def _orchestrator() -> str:
    from agentpool import orchestrate_with_memory_management

    place = tempfile.mkdtemp(prefix="agentpool-doctor-")
    try:
        with open(os.path.join(place, "sample.py"), "w", encoding="utf-8") as file:
            file.write("def double(x: int) -> int:\n    return x * 2\n")
        report = orchestrate_with_memory_management("Review this code", path=place)
        if not report.ok:
            problems = [f"{agent.name}: {agent.error}" for agent in report.agents if agent.error]
            if any("agents]" in problem for problem in problems):
                raise _Skipped("the agents' tools are not installed: pip install 'agentpool-runtime[agents]'")
            raise RuntimeError("; ".join(problems))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return f"{len(report.agents)} agents reviewed a file"


_KERNEL: Final = "agentpool is made for Linux 5.3 or later."
_SEE: Final = "If a sandbox forbids it, allow it there; otherwise please report this with what `--json` prints."

LOOKS: Final = (
    Check("python", _python),
    Check("memory limit", _memory, "Is /proc mounted?"),
    Check("memory pressure", _pressure, "Is /proc mounted?"),
    Check("pidfd", _pidfd, _KERNEL),
    Check("child subreaper", _subreaper, _KERNEL),
    Check("descriptors", _descriptors),
    Check("processes", _processes),
    Check("control folder", _control_folder),
)
TRIALS: Final = (
    Check("start by fork", lambda: _start("fork"), _SEE),
    Check("start by spawn", lambda: _start("spawn"), _SEE),
    Check("monitor", _monitor, _SEE),
    Check("breaker", _breaker, _SEE),
    Check("recycling", _recycling, _SEE),
    Check("hard memory limit", _memory_limit, _SEE),
    Check("timeout", _timeout, _SEE),
    Check("emergency shutdown", _emergency, _SEE),
    Check("control socket", _control, _SEE),
    Check("orchestrator", _orchestrator, _SEE),
)
