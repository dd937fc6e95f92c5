"""The job log, in the format of GNU parallel: one tab separated line per ended job, and what `--resume` reads from it.

Written by the main thread alone. A line is one write to a file opened for appending: whole, and there at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

__all__ = ["HEADER", "JobLog", "LogLine", "completion_key", "read_succeeded"]

HEADER: Final = "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n"
_COLUMNS: Final = 9
#: Exit value of a job that this program ended (timeout, memory limit), or whose worker was lost.
STOPPED: Final = -1


@dataclass(frozen=True, slots=True)
class LogLine:
    """One ended job. started_at: seconds since the epoch; received: bytes of standard output."""

    number: int
    started_at: float
    seconds: float
    received: int
    exit_value: int
    signal: int
    command: str

    def __str__(self) -> str:
        # GNU parallel's own replacement: the log stays one line per job.
        command = self.command.replace("\n", "\0")
        return (
            f"{self.number}\t:\t{self.started_at:.3f}\t{self.seconds:10.3f}\t0\t{self.received}"
            f"\t{self.exit_value}\t{self.signal}\t{command}\n"
        )


class JobLog:
    """Appends to a job log.

    append: keep what the file has (`--resume`, `+FILE`); else the log starts anew, as GNU parallel's does.
    Raises OSError.
    """

    def __init__(self, path: str, *, append: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if append else os.O_TRUNC)
        self._fd = os.open(path, flags, 0o666)
        end = os.fstat(self._fd).st_size
        if end == 0:
            self._append(HEADER)
        elif os.pread(self._fd, 1, end - 1) != b"\n":
            self._append("\n")  # the writer was stopped in the middle of a line

    def write(self, line: LogLine) -> None:
        self._append(str(line))

    def _append(self, text: str) -> None:
        view = memoryview(os.fsencode(text))
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        os.close(self._fd)


def completion_key(number: int, command: str) -> int:
    """What stands for one job in the set of those that succeeded: a whole number, so that millions fit."""
    return hash((number, command.replace("\n", "\0")))


def read_succeeded(path: str) -> set[int]:
    """The keys of the jobs that succeeded by this log; empty where there is none. Raises OSError.

    A job is told by its number and its command. Where it ran several times, the last time counts. Lines that are
    not whole (the writer was stopped) are passed over: the job runs again.
    """
    succeeded: set[int] = set()
    if not os.path.exists(path):
        return succeeded
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as log:
        for text in log:
            columns = text.rstrip("\n").split("\t", _COLUMNS - 1)
            if len(columns) != _COLUMNS or not text.endswith("\n") or not columns[0].isdecimal():
                continue
            key = completion_key(int(columns[0]), columns[-1])
            if columns[6] == "0" and columns[7] == "0":
                succeeded.add(key)
            else:
                succeeded.discard(key)
    return succeeded
