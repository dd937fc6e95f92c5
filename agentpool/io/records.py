"""A file in which a process says something of itself to others, with a lock on it as long as the process lives.

The lock is one of an open file description (OFD): the kernel releases it with the last descriptor, whatever ended the
process, and descriptors are close-on-exec, so that no child keeps one. So whoever finds a record without its lock has
found that of a dead process; one of a process that is busy or stopped can be read all the same. Knows nothing of what
is said. Any thread, one at a time for each record.

`agentpool_worker/hook.py` reads such files too, without this module.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from contextlib import suppress
from typing import Any, Final

__all__ = ["LOCKS_EXIST", "UNLOCKED", "Record", "is_locked", "lock", "read_record"]

#: Linux has them, others have not.
LOCKS_EXIST: Final = hasattr(fcntl, "F_OFD_SETLK")
UNLOCKED: Final = fcntl.F_UNLCK
#: struct flock of Linux on 64 bit: type, whence, start, length, pid
_FLOCK: Final = "hhqqi4x"
#: A record is written with one call into one page.
RECORD_BYTES: Final = 4096
#: Readings of a record that was being written at that moment.
_READINGS: Final = 100


def _flock(descriptor: int, command: int, kind: int, at: int) -> int:
    """Ask for a lock on one byte, or whether it is free; the lock's type as the kernel left it."""
    answer = fcntl.fcntl(descriptor, command, struct.pack(_FLOCK, kind, os.SEEK_SET, at, 1, 0))
    return int(struct.unpack(_FLOCK, answer)[0])


def lock(descriptor: int, at: int, kind: int = fcntl.F_WRLCK) -> None:
    """Lock that byte, or with UNLOCKED release it. Raises BlockingIOError or PermissionError: somebody else has it."""
    _flock(descriptor, fcntl.F_OFD_SETLK, kind, at)


def is_locked(descriptor: int, at: int) -> bool:
    """Does somebody else hold the byte? Disturbs nobody, as a trial to lock it would."""
    return _flock(descriptor, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, at) != UNLOCKED


class Record:
    """This process's record at `path`, where it is seen with its content and its lock or not at all. Raises OSError."""

    def __init__(self, path: str, content: dict[str, Any]) -> None:
        self._path = path
        folder, name = os.path.split(path)
        hidden = os.path.join(folder, f".{name}.new")
        self._descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            lock(self._descriptor, 0)
            self.write(content)
            os.rename(hidden, path)
        except BaseException:
            os.close(self._descriptor)
            os.unlink(hidden)
            raise

    @property
    def is_removed(self) -> bool:
        """Somebody deleted the file."""
        return not os.fstat(self._descriptor).st_nlink

    def write(self, content: dict[str, Any]) -> None:
        """Say this instead. Raises ValueError where it is longer than a page."""
        text = json.dumps(content, separators=(",", ":")).encode()
        line = b"%08x %s" % (zlib.crc32(text), text)
        if len(line) > RECORD_BYTES:
            raise ValueError(f"a record of {len(line)} bytes is longer than {RECORD_BYTES}")
        os.pwrite(self._descriptor, line.ljust(RECORD_BYTES, b"\n"), 0)

    def unlink(self) -> None:
        """Delete the file, where nobody else did."""
        with suppress(FileNotFoundError):
            os.unlink(self._path)

    def close(self) -> None:
        """Close the descriptor, and with it the lock; in a forked copy of the process the parent's goes on."""
        os.close(self._descriptor)


def read_record(path: str) -> dict[str, Any] | None:
    """What a process says of itself there, {} where it makes no sense. None: the process has ended, or is none.

    Raises OSError where the file is there and cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return _parse(descriptor) if is_locked(descriptor, 0) else None
    finally:
        os.close(descriptor)


def _parse(descriptor: int) -> dict[str, Any]:
    for _ in range(_READINGS):
        checksum, _, text = os.pread(descriptor, RECORD_BYTES, 0).rstrip(b"\n").partition(b" ")
        if checksum == b"%08x" % zlib.crc32(text):
            found = json.loads(text)
            return found if isinstance(found, dict) else {}
    return {}  # no process of ours wrote that
