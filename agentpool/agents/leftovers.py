"""Processes that dead pools left behind: found by what every worker's environment says, ended by pid and start time.

A pool that lives sees to its own processes, whatever dies first; so does its keeper when the pool's process is killed.
What is found here was left by a machine that lost both at once, or by a platform without subreapers. Any thread may
call it. Only this user's processes are looked at, only those of this PID namespace, and of pools that live none.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import psutil

from agentpool.config import MB

__all__ = ["Leftover", "end_leftovers", "find_leftovers"]

#: In the environment of a pool's keeper and of everything below it: the pid of the pool's process, and a random part.
KEEPER_MARK: Final = "AGENTPOOL_KEEPER"
WORKER_MARK: Final = "AGENTPOOL_WORKER"
#: Clocks of a process's start are rounded to ticks.
_TICK_SECONDS: Final = 0.02
_LOOKS: Final = 20


@dataclass(frozen=True, slots=True)
class Leftover:
    """One process of a dead pool.

    created_at: seconds since the epoch; with the pid it names the process for good. pool_pid: the process that the pool
    was in. worker_id: of the worker that started it, None for a keeper. command: its command line, shortened.
    """

    pid: int
    created_at: float
    pool_pid: int
    pool_mark: str
    worker_id: int | None
    rss_bytes: int
    command: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; memory in MB, age in seconds."""
        return {
            "pid": self.pid,
            "pool_pid": self.pool_pid,
            "worker_id": self.worker_id,
            "memory_mb": round(self.rss_bytes / MB, 1),
            "age_seconds": round(max(0.0, time.time() - self.created_at), 1),
            "command": self.command,
        }


def find_leftovers() -> list[Leftover]:
    """What dead pools of this user left on this machine, oldest first."""
    marked = list(_marked())
    keepers = {found.pool_mark for found, parent in marked if parent == found.pool_pid and _is_older(parent, found)}
    spared = _own_line()
    dead = [found for found, _ in marked if found.pool_mark not in keepers and found.pid not in spared]
    return sorted(dead, key=lambda found: found.created_at)


def end_leftovers(found: Iterable[Leftover], grace: float = 1.0) -> list[Leftover]:
    """SIGTERM to each, SIGKILL after `grace` seconds, and the same for what their pools left meanwhile.

    Returns what could not be ended.
    """
    targets = {(leftover.pid, leftover.created_at): leftover for leftover in found}
    marks = {leftover.pool_mark for leftover in targets.values()}
    for leftover in targets.values():
        _signal(leftover, signal.SIGTERM)
    _await_ends(list(targets.values()), grace)
    for _ in range(_LOOKS):
        left = [leftover for leftover in find_leftovers() if leftover.pool_mark in marks]
        if not left:
            return []
        for leftover in left:
            _signal(leftover, signal.SIGKILL)
        _await_ends(left, 0.5)
    return left


def _marked() -> Iterable[tuple[Leftover, int]]:
    """Each process of this user that bears a pool's mark, and its parent's pid."""
    uid, namespace = os.getuid(), _namespace(os.getpid())
    for process in psutil.process_iter():
        try:
            with process.oneshot():
                if process.uids().real != uid or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                environment = process.environ()
                mark = environment.get(KEEPER_MARK, "")
                pool_pid, dash, rest = mark.partition("-")
                # In another namespace the pool's pid means somebody else.
                if not (dash and rest and pool_pid.isdigit()) or _namespace(process.pid) != namespace:
                    continue
                worker = environment.get(WORKER_MARK, "")
                yield Leftover(
                    pid=process.pid,
                    created_at=process.create_time(),
                    pool_pid=int(pool_pid),
                    pool_mark=mark,
                    worker_id=int(worker) if worker.isdigit() else None,
                    rss_bytes=process.memory_info().rss,
                    command=" ".join(process.cmdline())[:200] or process.name(),
                ), process.ppid()
        except (psutil.Error, OSError):  # it ended, or is not ours to read
            continue


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:  # no procfs, or no namespaces: there is only one
        return ""


def _is_older(pid: int, found: Leftover) -> bool:
    """Is the process of this pid the pool's, and not one that got its pid later?"""
    try:
        return psutil.Process(pid).create_time() <= found.created_at + _TICK_SECONDS
    except psutil.Error:
        return False


def _own_line() -> set[int]:
    """This process and those above it: whoever sweeps may itself run in what a pool left."""
    try:
        me = psutil.Process()
        return {me.pid, *(parent.pid for parent in me.parents())}
    except psutil.Error:
        return {os.getpid()}


def _signal(leftover: Leftover, number: signal.Signals) -> None:
    """Signal exactly this process, or nobody."""
    try:
        process = psutil.Process(leftover.pid)
        if abs(process.create_time() - leftover.created_at) <= _TICK_SECONDS:
            process.send_signal(number)  # psutil itself looks once more whether the pid was given away
    except psutil.Error:  # it has ended
        return


def _await_ends(leftovers: list[Leftover], seconds: float) -> None:
    processes = []
    for leftover in leftovers:
        try:
            process = psutil.Process(leftover.pid)
        except psutil.Error:
            continue
        if abs(process.create_time() - leftover.created_at) <= _TICK_SECONDS:
            processes.append(process)
    psutil.wait_procs(processes, timeout=seconds)
