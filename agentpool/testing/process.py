"""A worker process that is only imagined: it does what `agentpool_worker.main` does, one move at a time.

Each method is one thing that can happen to it; who calls them, and when, is a schedule's business. What it says
arrives in its `FakeChannel` in the order in which the real one writes: results through the outbox of the page, what
the control thread says past it.
"""

from __future__ import annotations

import pickle
import signal
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from agentpool.config import MB
from agentpool.testing.channel import FakeChannel
from agentpool.testing.machine import Machine
from agentpool_worker import protocol
from agentpool_worker.protocol import Frame

if TYPE_CHECKING:
    from agentpool.testing.keeper import FakeKeeper

__all__ = ["FRESH_BYTES", "FakeProcess", "How", "Torn"]

FRESH_BYTES: Final = 20 * MB


class How(IntEnum):
    """How a call, or a start, ends."""

    VALUE = 0
    #: a value that a policy may want to see again
    AGAIN = 1
    ERROR = 2
    #: a result too large for the outbox: it is half written until the next move
    LARGE = 3
    CALL_FAILED = 4
    RESULT_FAILED = 5


class Torn(IntEnum):
    """What a death interrupts."""

    NOTHING = 0
    #: the outbox was written to the pipe, and not yet marked as empty: its results are seen twice
    FLUSH = 1


class TaskError(Exception):
    """What imagined tasks raise."""


class TaskCancelled(BaseException):
    """Stands for the exception that a worker raises in a task which was asked to stop."""


def _error_payload(error: BaseException, where: str = "") -> bytes:
    return pickle.dumps((pickle.dumps(error), type(error).__qualname__, str(error), "a traceback", "", where))


_RAISED: Final = _error_payload(TaskError("raised by the task"))
_CANCELLED: Final = _error_payload(TaskCancelled("the pool asked this task to stop"))
_BROKEN_INIT: Final = _error_payload(TaskError("raised by the initializer"))
_STARVED_INIT: Final = _error_payload(MemoryError("in the initializer"))


