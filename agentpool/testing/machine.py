"""One imaginary computer: its descriptors, processes and memory, and who waits for what.

Everything that the fakes of this package share. It decides nothing and knows no pool: a schedule moves its processes,
a pool's manager acts on them through the fakes of `agentpool.io`. Single-threaded.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from agentpool.config import MB
from agentpool.testing.clock import VirtualClock

if TYPE_CHECKING:
    from agentpool.testing.channel import FakeChannel
    from agentpool.testing.keeper import FakeKeeper
    from agentpool.testing.process import FakeProcess

__all__ = ["Machine", "Witness"]

TOTAL_BYTES: Final = 10_000 * MB


class Witness(Protocol):
    """Who is told what really happens in the workers: the oracle."""

    def began(self, process: FakeProcess, task_id: int) -> None:
        """The worker begins to run a task."""

    def ended(self, process: FakeProcess, task_id: int, kind: int, payload: bytes, *, is_safe: bool) -> None:
        """The task ended. `is_safe`: what came of it is where no death of the worker can lose it."""

    def lost(self, process: FakeProcess, task_id: int) -> None:
        """The worker died and took the task, or its unsent result, with it."""

    def says(self, process: FakeProcess, task_id: int) -> list[bytes]:
        """What the task says now, as it begins or before it ends."""


class _Nobody:
    def began(self, process: FakeProcess, task_id: int) -> None:
        """Nobody looks."""

    def ended(self, process: FakeProcess, task_id: int, kind: int, payload: bytes, *, is_safe: bool) -> None:
        """Nobody looks."""

    def lost(self, process: FakeProcess, task_id: int) -> None:
        """Nobody looks."""

    def says(self, process: FakeProcess, task_id: int) -> list[bytes]:
        """Nobody would listen."""
        return []


class Machine:
    """See the module. Descriptors and process ids are numbers that nothing else has."""

    __slots__ = (
        "_next_descriptor", "_next_pid", "available_bytes", "channels", "clock", "cpu_percent", "has_pidfds",
        "is_exhausted", "keepers", "order", "passing", "pidfds", "pressure_percent", "processes", "readable",
        "total_bytes", "witness", "writable",
    )

    def __init__(self, clock: VirtualClock | None = None, witness: Witness | None = None) -> None:
        self.clock = clock or VirtualClock()
        self.witness: Witness = witness or _Nobody()
        #: descriptors with something to read, and with room to write
        self.readable: set[int] = set()
        self.writable: set[int] = set()
        #: by the first of the descriptors that the worker's end has
        self.channels: dict[int, FakeChannel] = {}
        self.keepers: list[FakeKeeper] = []
        self.processes: dict[int, FakeProcess] = {}
        self.pidfds: dict[int, FakeProcess] = {}
        self.has_pidfds = True
        #: no descriptor and no process can be had
        self.is_exhausted = False
        self.total_bytes = TOTAL_BYTES
        self.available_bytes = TOTAL_BYTES // 2
        self.cpu_percent = 5.0
        self.pressure_percent: float | None = None
        #: called by a reactor that waits, with the seconds it would wait: the rest of the world goes on meanwhile
        self.passing: Callable[[float | None], None] | None = None
        #: in which order, and how many, of what is ready a reactor returns; see `FakeReactor.wait`
        self.order = 0
        self._next_descriptor = 100
        self._next_pid = 1000

    def descriptors(self, count: int) -> int:
        """The first of so many new descriptors. Raises OSError where there are none."""
        if self.is_exhausted:
            raise OSError(errno.EMFILE, "Too many open files (imagined)")
        first = self._next_descriptor
        self._next_descriptor += count
        return first

    def pid(self) -> int:
        """A process id that was never used."""
        self._next_pid += 1
        return self._next_pid

    def release(self) -> None:
        """Forget everybody, and have them forget each other."""
        for process in self.processes.values():
            process.channel.process = process.keeper = None
        self.witness = _Nobody()
        self.processes.clear()
        self.channels.clear()
        self.pidfds.clear()
        self.keepers.clear()

    def living(self) -> list[FakeProcess]:
        """The workers that run, oldest first."""
        return [process for process in self.processes.values() if not process.is_dead]

    def signal(self, pidfd: int | None, pid: int, number: int) -> None:
        """As `agentpool.io.processes.send`."""
        process = self.pidfds.get(pidfd) if pidfd is not None else self.processes.get(pid)
        if process is not None:
            process.signalled(number)

    def has_ended(self, pidfd: int) -> bool:
        """As `agentpool.io.processes.has_ended`."""
        return self.pidfds[pidfd].is_dead

    def close(self, descriptor: int) -> None:
        """As `os.close`. What was never open, or is closed already, is a mistake of the caller's."""
        if self.pidfds.pop(descriptor, None) is None:
            raise OSError(errno.EBADF, f"descriptor {descriptor} is not open (imagined)")
        self.readable.discard(descriptor)
