"""Which processes an agent program has left behind, and their end.

Runs in a worker. A worker is a child subreaper: whatever the program starts, in whatever session, stays a descendant of
the worker, or bears the program's mark in its environment. Where there is no procfs nothing is found here, and the
keeper ends what is left when the worker ends. Decides nothing of agents.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from typing import Final, NamedTuple

__all__ = ["MARK", "Process", "below", "end_all", "look_up", "processes", "strays"]

#: In the environment of an agent program and of all that it starts.
MARK: Final = "AGENTPOOL_AGENT"

#: Looks at most: a process that forks while it is looked for is seen the next time.
_LOOKS: Final = 50
_PAUSE_SECONDS: Final = 0.005


class Process(NamedTuple):
    """One process as /proc tells it. `started`: in clock ticks since boot; with the pid it names a process for good."""

    pid: int
    parent: int
    session: int
    started: int
    state: str


def processes() -> dict[int, Process]:
    """All processes of this host that can be seen, by pid."""
    found = {}
    try:
        names = os.listdir("/proc")
    except OSError:  # no procfs
        return {}
    for name in names:
        if name.isdigit() and (one := look_up(int(name))) is not None:
            found[one.pid] = one
    return found


def look_up(pid: int) -> Process | None:
    """One of them; None: it has ended, or cannot be seen."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:  # it has ended
        return None
    # The program's name is in parentheses and may contain some itself.
    fields = text[text.rindex(b")") + 2 :].split()
    return Process(
        pid=pid,
        parent=int(fields[1]),
        session=int(fields[3]),
        started=int(fields[19]),
        state=fields[0].decode(),
    )


def below(root: int, table: dict[int, Process]) -> list[Process]:
    """The descendants of `root`, itself not included."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    todo = [root]
    while todo:
        for process in children.get(todo.pop(), ()):
            found.append(process)
            todo.append(process.pid)
    return found


def strays(mark: str, since: int, spared: Iterable[int]) -> list[Process]:
    """What a program left in this worker, apart from what is still below the pids in `spared`.

    That is: descendants of this worker that bear the mark, and those that the worker adopted: its children that began
    after `since` (clock ticks), lead or belong to another session, and bear no other program's mark.
    """
    me = os.getpid()
    table = processes()
    own = table.get(me)
    if own is None:
        return []
    kept = set(spared)
    kept.update(process.pid for pid in list(kept) for process in below(pid, table))
    found = []
    for process in below(me, table):
        if process.pid in kept or process.state == "Z":
            continue
        theirs = _mark(process.pid)
        is_adopted = process.parent == me and process.session != own.session and process.started >= since
        if theirs == mark or (theirs is None and is_adopted):
            found.append(process)
            found += [other for other in below(process.pid, table) if other.pid not in kept and other.state != "Z"]
    return found


def _mark(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = file.read().split(b"\0")
    except OSError:  # gone, or not ours to read
        return None
    prefix = MARK.encode() + b"="
    return next((entry[len(prefix) :].decode() for entry in variables if entry.startswith(prefix)), None)


def end_all(targets: Iterable[Process], mark: str, since: int, spared: Iterable[int], seconds: float) -> list[Process]:
    """SIGKILL the targets and all strays of `mark`, again and again until none is left; what is left after `seconds`.

    Each is killed by (pid, start): a pid that was given to another process meanwhile is not touched.
    """
    spared = list(spared)
    deadline = time.monotonic() + seconds
    wanted = {process.pid: process for process in targets}
    for _ in range(_LOOKS):
        wanted |= {process.pid: process for process in strays(mark, since, spared)}
        for process in list(wanted.values()):
            if not _kill(process):
                del wanted[process.pid]
        if not wanted or time.monotonic() > deadline:
            break
        time.sleep(_PAUSE_SECONDS)  # it takes the kernel a moment; what it leaves comes to us
    return list(wanted.values())


def _kill(target: Process) -> bool:
    """SIGKILL exactly this process; reap it where it is our child. False: it is gone."""
    now = look_up(target.pid)
    if now is None or now.started != target.started:
        return False
    if now.state == "Z":
        if now.parent == os.getpid():
            _reap(target.pid)
        return False
    try:
        pidfd = os.pidfd_open(target.pid)
    except OSError:  # it ended in this instant
        return False
    try:
        same = look_up(target.pid)  # the descriptor holds the process fast: what we read now is what we kill
        if same is None or same.started != target.started:
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    except PermissionError:  # it became another user's
        return False
    finally:
        os.close(pidfd)
    return True


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # somebody else in this worker waited for it
        return
