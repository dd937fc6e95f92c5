"""Runs one test of `cpython_suite.py` in a process of its own, in its own session and with a time limit.

    python one_test.py TEST_ID LIMIT_SECONDS RESULT_FILE

This process forks before it imports anything heavy: the child runs the test, this one watches. It is a child subreaper,
so whatever the test leaves behind, daemonized or not, comes back here, is named in the result and killed by pid: when
this process ends, nothing of the test is left. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
#: Seconds that descendants of an ended test have to end too.
GRACE = 5.0


def become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(root: int) -> dict[int, str]:
    """Live processes below `root`: pid -> command line. One scan of /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_bytes().rpartition(b") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if stat[0] not in (b"Z", b"X"):
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found: dict[int, str] = {}
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            waiting.append(pid)
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def reap() -> None:
    """Collect every zombie of this process; the child that ran the test must have been waited for before."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def end_all(grace: float) -> list[str]:
    """Wait for all descendants, then kill what is left; returns what had to be killed."""
    deadline = time.monotonic() + grace
    survivors: dict[int, str] = {}
    while True:
        reap()
        if not (alive := descendants(os.getpid())):
            return [f"{pid} {command}" for pid, command in survivors.items()]
        if time.monotonic() >= deadline:
            survivors |= alive
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        time.sleep(0.02)


def write(path: Path, value: dict[str, object]) -> None:
    """All or nothing: a reader never sees half a result."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def run_here(test_id: str, limit: float, result: Path) -> None:
    """The child's side. It ends as any program does, so that what an executor does at interpreter exit counts too."""
    import faulthandler
    import resource

    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the suite crashes workers on purpose
    faulthandler.dump_traceback_later(limit * 0.9)

    import cpython_suite

    write(result, dict(cpython_suite.run(test_id)))


def watch(child: int, limit: float, result: Path) -> None:
    started = time.monotonic()
    descriptor = os.pidfd_open(child)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    ended = bool(poll.poll(limit * 1000))
    os.close(descriptor)
    seconds = time.monotonic() - started
    code: int | None = None
    if ended:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    survivors = end_all(GRACE if ended else 0.0)
    if result.exists():
        outcome = json.loads(result.read_text())
    else:
        outcome = {"status": "failed", "detail": "" if code is None else f"the test's process died, status {code}"}
    if not ended:
        outcome["detail"] = f"{outcome['status']}, but its process did not end in {limit:g} s\n{outcome['detail']}"
        outcome["status"] = "failed"
    elif code:
        outcome["detail"] = f"{outcome['status']}, and its process ended with status {code}\n{outcome['detail']}"
        outcome["status"] = "failed"
    elif survivors:
        outcome["detail"] = f"{outcome['status']}, but left processes: {survivors}\n{outcome['detail']}"
        outcome["status"] = "failed"
    write(result, {**outcome, "seconds": round(seconds, 2)})


def main() -> None:
    test_id, limit, result = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    become_subreaper()
    child = os.fork()
    if child:
        watch(child, limit, result)
    else:
        run_here(test_id, limit, result)


if __name__ == "__main__":
    main()
