"""What /proc says: processes below this one, their memory, what this process holds. Linux; shared by all who look.

Another eye than the pool's own (`agentpool.io.sampler`), on purpose: what is under test does not vouch for itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
MB: Final = 1024 * 1024
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Direct children whose own children are the workers: agentpool's keeper, multiprocessing's and loky's servers.
_SERVERS: Final = (b"keeper.main(", b"multiprocessing.forkserver")
_HELPERS: Final = (b"resource_tracker", b"semaphore_tracker")
#: Set in the environment of what the harness itself starts.
OURS: Final = "AGENTPOOL_STRESS_HELPER"


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc. With the pid, `start_ticks` is an identity that is not used again."""

    pid: int
    parent: int
    state: str
    start_ticks: int
    rss_bytes: int

    @property
    def is_zombie(self) -> bool:
        return self.state in "ZX"


def read(pid: int) -> Process | None:
    """None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            words = file.read(1024).rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(words[1]), words[0].decode(), int(words[19]), int(words[21]) * _PAGE)


def below(root: int | None = None) -> list[Process]:
    """Every process below `root` (this one), zombies too; parents before children."""
    children: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read(int(name))) is not None:
            children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [root or os.getpid()]
    while waiting:
        these = children.get(waiting.pop(), [])
        found += these
        waiting += [process.pid for process in these]
    return found


def command(pid: int) -> bytes:
    """The command line; empty for who is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@dataclass(frozen=True, slots=True)
class Crew:
    """The executor's processes at one moment."""

    servers: tuple[int, ...]
    #: worker -> memory of its whole tree
    workers: dict[int, int]


class Census:
    """Tells workers from servers and helpers; remembers what a process is, as its command line costs a file."""

    def __init__(self) -> None:
        self._roles: dict[tuple[int, int], str] = {}
        self._own_words = command(os.getpid())
        #: Direct children that are the harness' own.
        self.ours: set[int] = set()

    def take(self) -> Crew:
        """Now."""
        processes = [process for process in below() if not process.is_zombie]
        here = os.getpid()
        servers = {process.pid for process in processes
                   if process.parent == here and self._role(process) == "server"}
        roots: dict[int, int] = {}
        for process in processes:
            if process.parent in roots:
                roots[process.pid] = roots[process.parent]
            elif process.parent in servers or (process.parent == here and self._role(process) == "worker"):
                roots[process.pid] = process.pid
        workers: dict[int, int] = {}
        for process in processes:
            if process.pid in roots:
                root = roots[process.pid]
                workers[root] = workers.get(root, 0) + process.rss_bytes
        alive = {(process.pid, process.start_ticks) for process in processes}
        self._roles = {who: role for who, role in self._roles.items() if who in alive}
        return Crew(tuple(servers), workers)

    def _role(self, process: Process) -> str:
        if process.pid in self.ours:
            return "helper"
        who = (process.pid, process.start_ticks)
        role = self._roles.get(who)
        if role is None:
            words = command(process.pid)
            role = ("server" if any(word in words for word in _SERVERS)
                    else "helper" if not words or any(word in words for word in _HELPERS) else "worker")
            # With the words of this process it was forked: to be a worker, or to become another program in a moment.
            if words and words != self._own_words:
                self._roles[who] = role
        return role


def own_rss() -> int:
    """Of this process."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read(256).split()[1]) * _PAGE


def available() -> int:
    """Memory that the host can still give."""
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable"):
                return int(line.split()[1]) * 1024
    return 0


def adopt_orphans() -> None:
    """Make this process a child subreaper: what the executor loses sight of is then still found below it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def send(pid: int, signum: int, *, ancestor: int | None = None) -> bool:
    """Signal a process below this one, and no other that got its number meanwhile."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if all(process.pid != pid for process in below(ancestor)):
            return False
        signal.pidfd_send_signal(fd, signum)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
