"""What is still there when an executor is gone: processes, descriptors, threads, shared memory, temporary files."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Final

from stress import procs

RULES: Final = ("processes", "descriptors", "threads", "shared memory", "files")
#: A zombie that this process adopted is collected when it is this old; before, its creator may still wait for it.
_ZOMBIE_SECONDS: Final = 0.5


class Before:
    """What there was; `left` says what has come since."""

    def __init__(self, temporary: Path) -> None:
        self._temporary = temporary
        self._processes = {(process.pid, process.start_ticks) for process in procs.below()}
        self._descriptors = _descriptors()
        self._threads = set(threading.enumerate())
        self._shared = _shared_memory()

    def processes(self) -> list[procs.Process]:
        """Those that have come."""
        helpers, _ = _standard_librarys_own()
        return [process for process in procs.below()
                if (process.pid, process.start_ticks) not in self._processes and process.pid not in helpers]

    def left(self) -> dict[str, list[str]]:
        """By rule; empty: nothing."""
        found = {
            "processes": [f"process {process.pid} ({process.state}): {procs.command(process.pid)[:120]!r}"
                          for process in self.processes()],
            "descriptors": self._new_descriptors(),
            "threads": [thread.name for thread in threading.enumerate()
                        if thread not in self._threads and not thread.name.startswith("stress-")],
            "shared memory": [f"/dev/shm/{name}" for name in sorted(_shared_memory() - self._shared)
                              if not _is_foreign(name)],
            "files": [str(path) for path in sorted(self._temporary.rglob("*"))],
        }
        return {rule: these for rule, these in found.items() if these}

    def _new_descriptors(self) -> list[str]:
        # By kind: that a pipe was closed and another one opened since is no leak.
        def kind(target: str) -> str:
            return re.sub(r":\[\d+\]$", "", target)

        _, helpers = _standard_librarys_own()
        now = {fd: target for fd, target in _descriptors().items() if fd not in helpers}
        more = Counter(map(kind, now.values())) - Counter(map(kind, self._descriptors.values()))
        return [f"{fd}: {target}" for fd, target in now.items()
                if kind(target) in more and self._descriptors.get(fd) != target]

    def await_nothing(self, patience: float) -> dict[str, list[str]]:
        """What is still there after so many seconds; usually nothing, at once."""
        began, seen = time.monotonic(), dict[int, float]()
        while found := self.left():
            if time.monotonic() - began > patience:
                return found
            gc.collect()
            _collect_zombies(self.processes(), seen)
            time.sleep(0.02)
        return {}

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            if not process.is_zombie:
                procs.send(process.pid, signal.SIGKILL)


def _collect_zombies(processes: list[procs.Process], seen: dict[int, float]) -> None:
    now = time.monotonic()
    for process in processes:
        is_mine = process.is_zombie and process.parent == os.getpid()
        if is_mine and now - seen.setdefault(process.pid, now) >= _ZOMBIE_SECONDS:
            with suppress(ChildProcessError):  # its creator was quicker
                os.waitpid(process.pid, os.WNOHANG)


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def _is_foreign(name: str) -> bool:
    """Whether a process that is none of ours has it mapped: another program on this machine made it."""
    ours = {os.getpid(), *(process.pid for process in procs.below())}
    needle = f"/dev/shm/{name}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in ours:
            with suppress(OSError):
                if needle in Path(f"/proc/{entry}/maps").read_bytes():
                    return True
    return False


def _standard_librarys_own() -> tuple[set[int], set[int]]:
    """Pids and descriptors of helpers that live as long as this process once they are needed; loky has its own."""
    pids, descriptors = set(), set()
    for module, name, pid, fd in (
        ("multiprocessing.resource_tracker", "_resource_tracker", "_pid", "_fd"),
        ("multiprocessing.forkserver", "_forkserver", "_forkserver_pid", "_forkserver_alive_fd"),
        ("loky.backend.resource_tracker", "_resource_tracker", "_pid", "_fd"),
    ):
        helper = getattr(sys.modules.get(module), name, None)
        pids.add(getattr(helper, pid, None))
        descriptors.add(getattr(helper, fd, None))
    return {one for one in pids if one}, {one for one in descriptors if one is not None}
