"""One running agent program: starts it, moves its lines, and ends it with everything that it started.

Runs in a worker, on the thread that runs the task; a request to stop may be raised at any line and leaves nothing
behind. Knows nothing of what the lines mean. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from agentpool_worker.agents import descendants
from agentpool_worker.agents.failures import AgentProgramError

__all__ = ["Program"]

_CHUNK: Final = 256 * 1024
#: Waits are cut into slices, so that a request to stop is seen also where no signal interrupts the call.
_SLICE_SECONDS: Final = 0.2
#: One line of output may be this long, in bytes. Beyond it the program is out of its mind.
LONGEST_LINE: Final = 64 * 1024 * 1024
_STDERR_TAIL: Final = 4000
#: How long a killed process may take to disappear.
_KILL_SECONDS: Final = 5.0
#: After the program has ended, a descendant may hold its pipes open: so long is waited for more, in seconds.
_DRAIN_SECONDS: Final = 0.05


class Program:
    """A process that leads a session of its own, and bears a mark that all its descendants inherit.

    `send` and `close_input` write to it, `read_line` reads. `end` must be called, whatever happened.
    Raises OSError where it cannot be started.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
        self.argv = list(argv)
        self.mark = f"{os.getpid()}-{os.urandom(6).hex()}"
        self.exit_code: int | None = None
        #: when it last wrote anything
        self.heard_at = time.monotonic()
        self._since = 0
        self._out = bytearray()
        self._lines: deque[bytes] = deque()
        self._tail = bytearray()
        self._feed = bytearray()
        self._closes_input = False
        self._pidfd = -1
        self._streams: set[int] = set()
        self._poll = select.poll()
        # Two steps, so that a request to stop that arrives between fork and return still finds the process.
        self._process: subprocess.Popen[bytes] = subprocess.Popen.__new__(subprocess.Popen)
        try:
            self._process.__init__(  # type: ignore[misc]
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**env, descendants.MARK: self.mark},
                cwd=cwd,
                start_new_session=True,
                bufsize=0,
            )
            own = descendants.look_up(self._process.pid)
            self._since = own.started if own is not None else 0
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                assert stream is not None
                os.set_blocking(stream.fileno(), False)
            assert self._process.stdout is not None
            assert self._process.stderr is not None
            self._streams = {self._process.stdout.fileno(), self._process.stderr.fileno()}
            for descriptor in self._streams:
                self._poll.register(descriptor, select.POLLIN)
            self._pidfd = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else -1
            if self._pidfd >= 0:
                self._poll.register(self._pidfd, select.POLLIN)
        except BaseException:
            # With a return code it was forked and could not be started: it is over, and reaped.
            if getattr(self._process, "pid", None) is not None and self._process.returncode is None:
                self.end(0.0)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr_tail(self) -> str:
        """The last that it wrote to standard error."""
        return self._tail[-_STDERR_TAIL:].decode("utf-8", "replace").strip()

    # -- talking -------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Write to its standard input, as far as it takes it now; the rest goes while lines are read."""
        self.heard_at = time.monotonic()  # silence counts from the question
        self._feed += data
        self._write()

    def close_input(self) -> None:
        """End its standard input when all of it is written."""
        self._closes_input = True
        self._write()

    def read_line(self, seconds: float) -> bytes | None:
        """The next line of its standard output, without its end; None: nothing for so long, or no more will come.

        `exit_code` tells which. Raises AgentProgramError for a line without end.
        """
        deadline = time.monotonic() + seconds
        while not self._lines and self.exit_code is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._step(min(remaining, _SLICE_SECONDS))
        return self._lines.popleft() if self._lines else None

    def _step(self, seconds: float) -> None:
        for descriptor, _ in self._poll.poll(seconds * 1000):
            if descriptor in self._streams:
                self._read(descriptor)
            elif self._process.stdin is not None and descriptor != self._pidfd:
                self._write()
        self._look_for_end()

    def _read(self, descriptor: int) -> bool:
        """Read once. False: nothing was there, or the stream has ended."""
        try:
            chunk = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        if not chunk:
            self._streams.discard(descriptor)
            self._poll.unregister(descriptor)
            return False
        self.heard_at = time.monotonic()
        assert self._process.stderr is not None
        if descriptor == self._process.stderr.fileno():
            self._tail += chunk
            del self._tail[: -2 * _STDERR_TAIL]
            return True
        start = max(0, len(self._out) - 1)
        self._out += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(self._out).split(b"\n")
            self._lines.extend(lines)
            self._out = bytearray(rest)
        elif start > LONGEST_LINE:
            raise AgentProgramError(f"{self.argv[0]} wrote a line of more than {LONGEST_LINE // 2**20} MB")
        return True

    def _write(self) -> None:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            return
        descriptor = stdin.fileno()
        try:
            while self._feed:
                del self._feed[: os.write(descriptor, self._feed[:_CHUNK])]
        except BlockingIOError:
            self._poll.register(descriptor, select.POLLOUT)
            return
        except BrokenPipeError:  # it ended, or closed its input, without reading all of it
            self._feed.clear()
            self._closes_input = True
        with contextlib.suppress(KeyError):  # it was never full
            self._poll.unregister(descriptor)
        if self._closes_input:
            stdin.close()

    def _look_for_end(self) -> None:
        if self.exit_code is not None:
            return
        try:
            pid, status = os.waitpid(self._process.pid, os.WNOHANG)
        except ChildProcessError:
            self._process.returncode = self.exit_code = 0
            raise AgentProgramError(
                f"the exit status of {self.argv[0]} was taken by another waitpid() in this worker"
            ) from None
        if pid == 0:
            return
        # What it wrote is in the pipes; their end may never come, as a descendant may hold them open.
        if self._pidfd >= 0:
            self._poll.unregister(self._pidfd)  # it would be ready for ever
        deadline = time.monotonic() + _DRAIN_SECONDS
        while self._streams and (remaining := deadline - time.monotonic()) > 0:
            for descriptor, _ in self._poll.poll(remaining * 1000):
                if descriptor in self._streams:
                    self._read(descriptor)
                else:
                    self._poll.unregister(descriptor)  # nobody reads its standard input any more
        self._process.returncode = self.exit_code = os.waitstatus_to_exitcode(status)
        if self._out:
            self._lines.append(bytes(self._out))
            self._out.clear()

    # -- ending --------------------------------------------------------------------------------------------------

    def end(self, grace: float, spared: Sequence[int] = ()) -> None:
        """End it, if it still runs, and all that it started: end of input, SIGINT, SIGTERM, SIGKILL.

        grace: seconds for the first three together. spared: pids of this worker's other programs.
        """
        # Before the first signal: what the program's death sets free is not below it any more.
        snapshot = descendants.below(self._process.pid, descendants.processes()) if self.exit_code is None else []
        try:
            if self.exit_code is None and grace > 0:
                self._closes_input = True
                self._feed.clear()
                self._write()
                for number, share in ((None, 0.2), (signal.SIGINT, 0.4), (signal.SIGTERM, 0.4)):
                    self._signal(number)
                    if self._await_end(grace * share):
                        break
        finally:
            self._signal(signal.SIGKILL)
            self._await_end(_KILL_SECONDS)
            left = descendants.end_all(snapshot, self.mark, self._since, spared, _KILL_SECONDS)
            self._close()
        if left:
            raise AgentProgramError(f"{self.argv[0]} left processes that cannot be killed: "
                                    f"{', '.join(str(process.pid) for process in left)}")

    def sweep(self, spared: Sequence[int] = ()) -> None:
        """End what it has left to the worker, while it goes on itself: daemons of an earlier task."""
        descendants.end_all((), self.mark, self._since, [self._process.pid, *spared], _KILL_SECONDS)

    def _signal(self, number: signal.Signals | None) -> None:
        # Not waited for while `exit_code` is None: the pid is its own.
        if number is not None and self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def _await_end(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.exit_code is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self._step(min(remaining, 0.02 if self._pidfd < 0 else _SLICE_SECONDS))
        return True

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