class FakeProcess:
    """See the module. `pid` and `pidfd` as the parent knows them."""

    __slots__ = (
        "began_at", "channel", "cpu_seconds", "current", "exit_code", "half_written", "holds_pipe", "is_dead",
        "is_frozen", "is_kill_pending", "is_ready", "is_stillborn", "keeper", "machine", "pid",
        "pidfd", "rss_bytes", "runs", "setups", "stop_wanted", "tools", "worker_id",
    )

    def __init__(self, machine: Machine, worker_id: int, channel: FakeChannel, keeper: FakeKeeper | None) -> None:
        self.machine = machine
        self.worker_id = worker_id
        self.channel = channel
        self.keeper = keeper
        self.pid = machine.pid()
        machine.processes[self.pid] = self
        self.pidfd: int | None = None
        self.is_ready = False
        self.is_dead = False
        #: stopped, swapped out or in uninterruptible sleep: it makes no move
        self.is_frozen = False
        #: it never becomes ready: its initializer hangs
        self.is_stillborn = False
        #: SIGKILL is on its way
        self.is_kill_pending = False
        #: a descendant has the pipe of results too: it has no end when this process dies
        self.holds_pipe = False
        self.exit_code = 0
        self.current: Frame | None = None
        self.began_at = 0.0
        #: a result of which the pipe has only a part
        self.half_written: Frame | None = None
        self.stop_wanted = 0
        self.rss_bytes = FRESH_BYTES
        #: memory of the processes that its task started
        self.tools: list[int] = []
        self.cpu_seconds = 0.0
        #: calls that it began
        self.runs = 0
        #: kinds of agents that it has set up
        self.setups: set[bytes] = set()
        channel.process = self

    def __repr__(self) -> str:
        return f"<process {self.pid} of worker {self.worker_id}{' dead' if self.is_dead else ''}>"

    # -- the main thread -----------------------------------------------------------------------------------------

    @property
    def may_move(self) -> bool:
        """There is something for its main thread to do."""
        channel = self.channel
        return not (self.is_dead or self.is_frozen or self.is_stillborn) and bool(
            self.half_written or self.current or channel.calls or channel.held or channel.is_last_call_sent
            or channel.is_full
        )

    def move(self, how: int = How.VALUE, *, is_held: bool = False, seconds: float | None = None) -> bool:
        """The next thing that its main thread does. False: it waits.

        `is_held`: a result stays in the outbox while there are more calls. `seconds`: how long it says a call took.
        """
        if self.is_dead or self.is_frozen or self.is_stillborn:
            return False
        channel = self.channel
        if channel.is_full and self.current is None:
            channel.is_full = False
            self.machine.writable.add(channel.calls_fd)
        elif self.half_written is not None:
            frame, self.half_written = self.half_written, None
            self._write(frame)
            self.machine.witness.ended(self, frame.task_id, frame.kind, bytes(frame.payload), is_safe=True)
        elif self.current is not None:
            self._end_call(self.current, how, is_held, seconds)
        elif channel.calls:
            self._read(channel.calls.popleft())
        elif channel.held:
            self._flush()
        elif channel.is_last_call_sent:
            self.die(0)
        else:
            return False
        return True

    def _read(self, frame: Frame) -> None:
        if frame.kind == protocol.CALL:
            self._begin(frame)
        elif frame.kind == protocol.INIT:
            self.is_ready = True
            self._write(Frame(protocol.READY, 0, self.pid, self.rss_bytes // 1024, 0, 0, b"", ()))
        else:
            self._write(Frame(protocol.COLLECTED, 0, 0, self.rss_bytes // 1024, 0, 0, b"", ()))

    def fail_to_start(self, *, is_starved: bool = False) -> None:
        """Its initializer raises; `is_starved`: a MemoryError."""
        channel = self.channel
        if self.is_ready or self.is_dead or self.is_frozen or not channel.calls:
            return
        channel.calls.popleft()
        payload = _STARVED_INIT if is_starved else _BROKEN_INIT
        self._write(Frame(protocol.INIT_FAILED, 0, 0, 0, 0, 0, payload, ()))
        self.die(0)

    def _begin(self, frame: Frame) -> None:
        channel, slot = self.channel, frame.x
        # The parent's `revoke` and this are each one step here, as the barrier makes them: a revocation that comes
        # between the worker's mark and its look is `collide`.
        if slot in channel.revoked_slots:
            channel.began_slots.discard(slot)
            self._send(Frame(protocol.SKIPPED, 0, frame.task_id, slot, 0, 0, b"", ()), is_held=bool(channel.calls))
            return
        channel.began_slots.add(slot)
        self.current = frame
        self.began_at = self.machine.clock.now
        self.runs += 1
        self.machine.witness.began(self, frame.task_id)
        self._say(frame.task_id)

    def collide(self, task_id: int) -> bool:
        """The worker marks its next call as begun while the parent revokes it: both see each other, and both yield."""
        channel = self.channel
        if self.is_dead or self.is_frozen or self.current is not None or not channel.calls:
            return False
        frame = channel.calls[0]
        if frame.kind != protocol.CALL or frame.task_id != task_id or frame.x in channel.revoked_slots:
            return False
        channel.began_slots.add(frame.x)
        return True

    def _end_call(self, frame: Frame, how: int, is_held: bool, seconds: float | None) -> None:
        self.current = None
        task_id = frame.task_id
        took = self.machine.clock.now - self.began_at if seconds is None else seconds
        self.cpu_seconds += took
        self._say(task_id)
        if self.stop_wanted == task_id:
            kind, payload = protocol.ERROR, _CANCELLED
        elif how <= How.AGAIN or how == How.LARGE:
            kind, payload = protocol.VALUE, pickle.dumps((task_id, self.pid, self.runs, how == How.AGAIN))
        else:
            kind, payload = _FAILURES[How(how)], _RAISED
        if frame.buffers and (setup := bytes(frame.buffers[0])) not in self.setups:
            self.setups.add(setup)
            self._send(Frame(protocol.AGENT_SET_UP, 0, task_id, self.rss_bytes // 1024, 0, 0, b"", ()), is_held=True)
        kib = self.rss_bytes // 1024
        result = Frame(kind, 0, task_id, min(int(took * 1e6), 0xFFFFFFFF), kib, kib, payload, ())
        if how == How.LARGE and kind == protocol.VALUE:
            self._flush()
            self.half_written = result
            return
        self._send(result, is_held=is_held and bool(self.channel.calls))
        self.machine.witness.ended(self, task_id, kind, payload, is_safe=True)

    def _say(self, task_id: int) -> None:
        """The running task says something: results of calls before it go first."""
        if events := self.machine.witness.says(self, task_id):
            self._flush()
            payload = protocol.encode_events(task_id, events, 0)[protocol.HEADER.size :]
            self._write(Frame(protocol.EVENTS, 0, task_id, len(events), 0, 0, payload, ()))

    # -- what it writes ------------------------------------------------------------------------------------------

    def _send(self, frame: Frame, *, is_held: bool) -> None:
        self.channel.held.append(frame)
        if not is_held:
            self._flush()

    def _flush(self) -> None:
        channel = self.channel
        if channel.held:
            channel.results += channel.held
            channel.held.clear()
            self.machine.readable.add(channel.results_fd)

    def _write(self, frame: Frame) -> None:
        self.channel.results.append(frame)
        self.machine.readable.add(self.channel.results_fd)

    def complain(self, text: bytes) -> None:
        """Write to standard error."""
        if not self.is_dead:
            self.channel.stderr += text
            self.machine.readable.add(self.channel.stderr_fd)

    def corrupt(self) -> None:
        """Its task writes into the pipe of results."""
        if not self.is_dead:
            self.channel.is_corrupt = True
            self.machine.readable.add(self.channel.results_fd)

    # -- the control thread --------------------------------------------------------------------------------------

    def acknowledge(self) -> bool:
        """It reads the wish to stop a task, says so, and the task is interrupted. False: there is none to read."""
        channel = self.channel
        if self.is_dead or self.is_frozen or not channel.control:
            return False
        frame = channel.control.popleft()
        if frame.flags:
            channel.story = "File 'task.py', line 1 in work"
        self.stop_wanted = frame.task_id
        self._write(Frame(protocol.STOPPING, 0, frame.task_id, 0, 0, 0, b"", ()))
        return True

    # -- the end -------------------------------------------------------------------------------------------------

    def signalled(self, number: int) -> None:
        """What the kernel does with a signal. SIGKILL takes effect with `obey`, as it may take its time."""
        if self.is_dead:
            return
        if number == signal.SIGKILL:
            self.is_kill_pending = True
        elif number == signal.SIGUSR1 and not self.is_frozen:
            self.channel.story = "File 'loop.c', in a signal handler"

    def obey(self) -> bool:
        """SIGKILL takes effect. False: there is none."""
        if self.is_kill_pending and not self.is_dead:
            self.die(-9)
            return True
        return False

    def die(self, code: int, torn: int = Torn.NOTHING) -> None:
        """It is gone, with whatever it had not written; the keeper is still to say so."""
        if self.is_dead:
            return
        machine, channel = self.machine, self.channel
        self.is_dead = True
        self.exit_code = code
        if torn == Torn.FLUSH:
            channel.results += channel.held
        if code < 0 and code != -9:
            channel.story = channel.story or "Fatal Python error (imagined)"
        if self.half_written is not None:
            machine.witness.lost(self, self.half_written.task_id)
        elif self.current is not None:
            machine.witness.lost(self, self.current.task_id)
        self.half_written = self.current = None
        for frame in channel.calls:
            # Marked by `collide`, and never begun. (The real page would say that it began, to be on the safe side.)
            channel.began_slots.discard(frame.x)
        channel.calls.clear()
        if not self.holds_pipe:
            channel.is_results_ended = True
            machine.readable.add(channel.results_fd)
            machine.readable.add(channel.stderr_fd)
        elif channel.results:
            machine.readable.add(channel.results_fd)
        if channel.is_full:
            machine.writable.add(channel.calls_fd)  # a broken pipe is ready, too
        if self.pidfd is not None:
            machine.readable.add(self.pidfd)
        if self.keeper is not None:
            self.keeper.unreaped.append(self)


_FAILURES: Final = {
    How.ERROR: protocol.ERROR,
    How.CALL_FAILED: protocol.CALL_FAILED,
    How.RESULT_FAILED: protocol.RESULT_FAILED,
}
