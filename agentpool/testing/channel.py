"""Stands for `agentpool.io.channel.Channel`: the parent's end of one worker's pipes and page, without either.

The same methods with the same meaning; `tests/contract` runs the same cases against both. Frames are passed on as they
are: how bytes are cut is the business of `FrameReader`, which has its own tests. What the cut means is here: a frame
that was not wholly written when its worker died is lost, unless the page has it too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentpool.testing.machine import Machine
from agentpool_worker.protocol import CALL, COLLECT, INIT, SLOTS, STOP, Frame, ProtocolError

if TYPE_CHECKING:
    from agentpool.testing.process import FakeProcess

__all__ = ["FakeChannel"]


class FakeChannel:
    """Both ends: the methods of `Channel` for the parent, plain attributes for a `FakeProcess`."""

    __slots__ = (
        "_next_slot", "_outgoing", "_slots", "began_slots", "calls", "calls_fd", "control", "held", "is_closed",
        "is_corrupt", "is_full", "is_handed_over", "is_last_call_sent", "is_results_ended", "machine", "process",
        "results", "results_fd", "revoked_slots", "stderr", "stderr_count", "stderr_fd", "stderr_tail", "story",
        "worker_fd",
    )

    def __init__(self, machine: Machine) -> None:
        first = machine.descriptors(9)
        self.machine = machine
        #: -1 once no more calls go to the worker
        self.calls_fd = first
        self.results_fd = first + 1
        self.stderr_fd = first + 2
        self.worker_fd = first + 4
        self.stderr_tail = b""
        self.stderr_count = 0
        machine.channels[self.worker_fd] = self
        self.process: FakeProcess | None = None
        #: in the pipe of calls: written, and not read by the worker
        self.calls: deque[Frame] = deque()
        #: in the pipe of results
        self.results: deque[Frame] = deque()
        #: in the control pipe
        self.control: deque[Frame] = deque()
        self.stderr = b""
        #: in the outbox of the page: not yet written to the pipe
        self.held: list[Frame] = []
        #: in the page, of each slot: its call began, or is revoked
        self.began_slots: set[int] = set()
        self.revoked_slots: set[int] = set()
        #: what the interpreter's fault handler wrote
        self.story = ""
        #: the pipe of calls takes nothing until the worker reads
        self.is_full = False
        self.is_last_call_sent = False
        #: all other ends of the pipe of results are closed
        self.is_results_ended = False
        #: somebody wrote into the pipe of results
        self.is_corrupt = False
        self.is_handed_over = False
        self.is_closed = False
        self._outgoing: deque[Frame] = deque()
        self._slots: dict[int, int] = {}
        self._next_slot = 0

    def worker_fds(self) -> list[int]:
        """The worker's ends."""
        return [self.worker_fd]

    def handed_over(self) -> None:
        """The worker's ends are on their way."""
        self.is_handed_over = True

    # -- calls ---------------------------------------------------------------------------------------------------

    def queue_call(self, task_id: int, payload: Any, buffers: Sequence[memoryview]) -> None:
        """Have a call sent with the next `flush`."""
        slot = self._next_slot
        self._next_slot = (slot + 1) % SLOTS
        self._slots[task_id] = slot
        self.began_slots.discard(slot)
        self.revoked_slots.discard(slot)
        self._outgoing.append(Frame(CALL, 0, task_id, slot, 0, 0, payload, buffers))

    def send_init(self, payload: bytes, buffers: Sequence[memoryview]) -> bool:
        """Send the initializer; it goes before any call."""
        return self._send(Frame(INIT, 0, 0, 0, 0, 0, payload, buffers))

    def send_collect(self) -> bool:
        """Have the worker collect its garbage."""
        return self._send(Frame(COLLECT, 0, 0, 0, 0, 0, b"", ()))

    def _send(self, frame: Frame) -> bool:
        self._outgoing.append(frame)
        return self.flush()

    # -- the arena: nothing of a simulation is large ---------------------------------------------------------------

    shared_bytes = 0

    def open(self, offset: int, number: int, length: int) -> memoryview:
        """The contents of the block that a result lies in."""
        raise ProtocolError("a simulated worker has no arena")

    def has_lent(self, number: int) -> bool:
        """Does the worker still have the block of a call?"""
        return False

    def trim(self) -> bool:
        """Have the worker give back the memory of results."""
        return True

    def keep_results(self) -> None:
        """Before a fork of the parent."""

    # -- what is written -----------------------------------------------------------------------------------------

    @property
    def _is_deserted(self) -> bool:
        """Nobody can read any more: what is written comes to nothing, and the death will be observed."""
        return self.process is not None and self.process.is_dead

    def flush(self) -> bool:
        """Write what waits, as far as there is room. True: nothing waits any more; otherwise call it again."""
        if self.calls_fd < 0 or self._is_deserted:
            self._outgoing.clear()
        elif self.is_full:
            return False
        else:
            self.calls += self._outgoing
            self._outgoing.clear()
        return True

    def end_calls(self) -> None:
        """Tell the worker that no more will come: it finishes and ends."""
        self.machine.writable.discard(self.calls_fd)
        self.calls_fd = -1
        self._outgoing.clear()
        self.is_last_call_sent = True

    def ask_to_stop(self, task_id: int, *, wants_stack: bool) -> None:
        """Ask the worker to stop a task, and to note first what its threads do."""
        if not self._is_deserted:
            self.control.append(Frame(STOP, int(wants_stack), task_id, 0, 0, 0, b"", ()))

    def take_descriptors(self, most: int) -> list[int]:
        """What the worker passed with one message: imagined ones pass none. Raises ProtocolError."""
        raise ProtocolError("descriptors were announced, and none came: there are none here")

    # -- the page ------------------------------------------------------------------------------------------------

    def began(self, task_id: int) -> bool:
        """Has the worker begun this call?"""
        return self._slots.get(task_id) in self.began_slots

    def revoke(self, task_id: int) -> bool:
        """Take a call back. True: the worker has not begun it, and will pass over it."""
        slot = self._slots.get(task_id)
        if slot is None:
            return False
        self.revoked_slots.add(slot)
        if slot in self.began_slots:
            return False
        del self._slots[task_id]
        return True

    def is_current(self, task_id: int, slot: int) -> bool:
        """Is this the slot of the task's present call?"""
        return self._slots.get(task_id) == slot

    def finished(self, task_id: int) -> None:
        """The call is over: its slot is free."""
        self._slots.pop(task_id, None)

    def unsent_results(self) -> list[Frame]:
        """Results that the worker holds and has not written; what was seen before may be among them."""
        return list(self.held)

    def report(self) -> str:
        """What the interpreter's fault handler wrote: a crash report or a stack."""
        return self.story

    # -- results -------------------------------------------------------------------------------------------------

    def read_results(self, *, is_last: bool = False) -> tuple[list[Frame], bool]:
        """The whole frames that can be had now, and whether the end of file was reached. Raises ProtocolError."""
        if self.is_corrupt:
            raise ProtocolError("more bytes came than the worker wrote: its task has written into the pipe")
        frames = list(self.results)
        self.results.clear()
        if not self.is_results_ended:
            self.machine.readable.discard(self.results_fd)
        return frames, self.is_results_ended

    def stderr_since(self, position: int) -> tuple[bytes, int]:
        """What came after so many bytes, as far as it is kept, and how many came in all."""
        count = self.stderr_count
        return self.stderr_tail[max(0, len(self.stderr_tail) - max(0, count - position)) :], count

    def keep_stderr(self, data: bytes) -> None:
        """Remember the end of it."""
        self.stderr_tail = (self.stderr_tail + data)[-4096:]
        self.stderr_count += len(data)

    def read_stderr(self) -> bytes:
        """What the worker wrote to its standard error since; the tail is kept. b"" where there is nothing."""
        data, self.stderr = self.stderr, b""
        self.keep_stderr(data)
        if not self.is_results_ended:
            self.machine.readable.discard(self.stderr_fd)
        return data

    def close(self) -> None:
        """Give back all descriptors and the page. May be called twice."""
        self.is_closed = True
        machine = self.machine
        machine.channels.pop(self.worker_fd, None)
        machine.readable.discard(self.results_fd)
        machine.readable.discard(self.stderr_fd)
        machine.writable.discard(self.calls_fd)
