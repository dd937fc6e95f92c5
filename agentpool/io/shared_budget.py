"""Where the pools of one user meet: a directory with a file of slots, and for each pool a record and a bell.

    slots          byte N is slot N: who has a lock on it holds the slot
    <id>.json      what that pool says of itself; it keeps a lock on it as long as it lives
    <id>.bell      a FIFO that the others write a byte to when something changed

Locks are asked for and looked at, never waited for: who waits is told by its bell, or by the pidfds of those who hold
something. Why so: docs/decisions/0050; what kind of locks: `records`.

Knows nothing of core, and decides nothing. Only the manager thread of the pool that owns it may call it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable
from typing import Any, Final

from agentpool.errors import SettingsError
from agentpool.io.records import LOCKS_EXIST, UNLOCKED, Record, is_locked, lock, read_record
from agentpool.io.rundir import private_directory

__all__ = ["Others", "SharedBudget"]

_RECORD: Final = ".json"
_BELL: Final = ".bell"


class Others:
    """What a look showed: the other pools' records by id, and the slots that they hold."""

    __slots__ = ("records", "taken")

    def __init__(self, records: dict[str, dict[str, Any]], taken: frozenset[int]) -> None:
        self.records = records
        self.taken = taken


class SharedBudget:
    """This pool's place in the directory. Nothing is made before `join`. Raises OSError where the directory fails."""

    def __init__(self, directory: str) -> None:
        if not LOCKS_EXIST:
            raise SettingsError("scope='host' needs the file locks of Linux (OFD), which this system does not have")
        self._directory = private_directory(directory)
        self.id = ""
        #: becomes readable when something changed; None: not joined
        self.bell: int | None = None
        self._slots = -1
        self._record: Record | None = None

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    # -- taking part ---------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Be seen by the others, with an empty record. Harmless where that is so already."""
        if self.bell is not None:
            return
        private_directory(self._directory)
        self.id = f"{os.getpid()}-{time.monotonic_ns()}"
        try:
            self._slots = os.open(self._path("slots"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.mkfifo(self._path(self.id + _BELL), 0o600)
            # For reading and writing: there is no end of file when the others have closed theirs.
            self.bell = os.open(self._path(self.id + _BELL), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._record = Record(self._path(self.id + _RECORD), {})
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Give back everything. May be called again, and at any time."""
        if self._record is not None:
            self._record.unlink()
        if self.id:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(self.id + _BELL))
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptors and touch nothing: also in a forked copy of the process, where the locks go on."""
        for descriptor in (self._slots, -1 if self.bell is None else self.bell):
            if descriptor >= 0:
                os.close(descriptor)
        if self._record is not None:
            self._record.close()
        self._slots, self._record = -1, None
        self.bell = None
        self.id = ""

    # -- telling -------------------------------------------------------------------------------------------------

    def publish(self, record: dict[str, Any]) -> None:
        """Say this of the pool."""
        assert self._record is not None
        self._record.write(record)

    def ring(self) -> None:
        """Tell all others that something changed."""
        for name in os.listdir(self._directory):
            if not name.endswith(_BELL) or name == self.id + _BELL:
                continue
            try:
                bell = os.open(self._path(name), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:  # nobody hears it: that pool has ended, or is just beginning
                continue
            try:
                os.write(bell, b"!")
            except (BlockingIOError, BrokenPipeError):  # it was told often enough, or is gone
                pass
            finally:
                os.close(bell)

    def answer_bell(self) -> None:
        """Take what was rung."""
        if self.bell is not None:
            with contextlib.suppress(BlockingIOError):
                while len(os.read(self.bell, 4096)) == 4096:
                    pass

    # -- looking -------------------------------------------------------------------------------------------------

    def look(self, slots: int) -> Others:
        """The others that live, and which of the first so many slots they hold. Removes what dead ones left.

        Raises FileNotFoundError where somebody removed this pool's files, so that the others see it no more.
        """
        if not os.fstat(self._slots).st_nlink or self._record is None or self._record.is_removed:
            raise FileNotFoundError(errno.ENOENT, "the files of the budget were removed", self._directory)
        taken = frozenset(slot for slot in range(slots) if is_locked(self._slots, slot))
        return Others(self.look_on(), taken)

    def look_on(self) -> dict[str, dict[str, Any]]:
        """The records of the pools that live, without taking part oneself."""
        records = {}
        for name in os.listdir(self._directory):
            stem, dot, kind = name.rpartition(".")
            if dot + kind == _RECORD and stem != self.id and (record := self._read(stem)) is not None:
                records[stem] = record
        return records

    def _read(self, member: str) -> dict[str, Any] | None:
        """What that pool says of itself; None: it has ended."""
        record = read_record(self._path(member + _RECORD))
        if record is None:
            self._remove(member)
        return record

    def _remove(self, member: str) -> None:
        for kind in (_BELL, _RECORD):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(member + kind))

    def lives(self, member: str) -> bool:
        """Does that pool still exist?"""
        return self._read(member) is not None

    # -- slots ---------------------------------------------------------------------------------------------------

    def take(self, slots: Iterable[int]) -> tuple[int, ...]:
        """Take these slots; returns those that were got."""
        got = []
        for slot in slots:
            try:
                lock(self._slots, slot)
            except (BlockingIOError, PermissionError):
                continue
            got.append(slot)
        return tuple(got)

    def give(self, slots: Iterable[int]) -> None:
        """Give these slots back."""
        for slot in slots:
            lock(self._slots, slot, UNLOCKED)
