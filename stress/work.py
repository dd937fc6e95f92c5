"""What the tasks of a stress run do, in the worker. Standard library only, as every worker imports this.

Each task leaves a line in a journal when it begins and one when it ends, written by the worker itself: the oracle's
record of what really ran, which owes nothing to the executor under test.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

#: Where the journal is, the run's seed, the task's number.
Ticket = tuple[str, int, int]

MB: Final = 1024 * 1024

_journals: dict[str, int] = {}
#: What leaky tasks keep.
_leaked: list[bytearray] = []


def right_value(seed: int, number: int) -> int:
    """What task `number` returns: known to the oracle beforehand, and to no executor."""
    return zlib.crc32(b"%d:%d" % (seed, number))


def note(ticket: Ticket, event: str) -> None:
    """One line in one write to a file opened for appending: whole, whoever else writes."""
    path, _, number = ticket
    fd = _journals.get(path)
    if fd is None:
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fd = _journals.setdefault(path, opened)
        if fd != opened:  # another thread was quicker: an executor with threads for workers
            os.close(opened)
    os.write(fd, f"{event} {number} {os.getpid()} {time.monotonic():.6f}\n".encode())


def close_journals() -> None:
    """For an executor that ran tasks in the harness' own process."""
    while _journals:
        os.close(_journals.popitem()[1])


@contextmanager
def _noted(ticket: Ticket) -> Iterator[int]:
    note(ticket, "began")
    yield right_value(ticket[1], ticket[2])
    note(ticket, "ended")


def noop(seed: int, number: int) -> int:
    """The least that can be checked. Leaves no line: it is for counting by the hundred thousand."""
    return right_value(seed, number)


def nap(ticket: Ticket, seconds: float) -> int:
    """Sleep, as an agent that waits for a model does."""
    with _noted(ticket) as value:
        time.sleep(seconds)
    return value


def compute(ticket: Ticket, seconds: float) -> int:
    """Use the processor."""
    with _noted(ticket) as value:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
    return value


def leak(ticket: Ticket, megabytes: int) -> int:
    """Keep memory for as long as the worker lives."""
    with _noted(ticket) as value:
        _leaked.append(bytearray(os.urandom(4096)) * (megabytes * MB // 4096))
    return value


def hold(ticket: Ticket, megabytes: int, seconds: float) -> int:
    """Take memory bit by bit, hold it for a while, and give it back."""
    with _noted(ticket) as value:
        held = []
        for _ in range(max(1, megabytes // 4)):
            held.append(bytearray(b"x") * (4 * MB))
            time.sleep(0.005)
        time.sleep(seconds)
        held.clear()
    return value


def race(ticket: Ticket, megabytes_a_second: float, cap_megabytes: int) -> int:
    """Allocate until stopped; give up at a cap that spares the machine where nobody stops it."""
    with _noted(ticket):
        held, began = [], time.monotonic()
        for count in range(1, cap_megabytes // 8 + 1):
            held.append(bytearray(b"x") * (8 * MB))
            time.sleep(max(0.0, began + count * 8 / megabytes_a_second - time.monotonic()))
    return -1


def fail(ticket: Ticket) -> NoReturn:
    """Raise, as tasks do."""
    with _noted(ticket):
        raise ValueError(f"task {ticket[2]} was meant to fail")
    raise AssertionError


#: Ways to die: name -> signal, or an exit code as a negative number less one.
DEATHS: Final = ("kill", "segv", "abort", "term", "hangup", "exit-0", "exit-3", "null", "after-result")


def die(ticket: Ticket, how: str) -> int:
    """End this process by one of `DEATHS`."""
    note(ticket, "began")
    signals = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "abort": signal.SIGABRT, "term": signal.SIGTERM,
               "hangup": signal.SIGHUP}
    if how in signals:
        signal.signal(signals[how], signal.SIG_DFL) if how != "kill" else None
        os.kill(os.getpid(), signals[how])
        time.sleep(5)
    elif how == "null":
        ctypes.string_at(0)
    elif how.startswith("exit-"):
        os._exit(int(how[5:]))
    elif how == "after-result":
        # The process ends while its result is on the way, or has arrived: either is right. What it runs next is lost
        # with it, which the journal must know.
        import threading

        note(ticket, "doomed")
        threading.Timer(0.0005, os._exit, (9,)).start()
        return right_value(ticket[1], ticket[2])
    os._exit(1)


#: Ways to hang.
HANGS: Final = ("sleep", "deaf", "spin", "in-c", "stopped", "child")


def hang(ticket: Ticket, how: str) -> int:
    """Never end by itself (within ten minutes), by one of `HANGS`."""
    note(ticket, "began")
    end = time.monotonic() + 600
    while time.monotonic() < end:
        try:
            _hang_once(how, end)
        except BaseException:  # that is what `deaf` means
            if how != "deaf":
                raise
    return -1


def _hang_once(how: str, end: float) -> None:
    if how == "spin":
        while time.monotonic() < end:
            pass
    elif how == "in-c":
        sum(range(10**12))  # holds the interpreter's lock: no other thread runs, no exception comes through
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "child":
        subprocess.run(["sleep", "600"], check=False)
    else:
        time.sleep(600)


def leave_daemon(ticket: Ticket) -> int:
    """Leave a process behind, in a session of its own, that nobody waits for."""
    with _noted(ticket) as value:
        subprocess.Popen(["sleep", "900"], start_new_session=True, stdin=subprocess.DEVNULL)
        # Its object complains when it is collected before its process has ended.
    return value


def scratch(ticket: Ticket, kilobytes: int) -> int:
    """Write a temporary file and read it back. Raises OSError where the disk is full."""
    with _noted(ticket) as value, tempfile.TemporaryFile() as file:
        block = random.Random(ticket[2]).randbytes(1024)
        for _ in range(kilobytes):
            file.write(block)
        file.seek(0)
        if any(file.read(1024) != block for _ in range(kilobytes)):
            return -1
    return value


def flood(ticket: Ticket, kilobytes: int) -> int:
    """Write to standard output and error."""
    with _noted(ticket) as value:
        for _ in range(kilobytes):
            print("o" * 1023)
        print("e" * 1023, file=sys.stderr)
    return value


def payload(seed: int, number: int, size: int) -> bytes:
    """Bytes that anybody can make again, and that differ between tasks and within one."""
    block = random.Random(seed * 1_000_003 + number).randbytes(min(size, 65_536))
    whole = bytearray((block * (size // max(1, len(block)) + 1))[:size])
    for at in range(0, size - 8, 65_536):
        whole[at:at + 8] = at.to_bytes(8, "big")
    return bytes(whole)


def echo(ticket: Ticket, data: bytes) -> tuple[int, bytes]:
    """Take bytes, and give them back."""
    with _noted(ticket) as value:
        return value, data
    raise AssertionError


def give(ticket: Ticket, size: int) -> tuple[int, bytes]:
    """Give bytes that only this task knows, and the oracle."""
    with _noted(ticket) as value:
        return value, payload(ticket[1], ticket[2], size)
    raise AssertionError


def take(ticket: Ticket, data: bytes) -> tuple[int, int]:
    """Take bytes, and say what their checksum is."""
    with _noted(ticket) as value:
        return value, zlib.crc32(data)
    raise AssertionError
