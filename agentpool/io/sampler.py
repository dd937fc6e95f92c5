"""Readings of process trees: how much memory and CPU time a worker and all that descends from it use.

A reading says how much, never whether that is too much. It starts no thread. Any thread may use a `TreeSampler`, one
at a time. Processes come and go while a tree is read: what vanished is left out, and only the root's own absence is
reported. The readings of the host stand in `agentpool.io.host` and are offered here too.

Measured on 2 cores with Python 3.11 and psutil 7.2: `TreeSampler.read` 48 us for a lone process and 150 us with 3
descendants. Of that the search for descendants is 9 us a process (5 us more for each further thread: 32 of them make a
reading cost 210 us), psutil's memory 9 us and its CPU times 13 us a process, and the check for a reused process id
13 us. `tree_pss_bytes` 150 us for a lone process and 300 us with 3 small descendants, more for large ones: for reports,
not for every sample.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import psutil

from agentpool.io.host import HostReading, HostSampler

__all__ = ["HostReading", "HostSampler", "TreeReading", "TreeSampler", "descendants", "tree_pss_bytes"]


@dataclass(frozen=True, slots=True)
class TreeReading:
    """One look at a process and its descendants.

    rss_bytes: resident memory of all of them summed; pages that they share count in each. With another metric: PSS
        (a shared page is divided among those who share it) or USS (only what nobody shares).
    root_rss_bytes: of the process itself.
    processes: how many were read, the root included.
    cpu_seconds: CPU time used by all of them and by those of their children that have ended and were waited for, so
        that it grows as the tree works, whatever ends meanwhile.
    """

    rss_bytes: int
    root_rss_bytes: int
    processes: int
    cpu_seconds: float


class TreeSampler:
    """Reads one process tree again and again.

    `pid` must be alive, and the intended process, when the sampler is made: from then on a process id that was given
    to another process is noticed and reads as gone (psutil compares start times, which are known to 10 ms).
    `metric` "pss" and "uss" cost 0.4 ms a process and more for large ones; a process that may not be looked into so
    closely is read by its RSS.
    """

    __slots__ = ("_is_gone", "_metric", "_others", "_process", "pid")

    def __init__(self, pid: int, metric: Literal["rss", "pss", "uss"] = "rss") -> None:
        self.pid = pid
        self._metric = metric
        #: Kept by process id only to save making them again: 13 us each. What is read through them belongs to
        #: whoever has that id now, and it is asked only for ids that are in the tree now.
        self._others: dict[int, psutil.Process] = {}
        self._process: psutil.Process | None = None
        self._is_gone = False
        self._look_up()

    def _look_up(self) -> None:
        try:
            self._process = psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            self._is_gone = True
        except OSError:  # no descriptor is free: the next reading tries again
            return

    def read(self) -> TreeReading | None:
        """The tree now; None: the process is gone, waits as a zombie to be reaped, or cannot be read at present.

        That is so while this process, or the machine, has no descriptor left.
        """
        if self._process is None and not self._is_gone:
            self._look_up()
        try:
            return self._read()
        except OSError:
            return None

    def _read(self) -> TreeReading | None:
        process = self._process
        if process is None:
            return None
        if not process.is_running():
            self.close()
            return None
        try:
            root_rss, cpu_seconds = _usage(process, self._metric)
            if root_rss == 0 and process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        rss, count = root_rss, 1
        others: dict[int, psutil.Process] = {}
        for pid in descendants(self.pid):
            try:
                other = self._others.get(pid) or psutil.Process(pid)
                other_rss, other_seconds = _usage(other, self._metric)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # ended meanwhile; or, on macOS, runs as another user
            others[pid] = other
            rss += other_rss
            cpu_seconds += other_seconds
            count += 1
        self._others = others
        return TreeReading(rss, root_rss, count, cpu_seconds)

    def kill_remembered(self) -> None:
        """SIGKILL the descendants that the last reading found, whoever their parent is by now."""
        for process in self._others.values():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.kill()  # psutil sees to it that the process id is still the same process's

    def kill_biggest_descendant(self) -> int | None:
        """SIGKILL the descendant with the most memory of its own, and return its process id; None: there is none."""
        sizes: list[tuple[int, psutil.Process]] = []
        for pid in descendants(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process = psutil.Process(pid)
                sizes.append((_usage(process, self._metric)[0], process))
        for _, process in sorted(sizes, key=lambda item: item[0], reverse=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.kill()  # psutil sees to it that the process id is still the same process's
                return process.pid
        return None

    def close(self) -> None:
        """Forgets the process; from now on `read` returns None."""
        self._process = None
        self._is_gone = True
        self._others = {}


def _usage(process: psutil.Process, metric: str) -> tuple[int, float]:
    times = process.cpu_times()
    memory = process.memory_info().rss
    if metric != "rss":
        with contextlib.suppress(psutil.AccessDenied, AttributeError):  # another user's; a platform without PSS
            memory = getattr(process.memory_full_info(), metric)
    return memory, times.user + times.system + times.children_user + times.children_system


def descendants(pid: int) -> list[int]:
    """Process ids of the children of `pid`, their children and so on, nearest first; empty where it is gone.

    A process that is started or ends during the call may be in the answer or not. Where the kernel has no lists of
    children (macOS), psutil looks through all processes of the host: 1 ms for 80 of them.
    """
    if not _has_children_files():
        try:
            return [child.pid for child in psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
    found = [pid]
    seen = {pid}
    for parent in found:  # grows while it is walked
        for child in _children(parent):
            if child not in seen:
                seen.add(child)
                found.append(child)
    return found[1:]


@functools.cache
def _has_children_files() -> bool:
    # A kernel option (CONFIG_PROC_CHILDREN), and some sandboxes' /proc is without.
    pid = os.getpid()
    return os.path.exists(f"/proc/{pid}/task/{pid}/children")


def _children(pid: int) -> Iterator[int]:
    tasks = f"/proc/{pid}/task"
    try:
        threads = os.listdir(tasks)
    except OSError:  # the process has ended
        return
    for thread in threads:  # each thread has its own children
        try:
            listed = _read(f"{tasks}/{thread}/children")
        except OSError:  # the thread has ended; its children went to another thread, or to a subreaper
            continue
        yield from map(int, listed.split())


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(descriptor, 65536):  # /proc hands out a page at a time, whatever is asked for
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        os.close(descriptor)


def tree_pss_bytes(pid: int) -> int | None:
    """Proportional memory (PSS) of the tree: shared pages are divided among those who share them.

    None where the platform does not tell (not Linux), where the process is gone, or where one of the tree may not be
    looked into (it runs as another user): a partial sum would pass for a small tree.
    """
    try:
        total = _pss_bytes(pid)
        if total is not None:
            total += sum(_pss_bytes(child) or 0 for child in descendants(pid))
    except PermissionError:
        return None
    return total


def _pss_bytes(pid: int) -> int | None:
    """PSS of one process; None where it is gone or the kernel does not tell. Raises PermissionError."""
    # Not psutil.memory_full_info(): the same file, but also memory_info() and more figures than are wanted.
    try:
        text = _read(f"/proc/{pid}/smaps_rollup")
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in text.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return None
