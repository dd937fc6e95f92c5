"""Stands for `agentpool.io.processes.KeeperClient`: forks imagined workers when a schedule lets it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from agentpool.testing.channel import FakeChannel
from agentpool.testing.machine import Machine
from agentpool.testing.process import FakeProcess

__all__ = ["FakeKeeper"]

#: As in `agentpool.io.processes`.
Message = tuple[str, int, "int | str", "int | None"]


class FakeKeeper:
    """The parent's view, with the methods of `KeeperClient`, and the keeper itself: `fork`, `reap`, `die`."""

    def __init__(
        self, machine: Machine, setup: Mapping[str, object], environment: Mapping[str, str], cwd: str | None
    ) -> None:
        self.machine = machine
        self._fileno = machine.descriptors(1)
        self.pid = machine.pid()
        self.setup = dict(setup)
        #: workers asked for and not forked
        self.requests: deque[tuple[int, FakeChannel]] = deque()
        #: dead workers of which it has not told
        self.unreaped: deque[FakeProcess] = deque()
        self.is_dead = False
        self.is_kill_pending = False
        #: it does not read, fork or reap
        self.is_frozen = False
        #: its socket takes no message for now
        self.is_full = False
        self.is_stopped = False
        self.exit_code: int | None = None
        self._waiting: deque[tuple[int, FakeChannel]] = deque()
        self._said: deque[Message] = deque()
        machine.keepers.append(self)

    # -- what the parent calls -----------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._fileno

    def spawn(self, worker_id: int, descriptors: Sequence[int]) -> bool:
        """Have a worker forked. False: the message waits for room, and `flush` must be called."""
        self._waiting.append((worker_id, self.machine.channels[descriptors[0]]))
        return self.flush()

    def set_up(self, setup: Mapping[str, object]) -> bool:
        """Replace what workers are told of their surroundings."""
        self.setup = dict(setup)
        return self.flush()

    def flush(self) -> bool:
        """Send what waits. True: nothing waits any more."""
        if self.is_full and not self.is_dead:
            return False
        if not self.is_dead:  # otherwise it comes to nothing, and the end of file will tell
            self.requests += self._waiting
        self._waiting.clear()
        return True

    def messages(self) -> Iterator[Message]:
        """What the keeper has to say. Raises EOFError when it is gone."""
        while self._said:
            yield self._said.popleft()
        if self.is_dead:
            raise EOFError
        self.machine.readable.discard(self._fileno)

    def stop(self) -> None:
        """End the keeper and everything below it, and wait until it is gone."""
        self.is_stopped = True
        self.die(0)
        self.machine.readable.discard(self._fileno)

    def kill(self) -> None:
        """SIGKILL it."""
        self.is_kill_pending = True

    def kill_orphans(self) -> int:
        """Nothing outlives an imagined keeper."""
        return 0

    def abandon(self) -> None:
        """In a forked copy of the parent."""

    # -- what it does --------------------------------------------------------------------------------------------

    def _say(self, what: str, worker_id: int, detail: int | str, pidfd: int | None = None) -> None:
        self._said.append((what, worker_id, detail, pidfd))
        self.machine.readable.add(self._fileno)

    def make_room(self) -> None:
        """It reads, so that its socket takes messages again."""
        if self.is_full:
            self.is_full = False
            self.machine.writable.add(self._fileno)

    def fork(self, *, fails: bool = False) -> bool:
        """Fork the next worker. False: it cannot, or there is none to fork."""
        if self.is_dead or self.is_frozen or not self.requests:
            return False
        worker_id, channel = self.requests.popleft()
        machine = self.machine
        if fails:
            channel.is_results_ended = True
            machine.readable.add(channel.results_fd)
            self._say("failed", worker_id, "fork failed: [Errno 11] (imagined)")
            return True
        process = FakeProcess(machine, worker_id, channel, self)
        if machine.has_pidfds:
            process.pidfd = machine.descriptors(1) if not machine.is_exhausted else None
            if process.pidfd is not None:
                machine.pidfds[process.pidfd] = process
        self._say("spawned", worker_id, process.pid, process.pidfd)
        return True

    def reap(self) -> bool:
        """Tell of the next dead worker. False: it cannot, or there is none."""
        if self.is_dead or self.is_frozen or not self.unreaped:
            return False
        process = self.unreaped.popleft()
        self._say("exited", process.worker_id, process.exit_code)
        return True

    def die(self, code: int = -9) -> None:
        """It is gone, and the kernel kills its workers."""
        if self.is_dead:
            return
        self.is_dead = True
        self.exit_code = code
        self.requests.clear()
        machine = self.machine
        machine.readable.add(self._fileno)
        machine.writable.add(self._fileno)
        for process in machine.living():
            if process.keeper is self:
                process.die(-9)
