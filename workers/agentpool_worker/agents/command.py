"""The stock agent "command": runs one command line and hands back what it printed and how it ended.

Runs in a worker, on the thread that runs the task. Standard library only; knows nothing of `agentpool` in the parent.
The command leads a process group of its own, so that a stop reaches all of it. What the command leaves running in its
group when it ends is stopped too: the next task of this worker must not pay for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, TypedDict

from agentpool_worker.agents.base import Agent

__all__ = ["CommandAgent", "CommandFailed", "CommandResult"]

MB: Final = 1024 * 1024
#: As a shell says it: the program was not found; it was found and could not be started.
NOT_FOUND: Final = 127
CANNOT_START: Final = 126

_CHUNK: Final = 256 * 1024
#: The wait for output is cut into slices, so that a request to stop is seen also where no signal interrupts the call.
_SLICE_SECONDS: Final = 0.2
#: Without a pidfd the exit is polled.
_POLL_SECONDS: Final = 0.02
#: How long a group may take to disappear after SIGKILL (a process in an uninterruptible call takes its time).
_KILL_SECONDS: Final = 5.0
_STDERR_TAIL: Final = 400


class CommandResult(TypedDict):
    """What `CommandAgent.run` returns.

    argv: what was started. exit_code: the exit code; negative: the signal that ended it; 127 and 126: it could not be
    started, as a shell reports it, and `stderr` says why. signal: number of that signal, or 0.
    stdout, stderr: what was captured, empty where it stands in `stdout_file`, `stderr_file`.
    stdout_bytes: how much the command wrote, what was dropped included.
    started_at: seconds since the epoch; seconds: how long it ran.
    """

    argv: list[str]
    exit_code: int
    signal: int
    stdout: bytes
    stderr: bytes
    stdout_file: str | None
    stderr_file: str | None
    stdout_bytes: int
    started_at: float
    seconds: float


class CommandFailed(Exception):
    """The command ended with another exit code than 0, and `check=True` was given. `result` has the `CommandResult`."""

    def __init__(self, message: str, result: CommandResult) -> None:
        super().__init__(message, result)
        self.result = result

    def __str__(self) -> str:
        return str(self.args[0])


class CommandAgent(Agent):
    """Runs a command line. Not idempotent: a command may have had effects before its worker was lost."""

    name: ClassVar[str] = "command"
    idempotent: ClassVar[bool] = False

    def run(
        self,
        prompt: str = "",
        *,
        argv: Sequence[str] | None = None,
        shell: bool = False,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        output_limit_mb: float | None = 64.0,
        output_path: str | None = None,
        check: bool = False,
        stop_grace: float = 1.0,
    ) -> CommandResult:
        """Runs one command and waits until it has ended.

        prompt: the command line, split as a shell splits it but never given to one, unless `shell` is set: then
            `/bin/sh -c` runs it. Where `argv` is given, that is started, and the prompt is only a label.
        stdin: text for its standard input; None: /dev/null.
        env: variables in addition to those of the worker. cwd: its working directory.
        output_limit_mb: how much of each stream is kept, in MB; the rest is read, counted and dropped, and a note in
            the stream says so; None: no bound.
        output_path: stream into `PATH.out` and `PATH.err` (made when there is something to write) rather than into
            memory: what a command printed before it was killed can be read there.
        check: raise CommandFailed where the exit code is not 0.
        stop_grace: seconds between SIGTERM and SIGKILL when the task is asked to stop.

        Raises CommandFailed, ValueError (no command), OSError (an output file cannot be written).
        """
        given = self._argv(prompt, argv, shell)
        limit = None if output_limit_mb is None else int(output_limit_mb * MB)
        captures = [_Capture(limit, output_path and output_path + suffix) for suffix in (".out", ".err")]
        started_at, began = time.time(), time.monotonic()
        code = _execute(given, _encoded(stdin), env, cwd, captures, stop_grace)
        out, err = captures
        result = CommandResult(
            argv=given,
            exit_code=code,
            signal=max(0, -code),
            stdout=out.kept(),
            stderr=err.kept(),
            stdout_file=out.file,
            stderr_file=err.file,
            stdout_bytes=out.total,
            started_at=started_at,
            seconds=time.monotonic() - began,
        )
        if check and code != 0:
            raise CommandFailed(_failure_text(result, err.tail()), result)
        return result

    @staticmethod
    def _argv(prompt: str, argv: Sequence[str] | None, shell: bool) -> list[str]:
        if argv is not None:
            if isinstance(argv, (str, bytes)):
                raise TypeError("argv must be a sequence of strings, not one string; use prompt for a command line")
            if shell:
                raise ValueError("argv is never passed through a shell; give the command line as prompt, or no shell")
            given = [os.fspath(word) for word in argv]
        else:
            given = ["/bin/sh", "-c", prompt] if shell else shlex.split(prompt)
        if not given or (not prompt.strip() and argv is None):
            raise ValueError("no command was given: prompt or argv must name one")
        return given


def _encoded(stdin: str | bytes | None) -> bytes | None:
    return stdin.encode("utf-8", "surrogateescape") if isinstance(stdin, str) else stdin


def _failure_text(result: CommandResult, tail: bytes) -> str:
    number = result["signal"]
    how = f"was ended by {_signal_name(number)}" if number else f"exited with {result['exit_code']}"
    text = f"{shlex.join(result['argv'])} {how}"
    said = tail.decode("utf-8", "replace").strip()
    return f"{text}; its standard error ends: {said}" if said else text


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has a number only
        return f"signal {number}"


class _Capture:
    """Keeps one stream up to a bound, in memory or in a file, and counts all of it."""

    def __init__(self, limit: int | None, path: str | None) -> None:
        self.total = 0
        self.file: str | None = None
        self._limit = limit
        self._path = path
        self._memory = bytearray()
        self._fd = -1
        if path is not None:
            # An earlier attempt may have left its output under this name, and this one may print nothing.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def write(self, chunk: bytes) -> None:
        room = len(chunk) if self._limit is None else max(0, self._limit - self.total)
        self.total += len(chunk)
        if room:
            self._store(chunk[:room])

    def _store(self, chunk: bytes) -> None:
        if self._path is None:
            self._memory += chunk
            return
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o600)
            self.file = self._path
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        """Ends the stream with a note where something was dropped."""
        try:
            if self._limit is not None and self.total > self._limit:
                dropped = self.total - self._limit
                self._store(b"\n[agentpool: output limit reached; %d more bytes were dropped]\n" % dropped)
        finally:
            if self._fd >= 0:
                # Kept readable for `tail`: only the last bytes are needed, by position.
                self._memory += os.pread(self._fd, _STDERR_TAIL, max(0, os.fstat(self._fd).st_size - _STDERR_TAIL))
                os.close(self._fd)
                self._fd = -1

    def kept(self) -> bytes:
        return b"" if self.file else bytes(self._memory)

    def tail(self) -> bytes:
        return bytes(self._memory[-_STDERR_TAIL:])


def _execute(
    argv: list[str],
    stdin: bytes | None,
    env: Mapping[str, str] | None,
    cwd: str | os.PathLike[str] | None,
    captures: list[_Capture],
    stop_grace: float,
) -> int:
    """Runs `argv` to its end; its exit code. Whatever is raised here, nothing of its group is left running."""
    # Two steps, so that a request to stop that arrives between fork and return still finds the process.
    process: subprocess.Popen[bytes] = subprocess.Popen.__new__(subprocess.Popen)
    try:
        try:
            process.__init__(  # type: ignore[misc]
                argv,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=None if env is None else {**os.environ, **env},
                cwd=cwd,
                process_group=0,
                bufsize=0,
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in an argument
            from agentpool_worker.agents.starting import why_not_started

            said = f"agentpool: {why_not_started(argv, cwd, error)}\n"
            captures[1].write(said.encode("utf-8", "backslashreplace"))
            return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_START
        return _pump(process, stdin, captures)
    finally:
        _leave_nothing(process, captures, stop_grace)
        for capture in captures:
            capture.close()


def _pump(process: subprocess.Popen[bytes], stdin: bytes | None, captures: list[_Capture]) -> int:
    """Moves data until the command itself has ended; a descendant that holds its pipes open is not waited for."""
    assert process.stdout is not None
    assert process.stderr is not None
    sources = {process.stdout.fileno(): captures[0], process.stderr.fileno(): captures[1]}
    poller = select.poll()
    for fd in sources:
        os.set_blocking(fd, False)
        poller.register(fd, select.POLLIN)
    feed = memoryview(stdin or b"")
    if process.stdin is not None:
        os.set_blocking(process.stdin.fileno(), False)
        poller.register(process.stdin.fileno(), select.POLLOUT)
    pidfd = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else -1
    try:
        if pidfd >= 0:
            poller.register(pidfd, select.POLLIN)
        code: int | None = None
        while code is None:
            for fd, _ in poller.poll((_SLICE_SECONDS if pidfd >= 0 else _POLL_SECONDS) * 1000):
                if fd in sources:
                    if not _read_some(fd, sources[fd]):
                        poller.unregister(fd)
                elif fd != pidfd:
                    feed = _write_some(process, poller, feed)
            code = _reaped(process)
        _drain(process, captures)
        return code
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _drain(process: subprocess.Popen[bytes], captures: list[_Capture]) -> None:
    """Reads what the pipes hold now. Their end may never come, and a descendant may go on writing."""
    for stream, capture in zip((process.stdout, process.stderr), captures, strict=False):
        if stream is None or stream.closed:
            continue
        waiting = int.from_bytes(fcntl.ioctl(stream, termios.FIONREAD, bytes(4)), sys.byteorder)
        while waiting > 0:
            chunk = os.read(stream.fileno(), waiting)
            capture.write(chunk)
            waiting -= len(chunk) or waiting


def _read_some(fd: int, capture: _Capture) -> bool:
    """Reads once; False: the stream has ended."""
    try:
        chunk = os.read(fd, _CHUNK)
    except BlockingIOError:
        return True
    capture.write(chunk)
    return bool(chunk)


def _write_some(process: subprocess.Popen[bytes], poller: select.poll, feed: memoryview) -> memoryview:
    assert process.stdin is not None
    fd = process.stdin.fileno()
    try:
        feed = feed[os.write(fd, feed[:_CHUNK]) :]
    except BlockingIOError:
        return feed
    except BrokenPipeError:  # a command may end, or close its input, without reading all of it
        feed = feed[len(feed) :]
    if not feed:
        poller.unregister(fd)
        process.stdin.close()
    return feed


def _reaped(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code once the command has ended, as `Popen.returncode` has it; None while it runs.

    `Popen.wait` reports 0 where another thread of the process has taken the exit status; here that is an error.
    """
    try:
        pid, status = os.waitpid(process.pid, os.WNOHANG)
    except ChildProcessError:
        process.returncode = 0  # so that Popen does not try again
        raise RuntimeError(
            f"the exit status of process {process.pid} was taken by another waitpid() in this worker"
        ) from None
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode


def _leave_nothing(process: subprocess.Popen[bytes], captures: list[_Capture], grace: float) -> None:
    """Stops what is left of the command's group (SIGTERM, `grace` seconds, SIGKILL), reaps it, closes its pipes.

    What it says to that is still captured.
    """
    pid = getattr(process, "pid", None)  # unset: it was never forked
    if pid is None:
        return
    try:
        if not _stop_group(process, captures, signal.SIGTERM, grace):
            _stop_group(process, captures, signal.SIGKILL, _KILL_SECONDS)
    except BaseException:
        _stop_group(process, [], signal.SIGKILL, _KILL_SECONDS)  # asked to stop again, or the disk is full: no grace
        raise
    finally:
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _stop_group(
    process: subprocess.Popen[bytes], captures: list[_Capture], number: signal.Signals, seconds: float
) -> bool:
    """Sends a signal to the group, and waits up to `seconds` until no member is left; whether none is."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    sent = False
    while True:
        _reap_group(process)
        try:
            os.killpg(process.pid, 0 if sent else number)
        except (ProcessLookupError, PermissionError):  # not permitted: the members left are another user's
            _drain(process, captures)
            return True
        _drain(process, captures)
        sent = True
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(0.05, pause * 2)


def _reap_group(process: subprocess.Popen[bytes]) -> None:
    """Reaps ended members that are children of this process; a worker adopts the orphans among its descendants."""
    try:
        while True:
            pid, status = os.waitpid(-process.pid, os.WNOHANG)
            if pid == 0:
                return
            if pid == process.pid:
                process.returncode = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        if process.returncode is None:
            process.returncode = 0  # someone else took it: Popen must not wait for it again
